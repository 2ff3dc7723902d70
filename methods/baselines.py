"""The papers' baselines, which rotate nothing or not only: ALiBi's bias and xPos's decay."""
import torch
from torch import Tensor

from common.errors import UserError


def alibi_slopes(n_heads: int) -> Tensor:
    """The slope of each head: 2^(-8h/H), h = 1 .. H. If H is no power of two: the slopes of the
    next lower power P, then every other one of 2P. (Press et al. 2021, arXiv 2108.12409)"""
    power = 2 ** (n_heads.bit_length() - 1)
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    slopes += [2 ** (-4 * h / power) for h in range(1, 2 * (n_heads - power), 2)]
    return torch.tensor(slopes)


def alibi_bias(positions: Tensor, n_heads: int, factor: float = 1.0) -> Tensor:
    """-slope_h (m - n) / s, added to the score of a query at m and a key at n.

    positions n of the keys, [S] or [B, S] -> [H, 1, S] or [B, H, 1, S]. There is no row for each
    query: softmax is the same whatever is added to all scores of a row, so m may be any number,
    here the last position. Dividing the slopes by s is Position Interpolation for ALiBi.
    (Al-Khateeb et al. 2023, arXiv 2310.13017)
    """
    slopes = alibi_slopes(n_heads).to(positions.device) / factor
    distance = (positions.max() - positions).float()                 # [S] or [B, S]
    bias = -slopes[:, None] * distance[..., None, :]                 # [H, S] or [B, H, S]
    return bias[..., None, :]


def xpos_scale(positions: Tensor, pairs: int, factor: float = 1.0, scale_base: int = 512) -> Tensor:
    """zeta_i^(m / (512 s)), zeta_i = (2i + 0.4 D) / (1.4 D): positions [..., T] -> [..., T, D/2].

    Queries are multiplied by it and keys divided, so that the score of pair i decays as
    zeta_i^((m-n) / (512 s)), the fast pairs most. Powers of a position have a limit: past 32,695 s
    float32 ends, which is a UserError. (Sun et al. 2022, arXiv 2212.10554; torchscale)
    """
    i = torch.arange(pairs, dtype=torch.float32, device=positions.device)
    zeta = (2 * i + 0.8 * pairs) / (2.8 * pairs)
    power = positions[..., None].float() / (factor * scale_base)
    if float(power.max()) * -float(zeta[0].log()) > 80:
        raise UserError(f"xpos: position {int(positions.max())} is too far for powers in float32: "
                        "use a shorter text or a greater factor")
    return zeta ** power
