"""LongRoPE: a factor for every pair, found by evolution instead of a formula.

    python extras/longrope_search.py                      # the tiny model to 4 L, an hour on a core
    python extras/longrope_search.py --fitness passkeys --out out/longrope-passkeys.json
    python eval.py ppl --window 1024 --rope "$(cat out/longrope.rope)"

Pair i turns by theta_i / f_i. The factors lie from 1 to 1.25 s, in steps of 0.01, and never fall
from a fast pair to a slower one. The search begins with those of PI, NTK-aware and YaRN, and with
mutants of them. The best candidates so far are the parents of each generation: half of the children
change some factors of one, half mix two. (Ding et al. 2024, arXiv 2402.13753, Algorithm 1)

A candidate's fitness is the loss of the untrained model that has these factors, on texts of L'
tokens: of all tokens, or of the answers alone to needles or passkeys (LongRoPE2's needle-driven
perplexity, arXiv 2502.20082). The texts come from the training split; the factors found are then
compared with the formulas on the held-out documents.

All candidates have one attention_factor, YaRN's if none is given: a temperature gains as much as
good factors do, and what is found should differ from YaRN in the factors alone. Not here: the first
tokens that LongRoPE leaves as they are (n-hat), which no `longrope`, ours or transformers', has.

Each loss is kept as soon as it is measured, and all choices follow from the seed and the losses. So
after an interruption the same command goes on, to the same result.
"""
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the core lies one folder up

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from common.cache import ResultCache
from common.cli import field, parse, run_command
from common.errors import UserError
from common.files import read_json, whole_file
from common.results import require_numbers, result
from common.tables import format_table
from data.corpus import TokenFile, ensure_corpus, require_same_tokenizer, validation_documents
from data.needle import NeedlePrompts
from data.passkey import PasskeyPrompts, random_key
from data.tokenizer import Tokenizer
from eval import CONVENTIONS, measure_lengths, perplexity
from evaluation.jobs import parallel_map, row_bytes, rows_per_pass
from extras.evolution import EvolutionFlags, Factors, evolve
from methods import inv_freq
from model import LLaMA, ModelConfig
from plot import plot_longrope
from rope import yarn_mscale
from weights import with_rope
from weights.flags import ModelFlags, load_from_flags

STARTS = {"linear": "PI", "ntk": "NTK", "yarn": "YaRN"}
COMPARED = ["default", "linear", "ntk", "ntk_by_parts", "yarn"]
LEAST = {"texts": 1, "population": 1, "parents": 1, "iterations": 0, "mutations": 0,
         "crossovers": 0, "seed": 0, "max_tokens": 1, "depths": 1, "trials": 0}


@dataclass
class LongRopeFlags(EvolutionFlags, ModelFlags):
    factor: float = field(4.0, "s = L'/L")
    fitness: str = field("text", "the tokens whose loss counts: all of texts, or the answers to "
                         "needles or passkeys", choices=["text", "needles", "passkeys"])
    texts: int = field(8, "texts or prompts of L' tokens that a candidate is judged by")
    attention_factor: float | None = field(None, "of all candidates [YaRN's, 0.1 ln s + 1]")
    corpus: str = field("data/corpora/python", "token folder: the search reads its training split, "
                        "the comparison its held-out documents")
    max_tokens: int = field(32768, "held-out tokens to compare on")
    depths: int = field(10, "passkeys to compare on: places of the key")
    trials: int = field(5, "keys at each place; 0 measures no passkey")
    out: str = field("out/longrope.json", "result, as JSON; beside it a figure, and the rope dict "
                     "as a .rope file")


# ---- Where the search begins, and the fitness ---------------------------------------------------


def starting_points(config: ModelConfig, factor: float) -> dict[str, Factors]:
    """PI, NTK-aware and YaRN as factors f_i = theta_i / theta'_i."""
    theta, _ = inv_freq(config.rope, config.head_dim)
    points = {}
    for method in STARTS:
        rope = with_rope(config, {"rope_type": method, "factor": factor}).rope
        stretched, _ = inv_freq(rope, config.head_dim)
        points[method] = tuple((100 * theta / stretched).round().int().tolist())
    return points


