"""Held-out loss of a small model on shards of real repositories, as a figure.

Builds shards of the given repositories, holds rows out, trains the tiny LoopCoder on the others and
draws the loss on held-out rows by the role of a segment. Rows are held out, not repositories: the
model has seen other changes of the same projects. It shows that the parts work together and that
the loss falls steadily, not how good a model becomes.

    python bench/heldout.py [--steps 800] [--figure docs/heldout-loss.svg] flask.git click.git …
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROLES = ("patch", "intent", "context", "repo")
RECIPE = Path(__file__).resolve().parent.parent / "pipelines/quickstart.toml"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("repositories", nargs="*", help="local repositories")
    parser.add_argument("--run", type=Path, help="draw a finished run instead of training")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--figure", type=Path, default=Path("docs/heldout-loss.svg"))
    options = parser.parse_args()
    if bool(options.repositories) == bool(options.run):
        parser.error("name local repositories, or a finished run with --run")
    if options.run:
        return draw(options.run, options.figure)
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder), options)
        return draw(Path(folder) / "run", options.figure)


def train(folder: Path, options: argparse.Namespace) -> None:
    listing = folder / "list.txt"
    listing.write_text("".join(f"{Path(r).resolve()}\n" for r in options.repositories))
    length = f"pack.length={options.length}"
    codeflow(
        "build", "--repos", listing, "--out", folder / "data", "--recipe", RECIPE, "--set", length
    )
    settings = ("train.holdout=0.06", "train.evaluate_every=50", "train.evaluate_rows=24")
    said = [word for setting in settings for word in ("--set", setting)]
    codeflow(
        "train",
        "--shards",
        folder / "data",
        "--out",
        folder / "run",
        "--steps",
        options.steps,
        *said,
    )


def codeflow(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "codeflow", *map(str, arguments)], check=True)


def draw(run: Path, figure: Path) -> int:
    """Write the figure; returns 1 when the last loss on patches is not the lowest."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    scored = [line for line in lines if "eval/loss" in line]
    matplotlib.rcParams["svg.hashsalt"] = "codeflow"  # the same bytes for the same numbers
    _, axes = plt.subplots(figsize=(7, 4))
    axes.plot(
        [line["step"] for line in trained],
        [line["loss"] for line in trained],
        color="0.8",
        label="a training row, all roles",
    )
    for role in ROLES:
        axes.plot(
            [line["step"] for line in scored],
            [line[f"eval/role/{role}"] for line in scored],
            marker=".",
            linewidth=2.5 if role == "patch" else 1.2,
            label=f"held out, {role}",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    plt.savefig(figure, bbox_inches="tight", metadata={"Date": None})
    patches = [line["eval/role/patch"] for line in scored]
    for line in scored:
        roles = "  ".join(f"{role} {line[f'eval/role/{role}']:.3f}" for role in ROLES)
        print(f"step {line['step']:>5}  {roles}  bits/byte {line['eval/bits_per_byte']:.3f}")
    rises = sum(b > a for a, b in itertools.pairwise(patches))
    print(f"{figure}: loss on patches {patches[0]:.3f} -> {patches[-1]:.3f}, rose {rises} times")
    return 0 if patches[-1] == min(patches) else 1


if __name__ == "__main__":
    sys.exit(main())
