"""The evolution of extras/longrope_search.py, for any measure of how good a candidate is.
(Ding et al. 2024, arXiv 2402.13753, Algorithm 1)

A candidate is a list of factors, one a pair, in hundredths: 100 leaves the pair as it is. They lie
from 100 to a largest factor and never fall from a fast pair to a slower one. All that is made here
keeps that.
"""
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from common.cli import field

Factors = tuple[int, ...]


@dataclass
class EvolutionFlags:
    population: int = field(64, "candidates of the first generation")
    iterations: int = field(40, "generations after it")
    parents: int = field(32, "the best so far, of which children are made")
    mutations: int = field(16, "children of one parent")
    crossovers: int = field(16, "children of two")
    mutation_probability: float = field(0.3, "that a factor of a mutant is drawn anew")


def evolve(starts: Sequence[Factors], largest: int,
           measure: Callable[[list[Factors]], list[float]], c: EvolutionFlags, rng: Generator
           ) -> Iterator[dict[Factors, float]]:
    """After each generation yields the losses of all candidates so far.

    The first generation is `starts` and mutants of them. measure(candidates) -> their losses; it is
    asked for each candidate once.
    """
    change = functools.partial(mutate, rng, largest=largest, probability=c.mutation_probability)
    losses: dict[Factors, float] = {}
    children = [*starts, *(change(starts[n % len(starts)])
                           for n in range(c.population - len(starts)))]
    for _ in range(1 + c.iterations):
        new = [child for child in dict.fromkeys(children) if child not in losses]
        losses.update(zip(new, measure(new)))
        yield losses
        parents = sorted(losses, key=losses.get)[:c.parents]
        children = []
        for n in range(c.mutations + c.crossovers):
            one, other = (parents[i] for i in rng.integers(len(parents), size=2))
            child = change(one) if n < c.mutations else cross(rng, one, other)
            children.append(change(child) if child in losses else child)  # once more, to be new


def mutate(rng: Generator, parent: Factors, largest: int, probability: float) -> Factors:
    """In random order each factor is, with this probability, drawn anew from those that lie between
    its neighbours'."""
    child = [100, *parent, largest]
    for i in 1 + rng.permutation(len(parent)):
        if rng.random() < probability:
            child[i] = int(rng.integers(child[i - 1], child[i + 1], endpoint=True))
    return tuple(child[1:-1])


def cross(rng: Generator, one: Factors, other: Factors) -> Factors:
    """Each factor from either parent, and then all sorted: the i-th still lies between theirs."""
    from_one = rng.random(len(one)) < 0.5
    return tuple(sorted(np.where(from_one, one, other).tolist()))
