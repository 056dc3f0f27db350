from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from codeflow.errors import UsageError
from codeflow.train.attention import Documents
from codeflow.train.config import ModelConfig
from codeflow.train.errors import TrainingError
from codeflow.train.grpo import (
    Groups,
    GRPOConfig,
    Prompt,
    Sample,
    completion_log_probs,
    policy_loss,
    sample_groups,
    score,
    train_grpo,
    update,
    with_advantages,
)
from codeflow.train.model import LoopCoder

CONFIG = GRPOConfig(
    steps=4,
    prompts=2,
    group_size=4,
    max_new_tokens=3,
    learning_rate=1e-2,
    stop_ids=(0,),
    checkpoint_every=2,
)


def tiny(seed: int = 0) -> LoopCoder:
    config = ModelConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LoopCoder(config, seed=seed)


def gradients(model: LoopCoder) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def only_gradients(model: LoopCoder) -> torch.optim.Optimizer:
    """An optimizer that changes nothing, so that the gradients can be read."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


SAMPLES = [Sample((1, 2, 3), (4, 0), 1.5), Sample((5,), (6, 7, 8, 9, 0), -0.5)]


def test_log_probs_are_those_of_the_completion_tokens() -> None:
    model = tiny()
    have = completion_log_probs(model, SAMPLES, temperature=0.7)
    want = []
    for s in SAMPLES:
        ids = torch.tensor([*s.prompt, *s.completion])
        logits = model.logits(model(ids, Documents.of([len(ids)])).hidden) / 0.7
        log_p = logits.log_softmax(-1)
        want += [log_p[len(s.prompt) + i - 1, t] for i, t in enumerate(s.completion)]
    torch.testing.assert_close(have, torch.stack(want))


@pytest.mark.parametrize("micro_tokens", [1, 5, 1000])
def test_gradient_is_the_plain_policy_gradient_when_nothing_has_moved(micro_tokens: int) -> None:
    plain, clipped = tiny(), tiny()
    log_p = completion_log_probs(plain, SAMPLES, temperature=1.0)
    # Every token counts the same: the sum over 2 + 5 tokens, divided by 7, not a mean of means.
    loss = -(1.5 * log_p[:2].sum() - 0.5 * log_p[2:].sum()) / 7
    torch.autograd.backward(loss)
    config = replace(CONFIG, micro_tokens=micro_tokens, clip_norm=1e9)
    numbers = update(clipped, only_gradients(clipped), SAMPLES, config, random())
    have, want = gradients(clipped), gradients(plain)
    assert have.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(have[name], want[name])
    assert numbers["clip_fraction"] == 0.0
    assert numbers["updates"] == 1
    assert numbers["entropy"] == pytest.approx(-log_p.mean().item())
    norm = math.sqrt(sum(g.square().sum().item() for g in want.values()))
    assert numbers["gradient_norm"] == pytest.approx(norm, rel=1e-4)


def test_bounds_are_asymmetric_and_exact() -> None:
    #                       inside        above 1.28     below 0.8      at the bounds
    ratio = torch.tensor([1.0, 1.2, 0.9, 1.30, 1.30, 0.7, 0.7, 1.279, 0.801])
    advantage = torch.tensor([1.0, -1.0, 2.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    now = ratio.log().requires_grad_()
    loss, clipped = policy_loss(now, torch.zeros(9), advantage, CONFIG)
    torch.autograd.backward(loss)
    # Too far in the direction of its advantage a token is cut off; on the way back it is not.
    kept = torch.tensor([1, 1, 1, 0, 1, 1, 0, 1, 1])
    torch.testing.assert_close(now.grad, -ratio * advantage * kept)
    terms = ratio * advantage * kept
    terms[3], terms[6] = 1.28, -0.8
    torch.testing.assert_close(loss.detach(), -terms.sum())
    assert clipped.item() == 2


def test_several_updates_meet_the_bounds() -> None:
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    numbers = update(model, optimizer, SAMPLES, replace(CONFIG, epochs=6, updates=2), random())
    assert numbers["updates"] == 12
    assert 0.0 < numbers["clip_fraction"] < 1.0


def test_groups_that_teach_nothing_are_dropped_and_counted() -> None:
    prompts = [Prompt((i,)) for i in range(3)]
    groups: Groups = [[(4,), (5,), (6,), (7,)] for _ in prompts]
    rewards = torch.tensor([[1.0, 1, 1, 1], [0.0, 1, 0, 1], [0.3, 0.3, 0.3, 0.3]])
    samples, dropped = with_advantages(prompts, groups, rewards, epsilon=0.0)
    assert dropped == 2
    assert [s.prompt for s in samples] == [(1,)] * 4
    assert [s.completion for s in samples] == groups[1]
    assert [s.advantage for s in samples] == pytest.approx([-1, 1, -1, 1])


def test_advantages_are_standard_scores() -> None:
    rewards = torch.tensor([[0.0, 0.25, 1.0, 0.75]])
    samples, _ = with_advantages([Prompt((1,))], [[(2,)] * 4], rewards, epsilon=0.1)
    spread = math.sqrt((0.25 + 0.0625 + 0.25 + 0.0625) / 4) + 0.1
    want = [-0.5 / spread, -0.25 / spread, 0.5 / spread, 0.25 / spread]
    assert [s.advantage for s in samples] == pytest.approx(want)


def test_rewards_are_in_place_whatever_the_order_they_arrive_in() -> None:
    prompts = [Prompt((i,)) for i in range(5)]
    groups: Groups = [[(i, j) for j in range(6)] for i in range(5)]
    rewards = score(prompts, groups, lambda p, c: p.ids[0] + c[1] / 10, workers=4)
    torch.testing.assert_close(
        rewards, torch.tensor([[i + j / 10 for j in range(6)] for i in range(5)])
    )
    with pytest.raises(TrainingError, match="not finite"):
        score(prompts, groups, lambda _p, _c: float("nan"), workers=1)


def prefer(token: int) -> Callable[[Prompt, Sequence[int]], float]:
    return lambda _prompt, completion: float(completion[0] == token)


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_bandit_finds_its_arm(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=40, prompts=1, group_size=32, max_new_tokens=1)
    train_grpo(tiny(), [Prompt((1, 2))], prefer(7), config, tmp_path)
    rewards = [line["reward"] for line in lines(tmp_path)]
    assert len(rewards) == 40
    assert sum(rewards[:3]) / 3 < 0.5
    assert sum(rewards[-3:]) / 3 > 0.9


def test_when_all_groups_are_dropped_nothing_moves(tmp_path: Path) -> None:
    model = tiny()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train_grpo(model, [Prompt((1,))], lambda _p, _c: 1.0, CONFIG, tmp_path)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    assert [line["groups_dropped"] for line in lines(tmp_path)] == [1.0] * 4
    assert all("clip_fraction" not in line for line in lines(tmp_path))


def test_a_resumed_run_goes_on_as_it_would_have(tmp_path: Path) -> None:
    prompts = [Prompt((i, i + 1)) for i in range(1, 8)]
    whole, parts = tiny(), tiny()
    train_grpo(whole, prompts, prefer(7), CONFIG, tmp_path / "whole")
    train_grpo(parts, prompts, prefer(7), replace(CONFIG, steps=2), tmp_path / "parts")
    with pytest.raises(UsageError, match="holds a run"):
        train_grpo(tiny(1), prompts, prefer(7), CONFIG, tmp_path / "parts")
    again = tiny(1)
    train_grpo(again, prompts, prefer(7), CONFIG, tmp_path / "parts", resume=True)
    for (name, a), (_, b) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    timeless = [
        [{k: v for k, v in line.items() if "seconds" not in k} for line in lines(tmp_path / run)]
        for run in ("whole", "parts")
    ]
    assert timeless[0] == timeless[1]


def test_every_prompt_has_its_turn_before_any_comes_again(tmp_path: Path) -> None:
    seen: list[int] = []

    def rollout(_m: LoopCoder, batch: Sequence[Prompt], config: GRPOConfig, _seed: int) -> Groups:
        seen.extend(prompt.ids[0] for prompt in batch)
        return [[(1,)] * config.group_size for _ in batch]

    prompts = [Prompt((i,)) for i in range(4)]
    train_grpo(tiny(), prompts, lambda _p, _c: 0.0, CONFIG, tmp_path, rollout=rollout)
    assert sorted(seen[:4]) == sorted(seen[4:]) == [0, 1, 2, 3]


def test_rollouts_are_groups_and_depend_on_the_seed() -> None:
    prompts = [Prompt((1, 2)), Prompt((3,)), Prompt((4, 5, 6))]
    model = tiny()
    config = replace(CONFIG, prompts_at_once=2)
    groups = sample_groups(model, prompts, config, 5)
    assert [len(group) for group in groups] == [4, 4, 4]
    assert all(1 <= len(c) <= 3 and 0 not in c[:-1] for group in groups for c in group)
    assert groups == sample_groups(model, prompts, config, 5)
    assert groups != sample_groups(model, prompts, config, 6)


@pytest.mark.parametrize("groups", [[], [[(1,)] * 3] * 2, [[(1,)] * 3 + [()]] * 2])
def test_a_rollout_that_is_not_as_agreed_is_refused(tmp_path: Path, groups: Groups) -> None:
    with pytest.raises(TrainingError, match="must return 4 completions"):
        train_grpo(
            tiny(), [Prompt((1,))], prefer(1), CONFIG, tmp_path, rollout=lambda *_: list(groups)
        )


@pytest.mark.slow
def test_the_example_learns(tmp_path: Path) -> None:
    from examples.grpo_unit_tests import main

    rewards = main(tmp_path, steps=6)
    assert rewards[-1] > rewards[0] + 0.2


def test_without_prompts_it_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one prompt"):
        train_grpo(tiny(), [], prefer(1), CONFIG, tmp_path)
