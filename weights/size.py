"""How large a model is, and what a step of it costs, before it exists.

    V vocabulary   C width   F feed-forward width   D head_dim   H, K query and key/value heads
"""
from collections.abc import Sequence

from methods import METHODS
from methods.angles import rotary_dimensions
from model import ModelConfig


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters.

        embedding and output   2 V C, or V C if they are tied
        each layer             2 C H D (wq, wo) + 2 C K D (wk, wv) + 3 C F (w1, w2, w3)
                               + 2 C (its norms)
        last norm              C
        CLEX's network         2 P^2 for the P pairs that a head rotates
    """
    embeddings = (1 if config.tied else 2) * config.vocab_size * config.dim
    network = 0
    if METHODS[config.rope.rope_type].mechanism == "network":
        pairs = rotary_dimensions(config.rope, config.head_dim) // 2
        network = 2 * pairs * pairs
    return embeddings + config.n_layers * block_parameters(config) + config.dim + network


def block_parameters(config: ModelConfig) -> int:
    """Parameters of one layer."""
    attention = 2 * config.dim * (config.n_heads + config.n_kv_heads) * config.head_dim
    return attention + 3 * config.dim * config.ffn_dim + 2 * config.dim


def matrix_parameters(config: ModelConfig) -> int:
    """Weights of every matrix except the embedding table, which is only looked up."""
    norms = (2 * config.n_layers + 1) * config.dim
    table = 0 if config.tied else config.vocab_size * config.dim
    return parameter_count(config) - norms - table


def flops_per_token(config: ModelConfig, seq_len: int, training: bool = True) -> int:
    """Floating-point operations per token of a text of T tokens, matrix products only.

        forward    2 for each weight of every matrix except the embedding table,
                   and 4 H D (T+1)/2 a layer for q.k and p.v: a causal token sees (T+1)/2 keys
                   on average
        training   3 forward, as the backward pass costs twice as much (4 with recompute)
    """
    attention = 4 * config.n_heads * config.head_dim * (seq_len + 1) / 2
    forward = 2 * matrix_parameters(config) + config.n_layers * attention
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
