"""From a RopeConfig to the frequencies of a head: the one place where a method is called."""
from torch import Tensor

from common.errors import UserError
from methods.checks import check_attention_factor, check_head
from methods.clex import CLEX, clex_time
from methods.config import RopeConfig
from methods.rarer import resonate
from methods.table import METHODS
from rope import rope_frequencies


def inv_freq(config: RopeConfig, head_dim: int, seq_len: int | None = None,
             network: CLEX | None = None) -> tuple[Tensor, float]:
    """The angle that each pair turns per token, and what multiplies cos and sin.

    config: the method and its settings. head_dim: D, even. seq_len: tokens seen so far, for methods
    that depend on it. network: a model's trained CLEX. Returns (float32 [D/2] in radians per token,
    attention_factor); with a partial_rotary_factor p the frequencies are those of a head of p D.
    Computed in float64 and rounded once. A UserError if settings do not fit the head.
    """
    method = METHODS[config.rope_type]
    rotary_dim = rotary_dimensions(config, head_dim)
    check_head(config, rotary_dim)
    values = {"factor": config.factor,
              "original_window": config.original_max_position_embeddings,
              "seq_len": seq_len or 0,
              "partial_rotary_factor": config.partial_rotary_factor}
    arguments = {name: values[name] for name in method.arguments}      # for linear: factor alone
    settings = config.options if method.distance_map is None else {}   # else they are the map's
    frequencies, attention_factor = method.function(
        rotary_dim, config.base, **arguments, **settings)
    if replaces_attention_factor(config):
        attention_factor = 1.0
    check_attention_factor(config.rope_type, attention_factor)
    if network is not None and method.mechanism == "network":
        t = clex_time(config.original_max_position_embeddings, seq_len or 0,
                      config.setting("max_factor"))
        theta = rope_frequencies(rotary_dim, config.base)
        frequencies = frequencies.float().to(network.up.weight.device) * network(theta, t)
    if config.resonance:
        frequencies = resonate(frequencies)
    return frequencies.float(), float(attention_factor)


def replaces_attention_factor(config: RopeConfig) -> bool:
    """Whether the method's own factor (YaRN's, say) gives way to config.temperature: "none" removes
    it, log_n and llama4 replace it, unless they act in unrotated layers only."""
    if config.temperature is None:
        return False
    return config.temperature == "none" or config.no_rope_layer_interval is None


def rotary_dimensions(config: RopeConfig, head_dim: int) -> int:
    """Elements of a head that are rotated: head_dim, or the share partial_rotary_factor of it."""
    if head_dim < 2 or head_dim % 2:
        raise UserError(f"head_dim {head_dim}: RoPE rotates pairs, so it has to be even "
                        "(dim / n_heads)")
    if METHODS[config.rope_type].full_head:
        return head_dim
    rotary_dim = int(head_dim * config.partial_rotary_factor)
    if rotary_dim < 2 or rotary_dim % 2:
        raise UserError(f"partial_rotary_factor {config.partial_rotary_factor:g} of head_dim "
                        f"{head_dim}: has to leave an even number of elements to rotate")
    return rotary_dim


def build_clex(config: RopeConfig, head_dim: int) -> CLEX | None:
    """The trainable part of a method: a fresh CLEX, or None for all others."""
    if METHODS[config.rope_type].mechanism != "network":
        return None
    return CLEX(rotary_dimensions(config, head_dim) // 2)


def depends_on_length(config: RopeConfig) -> bool:
    """Whether angles change as the text grows. Every change makes cached keys and values stale."""
    return METHODS[config.rope_type].length_dependent or config.random_positions is not None
