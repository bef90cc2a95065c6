"""Counts that follow from shapes alone: parameters by owner, and model FLOPs per token for MFU. Imports no torch.

Try alone: ``python -c "from models.flops import *; from models.config import *; print(parameter_count(ModelConfig(), 256))"``.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.config import FeedForwardKind, LayerKind, ModelConfig
from models.memory.counts import memory_counts
from models.memory.stack_shapes import StackShapes


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by owner, summed over layers. ``matmul``: those that take part in a matrix product with every token."""

    embedding: int
    head: int
    """0 when the embedding is tied: the output projection then has no parameters of its own."""
    attention: int
    memory: int
    ffn: int
    """Feed-forwards, dense ones and memory layers with product keys (their keys included, their tables not)."""
    tables: int
    """Values of the tables that memory layers with product keys and hierarchical memories read."""
    norms: int
    """RMSNorm weights of the blocks and the final norm; norms inside a mixer belong to the mixer."""
    matmul: int

    @property
    def total(self) -> int:
        """All parameters, each counted once."""
        return self.embedding + self.head + self.attention + self.memory + self.ffn + self.tables + self.norms


def attention_matmul_parameters(config: ModelConfig) -> int:
    """Parameters of one attention layer that are linear projections of every token: wq, wk, wv, wo."""
    query_width = config.n_heads * config.attention_head_dim
    key_width = config.kv_heads * config.attention_head_dim
    return config.d_model * (2 * query_width + 2 * key_width)


def attention_parameters(config: ModelConfig) -> int:
    """Parameters of one attention layer: its projections, their biases and the norms of query and key where it has them."""
    head_dim = config.attention_head_dim
    biases = (config.n_heads + 2 * config.kv_heads) * head_dim if config.qkv_bias else 0
    return attention_matmul_parameters(config) + biases + (2 * head_dim if config.qk_norm else 0)


def ffn_parameters(config: ModelConfig) -> int:
    """Parameters of one SwiGLU: w_gate, w_up, w_down without biases."""
    return 3 * config.d_model * config.ff_width


def product_key_matmul_parameters(config: ModelConfig) -> int:
    """Parameters of one memory layer with product keys that meet every token in a product: query, keys, gate and output
    projection, and the dense feed-forward beside it."""
    keys = config.product_keys
    gated = 2 * config.d_model * config.value_width if keys.gate == "swish" else 0
    expanded = keys.expansion * config.value_width**2 if keys.expansion > 1 else 0
    expanded += ffn_parameters(config) if keys.attach == "beside" else 0
    return (config.d_model + keys.tucker_rank * keys.n_keys) * keys.heads * config.query_dim + gated + expanded


def feed_forward_parameters(config: ModelConfig, kind: FeedForwardKind) -> int:
    """Parameters of one feed-forward of ``kind``; without the table that it reads."""
    if kind != "product_keys":
        return ffn_parameters(config)
    keys = config.product_keys
    core = keys.heads * keys.tucker_rank**2 if keys.tucker_rank > 1 else 0
    return product_key_matmul_parameters(config) + core + (config.query_dim if keys.qk_norm else 0)


def table_parameters(config: ModelConfig) -> int:
    """Values of all tables."""
    return sum(rows * width for rows, width in config.table_shapes)


def memory_matmul_parameters(config: ModelConfig) -> int:
    """Parameters of one memory layer that are linear projections of every token."""
    return memory_counts(config).matmul


def memory_other_parameters(config: ModelConfig) -> int:
    """Parameters of one memory layer outside projections: convolutions, gates' scales and biases, norms."""
    return memory_counts(config).other


def block_parameters(config: ModelConfig, kind: LayerKind, feed_forward: FeedForwardKind = "dense") -> int:
    """Parameters of one block of ``kind``: mixer, feed-forward and its two norms; a table that it reads is the model's."""
    if kind == "memory":
        mixer = memory_matmul_parameters(config) + memory_other_parameters(config)
    else:
        mixer = attention_parameters(config)
    return mixer + feed_forward_parameters(config, feed_forward) + 2 * config.d_model


