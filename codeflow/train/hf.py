"""Models in the format of the Hugging Face hub, in and out.

    python -m codeflow.train.hf export CHECKPOINT OUT [--target vllm] [--tokenizer tokenizer.json]
    python -m codeflow.train.hf import FOLDER OUT [--loops 2] [--fold]

`import` turns a dense Llama or a LoopCoder into a folder to train from; `export` a checkpoint into
one that transformers and vLLM load.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from codeflow.errors import CodeflowError, UsageError
from codeflow.settings import build, to_mapping
from codeflow.train.arguments import conversion
from codeflow.train.config import ModelConfig
from codeflow.train.hf_config import read_hf_config, to_hf
from codeflow.train.hf_export import export
from codeflow.train.hf_weights import load_model, load_weights
from codeflow.train.inference import weights_folder
from codeflow.train.initialise import initialise_from
from codeflow.train.model import LoopCoder

__all__ = ["export", "initialise_from", "load_model", "load_weights", "read_hf_config", "to_hf"]

_LOADED_BY = {
    "transformers": "AutoModelForCausalLM.from_pretrained('{out}', trust_remote_code=True)",
    "vllm": "vllm serve {out} --trust-remote-code",
    "llama": "AutoModelForCausalLM.from_pretrained('{out}')",
}
_TRAINED_BY = "codeflow train --shards DATA --out RUN --set train.initialise_from={out}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return execute(conversion().parse_args(arguments))


def execute(options: argparse.Namespace) -> int:
    """Do what was typed; returns the exit code."""
    try:
        if options.command == "export":
            out, then = _export(options), _LOADED_BY[options.target]
        else:
            out, then = _import(options), _TRAINED_BY
    except CodeflowError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    print(f"{out}\n{_described(out)}\nnext: {then.format(out=out)}")
    return 0


def _described(folder: Path) -> str:
    """Its files and their size, for a person."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    size = sum(file.stat().st_size for file in files)
    return f"{size / 1e6:,.1f} MB in {', '.join(file.name for file in files)}"


def _export(options: argparse.Namespace) -> Path:
    checkpoint = weights_folder(Path(options.checkpoint))
    return export(
        checkpoint,
        options.out,
        target=options.target,
        shard_bytes=options.shard_bytes,
        dtype=getattr(torch, options.dtype),
        tokenizer=options.tokenizer or _own_tokenizer(checkpoint),
    )


def _own_tokenizer(checkpoint: Path) -> Path | None:
    file = checkpoint / "tokenizer.json"
    return file if file.is_file() else None


def _import(options: argparse.Namespace) -> Path:
    source = read_hf_config(options.folder)
    given = {
        "loop_num": options.loops,
        "loop_window_size": options.window,
        "vocab_size": options.vocab_size,
    }
    if options.fold:
        if options.loops < 2 or source.num_hidden_layers % options.loops:
            raise UsageError(
                f"--fold: {source.num_hidden_layers} layers do not fold into {options.loops} "
                "loops; --loops must be a divisor of them above 1"
            )
        given["num_hidden_layers"] = source.num_hidden_layers // options.loops
    changes = {name: value for name, value in given.items() if value is not None}
    config = build(ModelConfig, to_mapping(source) | changes, "import")
    with torch.device("meta"):  # all weights come from the source
        model = LoopCoder(config)
    model.to_empty(device="cpu")
    initialise_from(model, options.folder, fold=options.fold)
    return export(model, options.out)


if __name__ == "__main__":
    sys.exit(main())
