"""Generation with the caches that the loops need, so that decoding equals the full forward pass.

The first loop keeps the keys and values of every token. A later loop attends globally to those and
locally to its own last W; so of its own it keeps W, in a ring where each token takes the place of
the one that has just left the window. Keys are kept after RoPE, so their order does not matter. All
caches are allocated once. Prompts run through the model once, laid one after another; after that
every pass adds one token to each sample. The mathematics is that of the model's own layers.

The weights must be whole: a model sharded by FSDP has to be copied into one that is not.

`python -m codeflow.train.generate` prints the continuation of a prompt.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from codeflow.errors import CodeflowError, UsageError, did_you_mean, printable
from codeflow.train.arguments import END, generation
from codeflow.train.attention import Documents
from codeflow.train.inference import open_model, weights_folder
from codeflow.train.model import Layer, LoopCoder, rope_table


@dataclass(frozen=True)
class Generation:
    """One sampled continuation.

    Attributes:
        tokens: What follows the prompt, up to and with the stop token.
        log_probs: ln p of each token under the model itself, at temperature 1 and without
            truncation, whatever distribution it was sampled from.
        stopped: Whether it ended with a stop token and not for want of room.
    """

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    stopped: bool


def generate(
    model: LoopCoder,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    n: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop_ids: Collection[int] = (),
    seed: int = 0,
    generator: torch.Generator | None = None,
) -> list[Generation]:
    """`n` continuations of one prompt; see `generate_batch`."""
    (samples,) = generate_batch(
        model,
        [prompt_ids],
        max_new_tokens=max_new_tokens,
        n=n,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_ids=stop_ids,
        seed=seed,
        generator=generator,
    )
    return samples


@torch.no_grad()
def generate_batch(
    model: LoopCoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    n: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop_ids: Collection[int] = (),
    seed: int = 0,
    generator: torch.Generator | None = None,
) -> list[list[Generation]]:
    """`n` continuations of every prompt, all decoded together.

    A sample that has stopped is computed on until half of the samples have; then these leave the
    batch. The caches take, in bytes, 2 Hk D L * size of the dtype for every token of every sample.

    Args:
        model: On the device to compute on. Weights of another dtype than its activations are cast
            in every pass; for many tokens use a copy cast with `.to(model.dtype)`.
        prompts: Token ids; lengths may differ.
        max_new_tokens: At most so many tokens follow a prompt.
        n: Samples per prompt.
        temperature: Divides the logits; 0 always takes the most probable token.
        top_k: Sample from the k most probable tokens only.
        top_p: Sample from the most probable tokens that together just reach this probability,
            after temperature and `top_k`.
        stop_ids: Tokens that end a sample.
        seed: Of the sampling; the same seed, prompts and options give the same tokens.
        generator: Instead of the seed, one on the model's device, to go on from where it is.

    Returns:
        For every prompt its `n` samples.

    Raises:
        UsageError: An option out of range, a prompt that is empty or has ids that the model lacks,
            or prompts that with the new tokens are longer than the model's context.
    """
    _require_options(max_new_tokens, n, temperature, top_k, top_p)
    _require_prompts(model, prompts, max_new_tokens)
    device = model.head_weight.device
    if generator is None:
        generator = torch.Generator(device).manual_seed(seed)
    stop = frozenset(stop_ids)
    cache = Cache(model, [len(prompt) for prompt in prompts], n, max_new_tokens)
    logits = _prefill(model, prompts, cache).repeat_interleave(n, 0)

    samples = [_Sample() for _ in range(n * len(prompts))]
    running = list(range(len(samples)))  # the sample of each row of the batch
    for step in range(max_new_tokens):
        tokens = choose(logits, temperature, top_k, top_p, generator)
        log_probs = logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
        for number, token, log_prob in zip(
            running, tokens.tolist(), log_probs.tolist(), strict=True
        ):
            samples[number].add(token, log_prob, stop)
        rows = [row for row, number in enumerate(running) if not samples[number].stopped]
        if not rows or step + 1 == max_new_tokens:
            break
        if len(rows) <= len(running) // 2:
            running = [running[row] for row in rows]
            kept = torch.tensor(rows, device=device)
            cache.keep(kept)
            tokens = tokens[kept]
        logits = _decode(model, tokens, cache)
    done = [sample.finished() for sample in samples]
    return [done[i : i + n] for i in range(0, len(done), n)]


def choose(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float,
    generator: torch.Generator,
) -> Tensor:
    """A token for each row of float32 logits, (B, V) to (B,); options as in `generate_batch`.

    Source: Holtzman et al. 2020 for `top_p` (nucleus sampling).
    """
    if temperature == 0:
        return logits.argmax(-1)
    scaled = logits / temperature
    if top_k is None and top_p == 1:
        return torch.multinomial(scaled.softmax(-1), 1, generator=generator).squeeze(-1)
    scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        scaled, order = scaled[:, :top_k], order[:, :top_k]
    p = scaled.softmax(-1)
    before = p.cumsum(-1) - p  # 0 for the first, which is therefore always kept
    place = torch.multinomial(p.masked_fill(before >= top_p, 0.0), 1, generator=generator)
    return order.gather(-1, place).squeeze(-1)


class Ring:
    """Keys and values of the last `capacity` tokens of each sample, for one layer and loop.

    Token t lies at place t modulo `capacity`; a ring that is never full is a plain cache.
    """

    def __init__(self, samples: int, heads: int, capacity: int, dim: int, like: Tensor) -> None:
        self.capacity = capacity
        self.k, self.v = like.new_zeros((2, samples, heads, capacity, dim)).unbind(0)

    def fill(self, samples: slice, k: Tensor, v: Tensor) -> None:
        """Put the tokens of a prompt, (T, Hk, D) from position 0, into the rings of its samples."""
        kept = min(len(k), self.capacity)
        place = torch.arange(len(k) - kept, len(k), device=k.device) % self.capacity
        self.k[samples, :, place] = k[-kept:].transpose(0, 1)
        self.v[samples, :, place] = v[-kept:].transpose(0, 1)

    def add(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Put one token into each ring, k and v (B, Hk, D), positions (B,)."""
        sample = torch.arange(len(k), device=k.device)
        self.k[sample, :, positions % self.capacity] = k
        self.v[sample, :, positions % self.capacity] = v

    def attend(self, q: Tensor, longest: int, visible: Tensor | None) -> Tensor:
        """Attention of each sample's newest token, (B, Hq, D), to everything in its ring.

        Args:
            q: Queries.
            longest: Tokens of the longest sample; places from there on are empty.
            visible: bool (B, longest or more), where samples differ in length: which places are
                not empty.
        """
        filled = min(longest, self.capacity)
        mask = None if visible is None else visible[:, None, None, :filled]
        # The query heads that share a key head are laid out as queries of that head.
        grouped = q.view(len(q), self.k.shape[1], -1, q.shape[-1])
        out = F.scaled_dot_product_attention(
            grouped, self.k[:, :, :filled], self.v[:, :, :filled], attn_mask=mask
        )
        return out.reshape(q.shape)

    def keep(self, samples: Tensor) -> None:
        self.k, self.v = self.k[samples], self.v[samples]


