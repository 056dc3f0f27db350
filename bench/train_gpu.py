"""The trainer on a GPU: one command, one table; every case in a process of its own.

    loop      LoopCoder of L layers, 2 loops
    dense 2L  `loop_num` 1 and twice the layers: the same work per token, twice the weights

A case is a whole training step (forward, backward, clipping, AdamW) on one packed row in bfloat16
with float32 master weights and compiled layers. tokens/s is the median of the timed steps. MFU
counts attention as it is, causal and per document; MFU* counts the full square of the row, as many
trainers do, to be compared with their numbers. GB is the peak that the allocator held.

The default is what the claims need: two sizes, three lengths, one and 32 documents a row; all back
ends and all checkpointing policies at 1.2B; one step of 3.4B at 128K. A case that runs out of
memory or cannot run here says so in its row, and the table goes on.

    python bench/train_gpu.py                       # everything, about 40 minutes on an H200
    python bench/train_gpu.py --list                # the names of the cases
    python bench/train_gpu.py --only '1.2b 8K'      # cases whose name holds this
    python bench/train_gpu.py --device cpu --only tiny   # a smoke test of this script
    python bench/train_gpu.py --curves data/ --steps 500 # loss curves on your own shards instead
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from the source tree

import torch

from codeflow.train.attention import Documents
from codeflow.train.config import SIZES, ModelConfig
from codeflow.train.flops import (
    peak_flops,
    training_flops,
    training_flops_noncausal,
)
from codeflow.train.model import LoopCoder
from codeflow.train.optim import decays
from codeflow.train.parallel import usable_device

LENGTHS = {"8K": 8192, "32K": 32768, "128K": 131072}
WARM_UP, TIMED = 2, 3
LIMIT_S = 600  # of one case
ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}  # every step has its own shapes
#: (size, length, least MFU, least loop / dense 2L), one document a row, back end `auto`.
CLAIMS = (
    ("1.2b", "8K", 0.42, 0.93),
    ("1.2b", "32K", 0.36, 0.96),
    ("1.2b", "128K", 0.28, 0.0),
)


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    size: str
    tokens: int
    documents: int
    loops: int = 2
    backend: str = "auto"
    checkpointing: str = "save_attention"

    @property
    def name(self) -> str:
        length = next((k for k, n in LENGTHS.items() if n == self.tokens), str(self.tokens))
        model = "loop" if self.loops > 1 else "dense 2L"
        return f"{self.size} {length} {self.documents} {model} {self.backend} {self.checkpointing}"

    @property
    def config(self) -> ModelConfig:
        config = ModelConfig(**SIZES[self.size], loop_num=self.loops)
        if self.loops > 1:
            return config
        return dataclasses.replace(config, num_hidden_layers=2 * config.num_hidden_layers)

    def doc_lens(self, step: int = 0) -> list[int]:
        """Lengths from 1/2 to 3/2 of the mean, and others at every step, as in real rows.

        A kernel that is planned or compiled anew for a length it has not seen must show it.
        """
        n, total = self.documents, self.tokens
        if n == 1:
            return [total]
        lengths = [total * (n + 2 * i) // (2 * n * n) for i in range(n)]
        lengths = lengths[::2] + lengths[1::2][::-1]
        lengths = [*lengths[:-1], total - sum(lengths[:-1])]
        for i in range(0, n - 1, 2):
            moved = (i + 1) * step % (lengths[i + 1] // 2)
            lengths[i] += moved
            lengths[i + 1] -= moved
        return lengths


def cases() -> Iterator[Case]:
    """The default table."""
    yield Case("tiny", 2048, 8, backend="sdpa")
    for size in ("0.6b", "1.2b"):
        for tokens in LENGTHS.values():
            for documents in (1, 32):
                yield Case(size, tokens, documents)
                yield Case(size, tokens, documents, loops=1)
    for tokens in LENGTHS.values():
        for policy in ("none", "full"):
            yield Case("1.2b", tokens, 1, checkpointing=policy)
    for tokens in (LENGTHS["8K"], LENGTHS["32K"]):
        for documents in (1, 32):
            for backend in ("sdpa", "varlen", "flex"):
                yield Case("1.2b", tokens, documents, backend=backend)
    yield Case("3.4b", LENGTHS["128K"], 1, checkpointing="full")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--device", default="cuda", help="default cuda")
    parser.add_argument("--json", type=Path, help="append each row to this file, too")
    parser.add_argument("--curves", type=Path, metavar="SHARDS", help="loss curves instead")
    parser.add_argument("--steps", type=int, default=500, help="of --curves (default 500)")
    parser.add_argument("--size", default="0.6b", help="of --curves (default 0.6b)")
    parser.add_argument("--out", type=Path, default=Path("build/curves"), help="of --curves")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(Case(**json.loads(options.case)), options.device)))
        return 0
    if options.curves:
        return curves(options)
    chosen = [case for case in cases() if options.only in case.name]
    if options.list:
        print("\n".join(case.name for case in chosen))
        return 0
    return table(chosen, options)


def table(chosen: list[Case], options: argparse.Namespace) -> int:
    """Run cases one after another and print their rows, then what becomes of the claims."""
    print(f"torch {torch.__version__}, {device_name(options.device)}")
    print(
        f"{'case':<46} {'parameters':>11} {'tokens/s':>9} {'s/step':>7} {'MFU':>6} {'MFU*':>6} "
        f"{'GB':>6} {'loop / dense 2L':>16}"
    )
    rows: dict[Case, dict[str, Any]] = {}
    for case in chosen:
        row = rows[case] = in_fresh_process(case, options.device)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps({"case": case.name} | dataclasses.asdict(case) | row) + "\n")
        if "failed" in row:
            print(f"{case.name:<46} {row['failed']}", flush=True)
            continue
        ratio = ""
        loop = rows.get(dataclasses.replace(case, loops=2))
        if case.loops == 1 and loop and "failed" not in loop:
            ratio = f"{loop['tokens_per_second'] / row['tokens_per_second']:.3f}"
        print(
            f"{case.name:<46} {row['parameters'] / 1e6:>9,.0f} M {row['tokens_per_second']:>9,.0f} "
            f"{row['seconds']:>7.2f} {percent(row['mfu'])} {percent(row['mfu_noncausal'])} "
            f"{row['peak_bytes'] / 1e9:>6.1f} {ratio:>16}",
            flush=True,
        )
    verdicts = [claim(rows, *bounds) for bounds in CLAIMS]
    return 0 if all(verdicts) else 1


def claim(
    rows: dict[Case, dict[str, Any]], size: str, length: str, mfu: float, ratio: float
) -> bool:
    """Print what becomes of a claim; one whose cases were not run says so and does not fail."""
    case = Case(size, LENGTHS[length], 1)
    loop, dense = rows.get(case), rows.get(dataclasses.replace(case, loops=1))
    if loop is None or loop.get("mfu") is None:
        print(f"    {size} {length}: not measured")
        return loop is None
    best = max(
        row["mfu"]
        for other, row in rows.items()
        if row.get("mfu") is not None
        and dataclasses.replace(other, checkpointing=case.checkpointing) == case
    )
    met = best >= mfu
    print(f"    {size} {length} MFU, best policy: {best:.1%}, claim {mfu:.0%}: {verdict(met)}")
    if ratio and dense and dense.get("tokens_per_second"):
        found = loop["tokens_per_second"] / dense["tokens_per_second"]
        met &= found >= ratio
        print(
            f"    {size} {length} loop / dense 2L: {found:.3f}, claim {ratio}: "
            f"{verdict(found >= ratio)}"
        )
    return bool(met)


def verdict(met: bool) -> str:
    return "met" if met else "NOT MET"


def percent(share: float | None) -> str:
    return f"{'-':>6}" if share is None else f"{share:>6.1%}"


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else device


def in_fresh_process(case: Case, device: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--device", device]
    command += ["--case", json.dumps(dataclasses.asdict(case))]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, env=os.environ | ALLOCATOR
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {LIMIT_S} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"failed": lines[-1][:200]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def measure(case: Case, device: str) -> dict[str, Any]:
    """The numbers of a case, here and now."""
    torch.manual_seed(0)
    usable_device(device)  # as the trainer sets it up
    on_gpu = device.startswith("cuda")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    with torch.device("meta"):
        model = LoopCoder(
            case.config, backend=case.backend, dtype=dtype, checkpointing=case.checkpointing
        )
    model.to_empty(device=device)
    with torch.no_grad():  # on the device: drawing billions of numbers on the host takes minutes
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            elif "gate_projection" in name:
                parameter.zero_()
            else:
                parameter.normal_(0.0, case.config.initializer_range)
    if on_gpu:
        model.compile_layers()
    groups = [
        {"params": [p for n, p in model.named_parameters() if decays(n, p) == flag]}
        for flag in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=on_gpu)
    ids = torch.randint(0, case.config.vocab_size, (case.tokens,), device=device)
    labels = ids.roll(-1)

    def step(number: int) -> float:
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = model(ids, Documents.of(case.doc_lens(number), device), labels).loss / case.tokens
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        value = loss.item()
        if not value < float("inf"):
            raise RuntimeError(f"the loss is {value}")
        return time.perf_counter() - started

    for number in range(WARM_UP):
        step(number)
    seconds = statistics.median(step(WARM_UP + number) for number in range(TIMED))
    peak = peak_flops(torch.cuda.get_device_name()) if on_gpu else None

    def mfu(flops: int) -> float | None:
        return flops / seconds / peak if peak else None

    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
        "tokens_per_second": case.tokens / seconds,
        "mfu": mfu(training_flops(case.config, case.doc_lens())),
        "mfu_noncausal": mfu(training_flops_noncausal(case.config, case.doc_lens(), case.tokens)),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "device": device_name(device),
        "torch": torch.__version__,
    }


def curves(options: argparse.Namespace) -> int:
    """Train LoopCoder and dense 2L on the same rows; the loss of both, step by step, in JSON lines.

    The dense model has twice the parameters and the same work per token.
    """
    from codeflow.train.trainer import run

    dtype = "float32" if options.device == "cpu" else "bfloat16"
    for name, loops in (("loop", 2), ("dense 2L", 1)):
        config = Case(options.size, 0, 1, loops=loops).config
        result = run(
            options.curves,
            options.out / name.replace(" ", "-"),
            steps=options.steps,
            size=options.size,
            overrides=[
                f"model.loop_num={loops}",
                f"model.num_hidden_layers={config.num_hidden_layers}",
                f"train.dtype={dtype}",
                f"train.device={options.device}",
                "train.learning_rate=6e-4",
                "train.warmup_steps=50",
                "train.log_every=1",
            ],
        )
        print(
            f"{name:<9} {result.parameters / 1e6:,.0f} M parameters, {result.tokens:,} tokens, "
            f"{result.seconds:.0f} s: loss {result.first_losses_mean:.3f} -> "
            f"{result.last_losses_mean:.3f} (means of 10 steps)"
        )
    print(f"{options.out}: metrics.jsonl of both")
    return 0


if __name__ == "__main__":
    sys.exit(main())
