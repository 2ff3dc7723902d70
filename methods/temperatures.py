"""Temperatures: queries grow with their position, as the softmax flattens over more keys.

Among n keys with equally spread scores the share of one that stands out shrinks like 1/n. Queries
times ln n / ln L give most or part of it back (docs/maths.md, section 12). The factor is an inverse
temperature, 1/t in YaRN's letters: above 1 it sharpens. Keys in a cache stay as they are.
"""
import math

import torch
from torch import Tensor


def log_n(positions: Tensor, original_window: int) -> Tensor:
    """max(1, ln(m + 1) / ln L) for a query at m, which sees n = m + 1 keys in a text without gaps.
    (With `streaming` it sees L keys at most, and this is too much.) (Su 2021,
    kexue.fm/archives/8823; Nakanishi 2025, arXiv 2501.19399, learns its scale)"""
    return ((positions + 1.0).log() / math.log(original_window)).clamp(min=1.0)


def llama4(positions: Tensor, original_window: int, beta: float = 0.1) -> Tensor:
    """1 + beta ln(1 + floor(m / L)), as in Ministral 3. Llama 4, from which it comes, has
    floor((m + 1) / 8192)."""
    return 1 + beta * torch.log1p(torch.floor(positions / original_window))


TEMPERATURES = {"none": None, "log_n": log_n, "llama4": llama4}


def query_scale(name: str | None, positions: Tensor, original_window: int | None) -> Tensor | None:
    """What queries at these positions [..., T] are multiplied by, [..., T, 1]; None: nothing."""
    formula = TEMPERATURES.get(name or "none")
    if formula is None:
        return None
    return formula(positions.float(), original_window)[..., None]
