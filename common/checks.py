"""The door for a model's shape: numbers that follow from others, and impossible ones refused."""
import math
from typing import Any

from common.errors import UserError

COUNTS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len")


def complete_shape(config: Any) -> None:
    """Fill in n_kv_heads, head_dim and ffn_dim of a ModelConfig where they follow from the others,
    and refuse numbers that are no counts or heads that do not divide evenly."""
    if config.n_kv_heads is None:
        config.n_kv_heads = config.n_heads
    for name in COUNTS:
        require_count(config, name)
    if config.head_dim is None:
        if config.dim % (2 * config.n_heads):
            raise UserError(f"dim {config.dim} / n_heads {config.n_heads}: has to be an even whole "
                            "number, the head_dim that RoPE pairs up")
        config.head_dim = config.dim // config.n_heads
    if config.ffn_dim is None:
        config.ffn_dim = meta_ffn_dim(config)
    require_count(config, "ffn_dim")
    require_count(config, "head_dim", even=True)
    if config.n_heads % config.n_kv_heads:
        raise UserError(f"n_heads {config.n_heads} has to be a multiple of n_kv_heads "
                        f"{config.n_kv_heads}")


def meta_ffn_dim(config: Any) -> int:
    """Meta's rule: two thirds of 4C (SwiGLU has three matrices), scaled by ffn_dim_multiplier, and
    rounded up to multiple_of."""
    width = int(8 * config.dim / 3)
    if config.ffn_dim_multiplier is not None:
        width = int(config.ffn_dim_multiplier * width)
    return math.ceil(width / config.multiple_of) * config.multiple_of


def require_count(config: Any, name: str, even: bool = False) -> None:
    value = getattr(config, name)
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not is_count or even and value % 2:
        raise UserError(f"{name} = {value!r}: has to be a positive whole number"
                        + (", and even" if even else ""))
