"""Rotary position embedding (RoPE) and the ways to stretch it over a longer window.

RoPE (Su et al. 2021, arXiv 2104.09864) turns the i-th pair of a query or key at position m by the angle m * theta_i,

    theta_i = base^(-2i/D),   i = 0 .. D/2-1,

so that the score <R_m q, R_n k> depends on the distance m - n alone. Every method here answers one question: which angles
should a model see at positions that it was never trained on? Position Interpolation (Chen et al. 2023) answers: only angles
that it knows. Squeeze position m to m / s, with s = L'/L, and the window L' covers the same arc that L did.

    L   original window (`original_max_position_embeddings`)      L'  target window      s = L'/L  (`factor`)
    B   batch    T  positions    H  heads    D  head_dim          i   pair, 0 .. D/2-1
"""
import dataclasses
import math
from dataclasses import dataclass

import torch

from cli import UserError

# ---------------------------------------------------------------------------------------------------------------------
# What a model's folder says about its positions


@dataclass(frozen=True)
class RopeConfig:
    """The scaling of a model's RoPE, in Hugging Face's words (`rope_scaling`, `rope_parameters`). It travels with the weights."""

    rope_type: str = "default"                            # a key of METHODS
    factor: float = 1.0                                   # s = L'/L, always from the original window
    original_max_position_embeddings: int | None = None   # L
    rope_theta: float = 10000.0                           # the base
    low_freq_factor: float = 1.0                          # llama3: pairs with fewer turns in L than this are interpolated,
    high_freq_factor: float = 4.0                         #         pairs with more turns than this are left alone

    def __post_init__(self):
        if not isinstance(self.rope_type, str) or self.rope_type not in METHODS:
            raise UserError(f"rope_type '{self.rope_type}' is unknown: choose one of {', '.join(METHODS)} (pi is another name of linear)")
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name == "rope_type" or value is None and f.default is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e15:  # NaN is not less
                raise UserError(f"rope {f.name} = {value!r}: give a finite number")
        if self.factor > 1e6:
            raise UserError(f"rope factor {self.factor:g}: nothing is stretched a million times; give s = target window / original window")
        if self.factor < 1:
            raise UserError(f"rope factor {self.factor:g}: give s = target window / original window, which is at least 1")
        if self.rope_theta <= 1:
            raise UserError(f"rope_theta {self.rope_theta:g}: the base has to be greater than 1 (LLaMA: 10000)")
        window = self.original_max_position_embeddings
        if window is not None and (window < 1 or window != int(window)):
            raise UserError(f"original_max_position_embeddings {window!r}: has to be a positive whole number of tokens")
        if self.rope_type in NEEDS_WINDOW and self.original_max_position_embeddings is None:
            raise UserError(f"rope_type {self.rope_type} needs original_max_position_embeddings, the window of pre-training")
        if not self.low_freq_factor < self.high_freq_factor:
            raise UserError("llama3 needs low_freq_factor < high_freq_factor")

    @classmethod
    def from_dict(cls, d):
        """From a Hugging Face `rope_scaling` or `rope_parameters` dict (`type` or `rope_type`). None is plain RoPE; an unknown key is a
        UserError."""
        if not isinstance(d or {}, dict):
            raise UserError(f"rope {d!r}: give an object like {{'rope_type': 'linear', 'factor': 2}}")
        d = dict(d or {})
        old, new = d.pop("type", None), d.pop("rope_type", None)
        if old is not None and new is not None and old != new:
            raise UserError(f"rope: type '{old}' and rope_type '{new}' contradict each other; keep rope_type")
        if new is None and old is None and d.get("factor", 1) != 1:
            raise UserError(f"rope: factor {d['factor']} without a method: name one as rope_type (linear is Position Interpolation)")
        name = new or old or "default"
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(d) - set(known))
        if unknown:
            raise UserError(f"rope: unknown key {', '.join(map(repr, unknown))}; known are {', '.join(known)}")
        return cls(rope_type=ALIASES.get(name, name) if isinstance(name, str) else name, **d)

    def to_dict(self):
        """The dict that from_dict reads back: rope_type, rope_theta, and whatever differs from the defaults."""
        default = RopeConfig()
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                if f.name in ("rope_type", "rope_theta") or getattr(self, f.name) != getattr(default, f.name)}


# ---------------------------------------------------------------------------------------------------------------------
# The methods. Each takes theta [D/2], the unscaled frequencies in float64, and returns (frequencies [D/2], attention_factor).