class Cache:
    """What every sample remembers: a ring for each loop and layer, and where it stands.

    Args:
        model: Whose tokens these are.
        lengths: Tokens of each prompt.
        n: Samples of each prompt; those of a prompt lie side by side.
        max_new_tokens: Room for so many tokens after the prompts.
    """

    def __init__(
        self, model: LoopCoder, lengths: Sequence[int], n: int, max_new_tokens: int
    ) -> None:
        c, device = model.config, model.head_weight.device
        self.longest = max(lengths)
        self.n, self.same_length = n, len(set(lengths)) == 1
        self.positions = torch.tensor(lengths, device=device).repeat_interleave(n)  # of the next
        samples, total = n * len(lengths), self.longest + max_new_tokens
        like = torch.empty(0, device=device, dtype=model.dtype)
        self.rings = [
            [
                Ring(samples, c.num_key_value_heads, capacity, c.head_dim, like)
                for _ in range(c.num_hidden_layers)
            ]
            for capacity in [total] + [min(c.loop_window_size, total)] * (c.loop_num - 1)
        ]

    def advance(self) -> None:
        """Count the token that is in all rings now."""
        self.positions = self.positions + 1
        self.longest += 1

    def visible(self) -> Tensor | None:
        """Which places hold a token once the next one is in; None when all up to it do."""
        if self.same_length:
            return None
        places = torch.arange(self.longest + 1, device=self.positions.device)
        return places <= self.positions[:, None]

    def keep(self, samples: Tensor) -> None:
        """Drop all but some samples."""
        self.positions = self.positions[samples]
        for rings in self.rings:
            for ring in rings:
                ring.keep(samples)


