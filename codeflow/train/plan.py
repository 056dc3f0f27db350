"""How much memory a training step needs, from the shape of the model alone.

A model of the peak, not a measurement: allocators round up and fragment, and libraries keep
workspaces, so leave a tenth of the device free.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from codeflow.train.config import ModelConfig
from codeflow.train.flops import parameter_count
from codeflow.train.recompute import require_policy

FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device at the peak of a step, by what they are for.

    Attributes:
        weights: Float32 parameters, this rank's share.
        gradients: Their gradients, this rank's share.
        optimizer: The optimizer's state, this rank's share.
        gathered: Whole weights of the layers at work when they are sharded, and the output layer's.
        activations: What the forward pass keeps for the backward pass, cast weights included.
        loop_memory: Keys and values of the first loop and their gradients.
        workspace: Of one layer's backward pass, what is computed again included.
        loss: Logits of a chunk, and the gradient of the output layer.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    loop_memory: int
    workspace: int
    loss: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def memory_plan(
    config: ModelConfig,
    *,
    tokens: int,
    checkpointing: str = "none",
    world_size: int = 1,
    optimizer_bytes: int = 8,
    activation_bytes: int = 2,
    loss_chunk: int = 2048,
) -> MemoryPlan:
    """Memory of a step.

    Args:
        config: The model.
        tokens: Of one forward pass on one device.
        checkpointing: One of `recompute.POLICIES`.
        world_size: Ranks that weights, gradients and optimizer are sharded over (FSDP).
        optimizer_bytes: Per parameter: 8 for AdamW in float32, 4 with moments in bfloat16.
        activation_bytes: 2 for bfloat16, 4 for float32.
        loss_chunk: Tokens whose logits exist at the same time.

    Raises:
        UsageError: A policy that does not exist.
    """
    require_policy(checkpointing)
    h, b = config.hidden_size, activation_bytes
    share = -(-parameter_count(config) // world_size)
    layer = parameter_count(config, embeddings=False) // config.num_hidden_layers
    head = config.vocab_size * h
    tables = head if config.tie_word_embeddings else 2 * head
    # Backward through the MLP: two gradients, and the four activations if they were not kept.
    wide = (2 if checkpointing == "none" else 6) * config.intermediate_size
    # Autograd keeps the weights a loop was computed with, cast; sharded ones are gathered anew.
    cast = checkpointing == "none" and b < FLOAT32 and world_size == 1
    kept_weights = config.loop_num * b * parameter_count(config, embeddings=False) if cast else 0
    return MemoryPlan(
        weights=FLOAT32 * share,
        gradients=FLOAT32 * share,
        optimizer=optimizer_bytes * share,
        # The layer at work and the one fetched ahead of it; the embeddings stay whole.
        gathered=b * (tables + 2 * layer) if world_size > 1 else 0,
        activations=tokens * _activations(config, checkpointing, b) + kept_weights,
        loop_memory=tokens * _loop_memory(config, b),
        workspace=tokens * b * (wide + 4 * h),
        # Logits and their softmax in float32; the head's gradient, its cast and one chunk's share.
        loss=min(tokens, loss_chunk) * config.vocab_size * 2 * FLOAT32 + head * (FLOAT32 + 2 * b),
    )


def _loop_memory(config: ModelConfig, b: int) -> int:
    """Per token: keys and values of the first loop and their gradients."""
    if config.loop_num == 1:
        return 0
    return config.num_hidden_layers * 4 * config.num_key_value_heads * config.head_dim * b


def _activations(config: ModelConfig, checkpointing: str, b: int) -> int:
    """Per token: what all layers keep in all loops, without the loop memory."""
    layers, loops, h = config.num_hidden_layers, config.loop_num, config.hidden_size
    heads, q = config.num_attention_heads, config.num_attention_heads * config.head_dim
    attended = q * b + heads * FLOAT32  # the result of attention and its log-sum-exp
    attentions = 2 * loops - 1
    if checkpointing == "full":
        return layers * loops * h * b
    if checkpointing == "save_attention":
        return layers * (loops * h * b + attentions * attended)
    kv = config.num_key_value_heads * config.head_dim * b
    # A norm keeps its input in float32, and that before and after its weight.
    every = 2 * h * (FLOAT32 + 2 * b) + 4 * config.intermediate_size * b + q * b
    first = attended + (2 * kv if loops == 1 else 0)
    # Own keys and values in pairs of blocks, the mask of the window, what the gate reads and mixes.
    later = 2 * attended + 4 * kv + 2 * FLOAT32 * config.loop_window_size
    later += q * (2 * b + FLOAT32)
    return layers * (loops * every + first + (loops - 1) * later)
