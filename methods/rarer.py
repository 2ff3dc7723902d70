"""The rarer ways to choose frequencies. Like those of rope.py, each is a function that returns
(inv_freq, attention_factor), float64 [D/2] in radians per token and a factor of cos and sin."""
import math

import torch
from torch import Tensor

from rope import pair_numbers, rope_frequencies


def abf(head_dim: int, base: float, new_rope_theta: float = 500000.0) -> tuple[Tensor, float]:
    """Adjusted base frequency: another base, whatever s. (Xiong et al. 2023, arXiv 2309.16039:
    500,000; Code Llama: 1,000,000)"""
    return rope_frequencies(head_dim, new_rope_theta), 1.0


def longrope(head_dim: int, base: float, factor: float, original_window: int, seq_len: int,
             short_factor: list[float], long_factor: list[float],
             attention_factor: float | None = None) -> tuple[Tensor, float]:
    """LongRoPE: theta_i / f_i with a factor for each pair, found by a search: short_factor up to L
    tokens, long_factor beyond. cos and sin are multiplied by

        sqrt(1 + ln s / ln L) = sqrt(ln L' / ln L),

    within L too, unless attention_factor is given.

    (Ding et al. 2024, arXiv 2402.13753; Phi-3's code)
    """
    if attention_factor is None:
        attention_factor = 1.0
        if factor > 1 and original_window > 1:
            attention_factor = math.sqrt(1 + math.log(factor) / math.log(original_window))
    factors = long_factor if seq_len > original_window else short_factor
    divisors = torch.tensor(factors, dtype=torch.float64, device="cpu")
    return rope_frequencies(head_dim, base) / divisors, attention_factor


def proportional(head_dim: int, base: float, factor: float, partial_rotary_factor: float
                 ) -> tuple[Tensor, float]:
    """p-RoPE: only the fastest share p of the pairs turns, the slow rest stands still and knows no
    position. Then as linear. (With the other methods partial_rotary_factor makes the rotated part a
    smaller head, which has all frequencies from 1 to nearly 1/base.)

    (Barbero et al. 2024, arXiv 2410.06205; Gemma's code)
    """
    turning_pairs = int(partial_rotary_factor * head_dim // 2)
    turns = pair_numbers(head_dim) < turning_pairs
    return rope_frequencies(head_dim, base) * turns / factor, 1.0


def nope(head_dim: int, base: float) -> tuple[Tensor, float]:
    """NoPE: no position at all but the causal mask. (Kazemnejad et al. 2023, arXiv 2305.19466)"""
    return torch.zeros_like(rope_frequencies(head_dim, base)), 1.0


def drope(head_dim: int, base: float, original_window: int, seq_len: int,
          log_scale: float = 0.412) -> tuple[Tensor, float]:
    """DroPE: train with RoPE, then switch it off and train a little more at length L. Beyond L
    scores are multiplied by 1 + log_scale ln(l/L), q and k by its square root each. 0.412 is for
    models trained from scratch; the paper has 0.103 for SmolLM.

    (Gelberg et al. 2025, arXiv 2512.12167)
    """
    stretch = max(1.0, seq_len / original_window)
    no_rotation, _ = nope(head_dim, base)
    return no_rotation, math.sqrt(1 + log_scale * math.log(stretch))


def resonate(inv_freq: Tensor) -> Tensor:
    """Resonance RoPE, after any method: wavelengths rounded to whole tokens, so that a pair repeats
    itself exactly after each turn. Pairs that stand still stay so.

    (Wang et al. 2024, arXiv 2403.00071)
    """
    whole_wavelengths = (2 * math.pi / inv_freq).round().clamp(min=1)
    return torch.where(inv_freq > 0, 2 * math.pi / whole_wavelengths, inv_freq)
