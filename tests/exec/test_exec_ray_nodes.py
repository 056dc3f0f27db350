"""A cluster of several nodes: what is left when one of them, or the driver, is gone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from exec_ray import (
    HANGS,
    OBJECT_STORE,
    driver,
    kill_9,
    needs_ray,
    private_environment,
    starts,
)
from processes import all_gone, descendants, wait_for

from codeflow.exec import Limits, Outcome, Unit
from codeflow.exec.ray import RayExecutor

pytestmark = needs_ray

LIMITS = Limits(seconds=60, memory=1 << 30, attempts=1)
QUICK_TO_NOTICE = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 2,
}


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head that runs nothing, as clusters should have it, and two nodes of one CPU."""
    with private_environment(tmp_path_factory.getbasetemp()):
        from ray.cluster_utils import Cluster

        node = {"object_store_memory": OBJECT_STORE, "memory": 4 << 30, "include_dashboard": False}
        head = node | {"num_cpus": 0, "_system_config": QUICK_TO_NOTICE}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield cluster, [cluster.add_node(num_cpus=1, **node) for _ in range(2)]
        finally:
            cluster.shutdown()


def processes_of(node: Any) -> set[int]:
    (raylet,) = node.all_processes["raylet"]
    return descendants(raylet.process.pid)


def test_a_node_dies_while_it_holds_a_unit(cluster: Any, tmp_path: Path) -> None:
    cluster, nodes = cluster
    path = tmp_path / "starts"
    units = [Unit(f"u{n}", "exec_units:square", {"n": n}) for n in range(12)]
    units.append(Unit("slow", "exec_ray:first_start_hangs", {"starts": str(path)}, weight=9))

    def run() -> list[Outcome]:
        with RayExecutor(cluster.address, LIMITS) as executor:
            return list(executor.run(units))

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run)
        assert wait_for(lambda: len(starts(path)) == 1, seconds=60)
        (child, _), *_ = starts(path)
        (holder,) = [node for node in nodes if child in processes_of(node)]
        family = processes_of(holder)
        cluster.remove_node(holder, allow_graceful=False)
        outcomes = future.result(timeout=90)
    found = {o.unit_id: o for o in outcomes}
    assert len(outcomes) == len(found) == 13
    assert {o.status for o in outcomes} == {"done"}
    assert found["slow"].result == {"starts": 2}
    assert found["slow"].attempts == 1
    assert [found[f"u{n}"].result["square"] for n in range(12)] == [n * n for n in range(12)]
    assert all_gone(family)


def test_kill_9_of_a_driver_ends_its_units_on_all_nodes(cluster: Any, tmp_path: Path) -> None:
    cluster, nodes = cluster
    flags = [tmp_path / "a", tmp_path / "b"]
    with driver([sys.executable, "-c", HANGS, cluster.address, *map(str, flags)]) as process:
        assert wait_for(lambda: all(f.exists() and f.read_text() for f in flags), seconds=60)
        sleepers = {int(flag.read_text()) for flag in flags}
        assert [len(sleepers & processes_of(node)) for node in nodes] == [1, 1]  # spread
        kill_9(process)
        assert all_gone(sleepers)