class _Projections(NamedTuple):
    """Of one layer in one loop, for the tokens of a pass: q (T, Hq, D), k and v (T, Hk, D)."""

    q: Tensor
    k: Tensor
    v: Tensor


class _Attention(Protocol):
    """How the tokens of a pass attend; both methods first put their keys and values away."""

    def first_loop(self, layer: int, new: _Projections) -> Tensor:
        """Global attention, (T, Hq, D)."""

    def later_loop(self, loop: int, layer: int, new: _Projections) -> tuple[Tensor, Tensor]:
        """Global attention to the first loop, and local attention to this one."""


class _OfPrompts:
    """Attention of whole prompts, by the model's own back end; fills the cache."""

    def __init__(self, model: LoopCoder, docs: Documents, cache: Cache) -> None:
        self._layers = _layers(model)
        self._docs, self._cache = docs, cache
        self._memory: list[_Projections] = []

    def first_loop(self, layer: int, new: _Projections) -> Tensor:
        self._memory.append(new)
        self._store(self._cache.rings[0][layer], new)
        attention = self._layers[layer].attention
        return attention.global_attention(new.q, new.k, new.v, self._docs)

    def later_loop(self, loop: int, layer: int, new: _Projections) -> tuple[Tensor, Tensor]:
        self._store(self._cache.rings[loop][layer], new)
        first, attention = self._memory[layer], self._layers[layer].attention
        window = self._layers[layer].window
        far = attention.global_attention(new.q, first.k, first.v, self._docs)
        near = attention.local_attention(new.q, new.k, new.v, self._docs, window)
        return far, near

    def _store(self, ring: Ring, new: _Projections) -> None:
        lengths, n = list(self._docs.lengths), self._cache.n
        parts = zip(torch.split(new.k, lengths), torch.split(new.v, lengths), strict=True)
        for number, (k, v) in enumerate(parts):
            ring.fill(slice(number * n, (number + 1) * n), k, v)


class _OfNextTokens:
    """Attention of one new token of each sample to the cache."""

    def __init__(self, cache: Cache) -> None:
        self._cache, self._visible = cache, cache.visible()

    def first_loop(self, layer: int, new: _Projections) -> Tensor:
        return self._put_and_attend(self._cache.rings[0][layer], new)

    def later_loop(self, loop: int, layer: int, new: _Projections) -> tuple[Tensor, Tensor]:
        far = self._attend(self._cache.rings[0][layer], new)
        return far, self._put_and_attend(self._cache.rings[loop][layer], new)

    def _put_and_attend(self, ring: Ring, new: _Projections) -> Tensor:
        ring.add(new.k, new.v, self._cache.positions)
        return self._attend(ring, new)

    def _attend(self, ring: Ring, new: _Projections) -> Tensor:
        return ring.attend(new.q, self._cache.longest + 1, self._visible)


def _prefill(model: LoopCoder, prompts: Sequence[Sequence[int]], cache: Cache) -> Tensor:
    """Run the prompts through; float32 logits of what follows each, (prompts, V)."""
    device = cache.positions.device
    docs = Documents.of([len(prompt) for prompt in prompts], device)
    ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    hidden = _pass(model, ids, docs.positions, _OfPrompts(model, docs, cache))
    return model.logits(hidden[docs.cu_seqlens[1:] - 1]).float()


def _decode(model: LoopCoder, tokens: Tensor, cache: Cache) -> Tensor:
    """Run one token of each sample through; float32 logits of what follows it, (B, V)."""
    hidden = _pass(model, tokens, cache.positions, _OfNextTokens(cache))
    cache.advance()
    return model.logits(hidden).float()


def _pass(model: LoopCoder, ids: Tensor, positions: Tensor, attention: _Attention) -> Tensor:
    """The forward pass of the model, with another attention: (T,) to (T, hidden_size)."""
    embedded = model.model.embed_tokens(ids).to(model.dtype)
    rope = rope_table(positions, model.config.head_dim, model.config.rope_theta, model.dtype)
    x = embedded
    for loop in range(model.config.loop_num):
        if loop:
            x = model.next_loop(x, embedded)
        for number, layer in enumerate(_layers(model)):
            new = _Projections(*layer.before_attention(x, rope))
            if loop == 0:
                x = layer.after_attention(x, attention.first_loop(number, new))
            else:
                far, near = attention.later_loop(loop, number, new)
                x, _ = layer.after_both_attentions(x, new.q, far, near)
    hidden: Tensor = model.model.norm(x)
    return hidden


