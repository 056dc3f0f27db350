"""Unit `fetch`: bring a source onto this machine and pin its head.

Remote repositories are cloned bare, one branch, without hooks, configuration, prompts or protocols
other than https and ssh. Local ones are read where they are and never written to.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

from codeflow.errors import RepositoryError
from codeflow.mine.refs import find_git_dir, pinned_head
from codeflow.recipe import Recipe
from codeflow.work import Counts, Work


def run(work: Work, recipe: Recipe) -> Counts:
    """Leave `git_dir` (relative to the dataset for clones) and `head` in the unit's facts."""
    kind, location = work.facts["kind"], work.facts["location"]
    if kind == "path":
        git = find_git_dir(Path(location))
        work.facts["git_dir"] = location
    else:
        relative = f"clones/{work.unit}.git"
        target = work.root / relative
        if not target.exists():
            protocols = "https:ssh" if kind == "url" else "file"
            clone(location, target, protocols=protocols, seconds=recipe.run.clone_seconds)
        git = find_git_dir(target)
        work.facts["git_dir"] = relative
    work.facts["head"] = pinned_head(git)
    return {}


def clone(location: str, target: Path, *, protocols: str, seconds: float) -> None:
    """Clone into `target` atomically: a killed clone leaves only a temporary folder.

    Files over 1 MiB stay behind where the server can filter: they are never part of a document.

    Raises:
        RepositoryError: `clone_failed` with git's own last line, or `clone_timeout`.
    """
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    options = ["-c", "http.lowSpeedLimit=1000", "-c", "http.lowSpeedTime=60"]
    options += ["-c", "core.hooksPath=/dev/null", "-c", "transfer.fsckObjects=false"]
    command = ["git", *options, "clone", "--quiet", "--bare", "--single-branch", "--template="]
    if protocols != "file":
        command.append("--filter=blob:limit=1m")
    env = os.environ | {
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ASKPASS": "true",
        "GIT_SSH_COMMAND": "ssh -oBatchMode=yes -oConnectTimeout=30",
        "GIT_ALLOW_PROTOCOL": protocols,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "LC_ALL": "C",
    }
    try:
        process = subprocess.Popen(
            [*command, "--", location, str(temporary)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=env,
        )
        try:
            _, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as e:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            raise RepositoryError(
                "clone_timeout", f"clone took longer than {seconds:g} s (run.clone_seconds)"
            ) from e
        if process.returncode != 0:
            lines = errors.decode(errors="replace").strip().splitlines()
            said = [line for line in lines if line.startswith(("fatal:", "error:"))] or lines
            raise RepositoryError("clone_failed", "clone failed: " + (said or ["no message"])[0])
        os.replace(temporary, target)
    except FileNotFoundError as e:
        raise RepositoryError("clone_failed", "clone failed: no `git` command on PATH") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
