"""Evaluate a model: sliding-window perplexity, passkey retrieval, and text that it writes.

    python eval.py ppl      --model data/tiny --window 1024 --rope linear --factor 4
    python eval.py passkey  --model data/tiny --lengths 256 512 1024 --depths 10 --trials 10
    python eval.py generate --model data/tiny --prompt "def main("      # are the weights right?

The model's folder says which RoPE scaling it was trained with. --rope (a method's name, or a JSON
object with its settings) and --factor replace that, to try a scaling without fine-tuning. Each
command prints its result and the conditions; --out writes both as JSON.
"""
import functools
import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from common.cache import ResultCache
from common.cli import Parser, add_flags, field, run_command
from common.errors import UserError
from common.results import require_numbers, result
from data.corpus import check_max_tokens, ensure_corpus, read_documents, validation_documents
from data.passkey import PasskeyPrompts, random_key
from data.tokenizer import Tokenizer
from evaluation.generate import GenerateFlags, generate_command
from evaluation.grid import accuracy_grid
from evaluation.jobs import Window, map_windows
from evaluation.ranking import check_candidates, rank_passkeys
from evaluation.retrieval import retrieve_passkeys
from model import LLaMA, ModelConfig
from weights.flags import ModelFlags, load_from_flags

# Written beside every perplexity, as papers differ in both.
CONVENTIONS = {"bos": "once, at the start of each document",
               "mean": "over all scored tokens of all documents"}


# ---- Perplexity ----------------------------------------------------------------------------------