def default(theta, head_dim, config, seq_len):
    """Plain RoPE: theta_i. Beyond L this is extrapolation. (Su et al. 2021, section 3.2)"""
    return theta, 1.0


def linear(theta, head_dim, config, seq_len):
    """Position Interpolation: theta_i / s, the same as position m -> m / s.

    (Chen et al. 2023, arXiv 2306.15595, eq. 4; found at the same time by kaiokendev)"""
    return theta / config.factor, 1.0


def ntk(theta, head_dim, config, seq_len):
    """NTK-aware: base -> base * s^(D/(D-2)). The first pair keeps its frequency, the last becomes theta/s.

    (bloc97 2023; Peng et al. 2023, arXiv 2309.00071, appendix A)"""
    return stretch_base(theta, head_dim, config.factor), 1.0


def dynamic(theta, head_dim, config, seq_len):
    """Dynamic NTK: NTK-aware with s growing with the length l seen so far: s = f*l/L - (f-1) beyond L, else 1. f is `factor`.

    (emozilla 2023)"""
    length, window = seq_len or 0, config.original_max_position_embeddings
    scale = config.factor * length / window - (config.factor - 1) if length > window else 1.0
    return stretch_base(theta, head_dim, scale), 1.0


def llama3(theta, head_dim, config, seq_len):
    """LLaMA 3.1: with r = L theta / 2 pi turns inside L, theta/s where r < low, theta where r > high, a linear blend between.

    (Meta's llama-models)"""
    turns = config.original_max_position_embeddings * theta / (2 * math.pi)
    keep = ((turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)).clamp(0, 1)
    return keep * theta + (1 - keep) * theta / config.factor, 1.0


METHODS = {"default": default, "linear": linear, "ntk": ntk, "dynamic": dynamic, "llama3": llama3}
ALIASES = {"pi": "linear", "none": "default"}
NEEDS_WINDOW = {"dynamic", "llama3"}
LENGTH_DEPENDENT = {"dynamic"}


def stretch_base(theta, head_dim, scale):
    """(base * scale^(D/(D-2)))^(-2i/D) = theta_i * scale^(-2i/(D-2)): pair 0 is left alone, the last pair is divided by scale."""
    pair = torch.arange(len(theta), dtype=theta.dtype, device=theta.device)
    return theta * scale ** (-2 * pair / max(head_dim - 2, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Frequencies, angles, rotation


def inv_freq(config, head_dim, seq_len=None):
    """The angle that each pair turns per position.

    config: RopeConfig; head_dim: D, even; seq_len: tokens seen so far, for methods that depend on it.
    Returns (float32 [D/2] in radians per token, attention_factor: what cos and sin are multiplied by).
    Computed in float64 on the CPU and rounded once.
    """
    if head_dim < 2 or head_dim % 2:
        raise UserError(f"head_dim {head_dim}: RoPE rotates pairs, so it has to be even (dim / n_heads)")
    # device="cpu" by name: frequencies are numbers under `with torch.device("meta")` too, and a context here would break compiled graphs
    theta = config.rope_theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    frequencies, attention_factor = METHODS[config.rope_type](theta, head_dim, config, seq_len)
    return frequencies.float(), float(attention_factor)


def depends_on_length(config):
    """Whether the frequencies change as the text grows. What a cache holds is then out of date after every change."""
    return config.rope_type in LENGTH_DEPENDENT


def cos_sin(inv_freq, positions, attention_factor=1.0):
    """Cosine and sine of the angles m * theta_i: positions [T] or [B, T] -> two float32 tensors [..., T, D/2].

    Always float32: in bfloat16 position 257 is 256, and the angle is off by a whole radian.
    """
    with torch.autocast(inv_freq.device.type, enabled=False):
        angles = positions[..., None].float() * inv_freq
        return angles.cos() * attention_factor, angles.sin() * attention_factor


def apply_rope(x, cos, sin):
    """Rotate the pairs (x_0, x_1), (x_2, x_3), ... (Meta's interleaved layout).

    x [B, H, T, D], cos and sin [T, D/2] or [B, T, D/2] -> [B, H, T, D]: (u, v) -> (u cos - v sin, u sin + v cos), computed in float32.
    """
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]                                      # one row of positions per sequence: [B, 1, T, D/2]
    u, v = x.float().unflatten(-1, (-1, 2)).unbind(-1)                             # [B, H, T, D] -> two of [B, H, T, D/2]
    return torch.stack((u * cos - v * sin, u * sin + v * cos), dim=-1).flatten(-2).type_as(x)  # [B, H, T, D/2, 2] -> [B, H, T, D]