def stack_parameters(config: ModelConfig) -> int:
    """Parameters of a memory around the stack; 0 without one."""
    return StackShapes.of(config).parameters if config.memory.around_stack else 0


def parameter_count(config: ModelConfig, vocab_size: int) -> ParameterCount:
    """Parameters of ``models.transformer.Transformer(config, vocab_size)``, exactly."""
    kinds = config.layer_kinds
    n_memory = kinds.count("memory")
    n_attention = len(kinds) - n_memory
    attention = n_attention * attention_parameters(config)
    memory_matmul = n_memory * memory_matmul_parameters(config)
    readers = config.feedforward_kinds.count("product_keys")
    dense = (len(kinds) - readers) * ffn_parameters(config)
    embedding = vocab_size * config.d_model
    ffn_matmul = dense + readers * product_key_matmul_parameters(config)
    return ParameterCount(
        embedding=embedding,
        head=0 if config.tie_embeddings else embedding,
        attention=attention,
        memory=memory_matmul + n_memory * memory_other_parameters(config) + stack_parameters(config),
        ffn=dense + readers * feed_forward_parameters(config, "product_keys"),
        tables=table_parameters(config),
        norms=(2 * len(kinds) + 1) * config.d_model,
        matmul=n_attention * attention_matmul_parameters(config) + memory_matmul + ffn_matmul + embedding,
    )


def mean_window_keys(seq_len: int, window: int) -> float:
    """Keys a token sees on average over a sequence: token t sees min(t + 1, window)."""
    full = min(window, seq_len)
    return (full * (full + 1) / 2 + (seq_len - full) * full) / seq_len


def mixing_flops_per_token(config: ModelConfig, kind: LayerKind, seq_len: int) -> float:
    """Forward and backward FLOPs per token of one layer's token mixing, projections not included. See ``model_flops_per_token``."""
    if kind == "memory":
        return memory_counts(config, seq_len).mixing
    width = config.n_heads * config.attention_head_dim
    return 6.0 * seq_len * width if kind == "full" else 12.0 * width * mean_window_keys(seq_len, config.window)


def model_flops_per_token(config: ModelConfig, vocab_size: int, seq_len: int) -> float:
    """Model FLOPs of one token's forward and backward pass; a multiply-add counts 2, backward counts twice forward.

    6 P + sum over layers of
      full attention     6 S Hq D                    (2 products x 2 FLOPs x S/2 causal keys x 3)
      sliding window    12 Hq D mean_t min(t + 1, W)
      product keys       6 E V                       (E = heads x top_k rows of V values read and summed, once for each expansion, x 3)
      hierarchical      18 C U                       (U hidden units of three vectors of C = d_model numbers, those that a document fetches)
      Gated DeltaNet    18 H K V + 6 c H (2K + V)    (per head and token: k S, the rank-1 write and q S, 2 K V each, x 3;
                                                      causal convolution of c taps on q, k and v)
      other memories    ``models/memory/counts.py``
      around the stack  ``models/memory/stack_shapes.py``: all layers on segments with the memory's places
    P: parameters of matrix products (output projection included even when tied, embedding lookup excluded), S: seq_len,
    Hq, D: query heads and their size, W: window, H, K, V: memory heads, key and value size, c: conv_kernel.
    Not counted: recomputation, norms, activations, softmax, the optimizer, the extra products of chunked forms, and the
    savings of document bounds (a token is counted as if the whole sequence before it were its document).
    """
    if config.memory.around_stack:  # every layer sees the memory's places too, and keys of its segment only
        shapes = StackShapes.of(config)
        return 3.0 * shapes.flops_forward(seq_len) / seq_len + 6.0 * vocab_size * config.d_model
    mixing = sum(mixing_flops_per_token(config, kind, seq_len) for kind in config.layer_kinds)
    read = 6.0 * config.product_keys.expansion * config.product_keys.heads * config.product_keys.top_k * config.value_width
    fetched = 18.0 * config.d_model * sum(config.hierarchical.units)
    kinds = config.feedforward_kinds
    tables = read * kinds.count("product_keys") + fetched * kinds.count("hierarchical")
    return 6.0 * parameter_count(config, vocab_size).matmul + mixing + tables
