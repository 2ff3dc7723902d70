"""What positions do besides turning pairs: position ids that are not 0, 1, 2, ..., ALiBi's bias, and xPos's decay.

rope.py is about angles. The baselines and training recipes here change something else, and model.py sees all of it as one triple, made by
`where`: how to turn queries, how to turn keys, and what to add to the scores.

    B  batch    T  queries    S  keys    H  query heads    D  head_dim    m  position of a query    n  position of a key
"""
import math
from typing import NamedTuple

import numpy as np
import torch

from cli import UserError
from rope import METHODS, cos_sin


class Where(NamedTuple):
    """What attention knows about positions."""
    q: tuple                    # (cos, sin) of the queries, [T, D/2] or [B, T, D/2] each
    k: tuple                    # (cos, sin) of the keys; the same but for xPos
    bias: torch.Tensor | None   # added to the scores, [H, 1, S] or [B, H, 1, S]; None but for ALiBi


def where(config, n_heads, frequencies, attention_factor, positions, text_positions):
    """The triple for T tokens at `positions` [T] or [B, T], the last of a text at `text_positions` [S] or [B, S]. config: RopeConfig."""
    cos, sin = cos_sin(frequencies, positions, attention_factor)
    q = k = cos, sin
    adds = METHODS[config.rope_type].adds
    if adds == "decay":
        scale = xpos_scale(positions, len(frequencies), config.factor)
        q, k = (cos * scale, sin * scale), (cos / scale, sin / scale)
    return Where(q, k, alibi_bias(text_positions, n_heads, config.factor) if adds == "bias" else None)


# ---------------------------------------------------------------------------------------------------------------------
# ALiBi


def alibi_slopes(n_heads):
    """Slope of each head, [H]: 2^(-8h/H), h = 1 .. H. If H is no power of two: those of the next lower power P, then every other one of
    2P. (Press et al. 2021, arXiv 2108.12409; their code)"""
    power = 2 ** (n_heads.bit_length() - 1)
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    return torch.tensor(slopes + [2 ** (-4 * h / power) for h in range(1, 2 * (n_heads - power), 2)])


def alibi_bias(positions, n_heads, factor=1.0):
    """-slope_h * (m - n) / s, what ALiBi adds to the score of query m and key n: positions n, [S] or [B, S] -> [H, 1, S] or [B, H, 1, S].

    It has no row for each query: softmax is the same whatever is added to all scores of a row, so m may be any number, here the last
    position. So `tiled` attention stays linear in memory (`sdpa` makes a mask of every bias). Dividing the slopes by s is Position
    Interpolation for ALiBi. (Al-Khateeb et al. 2023, arXiv 2310.13017)"""
    slopes = alibi_slopes(n_heads).to(positions.device) / factor
    distance = positions.max() - positions                                         # [S] or [B, S]
    return -(slopes[:, None] * distance[..., None, :].float())[..., None, :]       # [.., H, 1, S]


# ---------------------------------------------------------------------------------------------------------------------
# xPos


def xpos_scale(positions, pairs, factor=1.0, scale_base=512):
    """zeta_i^(m / 512 s) with zeta_i = (2i + 0.4 D) / 1.4 D: positions [..., T] -> [..., T, D/2]. Queries are multiplied by it and keys
    divided, so the score of pair i decays as zeta_i^((m-n) / 512 s), the fast pairs most. (Sun et al. 2022, arXiv 2212.10554; torchscale,
    which counts m from the middle of the text: the same scores)

    Powers of a position, and so a limit: past 32,695 s the fastest pair's nears the end of float32. A UserError there."""
    zeta = (2 * torch.arange(pairs, dtype=torch.float32, device=positions.device) + 0.8 * pairs) / (2.8 * pairs)
    power = positions[..., None].float() / (factor * scale_base)
    if float(power.max()) * -float(zeta[0].log()) > 80:
        raise UserError(f"xpos: position {int(positions.max())} is too far for powers in float32: use a shorter text or a greater factor")
    return zeta ** power


# ---------------------------------------------------------------------------------------------------------------------
# Position ids


def position_ids(config, length, device=None):
    """Positions of a text of `length` tokens, [S]: 0, 1, 2, ..., or, with config.random_positions = N, a sorted random choice of
    0 .. N-1, the same for every text of this length, and another for every other length. (Ruoss et al. 2023, arXiv 2305.16843, who draw
    for every text)"""
    if config.random_positions is None:
        return torch.arange(length, device=device)
    return torch.from_numpy(random_positions(np.random.default_rng(length), length, config.random_positions)).to(device)


def random_positions(rng, length, longest):
    """`length` different positions out of 0 .. longest-1, in order: training sees the distances of a longer text. (Ruoss et al. 2023)"""
    if length > longest:
        raise UserError(f"random_positions {longest}: a text of {length} tokens does not fit; train with more of them")
    return np.sort(rng.choice(longest, length, replace=False))


def stretched_positions(rng, length, longest):
    """random_positions with both ends kept, 0 and longest-1: CLEX's training at t = longest / L. (Chen et al. 2023, arXiv 2310.16450)"""
    if length < 3:
        return np.linspace(0, longest - 1, length).astype(np.int64)
    return np.concatenate([[0], 1 + random_positions(rng, length - 2, longest - 2), [longest - 1]])


def pose_positions(rng, length, longest):
    """PoSE: 0 .. l-1, then a skip, then the rest in a row; l and the skip at random, so that positions up to longest-1 and distances of all
    sizes are seen on rows of `length` tokens. The text itself runs on; the paper's main variant skips in it, too. (Zhu et al. 2023, arXiv
    2309.10400, section 3.2)"""
    first = int(rng.integers(1, (length + 1) // 2 + 1))
    positions = np.arange(length)
    positions[first:] += int(rng.integers(0, longest - length + 1))
    return positions


def training_positions(config, original, target, way="own"):
    """How training draws positions, as data.batches.Batches takes it: a function (rng of the step, rng of the row, T) -> [T], or None for
    0 .. T-1. config: RopeConfig; original, target: L and L'; way: "pose", "contiguous", or the method's "own"."""
    if config.random_positions is not None:
        if config.random_positions < target:
            raise UserError(f"random_positions {config.random_positions}: fewer than the {target} tokens of a row; give more")
        return lambda step, row, length: random_positions(row, length, config.random_positions)
    if way == "pose":
        return lambda step, row, length: pose_positions(row, length, target)
    if way == "own" and METHODS[config.rope_type].train_on == "random":  # one t for all rows of a step, as it decides the frequencies
        longest = math.floor(config.setting("max_factor"))
        return lambda step, row, length: stretched_positions(row, length, int(step.integers(1, longest + 1)) * original)
    return None
