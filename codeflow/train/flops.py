"""How large a model is and how much work a document costs, without running it.

Attention is counted causally and per document. Counting it over the full square of a packed row,
as is common, would flatter long rows by a factor of up to two.
"""

from __future__ import annotations

from collections.abc import Iterable

from codeflow.train.config import ModelConfig


def parameter_count(config: ModelConfig, *, embeddings: bool = True) -> int:
    """Number of parameters; without `embeddings`, neither the embedding nor the output layer."""
    h, q = config.hidden_size, config.num_attention_heads * config.head_dim
    k = config.num_key_value_heads * config.head_dim
    norms, gate = 2 * h, q + config.num_attention_heads
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
    window, loops, layers = config.loop_window_size, config.loop_num, config.num_hidden_layers
    width = config.num_attention_heads * config.head_dim
    per_token = 2 * loops * layers * _matrix_parameters(config)
    per_token += 2 * (loops - 1) * layers * width  # gates
    per_token += 2 * config.vocab_size * config.hidden_size
    total = 0
    for n in doc_lens:
        reach = min(n, window)
        far = n * (n + 1) // 2
        near = reach * (reach + 1) // 2 + (n - reach) * window
        total += n * per_token + 4 * layers * width * (loops * far + (loops - 1) * near)
    return 3 * total


def _matrix_parameters(config: ModelConfig) -> int:
    h, d = config.hidden_size, config.head_dim
    attention = 2 * h * d * (config.num_attention_heads + config.num_key_value_heads)
    return attention + 3 * h * config.intermediate_size
