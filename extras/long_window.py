"""How far does a model read that nobody trained further? Distance maps and temperatures, from its
window L to 32 L.

    python extras/long_window.py                          # data/tiny, 256 to 8,192 tokens
    python extras/long_window.py --methods default '{"rope_type": "dca", "temperature": "log_n"}'

Each method is given, at each length, the factor that the length asks for. Perplexity is that of
held-out documents, read in windows of that length that move on by a quarter of it; passkeys are
counted over all seeds. Every measurement is kept: after an interruption the same command goes on.
"""
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the core lies one folder up

import numpy as np
import torch

from common.cache import ResultCache
from common.cli import field, parse, run_command
from common.device import choose_device
from common.errors import UserError
from common.files import check_output, read_json
from common.results import result
from common.tables import format_accuracy
from data.corpus import ensure_corpus, read_documents, validation_documents
from data.tokenizer import Tokenizer
from eval import CONVENTIONS, passkey, perplexity
from extras.sweep_tables import markdown
from methods import METHODS, parse_rope_flag
from methods.checks import check_attention
from model import ModelConfig
from plot import method_label, plot_long_window
from weights import load_config, load_tokenizer, with_rope
from weights.flags import ModelFlags, load_from_flags

MAPS = [name for name, method in METHODS.items() if method.distance_map]
FOLDING = [name for name in MAPS if name != "streaming"]  # which never sees more keys than L


def flag_with(method: str, temperature: str) -> str:
    return json.dumps({"rope_type": method, "temperature": temperature})


DEFAULT_METHODS = [
    "default", flag_with("default", "log_n"),
    "yarn", flag_with("yarn", "log_n"), flag_with("yarn", "none"),
    *MAPS,
    *(flag_with(name, "llama4") for name in FOLDING),
    *(flag_with(name, "log_n") for name in FOLDING)]


@dataclass
class LongWindowFlags(ModelFlags):
    methods: list[str] = field(DEFAULT_METHODS, "names or JSON objects [plain RoPE, YaRN and every "
                               "distance map, each with and without a temperature]")
    multiples: list[int] = field([1, 2, 4, 8, 16, 32], "lengths, as multiples of L")
    text: list[str] = field([], "UTF-8 files, a document each, instead of the corpus")
    corpus: str = field("data/corpora/python", "token folder whose validation documents are used")
    max_tokens: int = field(16384, "tokens of held-out documents to measure perplexity on; at "
                            "least the longest length")
    places: int = field(17, "passkey: places of the key at each seed; 0 measures none")
    seeds: list[int] = field([0, 1, 2], "passkey: a new key at each place for each of them")
    out: str = field("out/long-window.json", "table, as JSON, with figures beside it")


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(LongWindowFlags, __doc__, argv)
    base = load_config(flags.model)
    L = base.original_window
    lengths = [n * L for n in sorted(set(flags.multiples))]
    flags.seeds = list(dict.fromkeys(flags.seeds))
    check_flags(flags, base, lengths)
    tokenizer = load_tokenizer(flags.model, base.vocab_size)
    documents = documents_for(flags, tokenizer, lengths[-1])
    scored = sum(len(document) - 1 for document in documents)
    print(f"{len(flags.methods)} methods x {len(lengths)} lengths; {len(documents)} documents, "
          f"{scored:,} tokens; passkey: {flags.places} places x {len(flags.seeds)} keys")

    cache = ResultCache(flags.out)
    started = time.perf_counter()
    rows = []
    model = None
    for method in flags.methods:
        row = {"method": method, "perplexity": {}, "passkey": {}}
        for n in lengths:
            first = not rows and n == lengths[0]
            del model  # one at a time: the next may need the memory
            model, _ = load_from_flags(at_length(flags, method, n / L), quiet=not first)
            measured = perplexity(model, documents, n, cache=cache)
            row["perplexity"][n] = measured["perplexity"]
            row["passkey"][n] = share_of_keys(model, tokenizer, n, flags, cache)
            print(f"{method_label(method)}, {n} tokens: perplexity {row['perplexity'][n]:.2f}, "
                  f"passkey {format_accuracy(row['passkey'][n])}", flush=True)
        rows.append(row)
    measured = result(model, flags.seeds[0], long_window=rows, lengths=lengths,
                      documents=len(documents), tokens_scored=scored, stride="window / 4",
                      **CONVENTIONS, places=flags.places, seeds=flags.seeds,
                      seen_distances=seen_distances(L, factor=4.0),
                      seconds=time.perf_counter() - started)
    cache.write_result(measured | {"rope": base.rope.to_dict()})
    report = read_json(flags.out)
    print(markdown(*table(report)))
    for figure in plot_long_window(report, Path(flags.out).with_suffix(".png")):
        print(f"wrote {figure}")