def texts_to_search_on(c: LongRopeFlags, folder: Path, tokenizer: Tokenizer, window: int,
                       rng: Generator) -> tuple[Tensor, Tensor]:
    """What the model reads, ids [B, T], T = L' or one less, and what follows its last n tokens,
    targets [B, n], with -100 where it does not count."""
    corpus = TokenFile(folder, "train")
    require_same_tokenizer(corpus, tokenizer)
    documents = list(corpus.documents(window + 1))
    if len(documents) < c.texts:
        raise UserError(f"{folder}: {len(documents)} training documents have {window + 1} tokens, "
                        f"{c.texts} are wanted: give a larger corpus or fewer --texts")
    documents = [documents[i] for i in rng.choice(len(documents), c.texts, replace=False)]
    if c.fitness == "text":
        rows = torch.from_numpy(np.stack([document[:window + 1] for document in documents]))
        return rows[:, :-1], rows[:, 1:]

    needles, passkeys = NeedlePrompts(tokenizer, documents), PasskeyPrompts(tokenizer)
    built = []
    for depth in (np.arange(c.texts) + 0.5) / c.texts:
        if c.fitness == "needles":
            prompt, answer, _ = needles.build(rng, window, depth)
        else:
            prompt, answer = passkeys.build(random_key(rng), window, depth)
        built.append((prompt, answer))
    rows = torch.from_numpy(np.stack([np.concatenate(pair) for pair in built]))           # [B, L']
    longest = max(len(answer) for _, answer in built)
    targets = rows[:, -longest:].clone()
    for row, (_, answer) in zip(targets, built):
        row[:longest - len(answer)] = -100                               # the end of the prompt
    return rows[:, :-1], targets


@torch.inference_mode()
def mean_loss(model: LLaMA, rope: dict[str, Any], ids: Tensor, targets: Tensor) -> float:
    """Nats a token that counts."""
    candidate = with_other_rope(model, rope)
    rows = rows_per_pass(model, ids.shape[1])
    total = 0.0
    for some_ids, some_targets in zip(ids.split(rows), targets.split(rows)):
        hidden = candidate.hidden(some_ids.to(model.device), last=targets.shape[1])
        nll = candidate.nll(hidden.flatten(0, 1), some_targets.flatten().to(model.device))
        total += nll.double().sum().item()
    require_numbers(total)
    return total / int((targets != -100).sum())


def with_other_rope(model: LLaMA, rope: dict[str, Any]) -> LLaMA:
    """The model with other positions, and the same weights, not a copy."""
    candidate = copy(model)
    candidate.config = with_rope(model.config, rope)
    return candidate


def losses_of(candidates: list[Factors], model: LLaMA, as_rope: Callable[[Factors], dict],
              ids: Tensor, targets: Tensor, cache: ResultCache) -> list[float]:
    """The mean_loss of each candidate. On a CPU every core takes a candidate of its own."""
    jobs = {candidate: (model, as_rope(candidate), ids, targets) for candidate in candidates}
    length = ids.shape[1]
    job_bytes = rows_per_pass(model, length) * row_bytes(model, length)
    losses = dict(zip(jobs, parallel_map(mean_loss, jobs, model, cache, job_bytes)))
    return [losses[candidate] for candidate in candidates]


# ---- The command ---------------------------------------------------------------------------------


def search_factors(c: LongRopeFlags, model: LLaMA, tokenizer: Tokenizer, folder: Path,
                   cache: ResultCache) -> dict[str, Any]:
    """Run the evolution, a line for each generation. Returns what the JSON file says about it."""
    config, window = model.config, round(model.config.original_window * c.factor)
    temperature = yarn_mscale(c.factor) if c.attention_factor is None else c.attention_factor

    def as_rope(factors: Factors) -> dict[str, Any]:
        return {"rope_type": "longrope", "factor": c.factor,
                "original_max_position_embeddings": config.original_window,
                "short_factor": [1.0] * len(factors), "long_factor": [f / 100 for f in factors],
                "attention_factor": temperature}

    rng = np.random.default_rng(c.seed)
    ids, targets = texts_to_search_on(c, folder, tokenizer, window, rng)
    cache = cache.for_model(model, "longrope", c.factor, temperature, ids.tolist(),
                            targets.tolist())
    measure = functools.partial(losses_of, model=model, as_rope=as_rope, ids=ids, targets=targets,
                                cache=cache)
    starts = starting_points(config, c.factor)
    best = []
    for losses in evolve(list(starts.values()), math.floor(125 * c.factor), measure, c, rng):
        best.append(math.exp(min(losses.values())))
        formulas = "  ".join(f"{STARTS[m]} {math.exp(losses[f]):.4f}" for m, f in starts.items())
        print(f"generation {len(best) - 1:<3} best {best[-1]:.4f}   {formulas}", flush=True)
    found = as_rope(min(losses, key=losses.get))
    print("factors    " + " ".join(f"{f:.2f}" for f in found["long_factor"]))
    begun = {method: {"perplexity": math.exp(losses[f]), "factors": as_rope(f)["long_factor"]}
             for method, f in starts.items()}
    return {"fitness": c.fitness, "window": window, "attention_factor": temperature, "found": found,
            "generations": best, "candidates": len(losses), "starts": begun}


