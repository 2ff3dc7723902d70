"""A sentence hidden in text and begun again at the end: how much of it does the model complete?

    python extras/needle.py --model data/tiny
    python extras/needle.py --model data/tiny --rope linear --factor 4 --text book.txt
"""
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the core lies one folder up

import numpy as np
import torch

from common.cache import ResultCache
from common.cli import field, parse, run_command
from common.results import result
from data.corpus import ensure_corpus, read_documents, validation_documents
from data.needle import NeedlePrompts
from data.tokenizer import Tokenizer
from eval import four_lengths, print_by_depth
from evaluation.grid import accuracy_grid
from evaluation.retrieval import most_probable
from model import LLaMA
from weights.flags import ModelFlags, load_from_flags


@torch.inference_mode()
def answer_share(model: LLaMA, prompts: Sequence[np.ndarray],
                 answers: Sequence[np.ndarray]) -> list[float]:
    """Share of each answer's tokens that are the most probable ones, each after the right ones
    before it, in one pass."""
    produced = most_probable(model, prompts, answers)
    return [float(np.mean(np.equal(ids[:-1], answer))) for ids, answer in zip(produced, answers)]


def needle(model: LLaMA, tokenizer: Tokenizer, documents: Sequence[np.ndarray],
           lengths: Sequence[int] | None = None, depths: int = 10, trials: int = 10, seed: int = 0,
           progress: bool = True, cache: ResultCache | None = None) -> dict:
    """answer_share() of the sentence's second half, by the prompt's length and the needle's depth.

    documents: the haystack, arrays of token ids with BOS in front. `floor` is the same share where
    the sentence is hidden nowhere (`trials` prompts a length): what grammar alone tells. Methods
    that depend on the length have the frequencies of the whole prompt throughout. Returns the dict
    of the JSON file.
    """
    prompts = NeedlePrompts(tokenizer, documents)

    def build(rng: np.random.Generator, length: int, depth: float | None) -> tuple[tuple, int]:
        prompt, answer, place = prompts.build(rng, length, depth)
        return (prompt, answer), len(prompt) - place

    def build_without_needle(rng: np.random.Generator, length: int, _: float) -> tuple[tuple, int]:
        return build(rng, length, None)

    def score(cases: list[tuple]) -> list[float]:
        return answer_share(model, *zip(*cases))

    found = accuracy_grid(model, build, score, lengths, depths, trials, seed, cache, "needle",
                          progress)
    floor = accuracy_grid(model, build_without_needle, score, lengths, 1, trials, seed, cache,
                          "floor", progress)
    return result(model, seed, floor=floor["accuracy"], **found)


@dataclass
class NeedleFlags(ModelFlags):
    text: list[str] = field([], "UTF-8 files, the haystack, instead of the corpus")
    corpus: str = field("data/corpora/python",
                        "token folder whose validation documents are the haystack")
    lengths: list[int] = field([], "prompt lengths in tokens, the answer counted [half, one, two "
                               "and four original windows]")
    depths: int = field(10, "places of the needle, from the first to the last")
    trials: int = field(10, "needles in a piece of text at each place")


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(NeedleFlags, __doc__, argv)
    cache = ResultCache(flags.out)
    model, tokenizer = load_from_flags(flags)
    lengths = flags.lengths or four_lengths(model.config)
    if flags.text:
        documents = read_documents(flags.text, tokenizer, 0, 1)
    else:
        corpus = ensure_corpus(flags.corpus, tokenizer.path)
        documents = validation_documents(corpus, 2, 2**62, tokenizer, whole=True)
    found = needle(model, tokenizer, documents, lengths, flags.depths, flags.trials, flags.seed,
                   cache=cache)
    print_by_depth(found)
    floor = ", ".join(f"{share:.2f} at {length}" for length, share in found["floor"].items())
    print(f"without the needle {floor}, of {flags.trials} prompts   (share of the answer's tokens; "
          f"{flags.depths} depths x {flags.trials} needles; {found['seconds']:.1f} s)")
    cache.write_result(found)


if __name__ == "__main__":
    run_command(main)