def _layers(model: LoopCoder) -> list[Layer]:
    return cast(list[Layer], list(model.model.layers))


class _Sample:
    """A continuation that is being generated."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.stopped = False

    def add(self, token: int, log_prob: float, stop: frozenset[int]) -> None:
        if not self.stopped:
            self.tokens.append(token)
            self.log_probs.append(log_prob)
            self.stopped = token in stop

    def finished(self) -> Generation:
        return Generation(tuple(self.tokens), tuple(self.log_probs), self.stopped)


def _require_options(
    max_new_tokens: int, n: int, temperature: float, top_k: int | None, top_p: float
) -> None:
    counts = {"max_new_tokens": max_new_tokens, "n": n, "top_k": 1 if top_k is None else top_k}
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"{name} must be at least 1, not {count}")
    if not 0 <= temperature < float("inf"):
        raise UsageError(f"temperature must be at least 0 and finite, not {temperature}")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p must be above 0 and at most 1, not {top_p}")


def _require_prompts(
    model: LoopCoder, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    context, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    if not prompts or not min(len(prompt) for prompt in prompts):
        raise UsageError("a prompt needs at least one token; start from the end-of-text token")
    longest = max(len(prompt) for prompt in prompts)
    if longest + max_new_tokens > context:
        raise UsageError(
            f"a prompt of {longest:,} tokens and {max_new_tokens:,} new ones do not fit the "
            f"model's context of {context:,}; shorten the prompt or ask for fewer"
        )
    ids = [token for prompt in prompts for token in prompt]
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise UsageError(
            f"the prompt has token {max(ids) if max(ids) >= vocabulary else min(ids)}, the model "
            f"has tokens 0 to {vocabulary - 1}; was it made with another tokenizer?"
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return execute(generation().parse_args(arguments))


def execute(options: argparse.Namespace) -> int:
    """Do what was typed; returns the exit code."""
    try:
        tokenizer = _read_tokenizer(options)
        stop_ids = [_control_id(tokenizer, token) for token in options.stop]
        if not options.stop and (end := tokenizer.token_to_id(END)) is not None:
            stop_ids = [end]
        prompt = tokenizer.encode(_read_prompt(options), add_special_tokens=False).ids
        model, _ = open_model(options)
        samples = generate(
            model.to(model.dtype),  # cast once and not for every token
            prompt,
            max_new_tokens=options.max_new_tokens,
            n=options.samples,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            stop_ids=stop_ids,
            seed=options.seed,
        )
    except CodeflowError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    texts = [tokenizer.decode(list(s.tokens[: -1 if s.stopped else None])) for s in samples]
    if options.json:
        pairs = zip(texts, samples, strict=True)
        print(json.dumps([{"text": text, **dataclasses.asdict(s)} for text, s in pairs]))
        return 0
    for number, text in enumerate(texts, 1):
        if len(texts) > 1:
            print(f"--- sample {number} of {len(texts)}")
        print(printable(text))
    return 0


def _read_tokenizer(options: argparse.Namespace) -> Tokenizer:
    file = options.tokenizer or weights_folder(Path(options.checkpoint)) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_str(Path(file).read_text(encoding="utf-8"))
    except Exception as e:  # the library raises bare Exception for any malformed file
        raise UsageError(
            f"{file}: cannot be read as a tokenizer.json: {e}. Give the one of the shards that "
            "the model was trained on with --tokenizer."
        ) from e
    tokenizer.no_truncation()  # a file may carry either
    tokenizer.no_padding()
    return tokenizer


def _read_prompt(options: argparse.Namespace) -> str:
    if options.prompt_file is None:
        return str(options.prompt)
    try:
        return Path(options.prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as e:
        raise UsageError(f"{options.prompt_file}: cannot be read as a prompt: {e}") from e


def _control_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        known = [t.content for t in tokenizer.get_added_tokens_decoder().values()]
        raise UsageError(f"--stop {token}: is no token. {did_you_mean(token, known)}")
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
