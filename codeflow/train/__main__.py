"""`python -m codeflow.train`: train where neither click nor git is installed, or under torchrun."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from codeflow.errors import CodeflowError, UsageError
from codeflow.train.config import SIZES
from codeflow.train.estimate import H200_BYTES, estimate, render
from codeflow.train.progress import TrainResult
from codeflow.train.resolve import resolve
from codeflow.train.signals import Stopped
from codeflow.train.trainer import run

_EXAMPLES = """examples:
  python -m codeflow.train --shards data/ --out run/ --steps 300
  python -m codeflow.train --recipe stages.toml --out run/ --dry-run
  python -m codeflow.train --recipe stages.toml --out run/
  python -m codeflow.train --recipe stages.toml --out run/ --resume
  torchrun --nproc-per-node 2 -m codeflow.train --shards data/ --out run/ --size 1.2b

stages.toml is your copy of pipelines/train-stages.toml, with your own data in its `shards` lines.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = vars(_parser().parse_args(arguments))
    try:
        text = execute(**options)
    except CodeflowError as e:
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            print(f"error: {e}", file=sys.stderr)
        elif not isinstance(e, Stopped):  # which all processes are at the same step
            print(f"error on rank {rank}: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print("interrupted; continue with --resume", file=sys.stderr)
        return 130
    if text:
        print(text)
    return 0


def execute(
    *,
    shards: str | None,
    out: str | None,
    steps: int | None,
    size: str | None,
    config: str | None,
    overrides: Sequence[str],
    resume: bool,
    dry_run: bool,
    gpu_memory: float,
    world_size: int,
    as_json: bool,
) -> str:
    """Train, or with `dry_run` only say what training comes to.

    Returns:
        What to print on standard output; empty in processes that are not the first.

    Raises:
        CodeflowError: Anything that stops a run on purpose.
    """
    said: dict[str, Any] = {
        "steps": steps,
        "size": size,
        "config": config,
        "overrides": overrides,
    }
    if dry_run:
        plan = resolve(shards, **said, world_size=world_size)
        result = estimate(plan, gpu_memory=round(gpu_memory * 1e9), world_size=world_size)
        return json.dumps(dataclasses.asdict(result)) if as_json else render(result)
    if out is None:
        raise UsageError("--out: name the folder of the run, or add --dry-run")
    trained = run(shards, out, **said, resume=resume)
    if os.environ.get("RANK", "0") != "0":
        return ""
    return json.dumps(dataclasses.asdict(trained)) if as_json else summary(trained)


def summary(result: TrainResult) -> str:
    """The result for a person, one line."""
    cropped = f", {result.tokens_cropped:,} cropped" if result.tokens_cropped else ""
    skipped = f", {result.skipped:,} without an update" if result.skipped else ""
    heldout = f", held out {result.heldout_loss:.3f}" if result.heldout_loss is not None else ""
    if result.steps < 20:  # means of the first and the last 10 steps would overlap
        first, last, what = result.first_loss, result.last_loss, "first and last step"
    else:
        first, last = result.first_losses_mean, result.last_losses_mean
        what = "means of 10 steps"
    return (
        f"{result.steps:,} steps{skipped}, {result.tokens:,} tokens{cropped}, "
        f"{result.seconds:.1f} s; loss {first:.3f} -> {last:.3f} ({what}){heldout}; "
        f"{result.checkpoint}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m codeflow.train",
        description="Train a LoopCoder on packed shards.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shards", help="dataset folder, shards or manifest.json; of stages that name none"
    )
    parser.add_argument("--out", help="folder for metrics.jsonl and checkpoints/")
    parser.add_argument("--steps", type=int, help="length of a run without stages")
    parser.add_argument("--size", help=f"named model size: {', '.join(SIZES)} (default: tiny)")
    parser.add_argument(
        "--recipe",
        "--config",
        dest="config",
        metavar="FILE",
        help="TOML file with [model], [train] and [[stage]]",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="SECTION.KEY=VALUE",
        help="one setting; of a stage: stage.NAME.key=value",
    )
    parser.add_argument("--resume", action="store_true", help="from the newest checkpoint of --out")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what the run comes to, and whether it fits a GPU; needs none",
    )
    parser.add_argument(
        "--gpu-memory",
        type=float,
        default=H200_BYTES / 1e9,
        metavar="GB",
        help="of each GPU, for --dry-run (default: %(default)g, an H200)",
    )
    parser.add_argument(
        "--world-size", type=int, default=1, metavar="N", help="GPUs, for --dry-run (default: 1)"
    )
    parser.add_argument(
        "--json", action="store_true", dest="as_json", help="print the result as JSON"
    )
    return parser


def _leave(code: int) -> None:
    """End one process of several at once.

    All is written and the group is left, but threads of gloo can abort an interpreter that takes
    itself down (about once in fifty runs), and torchrun would call a finished run a failed one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    exit_code = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _leave(exit_code)
    sys.exit(exit_code)
