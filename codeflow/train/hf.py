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
from typing import get_args

import torch

from codeflow.errors import CodeflowError, UsageError
from codeflow.settings import build, to_mapping
from codeflow.train.config import ModelConfig
from codeflow.train.hf_config import read_hf_config, to_hf
from codeflow.train.hf_export import SHARD_BYTES, Target, export
from codeflow.train.hf_weights import load_model, load_weights
from codeflow.train.initialise import initialise_from
from codeflow.train.model import LoopCoder

__all__ = ["export", "initialise_from", "load_model", "load_weights", "read_hf_config", "to_hf"]


def main(arguments: list[str] | None = None, prog: str = "python -m codeflow.train.hf") -> int:
    """Run the command line; returns the exit code."""
    options = _parser(prog).parse_args(arguments)
    try:
        out = _export(options) if options.command == "export" else _import(options)
    except CodeflowError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    print(out)
    return 0


def _export(options: argparse.Namespace) -> Path:
    return export(
        options.checkpoint,
        options.out,
        target=options.target,
        shard_bytes=options.shard_bytes,
        dtype=getattr(torch, options.dtype),
        tokenizer=options.tokenizer,
    )


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


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog)
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser(
        "export",
        help="a checkpoint for transformers or vLLM",
        description="Write a checkpoint as a folder that transformers or vLLM loads.",
        epilog=f"""examples:
  {prog} export run/checkpoints/step-00000300 model/ --tokenizer data/shards/tokenizer.json
  {prog} export run/checkpoints/step-00000300 model/ --target vllm --dtype bfloat16""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("checkpoint", help="folder with config.json and model.safetensors")
    out.add_argument("out", help="folder to make")
    out.add_argument("--target", choices=get_args(Target), default="transformers")
    out.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    out.add_argument("--tokenizer", help="tokenizer.json, or a folder with it")
    out.add_argument(
        "--shard-bytes", type=int, default=SHARD_BYTES, help="most bytes of a file of weights"
    )
    back = commands.add_parser(
        "import",
        help="a dense or looped model to train from",
        description="Make a LoopCoder to start from out of a Llama or LoopCoder folder.",
        epilog=f"""examples:
  {prog} import path/to/llama/ start/ --loops 2            the same layers, run twice
  {prog} import path/to/llama/ start/ --loops 2 --fold     half of the layers, run twice""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    back.add_argument("folder", help="config.json and *.safetensors of a Llama or LoopCoder")
    back.add_argument("out", help="folder to make")
    back.add_argument("--loops", type=int, default=2, help="how often layers run (default: 2)")
    back.add_argument(
        "--window", type=int, help="tokens of local attention (default: source's, 64)"
    )
    back.add_argument("--vocab-size", type=int, help="larger vocabulary (default: the source's)")
    back.add_argument(
        "--fold", action="store_true", help="keep one of LOOPS layers, evenly spaced over all"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
