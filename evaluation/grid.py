"""Retrieval by the length of a prompt and the depth of what is hidden in it."""
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from common.cache import ResultCache
from common.errors import UserError
from evaluation.jobs import parallel_map, row_bytes, rows_per_pass


def accuracy_grid(model: torch.nn.Module, build: Callable, score: Callable,
                  lengths: Sequence[int] | None, depths: int, trials: int, seed: int,
                  cache: ResultCache | None, name: str, progress: bool = True,
                  generating: bool = False) -> dict[str, Any]:
    """Score `trials` prompts at every length and depth. Returns accuracies and conditions.

    build(rng, length, depth) -> ((prompt, answer, ...), distance): one case, its ids as arrays, and
    the tokens from what is hidden to the end of the prompt; score(cases) -> a number from 0 to 1
    for each. depth runs from 0, the beginning, to 1. lengths: the model's window if not given.
    """
    lengths = sorted(set(lengths or [model.config.max_seq_len]))
    check_grid(lengths, depths, trials, seed, name)
    started = time.perf_counter()
    places = [i / (depths - 1) for i in range(depths)] if depths > 1 else [0.5]
    jobs, distances = {}, {}
    for length in lengths:
        rng = np.random.default_rng((seed, length))
        built = [build(rng, length, place) for place in places for _ in range(trials)]
        by_depth = np.reshape([distance for _, distance in built], (depths, trials))
        distances[length] = [round(float(distance)) for distance in by_depth.mean(axis=1)]
        rows = rows_per_pass(model, length, generating)
        for i in range(0, len(built), rows):
            cases = [case for case, _ in built[i:i + rows]]
            jobs[length, i, hash_of_prompts(cases)] = (cases,)

    cache = (cache or ResultCache()).for_model(model, name)
    longest = lengths[-1]
    job_bytes = rows_per_pass(model, longest, generating) * row_bytes(model, longest, generating)
    scores = {length: [] for length in lengths}
    with tqdm(total=len(lengths) * depths * trials, desc=name, unit="prompt", leave=False,
              disable=None if progress else True) as bar:
        results = parallel_map(score, jobs, model, cache, job_bytes)
        for (length, _, _), numbers in zip(jobs, results):
            scores[length] += numbers
            bar.update(len(numbers))
    by_depth = {length: np.reshape(numbers, (depths, trials)).mean(axis=1).tolist()
                for length, numbers in scores.items()}
    return {"accuracy": {length: float(np.mean(row)) for length, row in by_depth.items()},
            "lengths": lengths, "depths": places, "trials": trials, "accuracy_by_depth": by_depth,
            "distances": distances, "seconds": time.perf_counter() - started}


def check_grid(lengths: list[int], depths: int, trials: int, seed: int, name: str) -> None:
    if depths < 1 or trials < 1:
        raise UserError(f"depths {depths}, trials {trials}: both have to be at least 1")
    if seed < 0:
        raise UserError(f"seed {seed}: give 0 or more")
    if lengths[0] < 1:
        raise UserError(f"a {name} prompt of {lengths[0]} tokens is too short: lengths are numbers "
                        "of tokens")


def hash_of_prompts(cases: list[tuple]) -> str:
    """A number for the ids of all prompts and answers."""
    arrays = [array.tobytes() for prompt, answer, *_ in cases for array in (prompt, answer)]
    return hashlib.sha256(b"".join(arrays)).hexdigest()