def sliding_windows(n: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """The windows that score a document of n tokens: yields (begin, end, skip) for each.

    The model reads tokens[begin:end], at most `window` of them, and predicts the token after each
    one, tokens[begin+1:end+1]. The window before has scored the first `skip` of these already.
    n = 9, window = 4, stride = 2: (0, 4, 0), (2, 6, 2), (4, 8, 2) score 4 + 2 + 2 = n-1 tokens.

    Every token but the first is scored exactly once. After the first window each is predicted from
    at least window - stride + 1 tokens. (Press et al. 2021, arXiv 2108.12409)
    """
    last_scored = 0  # the last token that the windows so far have scored; token 0 is given
    for begin in range(0, n - 1, stride):
        end = min(begin + window, n - 1)
        yield begin, end, last_scored - begin
        last_scored = end
        if end == n - 1:
            return


def perplexity(model: LLaMA, documents: Sequence[np.ndarray], window: int | None = None,
               stride: int | None = None, seed: int = 0, progress: bool = True, bins: int = 1,
               cache: ResultCache | None = None) -> dict[str, Any]:
    """exp(mean of -ln p(token)): one mean over all scored tokens of all documents, not a mean of
    windows' or documents' perplexities.

    documents: token ids, each beginning with BOS; a window inside a document gets no second BOS.
    window: tokens that the model reads at a time [default: its max_seq_len].
    stride: tokens from the begin of one window to the begin of the next [default: window / 4].
    bins: if above 1, also the mean loss by tokens of context, in this many parts of the window.
    seed: only written into the result. cache: an interrupted command goes on from it.
    Returns the dict that --out writes as JSON.
    """
    window, stride = window_and_stride(model, window, stride)
    documents = [np.asarray(document) for document in documents]
    check_documents(documents, window, bins)
    started = time.perf_counter()
    windows = [Window(index, begin, end, skip) for index, document in enumerate(documents)
               for begin, end, skip in sliding_windows(len(document), window, stride)]
    hashes = [hashlib.sha256(d.astype(np.int64).tobytes()).hexdigest() for d in documents]
    cache = (cache or ResultCache()).for_model(model, "perplexity", hashes, window, stride, bins)

    score = functools.partial(window_nll, model, documents, window=window, bins=bins)
    nll, tokens = np.zeros(bins), np.zeros(bins, np.int64)  # sums over all windows, for each bin
    title = f"perplexity, window {window}"
    for batch_nll, batch_tokens in map_windows(score, windows, model, cache, title, progress):
        nll += batch_nll
        tokens += batch_tokens
    mean = float(nll.sum() / tokens.sum())
    ppl = math.inf if mean > 700 else math.exp(mean)        # math.exp raises above 709.7
    return result(model, seed, perplexity=ppl, nll=mean,
                  tokens=int(tokens.sum()), documents=len(documents), window=window, stride=stride,
                  **CONVENTIONS, **loss_by_context(nll, tokens, window),
                  seconds=time.perf_counter() - started)


@torch.inference_mode()
def window_nll(model: LLaMA, documents: Sequence[np.ndarray], batch: Sequence[Window],
               window: int, bins: int) -> tuple[list[float], list[int]]:
    """Score a batch of windows, all of length T. Returns two lists with an entry for each bin of
    context: the sum of -ln p in nats, and the number of scored tokens."""
    rows = [documents[w.document][w.begin:w.end + 1] for w in batch]        # + 1: the last target
    ids = torch.from_numpy(np.stack(rows).astype(np.int64)).to(model.device)         # [B, T + 1]
    skip = torch.tensor([w.skip for w in batch], device=model.device)                # [B]
    T = ids.shape[1] - 1
    first = int(skip.min())     # positions before it are only context, in every row of the batch

    hidden = model.hidden(ids[:, :-1], last=T - first)                         # [B, T-first, C]
    targets = ids[:, 1 + first:]                                               # [B, T-first]
    position = torch.arange(first, T, device=model.device).expand_as(targets)  # of the token read
    new = position >= skip[:, None]            # bool [B, T-first], not scored by the window before
    nll = model.nll(hidden[new], targets[new]).cpu().double().numpy()          # [N]
    require_numbers(nll)
    bin_of_token = position[new].cpu().numpy() * bins // window                # [N]
    return (np.bincount(bin_of_token, weights=nll, minlength=bins).tolist(),
            np.bincount(bin_of_token, minlength=bins).tolist())


def loss_by_context(nll: np.ndarray, tokens: np.ndarray, window: int) -> dict[str, list]:
    """The mean loss of each bin, and the fewest tokens of context that a prediction in it has.
    Empty if there is only one bin, the whole window."""
    bins = len(nll)
    if bins == 1:
        return {}
    means = [float(total / n) if n else math.nan for total, n in zip(nll, tokens)]
    return {"context": [math.ceil(i * window / bins) + 1 for i in range(bins)],
            "nll_by_context": means, "tokens_by_context": tokens.tolist()}


def window_and_stride(model: LLaMA, window: int | None, stride: int | None) -> tuple[int, int]:
    """Fill in the defaults (the model's window, a quarter of the window), refuse what cannot be."""
    window = model.config.max_seq_len if window is None else window
    stride = max(1, window // 4) if stride is None else stride
    if window < 1 or stride < 1:
        raise UserError(f"window {window}, stride {stride}: both have to be at least 1")
    if stride > window:
        raise UserError(f"stride {stride} is greater than window {window}: tokens between two "
                        "windows would never be scored")
    return window, stride


def check_documents(documents: Sequence[np.ndarray], window: int, bins: int) -> None:
    if not 1 <= bins <= window:
        raise UserError(f"{bins} bins: give at least 1 and at most the window, {window}")
    if all(len(document) < 2 for document in documents):
        raise UserError("no document has two tokens: there is nothing to predict")


def bits_per_byte(nll: float, documents: Sequence[np.ndarray], tokenizer: Tokenizer
                  ) -> dict[str, float]:
    """-log2 p per byte of text, which compares models with different tokenizers:
    nats per token x scored tokens / (ln 2 x bytes of UTF-8)."""
    scored = sum(max(len(document) - 1, 0) for document in documents)
    size = 0
    for document in documents:
        ids = [i for i in document.tolist() if i not in (tokenizer.bos_id, tokenizer.eos_id)]
        size += len(tokenizer.decode(ids).encode())
    return {"bits_per_byte": nll * scored / math.log(2) / max(size, 1), "bytes": size}


# ---- Passkey retrieval ---------------------------------------------------------------------------

def passkey(model: LLaMA, tokenizer: Tokenizer, lengths: Sequence[int] | None = None,
            depths: int = 10, trials: int = 10, seed: int = 0, progress: bool = True,
            generation: bool = False, cache: ResultCache | None = None, rank: int = 0) -> dict:
    """Accuracy of greedy passkey retrieval at each length (tokens, the answer counted), for
    `depths` places of the key from the beginning to the end, and `trials` keys at each place:
    accuracy_grid makes the prompts with `build`, and averages what `score` says of the answers.

    Also k_max at the longest length. generation: judge by generating every answer instead of by one
    pass, with the same verdicts. rank: generate nothing, ask whether the key is the most probable
    of so many (evaluation/ranking.py). Returns the dict of the JSON file.
    """
    check_candidates(rank)
    prompts = PasskeyPrompts(tokenizer)
    chance = 1 / rank if rank else 0.0

    def build(rng: np.random.Generator, length: int, depth: float) -> tuple[tuple, int]:
        key = random_key(rng)
        prompt, answer = prompts.build(key, length, depth=depth)
        distance = len(prompt) - prompts.position(prompt, key)     # from the key to the end
        return (prompt, answer, key), distance

    def score(cases: list[tuple]) -> list[float]:
        texts, answers, keys = zip(*cases)
        if rank:
            return rank_passkeys(model, prompts, texts, keys, rank)
        return retrieve_passkeys(model, tokenizer, texts, answers, keys, generation=generation)

    name = "passkey by generation" if generation else "passkey"
    name = f"passkey among {rank}" if rank else name
    found = accuracy_grid(model, build, score, lengths, depths, trials, seed, cache, name, progress,
                          generating=True)
    longest = found["lengths"][-1]
    effective = k_max(found["distances"][longest], found["accuracy_by_depth"][longest],
                      0.2 + 0.8 * chance)  # 20 % known, and the others guessed
    return result(model, seed, k_max=effective, rank=rank, chance=chance, **found)


def k_max(distances: Sequence[int], accuracy: Sequence[float], threshold: float = 0.2) -> int:
    """The PI paper's effective window: the largest distance of the key from the end, up to which
    every distance tried has at least `threshold` accuracy; 0 if the nearest fails. (Section 3.3)"""
    best = 0
    for distance, value in sorted(zip(distances, accuracy)):
        if value < threshold:
            break
        best = distance
    return best


def measure_lengths(model: LLaMA, tokenizer: Tokenizer, documents: Sequence[np.ndarray],
                    lengths: Sequence[int], depths: int, trials: int, seed: int = 0,
                    cache: ResultCache | None = None) -> dict[str, dict[int, Any]]:
    """Perplexity, passkey accuracy and k_max at each length: a row of a table. Without trials there
    is no passkey."""
    row: dict[str, dict[int, Any]] = {"perplexity": {}, "passkey": {}, "k_max": {}}
    for n in lengths:
        row["passkey"][n], row["k_max"][n] = math.nan, None
        if trials:
            found = passkey(model, tokenizer, [n], depths, trials, seed, cache=cache)
            row["passkey"][n], row["k_max"][n] = found["accuracy"][n], found["k_max"]
    for n in lengths:
        row["perplexity"][n] = perplexity(model, documents, n, cache=cache)["perplexity"]
    return row


def four_lengths(config: ModelConfig) -> list[int]:
    """Half, one, two and four original windows."""
    L = config.original_window
    return [max(L // 2, 1), L, 2 * L, 4 * L]


# ---- Commands ------------------------------------------------------------------------------------

@dataclass
class PerplexityFlags(ModelFlags):
    text: list[str] = field([], "UTF-8 files, a document each, instead of the corpus")
    corpus: str = field("data/corpora/python", "token folder whose validation documents are used")
    window: int | None = field(None, "tokens the model reads at a time [the model's window]")
    stride: int | None = field(None, "tokens by which the window moves on [window / 4]")
    max_tokens: int = field(65536, "about how many tokens to score: of the whole corpus, or of "
                            "each --text; 0 is all")
    bins: int = field(1, "above 1: also the loss by tokens of context, in so many parts of the "
                      "window. The default stride is then the window, to score all parts about "
                      "equally often")


@dataclass
class PasskeyFlags(ModelFlags):
    lengths: list[int] = field([], "prompt lengths in tokens, the answer counted [half, one, two "
                               "and four original windows]")
    depths: int = field(10, "places of the key, from the first to the last")
    trials: int = field(10, "random keys at each place")
    generation: bool = field(False, "judge by generating every answer instead of by one "
                             "teacher-forced pass: the same verdict, slower")
    rank: int = field(0, "instead: is the key the most probable of so many keys? Chance is 1/RANK")


def perplexity_command(flags: PerplexityFlags, cache: ResultCache) -> dict[str, Any]:
    model, tokenizer = load_from_flags(flags)
    window, stride = window_and_stride(model, flags.window, flags.stride)
    stride = window if flags.bins > 1 and flags.stride is None else stride
    if flags.max_tokens < 0:
        raise UserError(f"--max-tokens {flags.max_tokens}: give a number of tokens, or 0 for all "
                        "of them")
    if flags.text:
        check_max_tokens(flags.max_tokens, window)
        documents = read_documents(flags.text, tokenizer, flags.max_tokens, window)
    else:
        # L is the original window. Documents of 8 L serve every --window up to 4 L, so that all
        # of them score the same text. A longer window needs two of its length, to slide.
        length = max(2 * window, 8 * model.config.original_window)
        most_tokens = flags.max_tokens or 2**62  # 0: the whole split
        corpus = ensure_corpus(flags.corpus, tokenizer.path)
        documents = validation_documents(corpus, length, most_tokens, tokenizer)
    found = perplexity(model, documents, window, stride, flags.seed, bins=flags.bins, cache=cache)
    found |= bits_per_byte(found["nll"], documents, tokenizer)
    print(f"perplexity {found['perplexity']:.4f}   ({found['nll']:.4f} nats a token, "
          f"{found['bits_per_byte']:.4f} bits a byte; {found['tokens']:,} tokens of "
          f"{found['documents']} documents, window {window}, stride {stride}, BOS {found['bos']}; "
          f"{found['seconds']:.1f} s)")
    if flags.bins > 1:
        print("context    loss (nats a token, predicted from so many tokens and more)")
        for context, nll in zip(found["context"], found["nll_by_context"]):
            print(f"{context:<10,} {nll:.4f}")
    return found


def passkey_command(flags: PasskeyFlags, cache: ResultCache) -> dict[str, Any]:
    model, tokenizer = load_from_flags(flags)
    lengths = flags.lengths or four_lengths(model.config)
    found = passkey(model, tokenizer, lengths, flags.depths, flags.trials, flags.seed,
                    generation=flags.generation, cache=cache, rank=flags.rank)
    print_by_depth(found)
    judged = f"ranked among {flags.rank}, chance {found['chance']:.2f}" if flags.rank else "greedy"
    print(f"k_max {found['k_max']} at length {found['lengths'][-1]}   ({flags.depths} depths x "
          f"{flags.trials} keys, {judged}; {found['seconds']:.1f} s)")
    return found


def print_by_depth(found: dict[str, Any]) -> None:
    """An accuracy_grid, a line for each length."""
    print("length   accuracy   by depth, from the beginning to the end")
    for length, accuracy in found["accuracy"].items():
        by_depth = " ".join(f"{a:.1f}" for a in found["accuracy_by_depth"][length])
        print(f"{length:<8} {accuracy:<10.3f} {by_depth}")


COMMANDS = {"ppl": (PerplexityFlags, perplexity_command, "sliding-window perplexity"),
            "passkey": (PasskeyFlags, passkey_command, "passkey retrieval by length and depth"),
            "generate": (GenerateFlags, generate_command, "continue a text")}


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, epilog="python eval.py ppl -h lists the flags of ppl; so "
                    "does -h behind passkey and generate")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, (settings, _, text) in COMMANDS.items():
        add_flags(commands.add_parser(name, help=text, description=text), settings)
    given = vars(parser.parse_args(argv))
    settings, command, _ = COMMANDS[given.pop("command")]
    flags = settings(**given)
    cache = ResultCache(flags.out)
    cache.write_result(command(flags, cache))


if __name__ == "__main__":
    run_command(main)
