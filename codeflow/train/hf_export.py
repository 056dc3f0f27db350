"""Write a model as a folder that transformers and vLLM load.

    config.json, generation_config.json         generation only where an end token is known
    model.safetensors                           or shards and model.safetensors.index.json
    configuration_loopcoder.py, modeling_loopcoder.py       for `trust_remote_code=True`
    tokenizer.json, tokenizer_config.json       where a tokenizer was given

Gates are named `model.gate_projections.N.*`, the only naming that all tools read; those of a
LoopCoder-V2 that read the residual stream `model.layers.N.self_attn.plt_gate.*`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from codeflow.errors import UsageError, did_you_mean
from codeflow.train.arguments import SHARD_BYTES
from codeflow.train.config import ModelConfig
from codeflow.train.errors import CheckpointError
from codeflow.train.hf_config import to_hf, to_llama
from codeflow.train.hf_tokenizer import copy_tokenizer
from codeflow.train.hf_weights import INDEX, SINGLE, hf_name, is_gate, load_model
from codeflow.train.model import LoopCoder

Target = Literal["transformers", "vllm", "llama"]
_CODE = ("configuration_loopcoder.py", "modeling_loopcoder.py")


def export(
    model: LoopCoder | str | Path,
    out: str | Path,
    *,
    target: Target = "transformers",
    shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype = torch.float32,
    tokenizer: str | Path | None = None,
) -> Path:
    """Write a model for other tools; the folder appears whole or not at all.

    Args:
        model: A model, not sharded, or a checkpoint's folder.
        out: The folder to make; it must not exist.
        target: `transformers`, `vllm` (the same files, but refuses what vLLM would compute
            otherwise) or, for a model with one loop, `llama` (needs no code of ours).
        shard_bytes: Most bytes of weights in a file; twice as much memory is needed meanwhile.
        dtype: Of the weights. float32 loses nothing.
        tokenizer: A `tokenizer.json`, or a folder with one and its `tokenizer_config.json`.

    Returns:
        `out`.

    Raises:
        UsageError: `out` exists, or the target cannot have this model or tokenizer.
        CheckpointError: The checkpoint cannot be read, or the folder cannot be written.
    """
    if target not in get_args(Target):
        raise UsageError(
            f"target {target!r} does not exist. {did_you_mean(target, get_args(Target))}"
        )
    out = Path(out)
    if out.exists():
        raise UsageError(f"{out}: exists already; delete it or name another folder")
    loaded = model if isinstance(model, LoopCoder) else load_model(model)
    config = loaded.config
    _refuse(config, target)
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"tmp-{out.name}-", dir=out.parent))
        temporary.chmod(0o755)  # not private, as temporary folders are
        content = to_llama(config) if target == "llama" else to_hf(config) | _write_code(temporary)
        if tokenizer is not None:
            special = copy_tokenizer(Path(tokenizer), temporary, config)
            content |= special
            if special:
                _write_json(temporary / "generation_config.json", special)
        content["torch_dtype"] = str(dtype).removeprefix("torch.")
        _write_json(temporary / "config.json", content)
        write_weights(temporary, _named(loaded, target), shard_bytes, dtype)
        temporary.rename(out)
    except OSError as e:
        raise CheckpointError(f"{out}: cannot be written: {e}") from e
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)  # gone already after success
    return out


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int, dtype: torch.dtype
) -> None:
    """Write one file, or several with an index when they exceed `shard_bytes` together."""
    size = torch.finfo(dtype).bits // 8
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.numel() * size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += tensor.numel() * size
    files = [SINGLE]
    if len(shards) > 1:
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {name: f for f, names in zip(files, shards, strict=True) for name in names}
        total = sum(t.numel() for t in tensors.values()) * size
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / INDEX, index)
    for file, names in zip(files, shards, strict=True):
        shard = {n: tensors[n].detach().to("cpu", dtype).contiguous() for n in names}
        # Not `save_file`: it makes the file unreadable to everybody but its owner.
        (folder / file).write_bytes(to_bytes(shard, metadata={"format": "pt"}))


def _named(model: LoopCoder, target: Target) -> dict[str, Tensor]:
    tensors = model.state_dict()
    if target == "llama":
        return {name: t for name, t in tensors.items() if not is_gate(name)}
    return {hf_name(name, model.config): t for name, t in tensors.items()}


def _refuse(config: ModelConfig, target: Target) -> None:
    if target == "llama" and config.loop_num > 1:
        raise UsageError(f"target llama: the model runs {config.loop_num} loops, a Llama one")
    if target == "vllm":
        problems = [
            f"{name} is true; vLLM's LoopCoder has no such biases"
            for name in ("attention_bias", "mlp_bias")
            if getattr(config, name)
        ]
        if config.head_dim * config.num_attention_heads != config.hidden_size:
            problems.append(
                f"head_dim {config.head_dim} times num_attention_heads "
                f"{config.num_attention_heads} is not hidden_size {config.hidden_size}, and vLLM "
                "takes hidden_size / num_attention_heads for the width of a head"
            )
        if problems:
            raise UsageError(f"target vllm: {'; '.join(problems)}")


def _write_code(folder: Path) -> dict[str, Any]:
    """Copy the code for transformers; returns what `config.json` says about it."""
    template = resources.files("codeflow.train") / "export_template"
    for name in _CODE:
        (folder / name).write_text((template / name).read_text())
    return {
        "auto_map": {
            "AutoConfig": "configuration_loopcoder.IQuestLoopCoderConfig",
            "AutoModelForCausalLM": "modeling_loopcoder.IQuestLoopCoderForCausalLM",
        }
    }


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")
