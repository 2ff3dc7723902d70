"""Rotary position embedding (RoPE): how it works, why it breaks, and how to stretch it.

Attention by itself knows no order. RoPE (Su et al. 2021, arXiv 2104.09864) rotates each pair of
numbers in a query or key, like the hand of a clock. At position m the i-th pair has turned by

    m * theta_i        with  theta_i = base^(-2i/D),  i = 0 .. D/2-1,

so that the score of a query at m and a key at n depends on the distance m - n alone.

A model trained on texts of L tokens has seen the angles of the positions 0 .. L-1. Every method
below answers one question: by which angles should the pairs turn in a text of L' > L tokens?
Position Interpolation (Chen et al. 2023, arXiv 2306.15595) answers: by angles between those.

    B  batch    H  heads    T  tokens    D  head_dim    i  pair, 0 .. D/2-1    m  position
    L  original_window      L'  target window      s = L'/L  factor      l  seq_len, tokens so far

A method is a function that returns (inv_freq, attention_factor): its own theta_i, the radians that
each pair turns per token (float64 [D/2]; inv_freq is Hugging Face's name for them), and a number
that multiplies cos and sin, 1 for most. Rarer methods, and those that change distances and not
angles, are in methods/; formulas in docs/maths.md. From a flag to attention:

    --rope, --factor  ->  RopeConfig                                     methods/config.py
    LLaMA.hidden      ->  inv_freq() looks the method up and calls it    methods/angles.py
                      ->  inputs_of_layers calls cos_sin                 methods/position_inputs.py
    Attention.forward ->  apply_rope
"""
import math

import numpy as np
import torch
from torch import Tensor

# ---- Rotation ------------------------------------------------------------------------------------


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair (u, v) of neighbouring elements by its angle:

        (u, v)  ->  (u cos - v sin,  u sin + v cos)

    x [B, H, T, D]; cos, sin [T, D/2], or [B, T, D/2] where each row of the batch has positions of
    its own. Returns [B, H, T, D] in x's dtype, computed in float32. If cos and sin have fewer than
    D/2 pairs, the last elements of x stay as they are (partial rotary embedding).
    """
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]                       # [B, 1, T, D/2]: for all heads
    rotary_dim = 2 * cos.shape[-1]
    pairs = x[..., :rotary_dim].float().unflatten(-1, (-1, 2))      # [B, H, T, D/2, 2]
    rotated = rotate_pairs(pairs, cos, sin).flatten(-2).type_as(x)
    if rotary_dim == x.shape[-1]:
        return rotated
    return torch.cat([rotated, x[..., rotary_dim:]], dim=-1)


def rotate_pairs(pairs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula above, [..., D/2, 2] -> [..., D/2, 2]. As complex numbers it is the product
    (u + iv)(cos + i sin), which takes one pass over memory instead of six."""
    if torch.compiler.is_compiling() or pairs.device.type == "mps":   # no complex numbers there
        u, v = pairs.unbind(-1)
        return torch.stack((u * cos - v * sin, u * sin + v * cos), dim=-1)
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))


