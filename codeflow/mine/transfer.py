"""git over a network that fails and from servers that lie: one hardened call, watched, tried again.

Every call runs without prompts, hooks, the user's or the system's configuration, and only over the
protocols it is given. Credentials come from the environment alone (SSH agent, `~/.netrc`, a
`GIT_ASKPASS` of the user's) and never reach a message. The trade-off is that what is worth trying
again is read from git's messages: git's exit code is 128 for a typo and for a power cut alike.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

from codeflow.errors import RepositoryError

_POLL_SECONDS = 0.2
_KEPT_VARIABLES = ("GIT_ASKPASS", "GIT_EXEC_PATH", "GIT_SSL_CAINFO", "GIT_SSL_CAPATH")
_OPTIONS = (
    *("-c", "http.lowSpeedLimit=1000", "-c", "http.lowSpeedTime=60"),
    *("-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false"),
    *("-c", "transfer.fsckObjects=false", "-c", "gc.auto=0", "-c", "maintenance.auto=false"),
)
#: What no second attempt will change. Asked first: git adds a general line about the network.
_REFUSED = re.compile(
    r"not found|not allowed|not supported|does not exist|does not appear to be|denied|forbidden"
    r"|authentication failed|could not read (?:username|password)|prompts disabled"
    r"|host key verification failed|returned error: 4(?!08|29)\d\d|certificate",
    re.IGNORECASE,
)
_NETWORK = re.compile(
    r"returned error: (?:5\d\d|408|429)|timed? ?out|too slow|connection (?:reset|refused|closed)"
    r"|could(?:n't| not) resolve|name resolution|early eof|hung up|unexpected disconnect"
    r"|failed to connect|could(?:n't| not) connect|unreachable|empty reply|(?:recv|send) failure"
    r"|rpc failed|http/2 stream|ssl_error_syscall|tls connection was non-properly terminated"
    r"|transfer closed|broken pipe|bad band|protocol error",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"'[^'\n]*'")
_USER_INFO = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s'\"]*@", re.IGNORECASE)
_PASSWORD = re.compile(r"(?:https?://[^/\s]*@|[a-z][a-z0-9+.-]*://[^/\s]*:[^/\s]*@)", re.IGNORECASE)


@dataclass(frozen=True)
class Limits:
    """What one transfer may cost.

    Attributes:
        seconds: All attempts and the pauses between them.
        attempts: Starts granted while the network fails.
        max_mib: Size of the repository on disk.
        pauses: Seconds before the second attempt, the third, …; the last one repeats.
    """

    seconds: float
    attempts: int = 4
    max_mib: int = 4096
    pauses: Sequence[float] = (2.0, 10.0, 30.0)


class GitFailed(RepositoryError):
    """git ended with an error; `retry` says whether another attempt may fare better."""

    def __init__(self, message: str, retry: bool) -> None:
        super().__init__("clone_failed", message)
        self.retry = retry


class Transfer:
    """The calls that make up one clone or update; they share the limits.

    Args:
        folder: What is watched while git runs; its size counts.
        protocols: Allowed protocols, separated by colons, as in `GIT_ALLOW_PROTOCOL`.
    """

    def __init__(self, folder: Path, protocols: str, limits: Limits) -> None:
        self.folder = folder
        self.limits = limits
        self._deadline = monotonic() + limits.seconds
        self._env = _environment(protocols)

    def run(self, *arguments: str) -> str:
        """Run git, again while the network fails; its standard output.

        Raises:
            GitFailed: With git's own words, credentials left out.
            RepositoryError: `clone_timeout` or `too_large`; git and its helpers are dead by then.
        """
        for attempt in range(1, self.limits.attempts + 1):
            try:
                return self._once(arguments)
            except GitFailed as e:
                pauses = self.limits.pauses
                pause = pauses[min(attempt, len(pauses)) - 1] if pauses else 0.0
                out_of_time = monotonic() + pause >= self._deadline
                if not e.retry or attempt == self.limits.attempts or out_of_time:
                    if attempt == 1:
                        raise
                    raise GitFailed(f"{e} (attempt {attempt})", e.retry) from e
                sleep(pause)
        raise AssertionError("at least one attempt is granted")

    def check_size(self) -> None:
        """Raise `too_large` when the folder is over the limit."""
        if folder_bytes(self.folder) > self.limits.max_mib << 20:
            raise RepositoryError(
                "too_large",
                f"the repository is larger than {self.limits.max_mib} MiB (run.clone_max_mib)",
            )

    def _once(self, arguments: Sequence[str]) -> str:
        try:
            process = subprocess.Popen(
                ["git", *_OPTIONS, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=self._env,
                cwd="/",  # a repository around the working folder has no say
            )
        except FileNotFoundError as e:
            raise RepositoryError("clone_failed", "clone failed: no `git` command on PATH") from e
        try:
            output, errors = self._watch(process)
        except BaseException:
            _kill_tree(process.pid)
            process.communicate()
            raise
        if process.returncode != 0:
            said = redacted(errors.decode(errors="replace")).strip()
            command = next(a for a in arguments if not a.startswith("-"))
            raise GitFailed(f"{command} failed: {_essence(said)}", is_network_error(said))
        return output.decode(errors="replace")

    def _watch(self, process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
        while True:
            left = self._deadline - monotonic()
            if left <= 0:
                raise RepositoryError(
                    "clone_timeout",
                    f"clone took longer than {self.limits.seconds:g} s (run.clone_seconds)",
                )
            try:
                output = process.communicate(timeout=min(left, _POLL_SECONDS))
            except subprocess.TimeoutExpired:
                self.check_size()
                continue
            self.check_size()
            return output


def is_network_error(said: str) -> bool:
    """Do git's messages (LC_ALL=C) speak of the network, and not of a refusal?"""
    said = _QUOTED.sub("", said)  # names of repositories and hosts say nothing
    return _NETWORK.search(said) is not None and _REFUSED.search(said) is None


def redacted(text: str) -> str:
    """`text` without what stands before the `@` of a URL."""
    return _USER_INFO.sub(r"\1", text)


def holds_password(location: str) -> bool:
    """Would storing this URL store a credential?"""
    return _PASSWORD.match(location) is not None


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder that may be changing under our feet."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:  # renamed or deleted since it was listed
                continue
    return total


def _environment(protocols: str) -> dict[str, str]:
    """The user's environment but for git's own variables, which could point it anywhere."""
    env = {k: v for k, v in os.environ.items() if k[:4] != "GIT_" or k in _KEPT_VARIABLES}
    env.setdefault("GIT_ASKPASS", "true")
    return env | {
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_SSH_COMMAND": "ssh -oBatchMode=yes -oConnectTimeout=30",
        "GIT_ALLOW_PROTOCOL": protocols,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_NO_REPLACE_OBJECTS": "1",
        "LC_ALL": "C",
    }


def _essence(said: str) -> str:
    lines = said.splitlines()
    told = [line for line in lines if line.startswith(("fatal:", "error:"))] or lines
    return (told or ["no message"])[0]


def _kill_tree(pid: int) -> None:
    """Kill a process and all it started, git's network helpers above all: they outlive git.

    Not by process group: git stays in its worker's, so that whoever kills the worker ends the
    clone too. Where there is no /proc, helpers end by themselves after `http.lowSpeedTime`.
    """
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:  # ended in the meantime
        pass
    for child in children:
        _kill_tree(int(child))
