"""Start a looped model from a dense one, or from another looped one.

Everything the two have in common is copied. What the source lacks is set so that the model starts
as close to it as it can: gates to zero (half global, half local), rows of a larger vocabulary to
the mean of the source's rows. With one loop the model then *is* the source.

A dense model with k times the layers can be folded: the looped model takes every k-th or so of
them, evenly spaced from the first to the last, because the layers next to the embedding and to the
output layer are the least like the others.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from codeflow.train.config import ModelConfig
from codeflow.train.errors import CheckpointError
from codeflow.train.hf_config import read_hf_config
from codeflow.train.hf_weights import (
    Stored,
    fill,
    missing_gates,
    stored_tensors,
    without_tied_head,
    zero_gates,
)
from codeflow.train.model import LoopCoder

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
#: Settings without which copied weights would mean something else.
_COMMON = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rms_norm_eps", "rope_theta", "attention_bias", "mlp_bias",
)  # fmt: skip


def initialise_from(model: LoopCoder, folder: str | Path, *, fold: bool = False) -> None:
    """Give a model the weights of a folder with a Llama or a LoopCoder.

    Number of loops, window, context and (upwards) the vocabulary may differ from the source's.
    Untied output weights may come from a tied source.

    Args:
        model: Whole and on one device, not yet sharded; all its weights are replaced.
        folder: `config.json` and `*.safetensors`.
        fold: Take evenly spaced layers of a dense source that has k times the model's layers.

    Raises:
        UsageError: The source's `config.json` is unusable.
        CheckpointError: The source is another model, or its weights are unusable.
    """
    folder = Path(folder)
    source = read_hf_config(folder)
    chosen = _chosen_layers(model.config, source, folder, fold)
    _require_common(model.config, source, folder)
    own = model.state_dict()
    stored = without_tied_head(own, _renumbered(stored_tensors(folder), chosen))
    if _HEAD in own and source.tie_word_embeddings and _EMBEDDING in stored:
        stored.setdefault(_HEAD, stored[_EMBEDDING])
    gates = missing_gates(own, stored)
    _require_shapes(own, stored, gates, folder)
    fill({name: own[name] for name in stored}, stored)
    zero_gates({name: own[name] for name in gates})


def folded_layers(source: int, target: int) -> list[int]:
    """The layers that a folded model takes: evenly spaced, the first and the last among them.

    Args:
        source: Layers of the dense model, a multiple of `target`.
        target: Layers of the looped model.
    """
    if target == 1:
        return [0]
    # Rounded to the nearest in whole numbers, so that every machine takes the same layers.
    steps = target - 1
    return [(2 * i * (source - 1) + steps) // (2 * steps) for i in range(target)]


def _chosen_layers(target: ModelConfig, source: ModelConfig, folder: Path, fold: bool) -> list[int]:
    have, want = source.num_hidden_layers, target.num_hidden_layers
    if not fold:
        if have != want:
            hint = "; fold it" if have % want == 0 and source.loop_num == 1 else ""
            raise CheckpointError(f"{folder}: has {have} layers, the model has {want}{hint}")
        return list(range(want))
    if source.loop_num > 1:
        raise CheckpointError(f"{folder}: runs {source.loop_num} loops; only dense models fold")
    if have % want or have == want:
        raise CheckpointError(
            f"{folder}: {have} layers do not fold into {want}: they must be a multiple of them"
        )
    return folded_layers(have, want)


def _require_common(target: ModelConfig, source: ModelConfig, folder: Path) -> None:
    differing = [
        f"model.{name} is {getattr(target, name)}, there {getattr(source, name)}"
        for name in _COMMON
        if getattr(target, name) != getattr(source, name)
    ]
    if target.vocab_size < source.vocab_size:
        differing.append(
            f"model.vocab_size is {target.vocab_size}, there {source.vocab_size}: it may only grow"
        )
    if target.tie_word_embeddings and not source.tie_word_embeddings:
        differing.append("model.tie_word_embeddings is true, there false")
    if differing:
        raise CheckpointError(f"{folder}: cannot start the model: {'; '.join(differing)}")


def _renumbered(stored: dict[str, Stored], chosen: list[int]) -> dict[str, Stored]:
    """The tensors by their names in the model; layers that were not chosen are left out."""
    position = {layer: i for i, layer in enumerate(chosen)}
    result = {}
    for name, tensor in stored.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            result[name] = tensor
        elif int(match[1]) in position:
            result[f"model.layers.{position[int(match[1])]}.{match[2]}"] = tensor
    return result


def _require_shapes(
    own: dict[str, Tensor], stored: dict[str, Stored], gates: set[str], folder: Path
) -> None:
    problems = [f"{n} is missing" for n in own.keys() - stored.keys() - gates]
    problems += [f"{n} is not part of the model" for n in stored.keys() - own.keys()]
    for name in own.keys() & stored.keys():
        have, want = stored[name].shape, tuple(own[name].shape)
        grows = name in (_EMBEDDING, _HEAD) and have[0] <= want[0] and have[1:] == want[1:]
        if have != want and not grows:
            problems.append(f"{name} is {list(have)}, the model has {list(want)}")
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        raise CheckpointError(
            f"{folder}: weights do not fit the model ({len(problems)} differences): {shown}"
        )
