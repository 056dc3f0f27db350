"""Weights of the Hugging Face format: which file holds what, and how names translate.

Files are read tensor by tensor, so reading needs memory for the model and one tensor more. Weights
of any floating-point type become those of the model, float32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from codeflow.train.config import ModelConfig
from codeflow.train.errors import CheckpointError
from codeflow.train.hf_config import read_hf_config
from codeflow.train.model import LoopCoder

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# A gate has three names in the wild; the first is that of the trainer.
_GATE = re.compile(r"model\.layers\.(\d+)\.gate_projection\.(.+)")
_OTHER_GATES = (
    re.compile(r"model\.gate_projections\.(\d+)\.(.+)"),
    re.compile(r"model\.layers\.(\d+)\.self_attn\.(?:plt_gate|loop_gate_proj)\.(.+)"),
)
# Rotary tables that old files hold; they are computed from the configuration.
_IGNORED = re.compile(r"(.+\.)?rotary_emb\.inv_freq")
_FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    name: str
    shape: tuple[int, ...]


def load_model(
    folder: str | Path, *, backend: str = "auto", dtype: torch.dtype = torch.float32
) -> LoopCoder:
    """A model on the CPU from an HF folder: `config.json` and `*.safetensors` with weights.

    Args:
        folder: Where they are.
        backend: How attention is computed, as for `LoopCoder`.
        dtype: Of the activations; parameters are float32.

    Raises:
        UsageError: `config.json` is unusable.
        CheckpointError: The weights are.
    """
    config = read_hf_config(folder)
    with torch.device("meta"):  # no time for initial weights that nobody will see
        model = LoopCoder(config, backend=backend, dtype=dtype)
    model.to_empty(device="cpu")
    load_weights(model, Path(folder))
    return model


def load_weights(model: LoopCoder, folder: Path) -> None:
    """Fill a model from a folder; every name and shape must match.

    Gates may have any of their names. Weights of a dense Llama have no gates: then, and only then,
    all gates become zero, which means half global, half local.

    Raises:
        CheckpointError: No weights there, or names or shapes that do not fit.
    """
    own = model.state_dict()
    stored = without_tied_head(own, stored_tensors(folder))
    gates = missing_gates(own, stored)
    problems = [f"{n} is missing" for n in own.keys() - stored.keys() - gates]
    problems += [f"{n} is not part of the model" for n in stored.keys() - own.keys()]
    problems += [
        f"{n} is {list(stored[n].shape)}, the model has {list(own[n].shape)}"
        for n in own.keys() & stored.keys()
        if own[n].shape != stored[n].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        raise CheckpointError(
            f"{folder}: weights do not fit its config.json ({len(problems)} differences): {shown}"
        )
    fill({name: own[name] for name in stored}, stored)
    zero_gates({name: own[name] for name in gates})


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """What a folder's files hold, by the trainer's names; no tensor is read.

    Raises:
        CheckpointError: No weights, a file missing, damaged or quantised, or a tensor twice.
    """
    result: dict[str, Stored] = {}
    for file, expected in _files(folder).items():
        try:
            with safe_open(file, framework="pt") as content:
                names = set(content.keys())
                if absent := sorted(expected - names):
                    raise CheckpointError(f"{file}: lacks {absent[0]}, which {INDEX} says it has")
                for name in sorted(expected or names):
                    if _IGNORED.fullmatch(name):
                        continue
                    part = content.get_slice(name)
                    if part.get_dtype() not in _FLOATS:
                        raise CheckpointError(
                            f"{file}: {name} is {part.get_dtype()}: quantised weights are not "
                            "supported, only floating-point ones"
                        )
                    own = own_name(name)
                    if own in result:
                        raise CheckpointError(f"{file}: {name} is there twice, once as {own}")
                    result[own] = Stored(file, name, tuple(part.get_shape()))
        except (OSError, SafetensorError) as e:
            raise CheckpointError(f"{file}: cannot be read: {e}") from e
    return result


def fill(targets: Mapping[str, Tensor], sources: Mapping[str, Stored]) -> None:
    """Copy tensors into place, file by file.

    Args:
        targets: Where to, (n, ...), in the memory of parameters. Where n is more than the source
            has, the rows after it become the mean of the source's rows.
        sources: Where from, for every target.

    Raises:
        CheckpointError: A file is damaged.
    """
    by_file: dict[Path, list[str]] = {}
    for name in targets:
        by_file.setdefault(sources[name].file, []).append(name)
    for file, names in by_file.items():
        try:
            with safe_open(file, framework="pt") as content, torch.no_grad():
                for name in names:
                    tensor = content.get_tensor(sources[name].name)
                    targets[name][: len(tensor)].copy_(tensor)
                    if len(tensor) < len(targets[name]):
                        targets[name][len(tensor) :] = tensor.float().mean(0)
        except (OSError, SafetensorError) as e:
            raise CheckpointError(f"{file}: cannot be read: {e}") from e


def missing_gates(own: Iterable[str], stored: Iterable[str]) -> set[str]:
    """The names of all gates where none is stored; where some are, nothing."""
    if any(_GATE.fullmatch(name) for name in stored):
        return set()
    return {name for name in own if _GATE.fullmatch(name)}


def zero_gates(gates: Mapping[str, Tensor]) -> None:
    """Make gates say half global, half local; the norm before a gate becomes 1."""
    with torch.no_grad():
        for name, gate in gates.items():
            gate.fill_(1.0 if name.endswith("gate_norm.weight") else 0.0)


def own_name(name: str) -> str:
    """The trainer's name of a tensor."""
    for pattern in _OTHER_GATES:
        name = pattern.sub(r"model.layers.\1.gate_projection.\2", name)
    return name


