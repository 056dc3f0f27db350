"""`python -m codeflow.train`: train where neither click nor git is installed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from codeflow.errors import CodeflowError
from codeflow.train.config import SIZES
from codeflow.train.trainer import TrainResult, run


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        result = run(
            options.shards,
            options.out,
            steps=options.steps,
            size=options.size,
            config=options.config,
            overrides=options.set,
            resume=options.resume,
        )
    except CodeflowError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print("interrupted; continue with --resume", file=sys.stderr)
        return 130
    print(json.dumps(dataclasses.asdict(result)) if options.json else summary(result))
    return 0


def summary(result: TrainResult) -> str:
    """The result for a person, one line."""
    cropped = f", {result.tokens_cropped:,} cropped" if result.tokens_cropped else ""
    return (
        f"{result.steps:,} steps, {result.tokens:,} tokens{cropped}, {result.seconds:.1f} s; "
        f"loss {result.first_losses_mean:.3f} -> {result.last_losses_mean:.3f} "
        f"(means of 10 steps); {result.checkpoint}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m codeflow.train", description="Train a LoopCoder on packed shards."
    )
    parser.add_argument("--shards", required=True, help="dataset folder, shards or manifest.json")
    parser.add_argument("--out", required=True, help="folder for metrics.jsonl and checkpoints/")
    parser.add_argument("--steps", type=int, help="optimizer updates")
    parser.add_argument("--size", choices=sorted(SIZES), help="named model size (default: tiny)")
    parser.add_argument("--config", help="TOML file with [model] and [train]")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="one setting"
    )
    parser.add_argument("--resume", action="store_true", help="from the newest checkpoint of --out")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