def compare_held_out(c: LongRopeFlags, model: LLaMA, tokenizer: Tokenizer, folder: Path,
                     found: dict[str, Any], cache: ResultCache) -> dict[str, Any]:
    """The rope dict that was found beside the formulas, as they are, on the held-out documents."""
    L, window = model.config.original_window, round(model.config.original_window * c.factor)
    lengths = sorted({L, 2 * L, window})
    documents = validation_documents(folder, 2 * lengths[-1], c.max_tokens, tokenizer)
    rows, by_document = [], {}
    for rope in [*({"rope_type": name, "factor": c.factor} for name in COMPARED), found]:
        name = rope["rope_type"]
        candidate = model if name == "default" else with_other_rope(model, rope)
        measured = measure_lengths(candidate, tokenizer, documents, lengths, c.depths, c.trials,
                                   c.seed, cache)
        by_document[name] = [perplexity(candidate, [document], window, cache=cache)["nll"]
                             for document in documents]
        rows.append({"name": name, "rope": candidate.config.rope.to_dict(), **measured})
        table = format_table(rows, lengths, {"L": L}).splitlines()
        print("\n".join(table if len(rows) == 1 else table[-1:]), flush=True)
    better = sum(a < b for a, b in zip(by_document["longrope"], by_document["yarn"]))
    print(f"{len(documents)} held-out documents, stride window / 4: at {window} longrope is better "
          f"than YaRN on {better} of them")
    return {"methods": rows, "lengths": lengths, "documents": len(documents),
            "tokens_scored": sum(len(document) - 1 for document in documents),
            "nll_by_document": by_document, "stride": "window / 4", **CONVENTIONS}


def main(argv: Sequence[str] | None = None) -> None:
    c = parse(LongRopeFlags, __doc__, argv)
    for name, least in LEAST.items():
        if getattr(c, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(c, name)}: has to be at least "
                            f"{least}")
    if not (1 < c.factor and math.isfinite(c.factor)):
        raise UserError(f"--factor {c.factor}: give a number above 1")
    if not 0 < c.mutation_probability <= 1:
        raise UserError(f"--mutation-probability {c.mutation_probability}: give one of at most 1")
    cache = ResultCache(c.out, beside=[".rope", ".png"])
    model, tokenizer = load_from_flags(dataclasses.replace(c, factor=None))
    if model.config.rope.rope_type != "default":
        raise UserError(f"rope {model.config.rope.rope_type}: the search is for a model with plain "
                        "RoPE: give another --model, without --rope")
    folder = ensure_corpus(c.corpus, tokenizer.path)
    started = time.perf_counter()
    search = search_factors(c, model, tokenizer, folder, cache)
    searched = time.perf_counter() - started
    compared = compare_held_out(c, model, tokenizer, folder, search["found"], cache)
    settings = {f.name: getattr(c, f.name) for f in dataclasses.fields(c) if f.name != "out"}
    measured = result(model, c.seed, **search, **compared, settings=settings,
                      search_seconds=searched, seconds=time.perf_counter() - started)
    if c.out:
        rope_file = Path(c.out).with_suffix(".rope")
        with whole_file(rope_file, "w") as file:
            file.write(json.dumps(search["found"]) + "\n")
        cache.write_result(measured)
        figure = plot_longrope(read_json(c.out), Path(c.out).with_suffix(".png"))
        print(f"wrote {rope_file} and {figure}")


if __name__ == "__main__":
    run_command(main)
