"""LongPPL: perplexity on the tokens that need the long context. (Fang et al. 2024, 2410.23771)

    python finetune.py --rope yarn --factor 4 --no-baseline      # an evaluator: out/yarn-x4
    python extras/longppl.py --rope linear yarn                 # data/tiny as it is, and with these
    python extras/longppl.py --model out/pi-x2 out/direct-x2 --evaluator out/yarn-x4 --length 512

Most tokens follow from the few before them, so plain perplexity, a mean over all, hardly shows
whether a model uses the rest. An evaluator, a model that reads long texts well, says which do not:

    l_long    its loss on a token, in nats, after all that comes before it
    l_short   its loss after the last K tokens only
    key       l_short - l_long > 2  and  l_long < 2
    LongPPL   exp(the judged model's mean loss over the key tokens)

The evaluator is none of the judged models. A key token is one on which its loss is small: its own
LongPPL is below e^2 by definition, however it reads. Nor is it a model that reads no more than the
old window, as it cannot say what the rest is good for. For an untrained method take a model that
was fine-tuned to the longer window.

The text is cut into pieces of --length tokens, BOS in front of each, and each is read in one pass.
l_short is read through windows of K tokens that move on by --stride: a token is predicted from its
last K - stride + 1 to K tokens; with --stride 1 from exactly K. Among a piece's first K tokens both
losses are the same, and none is key. (The authors' code: K to K + 1023, K = 4096.)

A model whose window is shorter than the pieces is also judged inside it, with a sliding window: as
good as without the long context. Every loss is kept: after an interruption the command goes on.
"""
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the core lies one folder up

import numpy as np

from common.cache import ResultCache
from common.cli import field, parse, run_command
from common.errors import UserError
from common.results import result
from data.corpus import ensure_corpus, read_documents, validation_documents
from data.tokenizer import Tokenizer
from eval import sliding_windows, window_nll
from evaluation.jobs import Window, map_windows
from extras.compare import at_factors, variants
from methods import parse_rope_flag
from model import LLaMA, ModelConfig
from weights import load_config, load_tokenizer, with_rope
from weights.flags import ModelFlags, load_from_flags, rope_from_flags

GAIN = 2.0            # nats that the long context brings at least, on a key token
PREDICTED_WELL = 2.0  # nats that a key token's loss has at most, with the long context


@dataclass
class LongPPLFlags(ModelFlags):
    model: list[str] = field(["data/tiny"], "models to judge, each as it is and with every --rope")
    rope: list[str] = field([], "methods to judge, names or JSON objects")
    factor: float | None = field(None, "s, for --rope [the length / the original window]")
    evaluator: str = field("out/yarn-x4", "model that chooses the key tokens; none of those judged")
    evaluator_rope: str | None = field(None, "method for it, at the factor, instead of its own")
    text: list[str] = field([], "UTF-8 files, instead of the corpus")
    corpus: str = field("data/corpora/python", "token folder whose validation documents are used")
    length: int | None = field(None, "tokens of a piece, the long context [four original windows]")
    short: int | None = field(None, "K, tokens of the short context [an eighth of the length]")
    stride: int | None = field(None, "tokens by which the short window moves on [K / 4]")
    max_tokens: int = field(65536, "about how many tokens to score; 0 is all")


class Judged(NamedTuple):
    """A row of the table: a model with some positions, and how it reads a piece."""
    name: str
    flags: ModelFlags
    window: int  # tokens it reads at a time
    stride: int


# ---- The measure ---------------------------------------------------------------------------------

def key_tokens(l_long: np.ndarray, l_short: np.ndarray) -> np.ndarray:
    """Whether each token needs the long context: bool, from the evaluator's losses in nats."""
    return (l_short - l_long > GAIN) & (l_long < PREDICTED_WELL)


def long_perplexity(losses: np.ndarray, key: np.ndarray) -> tuple[float, float]:
    """(exp of the mean loss over the key tokens, standard error of that mean in nats). The error
    counts tokens as independent, which those of one text are not quite."""
    chosen = losses[key]
    return float(np.exp(chosen.mean())), float(chosen.std() / np.sqrt(len(chosen)))


def token_losses(model: LLaMA, pieces: Sequence[np.ndarray], window: int, stride: int,
                 cache: ResultCache | None = None, title: str = "losses", progress: bool = True
                 ) -> np.ndarray:
    """-ln p, in nats, of every token but the first of each piece, read through sliding windows:
    pieces of N + 1 ids -> [pieces, N]."""
    hashes = [hashlib.sha256(piece.astype(np.int64).tobytes()).hexdigest() for piece in pieces]
    cache = (cache or ResultCache()).for_model(model, "token losses", hashes, window, stride)
    windows = [Window(index, begin, end, skip) for index, piece in enumerate(pieces)
               for begin, end, skip in sliding_windows(len(piece), window, stride)]

    def score(batch: list[Window]) -> list[tuple[int, int, list[float]]]:
        return [(w.document, w.begin + w.skip, new_losses(model, pieces, w)) for w in batch]

    losses = np.full((len(pieces), len(pieces[0]) - 1), np.nan)
    for batch in map_windows(score, windows, model, cache, title, progress):
        for piece, first, values in batch:
            losses[piece, first:first + len(values)] = values
    return losses


