"""GRPO: reinforcement learning from rewards of whole completions, without a value model.

Each prompt gets a group of completions; a completion's advantage is how far its reward lies from
the group's mean, in standard deviations (Shao et al. 2024, DeepSeekMath). There is no KL term, the
upper clip bound is higher than the lower, every token counts the same whatever the length of its
completion, and groups whose rewards are all equal are dropped (Yu et al. 2025, DAPO).

The log-probabilities before an update come from the same forward pass as those during it, and not
from the sampler, so a sampler of other precision biases the samples but never the ratio.

One process. A larger run brings its own rollout engine as `rollout`, and the rest stays.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from codeflow.errors import UsageError
from codeflow.settings import setting
from codeflow.train import checkpoint
from codeflow.train.attention import Documents
from codeflow.train.errors import TrainingError
from codeflow.train.generate import generate_batch
from codeflow.train.loss import IGNORE, log_probabilities
from codeflow.train.metrics import Metrics, say
from codeflow.train.model import LoopCoder
from codeflow.train.parallel import World


@dataclass(frozen=True)
class GRPOConfig:
    """How to train. A step is one batch of rollouts and the updates made from it."""

    steps: int = setting(500, "Batches of rollouts.", minimum=1)
    prompts: int = setting(64, "Of one step.", minimum=1)
    group_size: int = setting(16, "Completions of each prompt.", minimum=2)
    prompts_at_once: int = setting(8, "Sampled together; more memory, more speed.", minimum=1)
    max_new_tokens: int = setting(1024, "Of a completion.", unit="tokens", minimum=1)
    stop_ids: tuple[int, ...] = setting((), "Tokens that end a completion.")
    temperature: float = setting(1.0, "Of sampling and of the policy trained.", minimum=0.01)
    epochs: int = setting(1, "Passes over the completions of a step.", minimum=1)
    updates: int = setting(1, "Optimizer updates of a pass, each on its share.", minimum=1)
    micro_tokens: int = setting(16384, "In one forward pass.", unit="tokens", minimum=1)
    clip_low: float = setting(0.2, "A ratio below 1 - this gets no gradient.", minimum=0)
    clip_high: float = setting(0.28, "A ratio above 1 + this gets none.", source="DAPO", minimum=0)
    epsilon: float = setting(1e-6, "Added to a group's standard deviation.", minimum=0)
    learning_rate: float = setting(1e-6, "Of AdamW; constant, no weight decay.", minimum=0)
    clip_norm: float = setting(1.0, "Largest global norm of the gradient.", minimum=0)
    reward_workers: int = setting(8, "Rewards computed at the same time.", minimum=1)
    seed: int = setting(0, "Of the order of prompts and of sampling.", minimum=0)
    checkpoint_every: int = setting(50, "Between checkpoints.", unit="steps", minimum=1)
    keep_checkpoints: int = setting(2, "Older checkpoints are deleted.", minimum=1)


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids, and the tests (or anything as text) its reward needs."""

    ids: tuple[int, ...]
    tests: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A completion, at least one token, and its advantage over the others of its group."""

    prompt: Sequence[int]
    completion: Sequence[int]
    advantage: float


Reward = Callable[[Prompt, Sequence[int]], float]
"""The reward of a completion, which ends with its stop token; called from several threads."""

Groups = list[list[Sequence[int]]]
Rollout = Callable[[LoopCoder, Sequence[Prompt], GRPOConfig, int], Groups]
"""From model, prompts, settings and a seed: for every prompt its `group_size` completions."""


def train_grpo(
    model: LoopCoder,
    prompts: Sequence[Prompt],
    reward: Reward,
    config: GRPOConfig,
    out: Path,
    *,
    rollout: Rollout | None = None,
    resume: bool = False,
) -> None:
    """Train a model in place; writes `out/metrics.jsonl` and `out/checkpoints/`.

    Prompts and seeds of a step follow from its number, so a resumed run goes on as it would have.

    Raises:
        UsageError: There are no prompts, or `out` holds a run that is not to be resumed.
        TrainingError: A reward or a gradient is not finite, or a rollout is not as agreed.
    """
    if not prompts:
        raise UsageError("GRPO needs at least one prompt")
    rollout = rollout or sample_groups
    device = model.head_weight.device
    world = World(0, 1, 0, device)
    optimizer = torch.optim.AdamW(
        model.parameters(), config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    done, found = 0, checkpoint.latest(out / "checkpoints")
    if found and not resume:
        raise UsageError(f"{out}: holds a run ({found.name}); resume it, or use another folder")
    if found:
        checkpoint.require_config(found, model.config)
        done = int(checkpoint.restore(found, model, optimizer, world)["step"])
    out.mkdir(parents=True, exist_ok=True)
    metrics = Metrics(out / "metrics.jsonl", resumed_at=done)
    for step in range(done + 1, config.steps + 1):
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        batch = [prompts[i] for i in _of_step(len(prompts), config, step)]
        groups = rollout(model, batch, config, generator.initial_seed())
        _require_groups(groups, len(batch), config.group_size)
        rewards = score(batch, groups, reward, config.reward_workers)
        sampled = time.perf_counter() - start
        samples, dropped = with_advantages(batch, groups, rewards, config.epsilon)
        numbers = update(model, optimizer, samples, config, generator) if samples else {}
        lengths = [len(completion) for group in groups for completion in group]
        numbers = {
            "step": step,
            "reward": rewards.mean().item(),
            "groups_dropped": dropped / len(batch),
            "completion_tokens": sum(lengths) / len(lengths),
            **numbers,
            "seconds_sampling": sampled,
            "seconds": time.perf_counter() - start,
        }
        metrics.log(numbers)
        say("  ".join(f"{k} {v:.4g}" for k, v in numbers.items()))
        if step % config.checkpoint_every == 0 or step == config.steps:
            folder, keep = out / "checkpoints", config.keep_checkpoints
            checkpoint.save(folder, step, model, optimizer, {"step": step}, keep=keep, world=world)


def sample_groups(
    model: LoopCoder, prompts: Sequence[Prompt], config: GRPOConfig, seed: int
) -> Groups:
    """The rollout of codeflow's own generation, from the untruncated distribution."""
    if model.dtype != model.head_weight.dtype:
        model = copy.deepcopy(model).to(model.dtype)  # cast once and not for every token
    groups: Groups = []
    for i in range(0, len(prompts), config.prompts_at_once):
        generated = generate_batch(
            model,
            [prompt.ids for prompt in prompts[i : i + config.prompts_at_once]],
            max_new_tokens=config.max_new_tokens,
            n=config.group_size,
            temperature=config.temperature,
            stop_ids=config.stop_ids,
            seed=seed + i * 7919,
        )
        groups += [[completion.tokens for completion in group] for group in generated]
    return groups


