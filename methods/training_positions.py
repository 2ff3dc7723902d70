"""Positions of training rows other than 0, 1, 2, ...: PoSE, random positions, CLEX's."""
from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from common.errors import UserError
from methods.config import RopeConfig
from methods.table import METHODS


def random_positions(rng: Generator, length: int, longest: int) -> np.ndarray:
    """`length` different positions of 0 .. longest-1, in order: a short row has the distances of a
    long text. (Ruoss et al. 2023, arXiv 2305.16843)"""
    if length > longest:
        raise UserError(f"random_positions {longest}: a text of {length} tokens does not fit; "
                        "train with more of them")
    return np.sort(rng.choice(longest, length, replace=False))


def stretched_positions(rng: Generator, length: int, longest: int) -> np.ndarray:
    """random_positions with both ends kept, 0 and longest-1: CLEX's training at t = longest / L.
    (Chen et al. 2023, arXiv 2310.16450)"""
    if length < 3:
        return np.linspace(0, longest - 1, length).astype(np.int64)
    between = 1 + random_positions(rng, length - 2, longest - 2)
    return np.concatenate([[0], between, [longest - 1]])


def pose_positions(rng: Generator, length: int, longest: int) -> np.ndarray:
    """PoSE: 0 .. n-1, then a skip, then the rest in a row; n and the skip at random. Rows of
    `length` tokens so show positions up to longest-1 and distances of all sizes. The text itself
    runs on; the paper's main variant skips in it, too. (Zhu et al. 2023, arXiv 2309.10400, 3.2)"""
    first = int(rng.integers(1, (length + 1) // 2 + 1))
    skip = int(rng.integers(0, longest - length + 1))
    positions = np.arange(length)
    positions[first:] += skip
    return positions


def training_positions(config: RopeConfig, original: int, target: int, scheme: str = "own"
                       ) -> Callable[[Generator, Generator, int], np.ndarray] | None:
    """How training draws positions, as data.batches.Batches takes it: a function
    (rng of the step, rng of the row, T) -> [T], or None for 0 .. T-1.

    original, target: L and L'. scheme: "pose", "contiguous", or the method's "own".
    """
    if config.random_positions is not None:
        longest = config.random_positions
        if longest < target:
            raise UserError(f"random_positions {longest}: fewer than the {target} tokens of a row; "
                            "give more")
        return lambda step_rng, row_rng, length: random_positions(row_rng, length, longest)
    if scheme == "pose":
        return lambda step_rng, row_rng, length: pose_positions(row_rng, length, target)
    if scheme == "own" and METHODS[config.rope_type].trained_on == "random":
        largest_t = int(config.setting("max_factor"))

        def clex_positions(step_rng: Generator, row_rng: Generator, length: int) -> np.ndarray:
            t = int(step_rng.integers(1, largest_t + 1))  # one for the step: it sets the angles
            return stretched_positions(row_rng, length, t * original)
        return clex_positions
    return None