def new_losses(model: LLaMA, pieces: Sequence[np.ndarray], w: Window) -> list[float]:
    """The losses of a window that the one before has not scored. window_nll adds up what falls into
    a bin of the window: here every token has a bin of its own."""
    nll, _ = window_nll(model, pieces, [w], window=w.length, bins=w.length)
    return nll[w.skip:]


# ---- What is judged, by whom, on what ------------------------------------------------------------

def model_flags(flags: LongPPLFlags, model: str, rope: dict | None) -> ModelFlags:
    """The flags of one model among several, with a rope dict or its own."""
    shared = {f.name: getattr(flags, f.name) for f in dataclasses.fields(ModelFlags)}
    text = None if rope is None else json.dumps(rope)
    return ModelFlags(**shared | {"model": model, "rope": text, "factor": None})


def evaluator_flags(flags: LongPPLFlags) -> ModelFlags:
    """The flags of the evaluator, with its own rope or --evaluator-rope at the factor."""
    if not Path(flags.evaluator).exists():
        raise UserError(f"--evaluator {flags.evaluator}: no such model: name one that reads "
                        f"{flags.length} tokens well (for data/tiny: python finetune.py --rope "
                        "yarn --factor 4)")
    if flags.evaluator_rope is None:
        return model_flags(flags, flags.evaluator, None)
    factor = factor_for(flags, load_config(flags.evaluator))
    [(_, rope)] = at_factors(parse_rope_flag(flags.evaluator_rope), [factor])
    return model_flags(flags, flags.evaluator, rope)


def factor_for(flags: LongPPLFlags, config: ModelConfig) -> float:
    """s for --rope: --factor, or what stretches the model's window to a piece."""
    return flags.factor or max(1.0, flags.length / config.original_window)