def score(prompts: Sequence[Prompt], groups: Groups, reward: Reward, workers: int) -> Tensor:
    """Rewards, float32 (prompts, group size)."""
    pairs = [(p, c) for p, group in zip(prompts, groups, strict=True) for c in group]
    with ThreadPoolExecutor(workers) as pool:
        rewards = torch.tensor(list(pool.map(lambda pair: reward(*pair), pairs)))
    if not rewards.isfinite().all():
        raise TrainingError(f"a reward is not finite: {rewards.tolist()}")
    return rewards.float().view(len(groups), -1)


def with_advantages(
    prompts: Sequence[Prompt], groups: Groups, rewards: Tensor, epsilon: float
) -> tuple[list[Sample], int]:
    """Samples of the groups that teach something, and the count of the others."""
    samples: list[Sample] = []
    dropped = 0
    for prompt, group, r in zip(prompts, groups, rewards, strict=True):
        if r.min() == r.max():
            dropped += 1
            continue
        advantages = (r - r.mean()) / (r.std(correction=0) + epsilon)
        pairs = zip(group, advantages.tolist(), strict=True)
        samples += [Sample(prompt.ids, completion, a) for completion, a in pairs]
    return samples, dropped


def update(
    model: LoopCoder,
    optimizer: torch.optim.Optimizer,
    samples: Sequence[Sample],
    config: GRPOConfig,
    generator: torch.Generator,
) -> dict[str, float]:
    """Make all optimizer updates of a step, each normalised by the completion tokens of its share.

    Returns:
        `clip_fraction` of tokens, `entropy` in nats per token, estimated from the samples before
        the first update, `gradient_norm` and `updates`.
    """
    with torch.no_grad():
        everything = range(len(samples))
        parts = [[samples[i] for i in p] for p in _micro_batches(samples, everything, config)]
        flat = torch.cat([completion_log_probs(model, p, config.temperature) for p in parts])
    before = torch.split(flat, [len(s.completion) for s in samples])
    clipped, norms = torch.zeros((2,), device=flat.device).unbind()
    updates = 0
    for _ in range(config.epochs):
        order = torch.randperm(len(samples), generator=generator)
        for share in torch.tensor_split(order, min(config.updates, len(samples))):
            tokens = sum(len(samples[i].completion) for i in share.tolist())
            optimizer.zero_grad(set_to_none=True)
            for part in _micro_batches(samples, share.tolist(), config):
                chosen, old = [samples[i] for i in part], torch.cat([before[i] for i in part])
                now = completion_log_probs(model, chosen, config.temperature)
                loss, bound = policy_loss(now, old, advantages_of_tokens(chosen, now), config)
                torch.autograd.backward(loss / tokens)
                clipped += bound
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            if not norm.isfinite():
                raise TrainingError("GRPO: a gradient is not finite; lower the learning rate")
            optimizer.step()
            norms += norm
            updates += 1
    return {
        "clip_fraction": clipped.item() / (config.epochs * len(flat)),
        "entropy": -flat.mean().item(),
        "gradient_norm": norms.item() / updates,
        "updates": updates,
    }


