"""Units as tasks of a Ray cluster, for when one machine is not enough.

Ray starts workers, places units on nodes and notices when a node dies. All else stays as it is on
one machine: a task hands its unit to the supervised child of `isolate`, so time limit, memory limit
and native crash are judged by the same code as under `local`, and a unit's data goes through the
dataset folder, which every node must see, never through Ray's object store. The price is seconds
of start-up and half a gigabyte of Ray's own processes, so that on one machine `local` is faster.

Only tasks are used, with Ray's retries off: Ray repeats a task that ran out of memory without end
by default, and cannot tell a unit that crashes from a node that is switched off.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from codeflow import __version__
from codeflow.errors import CodeflowError
from codeflow.exec.isolate import Child
from codeflow.exec.types import Limits, Outcome, Status, Unit

_OBJECT_STORE = 80 << 20  # bytes, near Ray's minimum: only outcomes pass, a few hundred bytes each
_LOST_WORKERS = 10  # a unit that takes its worker with it each time must not run forever
_GLANCE = 1.0  # seconds between two looks at the nodes
#: Environment of workers. By default one that is told to end kills its child first, which then
#: cannot end what it started itself (a `git clone`); left alone, the child does both.
_WORKER = {"RAY_kill_child_processes_on_worker_exit": "0"}
#: Environment of a cluster that is started here, to be set before Ray is imported.
_PRIVATE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # despite its name: listen on loopback only
    "RAY_USAGE_STATS_ENABLED": "0",  # or Ray reports the use of the cluster to its makers
}

# -- on a node ------------------------------------------------------------------------------------

_idle: list[Child] = []  # of this Ray worker process, at most one: it serves one task at a time


def _run_unit(unit: Unit, limits: Limits, version: str) -> Outcome:
    """The Ray task: run one unit in this worker's child, start one where there is none."""
    if version != __version__:
        raise CodeflowError(f"{socket.gethostname()} has codeflow {__version__}, not {version}")
    child = _idle.pop() if _idle else Child(limits)
    try:
        if child.limits != limits:  # of another executor of the same driver
            child.close()
            child = Child(limits)
        child.start(unit)
        outcome = _await(child)
    except BaseException:
        child.close()
        raise
    if outcome.status in ("done", "failed", "disk_full"):
        _idle.append(child)
    else:
        child.close()
    return outcome


def _await(child: Child) -> Outcome:
    with selectors.DefaultSelector() as selector:
        selector.register(child, selectors.EVENT_READ)
        while (left := child.deadline - time.monotonic()) > 0:
            if selector.select(left):
                outcome = child.poll()
                if outcome is not None:
                    return outcome
    return child.time_out()


# -- in the driver --------------------------------------------------------------------------------


@dataclass
class _Job:
    """A unit and how often it was started: `attempts` ended by its own doing, `lost` not."""

    unit: Unit
    attempts: int = 0
    lost: int = 0


