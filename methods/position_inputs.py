"""What attention has to know about positions, for every method in the same form."""
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from methods.baselines import alibi_bias, xpos_scale
from methods.config import RopeConfig
from methods.table import METHODS
from methods.training_positions import random_positions
from rope import cos_sin


class PositionInputs(NamedTuple):
    """For the last T tokens of a text of S."""
    q_rope: tuple[Tensor, Tensor]   # cos and sin of the queries, [T, D/2] or [B, T, D/2]
    k_rope: tuple[Tensor, Tensor]   # cos and sin of the keys, the same but for xPos
    attn_bias: Tensor | None        # added to the scores, [H, 1, S] or [B, H, 1, S]: ALiBi only


def position_inputs(config: RopeConfig, n_heads: int, frequencies: Tensor, attention_factor: float,
                    text_positions: Tensor, tokens: int) -> PositionInputs:
    """For the last T = `tokens` of a text at text_positions [S] or [B, S]. frequencies,
    attention_factor: what inv_freq returned."""
    positions = text_positions[..., -tokens:]
    cos, sin = cos_sin(frequencies, positions, attention_factor)
    mechanism = METHODS[config.rope_type].mechanism
    if mechanism == "decay":
        scale = xpos_scale(positions, len(frequencies), config.factor)
        return PositionInputs((cos * scale, sin * scale), (cos / scale, sin / scale), None)
    bias = None
    if mechanism == "bias":
        bias = alibi_bias(text_positions, n_heads, config.factor)
    return PositionInputs((cos, sin), (cos, sin), bias)


def position_ids(config: RopeConfig, length: int, device: torch.device | None = None) -> Tensor:
    """Positions of a text of `length` tokens, [S]: 0, 1, 2, ...

    With config.random_positions = N a sorted random choice of 0 .. N-1, the same for every text of
    this length. (Ruoss et al. 2023, arXiv 2305.16843, who draw anew for every text)
    """
    if config.random_positions is None:
        return torch.arange(length, device=device)
    rng = np.random.default_rng(length)
    return torch.from_numpy(random_positions(rng, length, config.random_positions)).to(device)
