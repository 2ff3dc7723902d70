"""Every way to stretch RoPE, untrained, at every length: a table, a JSON file and a figure.

    python extras/compare.py --model data/tiny
    python extras/compare.py --model data/tiny --methods linear '{"rope_type": "yarn", "factor": 3}'

Each row is the model with other frequencies, measured as eval.py measures.
"""
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the core lies one folder up

from common.cache import ResultCache
from common.cli import field, parse, run_command
from common.device import choose_device
from common.errors import UserError
from common.files import read_json
from common.results import result
from common.tables import format_table
from data.corpus import ensure_corpus, read_documents, validation_documents
from eval import CONVENTIONS, four_lengths, measure_lengths
from methods import METHODS, RopeConfig, inv_freq, parse_rope_flag
from methods.checks import check_attention, check_value
from model import ModelConfig
from plot import plot_compare
from weights import load_config, load_tokenizer, with_rope
from weights.flags import ModelFlags, load_from_flags

Variant = tuple[str, dict]  # name and rope dict


@dataclass
class CompareFlags(ModelFlags):
    text: list[str] = field([], "UTF-8 files, a document each, instead of the corpus")
    corpus: str = field("data/corpora/python", "token folder whose validation documents are used")
    methods: list[str] = field([], "names or JSON objects [every method that suits the model]")
    factors: list[float] = field([2.0, 4.0], "s, for the methods that have a fixed one")
    lengths: list[int] = field([], "windows and prompt lengths [half, one, two and four times L]")
    max_tokens: int = field(16384, "tokens of held-out documents to measure perplexity on")
    depths: int = field(10, "passkey: places of the key")
    trials: int = field(5, "passkey: keys at each place; 0 measures no passkey")
    out: str = field("out/compare.json", "table, as JSON, with a figure beside it")


def variants(config: ModelConfig, factors: Sequence[float],
             chosen: Sequence[str] = ()) -> list[Variant]:
    """The rows of the comparison: the model as it is, then every method that suits it, or those
    `chosen` (names or JSON objects), at every factor. A row that would measure the same as one
    before is left out."""
    name = "default" if config.rope.rope_type == "default" else "as it is"
    rows = [(name, config.rope.to_dict() | {"factor": config.rope.factor})]
    for rope in [parse_rope_flag(text) for text in chosen] or suitable_methods(config):
        rows += at_factors(rope, factors)
    different, seen = [], []
    for row in rows:
        traits = distinguishing_traits(with_rope(config, row[1]))
        if traits not in seen:
            seen.append(traits)
            different.append(row)
    return different


def suitable_methods(config: ModelConfig) -> list[dict]:
    """Every method that works on a model without training and search, as rope dicts."""
    own = config.rope.rope_type
    if not METHODS[own].extends_rope:
        return [{"rope_type": own}]
    whole_heads = config.rope.partial_rotary_factor == 1    # as a temperature needs them
    methods = []
    for name, method in METHODS.items():
        if name == "streaming":  # which sees no more keys than L: nothing to restore
            methods.append({"rope_type": name})
        elif method.distance_map is not None:
            methods.append({"rope_type": name, "temperature": "log_n" if whole_heads else "none"})
        elif method.extends_rope and not method.needs_settings:
            share = {"partial_rotary_factor": turning_share(config)} if method.full_head else {}
            methods.append({"rope_type": name, **share})
    return methods + [{"rope_type": "yarn", "attention_factor": 1.0},
                      {"rope_type": "yarn", "ramp": "turns"},
                      {"rope_type": "yarn", "resonance": True}]


