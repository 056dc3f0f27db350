"""How large a model is and how much work a document costs, without running it.

The trainer reports model FLOPs utilisation by two conventions. The exact one counts attention as
it is: causal and per document. The common one counts the full square of every row, which flatters
long rows by a factor of up to two, and is there to be compared with numbers of other trainers.
"""

from __future__ import annotations

from collections.abc import Iterable

from codeflow.train.config import ModelConfig

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "L40S": 362e12,
    "A100": 312e12,
    "A800": 312e12,
}
"""Dense bfloat16 FLOP/s by a part of the device's name, as the makers state them; the first match
counts. H20 comes after H200, whose name holds its own."""


def peak_flops(device_name: str) -> float | None:
    """Peak of a device by its name (`torch.cuda.get_device_name`); None when it is not known."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)


def parameter_count(config: ModelConfig, *, embeddings: bool = True) -> int:
    """Number of parameters; without `embeddings`, neither the embedding nor the output layer."""
    h, q = config.hidden_size, config.num_attention_heads * config.head_dim
    k = config.num_key_value_heads * config.head_dim
    gate = _gate_width(config) + config.num_attention_heads
    norms = (3 if config.plt_gate_use_hidden_states else 2) * h
    biases = config.attention_bias * (q + 2 * k + h)
    biases += config.mlp_bias * (2 * config.intermediate_size + h)
    layer = _matrix_parameters(config) + norms + gate + biases
    tables = 1 if config.tie_word_embeddings else 2
    return config.num_hidden_layers * layer + h + embeddings * tables * config.vocab_size * h


def training_flops(config: ModelConfig, doc_lens: Iterable[int]) -> int:
    """Matrix-product FLOPs of forward and backward (3 x forward) on the given documents.

    One multiply-add is 2 FLOPs; a token at position p attends to p + 1 keys globally and to at
    most `loop_window_size` locally. Recomputation, norms and the softmax are not counted.
    """
    window, loops = config.loop_window_size, config.loop_num
    tokens = pairs = 0
    for n in doc_lens:
        reach = min(n, window)
        far = n * (n + 1) // 2
        near = reach * (reach + 1) // 2 + (n - reach) * window
        tokens += n
        pairs += loops * far + (loops - 1) * near
    return 3 * (tokens * _token_flops(config) + pairs * _pair_flops(config))


def training_flops_noncausal(
    config: ModelConfig, doc_lens: Iterable[int], row_length: int | None = None
) -> int:
    """`training_flops` by the common convention: every token attends to a whole row per loop.

    Args:
        config: The model.
        doc_lens: Lengths of the documents; only their sum matters.
        row_length: Tokens of a packed row; None for one row of all documents.
    """
    tokens = sum(doc_lens)
    pairs = config.loop_num * tokens * (tokens if row_length is None else row_length)
    return 3 * (tokens * _token_flops(config) + pairs * _pair_flops(config))


def _token_flops(config: ModelConfig) -> int:
    """Of the forward pass of a token, without attention."""
    loops, layers = config.loop_num, config.num_hidden_layers
    per_layer = 2 * loops * _matrix_parameters(config) + 2 * (loops - 1) * _gate_width(config)
    return layers * per_layer + 2 * config.vocab_size * config.hidden_size


def _pair_flops(config: ModelConfig) -> int:
    """Of the forward pass of a query and a key, in all heads of all layers."""
    return 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim


def _gate_width(config: ModelConfig) -> int:
    heads = config.num_attention_heads
    return heads * (config.hidden_size if config.plt_gate_use_hidden_states else config.head_dim)


def _matrix_parameters(config: ModelConfig) -> int:
    h, d = config.hidden_size, config.head_dim
    attention = 2 * h * d * (config.num_attention_heads + config.num_key_value_heads)
    return attention + 3 * h * config.intermediate_size
