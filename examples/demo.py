"""`make demo`: the whole of codeflow on real history, in a few minutes and without a network.

Input: this checkout's own git history, and a small multi-language repository that is built on the
spot. Every step is a command you can type yourself; each is printed before it runs.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from codeflow.errors import RepositoryError  # noqa: E402 - needs the path set above
from codeflow.mine.refs import find_git_dir, pinned_head  # noqa: E402
from examples.make_sample_repository import build  # noqa: E402

WORK = Path("build/demo")
STEPS = 200


def main() -> int:
    started = time.monotonic()
    shutil.rmtree(ROOT / WORK, ignore_errors=True)
    (ROOT / WORK).mkdir(parents=True)
    sources = [WORK / "sample.git"]
    build(ROOT / sources[0])
    if own_history_is_usable():
        sources.append(Path())
    (ROOT / WORK / "list.txt").write_text("".join(f"./{s}\n" for s in sources))

    data, run = WORK / "data", WORK / "run"
    recipe = "pipelines/quickstart.toml"
    # Rows of 2,048 tokens keep 200 training steps on two cores at about a minute.
    short = ("--set", "pack.length=2048")
    codeflow("build", "--repos", WORK / "list.txt", "--out", data, "--recipe", recipe, *short)
    codeflow("verify", data)
    result = json.loads(
        codeflow("train", "--shards", data, "--out", run, "--steps", STEPS, "--json", capture=True)
    )

    print("\nSummary")
    codeflow("show", data, echo=False)
    print(f"  model         {result['parameters']:,} parameters, LoopCoder on the CPU")
    print(
        f"  training      {result['steps']} steps, {result['tokens']:,} tokens: "
        f"loss {result['first_losses_mean']:.2f} in the first ten, "
        f"{result['last_losses_mean']:.2f} in the last ten"
    )
    print(f"  run           {run}/metrics.jsonl, {run}/checkpoints/")
    print(f"  took          {time.monotonic() - started:.0f} s")
    print("\nA document as the model sees it:  .venv/bin/codeflow show build/demo/data row:0")
    print("Now your own repositories:")
    print("  echo pallets/flask > list.txt        # or a path, a URL, a git bundle; one a line")
    print("  .venv/bin/codeflow build --repos list.txt --out data/")
    return 0


def own_history_is_usable() -> bool:
    """Is this folder a full clone? If not, say in one sentence what happens instead."""
    try:
        pinned_head(find_git_dir(ROOT))
        return True
    except RepositoryError as e:
        print(
            f"This folder cannot be mined itself ({e}); the demo goes on with the sample "
            "repository alone. Your own repositories: write their paths or URLs into list.txt "
            "and run `.venv/bin/codeflow build --repos list.txt --out data/`.\n"
        )
        return False


def codeflow(*arguments: object, capture: bool = False, echo: bool = True) -> str:
    """Run a codeflow command in the project's folder, after printing it; stop where it fails."""
    words = [str(a) for a in arguments]
    if echo:
        print(f"\n$ codeflow {shlex.join(words)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "codeflow", *words],
        cwd=ROOT,
        text=True,
        check=False,
        stdout=subprocess.PIPE if capture else None,
    )
    if done.returncode not in (0, 3):  # 3: some repository failed and was reported; go on
        sys.exit(done.returncode)
    return done.stdout or ""


if __name__ == "__main__":
    sys.exit(main())