def cos_sin(inv_freq: Tensor, positions: Tensor, attention_factor: float = 1.0
            ) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles m * theta_i, times attention_factor: [T] or [B, T] -> [.., T, D/2].
    Always float32: bfloat16 rounds position 257 to 256, and pair 0 would be a radian behind."""
    with torch.autocast(inv_freq.device.type, enabled=False):
        angles = positions[..., None].float() * inv_freq.float()
        return angles.cos() * attention_factor, angles.sin() * attention_factor


def rope_frequencies(head_dim: int, base: float = 10000.0) -> Tensor:
    """theta_i = base^(-2i/D), in radians per token: float64 [D/2], from 1 down to about 1/base.
    (Su et al. 2021, section 3.2.2; LLaMA 1 and 2: base 10,000, LLaMA 3: 500,000)"""
    return base ** (-2 * pair_numbers(head_dim) / head_dim)


def pair_numbers(head_dim: int) -> Tensor:
    """i = 0 .. D/2-1 in float64, on the CPU whatever PyTorch's default device is."""
    return torch.arange(head_dim // 2, dtype=torch.float64, device="cpu")


# ---- Why it breaks beyond L ----------------------------------------------------------------------
#
# By position L a pair whose wavelength is shorter than L has shown all its angles. A slower pair
# has not: beyond L its angles are new to the model, and so are the scores that such pairs add up
# to. The loss explodes at once. (theory.py has the numbers.)


def wavelengths(inv_freq: Tensor) -> Tensor:
    """Tokens until a pair has made a whole turn: 2 pi / theta_i."""
    return 2 * math.pi / inv_freq


def default(head_dim: int, base: float) -> tuple[Tensor, float]:
    """RoPE as it is: theta_i. Beyond L this is extrapolation."""
    return rope_frequencies(head_dim, base), 1.0


# ---- Position Interpolation ----------------------------------------------------------------------


def linear(head_dim: int, base: float, factor: float) -> tuple[Tensor, float]:
    """Position Interpolation: squeeze position m to m/s, that is, turn by theta_i / s per token.

    L' tokens then cover the angles that L tokens did. The price: neighbours are s times closer
    together than in training, which a short fine-tuning repairs. (Chen et al. 2023, eq. 4; found at
    the same time by kaiokendev; "linear" is Hugging Face's name for it.)"""
    return rope_frequencies(head_dim, base) / factor, 1.0


# ---- NTK-aware scaling: the faster a pair, the less it is slowed ---------------------------------


def ntk(head_dim: int, base: float, factor: float) -> tuple[Tensor, float]:
    """NTK-aware: pair i turns at theta_i * s^(-2i/(D-2)), the first as before, the last s times
    slower. It is RoPE with the base base * s^(D/(D-2)). (bloc97 2023, who came to it from neural
    tangent kernel theory; Peng et al. 2023, arXiv 2309.00071, section 3.1)"""
    exponent = -2 * pair_numbers(head_dim) / max(head_dim - 2, 1)
    return rope_frequencies(head_dim, base) * factor ** exponent, 1.0


def dynamic(head_dim: int, base: float, factor: float, original_window: int, seq_len: int
            ) -> tuple[Tensor, float]:
    """Dynamic NTK: plain RoPE up to L, then NTK-aware with a stretch that grows with the text,

        stretch = f l/L - (f - 1)    with f = `factor`; l/L if f = 1.    (emozilla 2023)"""
    if seq_len <= original_window:
        return default(head_dim, base)
    stretch = factor * seq_len / original_window - (factor - 1)
    return ntk(head_dim, base, stretch)


# ---- NTK-by-parts, YaRN and LLaMA 3: each pair by the number of turns that it makes within L -----
#
# A ramp says how much of theta_i a pair keeps: 1 for fast pairs (theta_i as trained), 0 for slow
# ones (theta_i / s).


def blend(theta: Tensor, factor: float, keep: Tensor) -> Tensor:
    """keep * theta + (1 - keep) * theta / s"""
    return keep * theta + (1 - keep) * theta / factor


def ramp_by_turns(theta: Tensor, original_window: int, slow: float, fast: float) -> Tensor:
    """0 below `slow` turns within L, 1 above `fast`, linear in the turns between."""
    turns = original_window * theta / (2 * math.pi)                # L / wavelength
    return ((turns - slow) / (fast - slow)).clamp(0, 1)


def ntk_by_parts(head_dim: int, base: float, factor: float, original_window: int,
                 beta_fast: float = 32.0, beta_slow: float = 1.0) -> tuple[Tensor, float]:
    """NTK-by-parts: keep pairs of more than beta_fast turns, interpolate those below beta_slow.
    (Peng et al. 2023, section 3.2, where the two are called beta and alpha)"""
    theta = rope_frequencies(head_dim, base)
    keep = ramp_by_turns(theta, original_window, beta_slow, beta_fast)
    return blend(theta, factor, keep), 1.0


def llama3(head_dim: int, base: float, factor: float, original_window: int,
           low_freq_factor: float = 1.0, high_freq_factor: float = 4.0) -> tuple[Tensor, float]:
    """LLaMA 3.1: NTK-by-parts with the limits 1 and 4. (Meta's llama-models)"""
    return ntk_by_parts(head_dim, base, factor, original_window,
                        beta_fast=high_freq_factor, beta_slow=low_freq_factor)


def yarn(head_dim: int, base: float, factor: float, original_window: int,
         beta_fast: float = 32.0, beta_slow: float = 1.0, truncate: bool = True,
         ramp: str = "index", attention_factor: float | None = None,
         mscale: float | None = None, mscale_all_dim: float | None = None
         ) -> tuple[Tensor, float]:
    """YaRN: NTK-by-parts, and an attention temperature.

    ramp: "index", as everyone deploys it, is linear in the pair's number, between limits that
    `truncate` rounds to whole pairs; "turns", as the paper prints it, is linear in the turns.
    attention_factor replaces 0.1 ln s + 1; mscale and mscale_all_dim are DeepSeek's variant of it.
    (Peng et al. 2023, sections 3.2 to 3.4, and the authors' code)"""
    theta = rope_frequencies(head_dim, base)
    if ramp == "turns":
        keep = ramp_by_turns(theta, original_window, beta_slow, beta_fast)
    else:
        keep = ramp_by_pair(head_dim, base, original_window, beta_slow, beta_fast, truncate)
    if attention_factor is None:
        attention_factor = yarn_mscale(factor)
        if mscale and mscale_all_dim:
            attention_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    return blend(theta, factor, keep), attention_factor


def ramp_by_pair(head_dim: int, base: float, original_window: int, slow: float, fast: float,
                 truncate: bool) -> Tensor:
    """1 up to the pair that turns `fast` times within L, 0 from the one that turns `slow` times,
    linear between. The last pair is D/2-1, but YaRN's code clips at D-1, and so does this."""
    first = pair_with_turns(head_dim, base, original_window, fast)
    last = pair_with_turns(head_dim, base, original_window, slow)
    if truncate:
        first = math.floor(first)
        last = math.ceil(last)
    first = max(first, 0)
    last = min(last, head_dim - 1)
    if first == last:
        last += 0.001  # a step instead of a division by zero
    return 1 - ((pair_numbers(head_dim) - first) / (last - first)).clamp(0, 1)


def pair_with_turns(head_dim: int, base: float, original_window: int, turns: float) -> float:
    """The pair, as a fraction, with so many turns: i = D ln(L / (2 pi turns)) / (2 ln base)."""
    return head_dim * math.log(original_window / (turns * 2 * math.pi)) / (2 * math.log(base))


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """0.1 weight ln s + 1, a factor of q and of k: scores grow by its square (1/t in the paper),
    as over more keys the softmax has to be sharper. (Fitted to LLaMA's perplexities)"""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def dynamic_yarn(head_dim: int, base: float, factor: float, original_window: int, seq_len: int,
                 **yarn_settings) -> tuple[Tensor, float]:
    """Dynamic YaRN: YaRN with s = max(factor, l/L). Use factor 1 for a model without fine-tuning,
    and after it the factor of the training. (Peng et al. 2023, "Dynamic Scaling")"""
    stretch = max(factor, seq_len / original_window)
    return yarn(head_dim, base, stretch, original_window, **yarn_settings)


# ---- DPRoPE: each pair by the distribution of its angles -----------------------------------------


def dprope(head_dim: int, base: float, factor: float, original_window: int,
           threshold: float = 0.0, interpolated_dims: int | None = None, bins: int | None = None
           ) -> tuple[Tensor, float]:
    """DPRoPE: interpolate a pair if that disturbs the distribution of its angles less,

        theta_i / s   where   d(theta_i) > d(theta_i / s) + threshold,   else theta_i,

    with d the angle_disturbance at L' positions. interpolated_dims: interpolate so many dimensions
    instead (two a pair), those with the greatest difference. bins: arcs of the circle, 360 at
    L = 4096 as in the paper, fewer for a shorter window, whose histograms would be nearly empty.
    (Wu et al. 2024, EMNLP, eqs. 5 to 9)"""
    theta = rope_frequencies(head_dim, base)
    bins = bins or angle_bins(original_window)
    if_kept, if_interpolated = disturbance_of_both(theta.numpy(), factor, original_window, bins)
    pairs = None if interpolated_dims is None else interpolated_dims // 2
    chosen = torch.from_numpy(pairs_to_interpolate(if_kept, if_interpolated, threshold, pairs))
    return torch.where(chosen, theta / factor, theta), 1.0


def angle_bins(original_window: int) -> int:
    """About eleven positions for each arc of the circle, but 360 arcs at most."""
    return min(360, max(4, round(original_window * 360 / 4096)))


def angle_histogram(theta: np.ndarray, positions: int, bins: int = 360) -> np.ndarray:
    """How often each pair shows each angle: [D/2] -> [D/2, bins], rows that sum to 1.

    Entry k of row i is the share of the positions m = 0 .. positions-1 with the angle
    m theta_i mod 2 pi in the arc [2 pi k / bins, 2 pi (k+1) / bins). (eqs. 5 to 7)"""
    histogram = np.empty((len(theta), bins))
    for i, theta_i in enumerate(theta):
        angles = theta_i * np.arange(positions) % (2 * np.pi)
        arcs = (angles * (bins / (2 * np.pi))).astype(np.int64)
        arcs = np.minimum(arcs, bins - 1)                           # rounding may reach 2 pi
        histogram[i] = np.bincount(arcs, minlength=bins) / positions
    return histogram


def angle_disturbance(theta: np.ndarray, new_theta: np.ndarray, length: int, new_length: int,
                      bins: int = 360, printed: bool = False, epsilon: float = 1e-12) -> np.ndarray:
    """How far the angles of new_theta at new_length positions are from those of training, [D/2]:

        sum_k F_k ln((F_k + epsilon) / (F'_k + epsilon))      in nats,

    F the histogram of theta at `length` positions, F' that of new_theta at new_length. This is
    KL(original || extended), which reproduces the paper's Table 3. printed: the order of eq. 8,
    KL(extended || original), which has no bound as epsilon -> 0 where an angle is new."""
    p = angle_histogram(theta, length, bins)
    q = angle_histogram(new_theta, new_length, bins)
    if printed:
        p, q = q, p
    return (p * np.log((p + epsilon) / (q + epsilon))).sum(axis=1)


def disturbance_of_both(theta: np.ndarray, factor: float, length: int, bins: int = 360, **options
                        ) -> tuple[np.ndarray, np.ndarray]:
    """Disturbance of each pair at s * length positions, kept and interpolated: two arrays [D/2]."""
    new_length = round(factor * length)
    if_kept = angle_disturbance(theta, theta, length, new_length, bins, **options)
    if_interpolated = angle_disturbance(theta, theta / factor, length, new_length, bins, **options)
    return if_kept, if_interpolated


def pairs_to_interpolate(if_kept: np.ndarray, if_interpolated: np.ndarray, threshold: float = 0.0,
                         pairs: int | None = None) -> np.ndarray:
    """Which pairs to interpolate, bool [D/2]: all that gain more than threshold (eq. 9; a tie, such
    as 0 = 0 of a pair that stays in one arc, is no gain), or the `pairs` that gain most."""
    gain = if_kept - if_interpolated
    if pairs is None:
        return gain > threshold
    greatest = np.argsort(-gain, kind="stable")[:pairs]
    return np.isin(np.arange(len(gain)), greatest)
