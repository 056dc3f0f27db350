"""What is typed after `codeflow evaluate`, `generate`, `export`, `import`; imports nothing heavy.

The same parsers serve `python -m codeflow.train.evaluate` and its like, which GPU machines use.
"""

from __future__ import annotations

import argparse

BACKENDS = ("auto", "sdpa", "dense", "varlen", "flex")
DTYPES = ("float32", "bfloat16")
END = "<|endoftext|>"  # ends every document of the shards
SHARD_BYTES = 5 * 10**9
TARGETS = ("transformers", "vllm", "llama")


def evaluation(prog: str = "python -m codeflow.train.evaluate") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Loss of a model on packed shards, by kind of document and role of segment.",
        epilog=f"""examples:
  {prog} run/ --shards data/                     the rows that the run did not train on
  {prog} run/checkpoints/step-00000100 --shards other/ --all --rows 100 --json""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model(parser)
    parser.add_argument("--shards", required=True, help="dataset folder, shards or manifest.json")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--holdout",
        type=float,
        metavar="SHARE",
        help="rows that a run with train.holdout=SHARE leaves out; no more than the model's own "
        "run did (default: as many; all rows where none were, or where that is not known)",
    )
    which.add_argument("--all", action="store_true", help="all rows, trained on or not")
    parser.add_argument("--rows", type=_positive, metavar="N", help="no more than N rows")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def generation(prog: str = "python -m codeflow.train.generate") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Continue a prompt with a model.",
        epilog=f"""examples:
  {prog} run/ --prompt 'def main('
  {prog} model/ --prompt-file old.txt --samples 4 --temperature 0.8 --top-p 0.95 --json""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model(parser)
    parser.add_argument("--tokenizer", help="tokenizer.json (default: that of the checkpoint)")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text; control tokens such as <|file_sep|> are known")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a file with the text")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="how many (default: 1)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default: greedy")
    parser.add_argument("--top-k", type=int, metavar="K", help="of the K most probable tokens only")
    parser.add_argument("--top-p", type=float, default=1.0, help="of those that reach this share")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TOKEN",
        help=f"token that ends the text; may be repeated (default: {END})",
    )
    parser.add_argument("--json", action="store_true", help="print tokens and log-probs as JSON")
    return parser


def conversion(prog: str = "python -m codeflow.train.hf") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog)
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser(
        "export",
        help="a checkpoint for transformers or vLLM",
        description="Write a checkpoint as a folder that transformers or vLLM loads.",
        epilog=f"""examples:
  {prog} export run/ model/                       its newest checkpoint
  {prog} export run/checkpoints/step-00000300 model/ --target vllm --dtype bfloat16""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("checkpoint", help="folder with config.json and weights, or of a training run")
    out.add_argument("out", help="folder to make")
    out.add_argument("--target", choices=TARGETS, default="transformers")
    out.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    out.add_argument(
        "--tokenizer", help="tokenizer.json, or a folder with it (default: that of the checkpoint)"
    )
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


def _add_model(parser: argparse.ArgumentParser) -> None:
    """The options of `open_model`."""
    parser.add_argument(
        "checkpoint", help="folder with config.json and weights, or of a training run"
    )
    parser.add_argument("--device", default="auto", help="cuda, cpu, …; auto: cuda if there is one")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the activations")
    parser.add_argument(
        "--backend", default="auto", choices=BACKENDS, help="how attention is computed"
    )


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number