def hf_name(name: str, config: ModelConfig) -> str:
    """The name of one of the trainer's tensors that vLLM and transformers know."""
    if config.plt_gate_use_hidden_states:
        return _GATE.sub(r"model.layers.\1.self_attn.plt_gate.\2", name)
    return _GATE.sub(r"model.gate_projections.\1.\2", name)


def is_gate(name: str) -> bool:
    """Whether one of the trainer's names is that of a gate."""
    return _GATE.fullmatch(name) is not None


def without_tied_head(own: Mapping[str, Any], stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """What is stored, less the output layer of a model that has none of its own.

    Raises:
        CheckpointError: That output layer is not the embedding, so the model is not tied.
    """
    head = stored.get("lm_head.weight")
    if head is None or "lm_head.weight" in own:
        return dict(stored)
    embedding = stored.get("model.embed_tokens.weight")
    if embedding is not None and not torch.equal(_read(head), _read(embedding)):
        raise CheckpointError(
            f"{head.file}: lm_head.weight is not the embedding; tie_word_embeddings must be false"
        )
    return {name: s for name, s in stored.items() if s is not head}


def _read(stored: Stored) -> Tensor:
    try:
        with safe_open(stored.file, framework="pt") as content:
            tensor: Tensor = content.get_tensor(stored.name)
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{stored.file}: cannot be read: {e}") from e
    return tensor


def _files(folder: Path) -> dict[Path, set[str]]:
    """The files of a folder, and the names that its index wants of each: none, if all of them."""
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: set()}
    index = folder / INDEX
    if not index.is_file():
        if files := sorted(folder.glob("model*.safetensors")):
            return {file: set() for file in files}
        raise CheckpointError(f"{folder}: no model*.safetensors")
    try:
        entries = json.loads(index.read_text())["weight_map"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{index}: is not an index of weights: {e!r}") from e
    wanted: dict[Path, set[str]] = {}
    for name, file in entries:
        if Path(str(file)).name != file:
            raise CheckpointError(f"{index}: {file!r} is not the name of a file beside it")
        wanted.setdefault(folder / file, set()).add(name)
    if missing := sorted(str(file.name) for file in wanted if not file.is_file()):
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(wanted)} files of weights are missing: "
            f"{', '.join(missing[:5])}. Download or copy them again."
        )
    return wanted