class RayExecutor:
    """Keeps a cluster busy with two units a slot, heaviest first; counts attempts itself.

    A slot is one CPU and `limits.memory` bytes of a node. Of its two units one runs and one is
    next, which hides the way there and back; more would cost the driver 7 KB each for nothing.

    A unit whose own process dies is tried `limits.attempts` times, as under `local`. A unit whose
    node or Ray worker is lost is submitted again and that is no attempt; but a unit that lost ten
    workers while their nodes lived on is held to be the cause, and ends.

    Args:
        address: `host:port` or `auto` (the cluster of this machine); None: the one that
            RAY_ADDRESS names, else one of this machine alone that ends with this executor. A
            driver that is connected already stays so, whatever the address.
        limits: Granted to each unit, enforced on the node.
        cpus: Units at work at a time when a cluster is started here; another one is used whole.
        patience: Seconds to wait for a usable node before giving up.

    Raises:
        CodeflowError: Ray is not installed, or the cluster cannot be reached.
    """

    def __init__(
        self, address: str | None, limits: Limits, cpus: int = 1, patience: float = 600.0
    ) -> None:
        self.limits = limits
        self.patience = patience
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        if address == "local":
            for name, value in _PRIVATE.items():
                os.environ.setdefault(name, value)
        self._ray = _import_ray()
        self._connected_here = not self._ray.is_initialized()
        if self._connected_here:
            _connect(self._ray, address, limits, cpus)
        self._task = self._ray.remote(_run_unit).options(
            num_cpus=1,
            memory=limits.memory,
            max_retries=0,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": _WORKER},
        )
        self._in_flight: dict[Any, _Job] = {}  # by the reference to the task's result

    def run(self, units: Iterable[Unit]) -> Iterator[Outcome]:
        """Run all units; yield each outcome as it becomes known, in no fixed order.

        Raises:
            CodeflowError: No node was usable for `patience` seconds, or one has another codeflow.
        """
        waiting = deque(_Job(u) for u in sorted(units, key=lambda u: (-u.weight, u.id)))
        slots = _Slots(self._ray, self.limits, self.patience)
        try:
            while waiting or self._in_flight:
                # At least one, or a cluster that grows by demand would see none.
                window = max(1, 2 * slots.count())
                while waiting and len(self._in_flight) < window:
                    job = waiting.popleft()
                    self._in_flight[self._task.remote(job.unit, self.limits, __version__)] = job
                ended, _ = self._ray.wait(list(self._in_flight), num_returns=1, timeout=_GLANCE)
                for result in ended:
                    job = self._in_flight.pop(result)
                    outcome = self._judge(job, result)
                    if outcome is not None:
                        yield outcome
                    elif job.lost:
                        waiting.append(job)  # last, so that a shortage of memory can pass
                    else:
                        waiting.appendleft(job)
        finally:
            self._abandon()

    def close(self) -> None:
        """Abandon units at work, and leave the cluster if this executor joined it.

        In a cluster that the caller joined, idle children live as long as Ray keeps their workers.
        """
        self._abandon()
        if self._connected_here and self._ray.is_initialized():
            self._ray.shutdown()

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _judge(self, job: _Job, result: Any) -> Outcome | None:
        """How the unit ended; None when it has to run again."""
        errors = self._ray.exceptions
        try:
            outcome: Outcome = self._ray.get(result)
        except errors.RayTaskError as e:  # raised by `_run_unit` itself, so it would be again
            raise CodeflowError(
                f"a Ray worker cannot run units: {e.cause}\n"
                "Every node needs the same versions of Python, Ray and codeflow as the driver."
            ) from e
        except errors.NodeDiedError:
            return None
        except errors.RayError as e:
            job.lost += 1
            if job.lost < _LOST_WORKERS:
                return None
            status: Status = "oom" if isinstance(e, errors.OutOfMemoryError) else "crash"
            why = str(e).strip().partition("\n")[0]
            reason = f"{job.lost} Ray workers were lost under it, the last one by: {why}"
            return Outcome(job.unit.id, status, reason, attempts=job.attempts + job.lost)
        job.attempts += 1
        if outcome.status == "crash" and job.attempts < self.limits.attempts:
            return None
        return dataclasses.replace(outcome, attempts=job.attempts)

    def _abandon(self) -> None:
        if self._ray.is_initialized():
            for result in self._in_flight:
                self._ray.cancel(result, force=True)  # ends the worker, and so its child
        self._in_flight.clear()


class _Slots:
    """Units the cluster can run at a time, looked up at most once a second."""

    def __init__(self, ray: Any, limits: Limits, patience: float) -> None:
        self._ray = ray
        self._memory = limits.memory
        self._patience = patience
        self._count = 0
        self._looked = float("-inf")
        self._usable = time.monotonic()

    def count(self) -> int:
        """Slots of all living nodes.

        Raises:
            CodeflowError: There has been none for longer than `patience`.
        """
        now = time.monotonic()
        if now - self._looked < _GLANCE:
            return self._count
        self._looked = now
        alive = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        self._count = sum(
            int(min(r.get("CPU", 0), r.get("memory", 0) // self._memory)) for r in alive
        )
        if self._count:
            self._usable = now
        elif now - self._usable > self._patience:
            raise CodeflowError(
                f"no node of the Ray cluster could run a unit for {self._patience / 60:g} minutes: "
                f"{len(alive)} alive, none with 1 CPU and {self._memory >> 20} MiB "
                "(run.unit_memory_mib). Start larger or more nodes and run the same command again; "
                "finished units are kept"
            )
        return self._count


def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ModuleNotFoundError as e:
        raise CodeflowError(
            f"the Ray executor needs {e.name}: pip install 'codeflow[ray]', "
            "or use --executor local on one machine"
        ) from e
    return ray


def _connect(ray: Any, address: str, limits: Limits, cpus: int) -> None:
    options: dict[str, Any] = {}
    if address == "local":
        options = {
            "num_cpus": cpus,
            # Declared, not taken: on one machine a limit is a limit, as under `local`.
            "_memory": cpus * limits.memory,
            "object_store_memory": _OBJECT_STORE,
            "include_dashboard": False,
        }
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if port.isdecimal():  # Ray itself needs minutes to find out that nobody is there
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as e:
        raise CodeflowError(
            f"cannot join the Ray cluster at `{address}`: {e}\nIs it up, with the same versions of "
            "Python and Ray, and does this machine hold its token (RAY_AUTH_TOKEN_PATH)?"
        ) from e
