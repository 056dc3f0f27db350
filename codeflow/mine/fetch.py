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

from codeflow.dataset import clones_folder
from codeflow.errors import RepositoryError
from codeflow.mine.history import read_mainline
from codeflow.mine.objects import Objects
from codeflow.mine.refs import GitDir, find_git_dir, pinned_head
from codeflow.recipe import Recipe
from codeflow.work import Counts, Work


def run(work: Work, recipe: Recipe) -> Counts:
    """Leave in the unit's facts: `git_dir` (`clones/…` for clones), `head`, `root`,
    `mainline_commits`.
    """
    if work.facts["kind"] == "path":
        work.facts["git_dir"] = work.facts["location"]
    else:
        work.facts["git_dir"] = f"clones/{work.unit}.git"
    git = repository(work, recipe)
    work.facts["head"] = pinned_head(git)
    chain = read_mainline(Objects(git.objects, recipe.mine.max_blob_bytes), work.facts["head"])
    work.facts |= {"root": chain[0].id, "mainline_commits": len(chain)}
    return {}


def repository(work: Work, recipe: Recipe) -> GitDir:
    """The git directory of a unit's repository, cloned where this machine does not have it yet.

    Nodes that share no disk each keep clones of their own.
    """
    if work.facts["kind"] == "path":
        return find_git_dir(Path(work.facts["git_dir"]))
    folder = clones_folder(work.root) / Path(work.facts["git_dir"]).name
    if not folder.exists():
        protocols = "https:ssh" if work.facts["kind"] == "url" else "file"
        seconds = recipe.run.clone_seconds
        clone(work.facts["location"], folder, protocols=protocols, seconds=seconds)
    return find_git_dir(folder)


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
            _kill_tree(process.pid)
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


def _kill_tree(pid: int) -> None:
    """Kill a process and all it started, git's network helpers above all: they outlive git.

    Not by process group: git stays in its worker's, so that whoever kills the worker ends the
    clone too. Where there is no /proc, helpers end by themselves after `http.lowSpeedTime`.
    """
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    os.kill(pid, signal.SIGKILL)
    for child in children:
        _kill_tree(int(child))
