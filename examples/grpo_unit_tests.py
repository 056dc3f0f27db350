"""GRPO with unit tests as the reward, in about a minute on two cores.

    python examples/grpo_unit_tests.py [OUT]

A byte-level LoopCoder of 0.1 M parameters is first trained, from nothing, on a corpus of one-line
functions of which a quarter do what their name says and the others anything. So it writes the right
body about that often. GRPO then rewards it with the share of unit tests that its bodies pass, and
the mean reward rises to nearly one.

It shows that every part works together: sampling, execution, advantages, updates, checkpoints. It
does not show that a model of this size learns to program: it learns seven names by heart. For a
model of your own, load it with `codeflow.train.hf.load_model`, encode prompts with its tokenizer
and decode completions in the reward. Rewards run the programs of the model on this machine: see
`codeflow.train.rewards` for what that does not protect you from.
"""

from __future__ import annotations

import functools
import json
import operator
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from codeflow.train.attention import Documents
from codeflow.train.config import ModelConfig
from codeflow.train.grpo import GRPOConfig, Prompt, train_grpo
from codeflow.train.loss import IGNORE
from codeflow.train.model import LoopCoder
from codeflow.train.rewards import Limits, pass_rate

OPERATORS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "mod": operator.mod,
    "band": operator.and_,
    "bor": operator.or_,
    "bxor": operator.xor,
}
SIGNS = "+-*%&|^"
SOUND = 0.25  # share of functions in the corpus that do what their name says
CASES = ((13, 6), (19, 5), (25, 7))  # no two operators agree on one, and none gives an operand
END = ord("\n")


def main(out: Path, steps: int = 30) -> list[float]:
    """Train both ways; returns the mean reward of every GRPO step."""
    torch.manual_seed(0)
    model = LoopCoder(
        ModelConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=128,
            initializer_range=0.1,  # the usual 0.02 starts slowly at this width
        )
    )
    learn_to_spell(model)
    prompts = [Prompt(encode(beginning(name)), unit_tests(name)) for name in OPERATORS]
    config = GRPOConfig(
        steps=steps,
        prompts=len(prompts),
        group_size=32,
        prompts_at_once=len(prompts),
        max_new_tokens=8,
        stop_ids=(END,),
        updates=2,
        learning_rate=1e-3,
    )
    train_grpo(model, prompts, reward, config, out)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [float(json.loads(line)["reward"]) for line in lines]


def learn_to_spell(model: LoopCoder, steps: int = 250) -> None:
    """Next-token training on functions that mostly do not do what their name says."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    chance = random.Random(0)
    for step in range(1, steps + 1):
        documents = []
        for _ in range(64):
            name, right = chance.choice(list(zip(OPERATORS, SIGNS, strict=True)))
            body = chance.choice(SIGNS).join(chance.choices("ab", k=2))
            if chance.random() < SOUND:
                body = f"a{right}b"
            documents.append(encode(f"{beginning(name)}{body}\n"))
        ids = torch.tensor([token for d in documents for token in d])
        labels = torch.tensor([token for d in documents for token in (*d[1:], IGNORE)])
        docs = Documents.of([len(d) for d in documents])
        loss = model(ids, docs, labels).loss / (labels != IGNORE).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        if step % 50 == 0:
            print(f"spelling, step {step}: loss {loss.item():.3f}")


def beginning(name: str) -> str:
    return f"def {name}(a, b): return "


def unit_tests(name: str) -> tuple[str, ...]:
    apply = OPERATORS[name]
    return tuple(f"assert {name}({a}, {b}) == {apply(a, b)}" for a, b in CASES)


def reward(prompt: Prompt, completion: Sequence[int]) -> float:
    program = "".join(map(chr, [*prompt.ids, *completion]))
    return run_once(program, prompt.tests)


@functools.cache  # a model this small writes the same few programs again and again
def run_once(program: str, tests: tuple[str, ...]) -> float:
    return pass_rate(program, tests, Limits(seconds=2.0))


def encode(text: str) -> tuple[int, ...]:
    return tuple(text.encode("ascii"))


if __name__ == "__main__":
    torch.set_num_threads(1)  # for tensors this small, threads only wait for each other
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="grpo-"))
    rewards = main(folder)
    print(
        f"mean reward {sum(rewards[:3]) / 3:.2f} in the first three steps, "
        f"{sum(rewards[-3:]) / 3:.2f} in the last three; see {folder}"
    )
