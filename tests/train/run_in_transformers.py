"""Runs in its own process, with one version of transformers on the path; not a test by itself.

    python run_in_transformers.py WORK

WORK holds exported models (`looped`, `second`, `tied`, `llama`, `gateless`) and `ids.safetensors`.
Results are written to WORK/results.safetensors, WORK/results.json and WORK/saved-*.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

WORK = Path(sys.argv[1])
IDS = load_file(WORK / "ids.safetensors")["ids"]
PROMPT, NEW = 9, 12
tensors: dict[str, Tensor] = {}
facts: dict[str, Any] = {"version": transformers.__version__}


def load(name: str, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(WORK / name, trust_remote_code=True, **options)
    model.generation_config.eos_token_id = None  # all texts of a batch become equally long
    return model.eval()


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options
    )


def padded(left: int, right: int) -> tuple[Tensor, Tensor]:
    """The prompts between columns of another token, and their mask."""
    inside = IDS[:, :PROMPT]
    columns = (torch.full((len(IDS), n), 7) for n in (left, right))
    ids = torch.cat([next(columns), inside, next(columns)], 1)
    mask = torch.zeros_like(ids)
    mask[:, left : left + PROMPT] = 1
    return ids, mask


@torch.no_grad()
def look_at_inference(name: str, model: Any) -> None:
    full = model(IDS)
    tensors[f"{name}/logits"] = full.logits
    facts[f"{name}/cache"] = type(full.past_key_values).__name__
    # Several tokens at a time, one at a time, and across the edge of the window.
    cache, parts, at = None, [], 0
    for n in (6, 1, 1, 5, 1, 2, IDS.shape[1] - 16):
        out = model(IDS[:, at : at + n], past_key_values=cache, use_cache=True)
        cache, at = out.past_key_values, at + n
        parts.append(out.logits)
    tensors[f"{name}/decoded"] = torch.cat(parts, 1)
    facts[f"{name}/kept"] = sorted({layer.keys.shape[2] for layer in cache.layers})
    tensors[f"{name}/last"] = model(IDS, logits_to_keep=2).logits
    for side, (left, right) in {"left": (3, 0), "right": (0, 3), "both": (2, 2)}.items():
        ids, mask = padded(left, right)
        logits = model(ids, attention_mask=mask).logits
        tensors[f"{name}/padded/{side}"] = logits[:, left : left + PROMPT]
    positions = torch.cat([torch.arange(10), torch.arange(IDS.shape[1] - 10)])[None]
    tensors[f"{name}/packed"] = model(IDS[:1], position_ids=positions, use_cache=False).logits


@torch.no_grad()
def look_at_generation(name: str, model: Any) -> None:
    calls: list[int] = []
    watch = model.model.embed_tokens.register_forward_pre_hook(
        lambda _, arguments: calls.append(arguments[0].shape[1])
    )
    tensors[f"{name}/generated"] = generate(model, IDS[:, :PROMPT], use_cache=True)
    facts[f"{name}/read"] = list(calls)
    watch.remove()
    # Greedy by hand, without any cache.
    ids = IDS[:, :PROMPT]
    for _ in range(NEW):
        best = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], 1)
    tensors[f"{name}/by hand"] = ids
    left, mask = padded(3, 0)
    generated = generate(model, left, mask)
    tensors[f"{name}/generated after padding"] = generated[:, 3:]
    tensors[f"{name}/beams"] = generate(model, IDS[:, :PROMPT], num_beams=3)
    tensors[f"{name}/beams without cache"] = generate(
        model, IDS[:, :PROMPT], num_beams=3, use_cache=False
    )


def look_at_training(name: str, model: Any) -> None:
    labels = IDS.clone()
    labels[0, :5] = -100
    model.train()
    out = model(IDS, labels=labels)
    facts[f"{name}/cache in training"] = out.past_key_values is not None
    out.loss.backward()
    tensors[f"{name}/loss"] = out.loss.detach()
    for parameter_name, p in model.named_parameters():
        tensors[f"{name}/grad/{parameter_name}"] = p.grad.clone()
    counted = model(IDS, labels=labels, num_items_in_batch=torch.tensor(10))
    tensors[f"{name}/loss of 10 items"] = counted.loss.detach()
    model.zero_grad()


def refusals(model: Any) -> list[str]:
    said = []
    for options in (
        {"output_attentions": True},
        {"attention_mask": torch.ones(2, 1, IDS.shape[1], IDS.shape[1])},
    ):
        try:
            model(IDS, **options)
        except ValueError as e:
            said.append(str(e))
    return said


def main() -> None:
    torch.manual_seed(0)
    for name in ("looped", "second", "tied"):
        model = load(name)
        look_at_inference(name, model)
        look_at_generation(name, model)
        look_at_training(name, model)
        facts[f"{name}/buffers"] = [buffer for buffer, _ in model.named_buffers()]
        model.save_pretrained(WORK / f"saved-{name}")
        with torch.no_grad():
            tensors[f"{name}/logits after saving"] = load(f"saved-{name}")(IDS).logits
    facts["refusals"] = refusals(load("looped"))
    tensors["bfloat16"] = load("looped", dtype=torch.bfloat16)(IDS).logits.float()
    loaded = load("gateless")
    for i, gate in enumerate(loaded.model.gate_projections):
        tensors[f"gateless/{i}/weight"] = gate.weight.detach()
        tensors[f"gateless/{i}/bias"] = gate.bias.detach()
    llama = AutoModelForCausalLM.from_pretrained(WORK / "llama").eval()
    facts["llama"] = type(llama).__name__
    with torch.no_grad():
        tensors["llama"] = llama(IDS).logits
    tokenizer = AutoTokenizer.from_pretrained(WORK / "looped", trust_remote_code=True)
    facts["tokenizer"] = tokenizer("a b <|endoftext|>")["input_ids"]
    facts["eos"] = tokenizer.eos_token_id
    # The other way: a Llama made here, in shards, for the trainer to import.
    shape = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    dense = LlamaForCausalLM(shape).eval()
    dense.save_pretrained(WORK / "dense", max_shard_size="20KB")
    with torch.no_grad():
        tensors["dense"] = dense(IDS).logits
    save_file({n: t.contiguous() for n, t in tensors.items()}, WORK / "results.safetensors")
    (WORK / "results.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