def turning_share(config: ModelConfig) -> float:
    """The share of pairs that complete a turn within L: p-RoPE lets the others stand still."""
    frequencies, _ = inv_freq(RopeConfig(rope_theta=config.rope.base), config.head_dim)
    turning = int((frequencies * config.original_window >= 2 * math.pi).sum())
    share = turning / (config.head_dim // 2)
    # p-RoPE turns floor(share D / 2) pairs, which rounding may make one less: 15 / 44 of 44.
    return share if share * config.head_dim // 2 == turning else math.nextafter(share, 1)


def at_factors(rope: dict, factors: Sequence[float]) -> list[Variant]:
    """A method at each factor. At one only if it names its own, or has none to choose: plain RoPE,
    and methods that follow the length of the text."""
    rope_type = rope["rope_type"]
    name = rope_type
    for key, value in rope.items():
        if key in ("rope_type", "factor", "original_max_position_embeddings"):
            continue
        name += f" {key}"
        if isinstance(value, float):
            name += f"={value:.2g}"
        elif value is not True and not isinstance(value, list):
            name += f"={value}"
    if rope.get("factor") is not None:
        factors = [check_value("factor", rope["factor"], "float")]
    elif rope_type == "default" or METHODS[rope_type].length_dependent:
        return [(name, rope)]
    return [(f"{name} x{factor:g}", rope | {"factor": factor}) for factor in factors]


def distinguishing_traits(config: ModelConfig) -> list:
    """What tells a variant from another one: frequencies and attention factor at L, 2L and 4L, and
    whatever else the model makes of its rope dict."""
    rope, L = config.rope, config.original_window
    traits = []
    for length in (L, 2 * L, 4 * L):
        frequencies, attention_factor = inv_freq(rope, config.head_dim, length)
        traits += [frequencies.tolist(), attention_factor]
    traits += [rope.random_positions, rope.temperature, rope.no_rope_layer_interval]
    if METHODS[rope.rope_type].mechanism != "angles":
        traits += [rope.rope_type, rope.factor, rope.options]
    return traits


def compare(flags: CompareFlags, cache: ResultCache) -> dict:
    """Measure all variants. Returns the dict of the JSON file."""
    if flags.rope is not None or flags.factor is not None:
        raise UserError("compare tries methods itself: name them with --methods, and their "
                        "factors with --factors")
    base = load_config(flags.model)
    plan = variants(base, flags.factors, flags.methods)
    lengths = sorted(set(flags.lengths or four_lengths(base)))
    if lengths[0] < 1 or flags.max_tokens < 1:
        raise UserError(f"--lengths {lengths[0]}, --max-tokens {flags.max_tokens}: both have to be "
                        "at least 1")
    if flags.text and flags.max_tokens < lengths[-1]:
        raise UserError(f"--max-tokens {flags.max_tokens} is below the longest of --lengths, "
                        f"{lengths[-1]}: give at least as many, or shorter lengths")
    for _, rope in plan:
        check_attention(flags.attention, rope["rope_type"], choose_device(flags.device))
    tokenizer = load_tokenizer(flags.model, base.vocab_size)
    if flags.text:
        documents = read_documents(flags.text, tokenizer, flags.max_tokens + 1, lengths[-1])
    else:
        corpus = ensure_corpus(flags.corpus, tokenizer.path)
        documents = validation_documents(corpus, 2 * lengths[-1], flags.max_tokens, tokenizer)
    scored = sum(len(document) - 1 for document in documents)
    started = time.perf_counter()
    keys = f"passkey: {flags.depths} depths x {flags.trials} keys"
    print(f"{len(plan)} rows x {len(lengths)} lengths; {len(documents)} documents, {scored:,} "
          f"tokens, stride window / 4; {keys if flags.trials else 'no passkey'}")
    if not flags.methods and METHODS[base.rope.rope_type].extends_rope:
        left_out = [name for name, method in METHODS.items()
                    if not method.extends_rope or method.needs_settings]
        print(f"left out: {', '.join(left_out)} (no stretching of RoPE, or in need of settings: "
              "--methods takes JSON objects)")
    rows = []
    model = None
    for name, rope in plan:
        del model  # one at a time: the next may need the memory
        row_flags = dataclasses.replace(flags, rope=json.dumps(rope))
        model, _ = load_from_flags(row_flags, quiet=bool(rows))
        measured = measure_lengths(model, tokenizer, documents, lengths, flags.depths,
                                   flags.trials, flags.seed, cache)
        rows.append({"name": name, "rope": model.config.rope.to_dict(), **measured})
        table = format_table(rows, lengths, {"L": base.original_window}).splitlines()
        print("\n".join(table if len(rows) == 1 else table[-1:]), flush=True)
    measured = result(model, flags.seed, methods=rows, lengths=lengths, documents=len(documents),
                      tokens_scored=scored, stride="window / 4", **CONVENTIONS,
                      depths=flags.depths, trials=flags.trials,
                      seconds=time.perf_counter() - started)
    return measured | {"rope": base.rope.to_dict()}


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(CompareFlags, __doc__, argv)
    cache = ResultCache(flags.out, beside=[".png"])
    cache.write_result(compare(flags, cache))
    if flags.out:
        figure = plot_compare(read_json(flags.out), Path(flags.out).with_suffix(".png"))
        print(f"wrote {figure}")


if __name__ == "__main__":
    run_command(main)