def policy_loss(
    now: Tensor, before: Tensor, advantages: Tensor, config: GRPOConfig
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate loss (Schulman et al. 2017) with a lower and a higher bound.

    Args:
        now: Log-probabilities of tokens under the policy being trained, (n,).
        before: The same before the first update of the step.
        advantages: Of the completions the tokens belong to, (n,).
        config: The bounds.

    Returns:
        The sum over tokens, and the count of tokens where the bound cuts the gradient off.
    """
    ratio = (now - before).exp()
    free = ratio * advantages
    bounded = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high) * advantages
    return -torch.minimum(free, bounded).sum(), (bounded < free).sum()


def advantages_of_tokens(samples: Sequence[Sample], like: Tensor) -> Tensor:
    """Every completion's advantage, once for each of its tokens."""
    values = [s.advantage for s in samples for _ in s.completion]
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def completion_log_probs(model: LoopCoder, samples: Sequence[Sample], temperature: float) -> Tensor:
    """Log-probabilities of all completion tokens, float32, in the order of the samples.

    Each sample is a document of one packed batch; its last token is only a target.
    """
    device = model.head_weight.device
    ids = [t for s in samples for t in (*s.prompt, *s.completion[:-1])]
    targets = [t for s in samples for t in ([IGNORE] * (len(s.prompt) - 1) + [*s.completion])]
    places = [i for i, target in enumerate(targets) if target != IGNORE]
    docs = Documents.of([len(s.prompt) + len(s.completion) - 1 for s in samples], device)
    hidden = model(torch.tensor(ids, device=device), docs).hidden
    log_p = log_probabilities(
        hidden / temperature, model.head_weight, torch.tensor(targets, device=device)
    )
    return log_p[torch.tensor(places, device=device)]


def _micro_batches(
    samples: Sequence[Sample], order: Sequence[int], config: GRPOConfig
) -> Iterator[list[int]]:
    """Cut an order of samples into runs of at most `micro_tokens`; a longer sample is alone."""
    part: list[int] = []
    tokens = 0
    for i in order:
        length = len(samples[i].prompt) + len(samples[i].completion) - 1
        if part and tokens + length > config.micro_tokens:
            yield part
            part, tokens = [], 0
        part.append(i)
        tokens += length
    yield part


def _of_step(prompts: int, config: GRPOConfig, step: int) -> Iterator[int]:
    """Which prompts a step uses: all of them in one random order, then all in another, …"""
    for i in range((step - 1) * config.prompts, step * config.prompts):
        g = torch.Generator().manual_seed(config.seed * 1_000_003 + i // prompts)
        yield int(torch.randperm(prompts, generator=g)[i % prompts])


def _require_groups(groups: Groups, prompts: int, size: int) -> None:
    lengths = [[len(completion) for completion in group] for group in groups]
    if [len(n) for n in lengths] != [size] * prompts or not all(map(all, lengths)):
        raise TrainingError(
            f"GRPO: the rollout must return {size} completions, each at least one token, for each "
            f"of {prompts} prompts"
        )