def check_flags(flags: LongWindowFlags, base: ModelConfig, lengths: Sequence[int]) -> None:
    if flags.rope is not None or flags.factor is not None:
        raise UserError("long_window tries methods itself: name them with --methods; their factor "
                        "is that of the length")
    if flags.seed != 0:
        raise UserError("--seed: give --seeds, those of the keys")
    if min(flags.multiples) < 1 or flags.places < 0 or min(flags.seeds, default=-1) < 0:
        raise UserError("--multiples have to be at least 1, --places at least 0, and --seeds one "
                        "or more numbers of at least 0")
    if flags.max_tokens < lengths[-1]:
        raise UserError(f"--max-tokens {flags.max_tokens} is below the longest length, "
                        f"{lengths[-1]}: give at least as many, or smaller --multiples")
    if not flags.out:
        raise UserError("--out: give the name of a JSON file")
    check_output(flags.out, beside=[".png"])
    for method in flags.methods:
        rope = parse_rope_flag(method)
        if "factor" in rope:
            raise UserError(f"{method}: leave the factor out, it is that of the length")
        check_attention(flags.attention, rope["rope_type"], choose_device(flags.device))
        for n in lengths:  # refused now, not after hours
            with_rope(base, json.loads(at_length(flags, method, n / base.original_window).rope))


def documents_for(flags: LongWindowFlags, tokenizer: Tokenizer, longest: int) -> list[np.ndarray]:
    if flags.text:
        return read_documents(flags.text, tokenizer, flags.max_tokens + 1, longest)
    corpus = ensure_corpus(flags.corpus, tokenizer.path)
    return validation_documents(corpus, longest + 1, flags.max_tokens, tokenizer)


def at_length(flags: LongWindowFlags, method: str, factor: float) -> LongWindowFlags:
    """The flags that load the model with a method that is stretched by so much."""
    rope = parse_rope_flag(method)
    if rope["rope_type"] != "default":
        rope["factor"] = factor
    return dataclasses.replace(flags, rope=json.dumps(rope))


def share_of_keys(model: torch.nn.Module, tokenizer: Tokenizer, n: int, flags: LongWindowFlags,
                  cache: ResultCache) -> float:
    """The share of the keys found in prompts of n tokens, over all places and seeds."""
    if flags.places == 0:
        return math.nan
    found = [passkey(model, tokenizer, [n], flags.places, 1, seed, cache=cache)["accuracy"][n]
             for seed in flags.seeds]
    return sum(found) / len(found)


def seen_distances(L: int, factor: float) -> dict[str, list[float | None]]:
    """For each map the distance at which the last query of L' tokens sees a key, by the distance in
    the text: 0, L/64, 2L/64, ... None where it does not see it."""
    n = torch.arange(round(L * factor), device="cpu")
    found = {}
    for name in MAPS:
        seen = torch.full((len(n),), torch.nan, dtype=torch.float64)
        for band in METHODS[name].distance_map(n[-1:], n, L, factor):
            inside = (n >= band.first) & (n < band.stop)
            seen[inside] = (band.q - band.k).double()[inside]
        by_distance = seen.flip(0)[::max(1, L // 64)]
        found[name] = [None if math.isnan(d) else d for d in by_distance.tolist()]
    return found


def table(report: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """A row for each method: perplexity / passkey at each length."""
    lengths = [str(n) for n in report["lengths"]]
    body = []
    for row in report["long_window"]:
        cells = [method_label(row["method"])]
        for n in lengths:
            accuracy = row["passkey"][n]
            found = "-" if accuracy is None else f"{accuracy:.2f}"
            cells.append(f"{row['perplexity'][n]:.1f} / {found}")
        body.append(cells)
    return "Perplexity / passkeys found, untrained", ["method", *lengths], body


if __name__ == "__main__":
    run_command(main)
