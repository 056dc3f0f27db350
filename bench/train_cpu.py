"""The trainer on a CPU: back ends of attention, a loop against a dense model, loss against loss.

    sdpa      the model with the back end of every day: fused kernels, blocks of the window
    masked    the same kernels given a (T, T) mask for each kind of attention
    dense     the oracle of the tests, which forms every (T, T) matrix of scores
    dense 2L  `loop_num` 1 and twice the layers: the same work per token, twice the weights
    chunked   the loss of the trainer, holding the logits of 256 tokens at a time
    full      `F.cross_entropy` over all logits at once

Speed is CPU time (user + system) of forward and backward, medians of interleaved runs, because wall
time on a shared machine says little; a claim is a ratio of two medians. Memory is how far the peak
of a fresh process rises over what it held before the step (Linux only).

    python bench/train_cpu.py [--runs N] [--threads N]
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from codeflow.train.attention import Attention, Documents
from codeflow.train.config import ModelConfig
from codeflow.train.loss import cross_entropy
from codeflow.train.model import Layer, LoopCoder

LOOPED = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    loop_num=2,
    loop_window_size=64,
)
TWICE_AS_DEEP = dataclasses.replace(LOOPED, num_hidden_layers=8, loop_num=1)
TOKENS = 2048
MEMORY_TOKENS = {"sdpa": 4096, "masked": 4096, "dense": 4096, "dense 2L": 4096}
LOSS_VOCABULARY = 32768
Step = Callable[[], None]


def train_step(config: ModelConfig, tokens: int, backend: str | Attention = "sdpa") -> Step:
    """Forward and backward of one document."""
    model = LoopCoder(config, backend=backend if isinstance(backend, str) else "sdpa")
    for layer in model.model.layers:
        if isinstance(layer, Layer) and isinstance(backend, Attention):
            layer.attention = backend
    ids = torch.randint(0, config.vocab_size, (tokens,))

    def step() -> None:
        model.zero_grad()
        loss = model(ids, Documents.of([tokens]), ids.roll(-1)).loss
        torch.autograd.backward(loss / tokens)

    return step


def masked_attention(q: Tensor, k: Tensor, v: Tensor, _: Documents, window: int) -> Tensor:
    token = torch.arange(len(q))
    distance = token[:, None] - token
    visible = (distance >= 0) & (distance < window)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    return out[0].transpose(0, 1)


MASKED = Attention(lambda q, k, v, docs: masked_attention(q, k, v, docs, len(q)), masked_attention)


def loss_step(loss: Callable[[Tensor, Tensor, Tensor], Tensor], tokens: int) -> Step:
    hidden = torch.randn(tokens, LOOPED.hidden_size, requires_grad=True)
    weight = (0.02 * torch.randn(LOSS_VOCABULARY, LOOPED.hidden_size)).requires_grad_()
    labels = torch.randint(0, LOSS_VOCABULARY, (tokens,))

    def step() -> None:
        hidden.grad = weight.grad = None
        torch.autograd.backward(loss(hidden, weight, labels) / tokens)

    return step


def full_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, labels, reduction="sum")


SIDES: dict[str, Callable[[int], Step]] = {
    "sdpa": lambda tokens: train_step(LOOPED, tokens),
    "masked": lambda tokens: train_step(LOOPED, tokens, MASKED),
    "dense": lambda tokens: train_step(LOOPED, tokens, "dense"),
    "dense 2L": lambda tokens: train_step(TWICE_AS_DEEP, tokens),
    "chunked": lambda tokens: loss_step(cross_entropy, tokens),
    "full": lambda tokens: loss_step(full_cross_entropy, tokens),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=5, help="runs of each side (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--memory-of", nargs=2, metavar=("SIDE", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.memory_of:
        side, tokens = options.memory_of
        print(peak_extra_bytes(SIDES[side], int(tokens)))
        return 0
    seconds = cpu_seconds({name: side(TOKENS) for name, side in SIDES.items()}, options.runs)
    print(f"{'side':<9} {'tokens':>6} {'CPU s':>7} {'tokens/s':>9}   {'tokens':>6} {'peak MB':>8}")
    memory: dict[str, int] = {}
    for name, value in seconds.items():
        tokens = MEMORY_TOKENS.get(name, TOKENS)
        memory[name] = in_fresh_process(name, tokens, options.threads)
        print(
            f"{name:<9} {TOKENS:>6} {value:>7.3f} {TOKENS / value:>9,.0f}   "
            f"{tokens:>6} {memory[name] / 1e6:>8.0f}"
        )
    met = [
        claim("dense / sdpa, time", seconds["dense"] / seconds["sdpa"], least=1.7),
        claim("masked / sdpa, time", seconds["masked"] / seconds["sdpa"], least=1.3),
        claim("sdpa / dense, memory", memory["sdpa"] / memory["dense"], most=0.25),
        claim("sdpa / dense 2L, tokens/s", seconds["dense 2L"] / seconds["sdpa"], least=0.85),
        claim("chunked / full, memory", memory["chunked"] / memory["full"], most=0.25),
        claim("chunked / full, time", seconds["chunked"] / seconds["full"], most=1.1),
    ]
    return 0 if all(met) else 1


def claim(what: str, ratio: float, *, least: float = 0.0, most: float = math.inf) -> bool:
    """Print what becomes of a claim; returns whether it holds."""
    bound = f"at least {least}" if least else f"at most {most}"
    met = least <= ratio <= most
    print(f"    {what}: {ratio:.2f}x, claim {bound}x: {'met' if met else 'NOT MET'}")
    return met


def cpu_seconds(steps: dict[str, Step], runs: int) -> dict[str, float]:
    """Median CPU seconds of each side, all sides in turn; the first turn is a warm-up."""
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for run in range(runs + 1):
        for name, step in steps.items():
            before = time.process_time()
            step()
            if run:
                spent[name].append(time.process_time() - before)
    return {name: statistics.median(values) for name, values in spent.items()}


def in_fresh_process(side: str, tokens: int, threads: int) -> int:
    command = [sys.executable, __file__, "--threads", str(threads)]
    command += ["--memory-of", side, str(tokens)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def peak_extra_bytes(side: Callable[[int], Step], tokens: int) -> int:
    step = side(tokens)
    side(32)()  # what the first step of a process loads is not the step's
    before = resident_bytes("VmRSS")
    step()
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    # Not getrusage: its peak is inherited from the process that started this one.
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
