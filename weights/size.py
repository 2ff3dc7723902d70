"""How large a model is, and what a step of it costs, before it exists.

    V vocabulary   C width   F feed-forward width   D head_dim   H, K query and key/value heads
"""
from collections.abc import Sequence

import torch

from methods import METHODS
from methods.angles import rotary_dimensions
from model import LOSS_CHUNK, ModelConfig


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters.

        embedding and output   2 V C, or V C if they are tied
        each layer             2 C H D (wq, wo) + 2 C K D (wk, wv) + 3 C F (w1, w2, w3)
                               + 2 C (its norms)
        last norm              C
        CLEX's network         2 P^2 for the P pairs that a head rotates
    """
    embeddings = (1 if config.tied else 2) * config.vocab_size * config.dim
    attention = 2 * config.dim * (config.n_heads + config.n_kv_heads) * config.head_dim
    feed_forward = 3 * config.dim * config.ffn_dim
    layer = attention + feed_forward + 2 * config.dim
    network = 0
    if METHODS[config.rope.rope_type].mechanism == "network":
        pairs = rotary_dimensions(config.rope, config.head_dim) // 2
        network = 2 * pairs * pairs
    return embeddings + config.n_layers * layer + config.dim + network


def flops_per_token(config: ModelConfig, seq_len: int, training: bool = True) -> int:
    """Floating-point operations per token of a text of T tokens, matrix products only.

        forward    2 for each weight of every matrix except the embedding table,
                   and 4 H D (T+1)/2 a layer for q.k and p.v: a causal token sees (T+1)/2 keys
                   on average
        training   3 forward, as the backward pass costs twice as much (4 with recompute)
    """
    norms = (2 * config.n_layers + 1) * config.dim
    matrices = parameter_count(config) - norms
    if not config.tied:
        matrices -= config.vocab_size * config.dim
    attention = 4 * config.n_heads * config.head_dim * (seq_len + 1) / 2
    forward = 2 * matrices + config.n_layers * attention
    return int(3 * forward if training else forward)


def evaluation_flops(config: ModelConfig, lengths: Sequence[int], documents: int, length: int,
                     keys: int) -> float:
    """Floating-point operations to measure, at every length n, perplexity on documents of `length`
    tokens with stride n / 4, and `keys` passkeys."""
    flops = 0.0
    scored = length - 1  # all but the first token
    for n in lengths:
        read = documents * max(4 * scored - 3 * n, scored) + keys * n
        flops += read * flops_per_token(config, n, training=False)
    return flops


def training_bytes(config: ModelConfig, rows: int, seq_len: int,
                   dtype: torch.dtype = torch.float32, recompute: bool = False,
                   attention: str = "sdpa") -> int:
    """Memory of a training step in bytes, good to about 30 %.

        weights       16 a parameter: the weight, its gradient and AdamW's two moments in float32
        activations   9 C + 3 K D + 4 F numbers of `dtype` for each token and layer: the inputs of
                      norms, matrices and products; with recompute C float32, and that of one layer
        scores        naive attention over T tokens adds H T float32 to that, and 3 H T once
        logits        three float32 copies of a chunk
    """
    numbers = 9 * config.dim + 3 * config.n_kv_heads * config.head_dim + 4 * config.ffn_dim
    layer = numbers * dtype.itemsize  # bytes for each token
    scores = config.n_heads * seq_len * 4 if attention == "naive" else 0
    layer += scores
    activations = config.n_layers * layer + 3 * scores
    if recompute:
        activations = config.n_layers * config.dim * 4 + layer + 3 * scores
    logits = 3 * 4 * min(LOSS_CHUNK, rows * seq_len * config.vocab_size)
    return 16 * parameter_count(config) + rows * seq_len * activations + logits