def list_judged(flags: LongPPLFlags) -> list[Judged]:
    """Every model as it is, inside its window if that is shorter than a piece, and with every
    --rope."""
    rows = []
    for path in flags.model:
        config = load_config(path)
        (name, own), *others = variants(config, [factor_for(flags, config)], flags.rope)
        if not flags.rope:
            others = []  # variants() takes an empty list to mean all methods
        label = f"{Path(path).name}, " if len(flags.model) > 1 else ""
        as_it_is = model_flags(flags, path, own)
        rows.append(Judged(label + name, as_it_is, flags.length, flags.length))
        window = config.max_seq_len
        if window < flags.length:
            inside = Judged(label + f"{name}, in its window", as_it_is, window, max(1, window // 4))
            rows.append(inside)
        for name, rope in others:
            rows.append(Judged(label + name, model_flags(flags, path, rope), flags.length,
                               flags.length))
    return rows


def check_evaluator(evaluator: ModelFlags, judged: Sequence[Judged], length: int) -> None:
    """Refuse an evaluator that is judged itself, or that cannot read a whole piece."""
    config = with_rope(load_config(evaluator.model), rope_from_flags(evaluator))
    if config.max_seq_len < length:
        raise UserError(f"--evaluator {evaluator.model} has a window of {config.max_seq_len} "
                        f"tokens: it cannot say what {length} are good for; name a model of a "
                        "longer window, or give a shorter --length")
    for row in judged:
        same_weights = Path(row.flags.model).resolve() == Path(evaluator.model).resolve()
        rope = with_rope(load_config(row.flags.model), rope_from_flags(row.flags)).rope
        if same_weights and rope == config.rope:
            raise UserError(f"--evaluator {evaluator.model} is itself judged (as '{row.name}'): "
                            "key tokens are those on which its own loss is small, so it would "
                            "choose what flatters it: name another model")


def check_tokenizers(flags: LongPPLFlags) -> None:
    """Refuse models whose tokens are not the evaluator's: key tokens are numbers of tokens."""
    hashes = {path: load_tokenizer(path, load_config(path).vocab_size).sha256
              for path in (flags.evaluator, *flags.model)}
    for path in flags.model:
        if hashes[path] != hashes[flags.evaluator]:
            raise UserError(f"{path} has another tokenizer than the evaluator {flags.evaluator}, "
                            "so its tokens are others: judge it with an evaluator of its own")


def complete_lengths(flags: LongPPLFlags, L: int) -> None:
    """Fill in the defaults, refuse what cannot be. L: the original window."""
    flags.length = 4 * L if flags.length is None else flags.length
    flags.short = max(1, flags.length // 8) if flags.short is None else flags.short
    flags.stride = max(1, flags.short // 4) if flags.stride is None else flags.stride
    if not 0 < flags.short < flags.length:
        raise UserError(f"--short {flags.short}: has to be from 1 to below the --length, "
                        f"{flags.length}")
    if not 0 < flags.stride <= flags.short:
        raise UserError(f"--stride {flags.stride}: has to be from 1 to --short, {flags.short}")
    if flags.max_tokens and flags.max_tokens < flags.length:
        raise UserError(f"--max-tokens {flags.max_tokens}: give at least a piece of {flags.length} "
                        "tokens, or 0 for all")
    if flags.factor is not None and flags.factor < 1:
        raise UserError(f"--factor {flags.factor:g}: has to be at least 1")


def read_pieces(flags: LongPPLFlags, tokenizer: Tokenizer) -> list[np.ndarray]:
    """The text in pieces of --length tokens, BOS in front of each. What is left over at the end of
    a document is not used."""
    N = flags.length
    if flags.text:
        documents = read_documents(flags.text, tokenizer, 0, 1)
    else:
        corpus = ensure_corpus(flags.corpus, tokenizer.path)
        documents = validation_documents(corpus, N + 1, 2**62, tokenizer, whole=True)
    pieces = [np.concatenate([document[:1], document[start:start + N]])
              for document in documents for start in range(1, len(document) - N + 1, N)]
    if not pieces:
        raise UserError(f"--text: no file has {N} tokens: give a longer one, or a shorter --length")
    return pieces[:flags.max_tokens // N] if flags.max_tokens else pieces


# ---- The command ---------------------------------------------------------------------------------

def choose_key_tokens(flags: LongPPLFlags, evaluator: ModelFlags, cache: ResultCache
                      ) -> tuple[np.ndarray, list[np.ndarray], dict[str, Any]]:
    """(bool [pieces, N], the pieces, what the report says of the evaluator)."""
    model, tokenizer = load_from_flags(evaluator)
    pieces = read_pieces(flags, tokenizer)
    length, short, stride = flags.length, flags.short, flags.stride
    l_long = token_losses(model, pieces, length, length, cache, "evaluator, long")
    l_short = token_losses(model, pieces, short, stride, cache, "evaluator, short")
    key = key_tokens(l_long, l_short)
    about = {"model": evaluator.model, "rope": model.config.rope.to_dict(),
             "perplexity_long": float(np.exp(l_long.mean())),
             "perplexity_short": float(np.exp(l_short.mean()))}
    least = short - stride + 1
    context = f"{short:,}" if stride == 1 else f"{least:,} to {short:,}"
    print(f"evaluator  perplexity {about['perplexity_long']:.3f} with up to {length:,} tokens of "
          f"context, {about['perplexity_short']:.3f} with the last {context}\n"
          f"key        {key.sum():,} of {key.size:,} tokens ({key.mean():.2%}) in {len(pieces)} "
          f"pieces: loss below {PREDICTED_WELL:g} with the long context, and more than {GAIN:g} "
          "above it with the short one")
    if not key.any():
        raise UserError("no token needs the long context by this rule: give more text "
                        "(--max-tokens), another evaluator, or a smaller --short")
    return key, pieces, about


def longppl(flags: LongPPLFlags, cache: ResultCache) -> dict[str, Any]:
    """Judge all models on the evaluator's key tokens. Returns the dict of the JSON file."""
    started = time.perf_counter()
    first = load_config(flags.model[0])
    complete_lengths(flags, first.original_window)
    judged, evaluator = list_judged(flags), evaluator_flags(flags)
    check_evaluator(evaluator, judged, flags.length)
    check_tokenizers(flags)
    key, pieces, about = choose_key_tokens(flags, evaluator, cache)
    width = 2 + max(len(row.name) for row in judged)
    print(f"\n{'':{width}}{'window':>8}  {'perplexity':>10}  {'LongPPL':>10}")
    rows = []
    model = None
    for row in judged:
        del model  # one at a time: the next may need the memory
        model, _ = load_from_flags(row.flags, quiet=True)
        losses = token_losses(model, pieces, row.window, row.stride, cache, row.name)
        value, error = long_perplexity(losses, key)
        rows.append({"name": row.name, "model": row.flags.model, "window": row.window,
                     "stride": row.stride, "rope": model.config.rope.to_dict(),
                     "perplexity": float(np.exp(losses.mean())), "longppl": value,
                     "standard_error_nats": error})
        print(f"{row.name:{width}}{row.window:8,}  {rows[-1]['perplexity']:10.3f}  {value:10.3f}",
              flush=True)
    measured = result(model, flags.seed, judged=rows, evaluator=about, tokens=key.size,
                      pieces=len(pieces), key_tokens=int(key.sum()), key_share=float(key.mean()),
                      gain=GAIN, predicted_well=PREDICTED_WELL, length=flags.length,
                      short=flags.short, stride=flags.stride,
                      short_context=[flags.short - flags.stride + 1, flags.short],
                      bos="in front of each piece", seconds=time.perf_counter() - started)
    return measured | {"model": ", ".join(flags.model), "rope": first.rope.to_dict(),
                       "original_window": first.original_window}


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(LongPPLFlags, __doc__, argv)
    cache = ResultCache(flags.out)
    cache.write_result(longppl(flags, cache))


if __name__ == "__main__":
    run_command(main)
