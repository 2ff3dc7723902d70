"""What a window is worth: sliding-window perplexity, passkeys and needles, all methods side by side; and a model's own words.

    python eval.py ppl     --model data/tiny --window 1024 --rope linear --factor 4
    python eval.py passkey --model data/tiny --lengths 256 512 1024 --depths 10 --trials 10
    python eval.py needle  --model data/tiny                  # a sentence hidden in text, begun again at the end
    python eval.py compare --model data/tiny                  # every method of rope.py, untrained -> a table, a JSON file and a figure
    python eval.py generate --model data/tiny --prompt "def main("          # the proof that the weights are right

A model's folder knows its own RoPE scaling; --rope and --factor replace it, for a model that was not fine-tuned. --rope takes a method's
name or a JSON object with its settings. Each command prints what it measured and under which conditions, and with --out writes it as JSON.
"""
import dataclasses
import hashlib
import json
import math
import time
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cli import Kept, Parser, UserError, add_flags, choose_device, choose_dtype, describe_device, field, read_json, run, write_json
from data.batches import TokenFile
from data.prepare import ensure_corpus, read_text
from model import stream
from passes import in_turn, result, row_bytes, rows_at_once, store
from plot import plot_compare
from retrieval import needle, passkey
from rope import METHODS, RopeConfig, inv_freq, rope_argument
from weights import load_config, load_model, load_tokenizer, original_window, with_rope


# ---------------------------------------------------------------------------------------------------------------------
# Perplexity


def sliding_windows(n, window, stride):
    """Cover the n-1 predictions of a document of n tokens: yields (begin, end, skip).

    The model reads tokens[begin:end], at most `window` of them, and predicts tokens[begin+1:end+1], of which the first `skip` were scored
    by the window before. Every token but the first is scored exactly once, after the first window each with at least window - stride + 1
    tokens of context. With stride = window the pieces do not overlap. (Press et al. 2021; Baevski & Auli 2018)
    """
    scored = 0  # predictions made so far
    for begin in range(0, n - 1, stride):
        end = min(begin + window, n - 1)
        yield begin, end, scored - begin
        scored = end
        if end == n - 1:
            return


CONVENTIONS = {"bos": "once, at the start of each document", "mean": "over all scored tokens of all documents"}  # said with each result


def bits_per_byte(nll, documents, tokenizer):
    """-log2 p per byte of text, which compares models with different tokenizers: nats per token x tokens / (ln 2 x bytes of UTF-8)."""
    scored = sum(len(d) - 1 for d in documents if len(d) > 1)
    size = sum(len(tokenizer.decode([i for i in d.tolist() if i not in (tokenizer.bos_id, tokenizer.eos_id)]).encode()) for d in documents)
    return {"bits_per_byte": nll * scored / math.log(2) / max(size, 1), "bytes": size}


def window_and_stride(model, window=None, stride=None):
    """What is left open filled in, the model's window and a quarter of the window; what cannot work refused."""
    window = model.config.max_seq_len if window is None else window
    stride = max(1, window // 4) if stride is None else stride
    if window < 1 or stride < 1:
        raise UserError(f"window {window}, stride {stride}: both have to be at least 1")
    if stride > window:
        raise UserError(f"stride {stride} is greater than window {window}: tokens between two windows would never be scored")
    return window, stride


@torch.inference_mode()
def window_nll(model, windows, window, bins):
    """Sum of -ln p in nats, and number, of the scored tokens of windows of one length: [2][bins], by how much of the window each had read.

    windows: [(document, begin, end, skip)], see sliding_windows. Only the scored positions are computed in the last layer and meet the
    vocabulary.
    """
    x = torch.from_numpy(np.stack([d[begin:end + 1] for d, begin, end, _ in windows]).astype(np.int64)).to(model.device)
    skip = torch.tensor([skip for *_, skip in windows], device=model.device)
    T, first = x.shape[1] - 1, min(skip for *_, skip in windows)
    place = torch.arange(first, T, device=model.device).expand(len(x), -1)                       # [B, T - first]
    scored = place >= skip[:, None]
    hidden = model.hidden(x[:, :-1], last=T - first)                                             # [B, T - first, C]
    nll = model.nll(hidden[scored], x[:, 1 + first:][scored]).float().cpu().double().numpy()
    which = place[scored].cpu().numpy() * bins // window
    return [np.bincount(which, nll, bins).tolist(), np.bincount(which, minlength=bins).tolist()]


def perplexity(model, documents, window=None, stride=None, seed=0, progress=True, bins=1, keep=None):
    """exp of the mean of -ln p over all scored tokens of all documents: one mean over tokens, not a mean of windows or documents.

    documents: arrays of token ids, each beginning with BOS; no window gets another. window: tokens the model reads at a time (default: its
    max_seq_len); stride: tokens by which the window moves on (default: a quarter of it). bins: also the mean loss by the tokens of context
    that a prediction had, in so many equal parts of the window; with stride = window every part is scored equally often. keep: a cli.Kept.
    Returns the dict of the JSON file.
    """
    window, stride = window_and_stride(model, window, stride)
    if not 1 <= bins <= window:
        raise UserError(f"{bins} bins: give at least 1 and at most the window, {window}")
    documents = [np.asarray(d) for d in documents]
    if not any(len(d) > 1 for d in documents):
        raise UserError("no document has two tokens: there is nothing to predict")
    pieces = [(n, d, *w) for n, d in enumerate(documents) for w in sliding_windows(len(d), window, stride)]
    pieces.sort(key=lambda p: (p[3] - p[2], p[4]))  # windows of one length together; the sort is stable, so the sum is reproducible
    jobs, started = {}, time.perf_counter()
    text = [hashlib.sha256(d.astype(np.int64).tobytes()).hexdigest() for d in documents]
    keep = store(keep, model, "perplexity", text, window, stride, bins)
    for length, equal in groupby(pieces, lambda p: p[3] - p[2]):
        rows, equal = rows_at_once(model, length), list(equal)
        size = rows * row_bytes(model, length)  # the last ones are the longest
        for batch in (equal[i:i + rows] for i in range(0, len(equal), rows)):
            jobs[tuple((n, begin) for n, _, begin, *_ in batch)] = model, [p[1:] for p in batch], window, bins
    total, count = np.zeros(bins), np.zeros(bins, np.int64)
    with tqdm(total=len(jobs), desc=f"perplexity, window {window}", unit="pass", leave=False, disable=None if progress else True) as bar:
        for nll, tokens in in_turn(window_nll, jobs, model, keep, size):
            total, count = total + nll, count + tokens
            bar.update()
    mean, more = total.sum() / count.sum(), {}
    if bins > 1:
        edges = [-(-i * window // bins) + 1 for i in range(bins)]  # tokens of context, BOS counted, from which on a prediction is in bin i
        more = {"context": edges, "nll_by_context": [t / n if n else math.nan for t, n in zip(total, count)],
                "tokens_by_context": count.tolist()}
    return result(model, seed, perplexity=math.inf if mean > 700 else math.exp(mean), nll=float(mean), tokens=int(count.sum()),
                  documents=len(documents), window=window, stride=stride, **CONVENTIONS, **more,
                  seconds=time.perf_counter() - started)


# ---------------------------------------------------------------------------------------------------------------------
# Both at several lengths


def measure(model, tokenizer, documents, lengths, depths, trials, seed=0, keep=None):
    """Perplexity, passkey accuracy and the PI paper's k_max at each length: a row of a table."""
    keys = {n: passkey(model, tokenizer, [n], depths, trials, seed, keep=keep) if trials else {"accuracy": {n: math.nan}, "k_max": None}
            for n in lengths}
    return {"perplexity": {n: perplexity(model, documents, window=n, keep=keep)["perplexity"] for n in lengths},
            "passkey": {n: k["accuracy"][n] for n, k in keys.items()}, "k_max": {n: k["k_max"] for n, k in keys.items()}}


def table(rows, lengths, windows):
    """Rows of measure() as text, perplexity and passkey accuracy side by side. windows: {"L": 256, ...}, to be marked in the header."""
    titles = [" ".join([str(n), *(name for name, w in windows.items() if w == n)]) for n in lengths]
    width = max(20, 2 + max(len(row["name"]) for row in rows))
    lines = [" " * width + "perplexity at window".ljust(10 * len(lengths)) + "  passkey accuracy at length",
             " " * width + "".join(t.ljust(10) for t in titles) + "  " + "".join(t.ljust(10) for t in titles)]
    for row in rows:
        lines.append(row["name"].ljust(width) + "".join(f"{row['perplexity'][n]:<10.3f}" for n in lengths) + "  "
                     + "".join("-".ljust(10) if math.isnan(row["passkey"][n]) else f"{row['passkey'][n]:<10.2f}" for n in lengths))
    return "\n".join(lines)


def variants(config, factors, chosen=()):
    """What compare tries on a model, [(name, rope dict)]: the model as it is; then each method that suits it, or those `chosen` (names or
    JSON objects): with all factors if a fixed one is part of it, else at factor 1, at which a method that follows the length has nothing
    to choose. What would give the same angles as a row before is left out."""
    own, rows = config.rope, [("as it is" if config.rope.rope_type != "default" else "default", config.rope.to_dict())]
    if chosen:
        methods = [rope_argument(each) for each in chosen]
    elif METHODS[own.rope_type].rotary:  # what is RoPE may be stretched by all that is RoPE, but for what has to be searched for first
        methods = [{"rope_type": name} for name, m in METHODS.items() if m.rotary and not needs_settings(m)]
        # p-RoPE of plain RoPE: let those pairs stand still that never complete a turn in L
        plain, _ = inv_freq(RopeConfig(rope_theta=own.base), config.head_dim)
        share = {"partial_rotary_factor": int((plain * original_window(config) >= 2 * math.pi).sum()) / (config.head_dim // 2)}
        methods = [m | share if METHODS[m["rope_type"]].whole_head else m for m in methods]
        methods += [{"rope_type": "yarn", **more} for more in ({"attention_factor": 1.0}, {"ramp": "turns"}, {"resonance": True})]
    else:
        methods = [{"rope_type": own.rope_type}]
    for rope in methods:
        known = RopeConfig.from_dict({"original_max_position_embeddings": original_window(config)} | rope)
        fixed = "factor" in rope or known.rope_type == "default" or METHODS[known.rope_type].grows
        more = {k: v for k, v in rope.items() if k not in ("rope_type", "factor", "original_max_position_embeddings")}
        more = [k if v is True or isinstance(v, list) else f"{k}={v:.2g}" if isinstance(v, float) else f"{k}={v}" for k, v in more.items()]
        name = " ".join([known.rope_type, *more])
        for factor in [rope.get("factor")] if fixed else factors:
            rows.append((name + (f" x{factor:g}" if factor else ""), rope | ({"factor": factor} if factor else {})))
    unique, L = {}, original_window(config)
    for name, rope in rows:
        one = with_rope(config, rope).rope
        angles = [(*inv_freq(one, config.head_dim, n)[0].tolist(), inv_freq(one, config.head_dim, n)[1]) for n in (L, 2 * L, 4 * L)]
        other = (one.rope_type, one.factor, json.dumps(one.options)) if METHODS[one.rope_type].adds else one.random_positions
        unique.setdefault(json.dumps([angles, other]), (name, rope))
    return list(unique.values())


def needs_settings(function):
    """Whether a method does not work without settings of its own (LongRoPE's factors)."""
    return any(option.default is option.empty for option in function.options.values())


# ---------------------------------------------------------------------------------------------------------------------
# Documents and commands


def validation_documents(corpus, at_least, max_tokens, tokenizer, whole=False):
    """Held-out documents of a token folder, all cut to the same length `at_least`, or `whole`, together about max_tokens, or fewer."""
    corpus = TokenFile(corpus, "val")
    if corpus.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(f"the corpus was tokenised with another tokenizer than {tokenizer.path}: "
                        f"prepare one with data/prepare.py --tokenizer {tokenizer.path}")
    chosen = [d if whole else d[:at_least] for d, _ in zip(corpus.documents(at_least), range(max(1, max_tokens // at_least)))]
    if not chosen:
        raise UserError(f"no validation document has {at_least} tokens: give a larger corpus, or text with --text, or a shorter window")
    return chosen


def texts(paths, tokenizer, max_tokens, window):
    """The files as documents of at most max_tokens tokens (0: whole), BOS in front; at least one has to be longer than the window."""
    documents = []
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; --text takes UTF-8 text files")
        text = read_text(path)
        if text is None:
            raise UserError(f"{path}: not UTF-8 text; convert it first (iconv -t utf-8)")
        documents.append(np.array(tokenizer.encode(text, bos=True), np.int64)[:max_tokens or None])
    if max(map(len, documents)) <= window:
        raise UserError(f"the longest text has {max(map(len, documents))} tokens, the window {window}: "
                        "give a longer text or a shorter --window")
    return documents


@dataclass
class Common:
    model: str = field("data/tiny", "model folder")
    rope: str | None = field(None, "method to use instead of the folder's own: default, linear (= pi), ntk, yarn, ..., or a JSON object")
    factor: float | None = field(None, "s = target window / original window, for --rope")
    seed: int = field(0, "of keys and samples")
    out: str = field("", "JSON file to write")
    device: str = field("auto", "auto, cpu, cuda or mps")
    dtype: str = field("float32", "of the weights", choices=["auto", "float32", "bfloat16", "float16"])
    matmul: str = field("highest", "how float32 matrices are multiplied, sums in float32: highest in float32; high in TF32, on a GPU that has it; "
                        "medium the same, and in bfloat16 on a CPU that has it (AMX)", choices=["highest", "high", "medium"])
    attention: str = field("auto", "auto takes sdpa", choices=["auto", "naive", "tiled", "sdpa"])


@dataclass
class PerplexityConfig(Common):
    text: list[str] = field([], "UTF-8 files, a document each, instead of the corpus")
    corpus: str = field("data/corpora/python", "token folder whose validation documents are used")
    window: int | None = field(None, "tokens the model reads at a time [the model's window]")
    stride: int | None = field(None, "tokens by which the window moves on [window / 4]")
    max_tokens: int = field(65536, "tokens to score, about: of the corpus, or of each --text; 0 is all")
    bins: int = field(1, "also the loss by tokens of context, in so many parts of the window; without --stride the windows then do not "
                      "overlap, so that every part is scored equally often")


@dataclass
class PasskeyConfig(Common):
    lengths: list[int] = field([], "prompt lengths in tokens, the answer counted [half, one, two and four original windows]")
    depths: int = field(10, "places of the key, from the first to the last")
    trials: int = field(10, "random keys at each place")
    generation: bool = field(False, "judge by generating every answer instead of by one teacher-forced pass: the same verdict, slower")


@dataclass
class NeedleConfig(Common):
    text: list[str] = field([], "UTF-8 files, the haystack, instead of the corpus")
    corpus: str = field("data/corpora/python", "token folder whose validation documents are the haystack")
    lengths: list[int] = field([], "prompt lengths in tokens, the answer counted [half, one, two and four original windows]")
    depths: int = field(10, "places of the needle, from the first to the last")
    trials: int = field(10, "needles in a piece of text at each place")


@dataclass
class CompareConfig(Common):
    text: list[str] = field([], "UTF-8 files, a document each, instead of the corpus")
    corpus: str = field("data/corpora/python", "token folder whose validation documents are used")
    methods: list[str] = field([], "names or JSON objects of the methods to try [every one that suits the model]")
    factors: list[float] = field([2.0, 4.0], "s, for the methods that have a fixed one")
    lengths: list[int] = field([], "windows and prompt lengths in tokens [half, one, two and four original windows]")
    eval_tokens: int = field(16384, "tokens of held-out documents that each perplexity is measured on")
    depths: int = field(10, "passkey: places of the key")
    trials: int = field(5, "passkey: keys at each place; 0 measures no passkey")
    out: str = field("results/compare.json", "table, as JSON; a figure of the same name is drawn beside it")


@dataclass
class GenerateConfig(Common):
    prompt: str = field("", "text to continue; @FILE reads it from a file")
    max_new_tokens: int = field(100, "tokens at most; an end-of-sequence token ends it sooner")
    temperature: float = field(0.0, "0 takes the most probable token always")
    top_p: float = field(1.0, "sample from the fewest tokens whose probability reaches this")


def rope_flags(config):
    """--rope and --factor as a dict for load_model, or None: the folder's own."""
    if config.rope is None:
        if config.factor is not None:
            raise UserError(f"--factor {config.factor:g} needs --rope: which method stretches the window? (linear: Position Interpolation)")
        return None
    rope = rope_argument(config.rope)
    known = RopeConfig.from_dict({"original_max_position_embeddings": 4096} | rope)  # any window: the folder knows its own
    if config.factor is not None and "factor" in rope and rope["factor"] != config.factor:
        raise UserError(f"--factor {config.factor:g} and factor {rope['factor']:g} in --rope contradict each other: give one of them")
    method, factor = METHODS[known.rope_type], rope.get("factor", config.factor)
    if factor is None and method.rotary and not method.grows and known.rope_type != "default":
        raise UserError(f"--rope {config.rope} needs --factor: how many times longer does the window become?")
    return rope | {"factor": 1.0 if factor is None else factor}


def load(config, quiet=False):
    """The model and tokenizer that the flags name, and the header that every evaluation prints first. How float32 is multiplied is set for
    the whole process."""
    device, rope = choose_device(config.device), rope_flags(config)
    torch.set_float32_matmul_precision(config.matmul)
    model = load_model(config.model, rope=rope, device=device, dtype=choose_dtype(config.dtype, device), attention=config.attention)
    tokenizer = load_tokenizer(config.model, model.config.vocab_size)
    if quiet:
        return model, tokenizer
    dtype = str(model.tok_embeddings.weight.dtype).removeprefix("torch.")
    dtype += "" if dtype != "float32" or config.matmul == "highest" else f" (matmul {config.matmul})"
    print(f"device     {describe_device(device)}, {dtype}, attention {config.attention}{' (sdpa)' if config.attention == 'auto' else ''}")
    print(f"model      {config.model}, {model.config.parameters():,} parameters, "
          f"window {original_window(model.config)} -> {model.config.max_seq_len}, rope {model.config.rope.to_dict()}\n"
          f"tokenizer  {tokenizer.vocab_size:,} pieces, {tokenizer.policy}")
    return model, tokenizer


def perplexity_command(config, keep):
    model, tokenizer = load(config)
    window, stride = window_and_stride(model, config.window, config.stride)
    stride = window if config.bins > 1 and config.stride is None else stride
    if config.max_tokens < 0:
        raise UserError(f"--max-tokens {config.max_tokens}: give a number of tokens, or 0 for all of them")
    if config.text:
        documents = texts(config.text, tokenizer, config.max_tokens, window)
    else:
        corpus = ensure_corpus(config.corpus, tokenizer.path)
        # Long enough for the window to slide in, and the same ones for every window up to four original ones: their perplexities compare.
        documents = validation_documents(corpus, max(2 * window, 8 * original_window(model.config)), config.max_tokens or 2**62, tokenizer)
    measured = perplexity(model, documents, window, stride, config.seed, bins=config.bins, keep=keep)
    measured |= bits_per_byte(measured["nll"], documents, tokenizer)
    print(f"perplexity {measured['perplexity']:.4f}   ({measured['nll']:.4f} nats a token, {measured['bits_per_byte']:.4f} bits a byte; "
          f"{measured['tokens']:,} tokens of {measured['documents']} documents, window {window}, stride {stride}, BOS {measured['bos']}; "
          f"{measured['seconds']:.1f} s)")
    if config.bins > 1:
        print("context    loss (nats a token, predicted from so many tokens and more)")
        print("\n".join(f"{n:<10,} {nll:.4f}" for n, nll in zip(measured["context"], measured["nll_by_context"])))
    return measured


def by_length(measured):
    """What grid() measured, a line for each length."""
    print("length   accuracy   by depth, from the beginning to the end")
    for length, accuracy in measured["accuracy"].items():
        print(f"{length:<8} {accuracy:<10.3f} " + " ".join(f"{a:.1f}" for a in measured["accuracy_by_depth"][length]))


def passkey_command(config, keep):
    model, tokenizer = load(config)
    lengths = config.lengths or four_lengths(model.config)
    measured = passkey(model, tokenizer, lengths, config.depths, config.trials, config.seed, generation=config.generation, keep=keep)
    by_length(measured)
    print(f"k_max {measured['k_max']} at length {measured['lengths'][-1]}   "
          f"({config.depths} depths x {config.trials} keys, greedy; {measured['seconds']:.1f} s)")
    return measured


def needle_command(config, keep):
    model, tokenizer = load(config)
    lengths = config.lengths or four_lengths(model.config)
    if config.text:
        documents = texts(config.text, tokenizer, 0, 1)
    else:
        documents = validation_documents(ensure_corpus(config.corpus, tokenizer.path), 2, 2**62, tokenizer, whole=True)
    measured = needle(model, tokenizer, documents, lengths, config.depths, config.trials, config.seed, keep=keep)
    by_length(measured)
    print("without the needle " + ", ".join(f"{share:.2f} at {n}" for n, share in measured["floor"].items())
          + f"   (share of the answer's tokens; {config.depths} depths x {config.trials} needles; {measured['seconds']:.1f} s)")
    return measured


def four_lengths(config):
    """Half, one, two and four original windows."""
    L = original_window(config)
    return [max(L // 2, 1), L, 2 * L, 4 * L]


def compare_command(config, keep):
    base = load_config(config.model)
    L, rows = original_window(base), []
    if config.rope is not None or config.factor is not None:
        raise UserError("compare tries methods itself: name them with --methods, and their factors with --factors")
    plan = variants(base, config.factors, config.methods)
    for _, rope in plan:  # a mistake in the last of them should not show after the others' minutes
        with_rope(base, rope)
    lengths = sorted(set(config.lengths or four_lengths(base)))
    if lengths[0] < 1 or config.eval_tokens < 1:
        raise UserError(f"--lengths {lengths[0]}, --eval-tokens {config.eval_tokens}: both have to be at least 1")
    tokenizer = load_tokenizer(config.model, base.vocab_size)
    if config.text:
        documents = texts(config.text, tokenizer, config.eval_tokens + 1, lengths[-1])
    else:
        documents = validation_documents(ensure_corpus(config.corpus, tokenizer.path), 2 * lengths[-1], config.eval_tokens, tokenizer)
    scored, started = sum(len(d) - 1 for d in documents), time.perf_counter()
    print(f"{len(plan)} rows x {len(lengths)} lengths; {len(documents)} documents, {scored:,} tokens, stride window / 4; "
          + (f"passkey: {config.depths} depths x {config.trials} keys" if config.trials else "no passkey"))
    if not config.methods and METHODS[base.rope.rope_type].rotary:
        left = [name for name, m in METHODS.items() if not m.rotary or needs_settings(m)]
        print(f"left out: {', '.join(left)} (no stretching of RoPE, or in need of settings: --methods takes JSON objects)")
    model = None
    for name, rope in plan:
        del model  # one at a time: the next may need the memory
        model = load(dataclasses.replace(config, rope=json.dumps(rope), factor=None), quiet=bool(rows))[0]
        rows.append({"name": name, "rope": model.config.rope.to_dict(),
                     **measure(model, tokenizer, documents, lengths, config.depths, config.trials, config.seed, keep)})
        print("\n".join(table(rows, lengths, {"L": L}).splitlines()[0 if len(rows) == 1 else -1:]), flush=True)
    return result(model, config.seed, methods=rows, lengths=lengths, documents=len(documents), tokens_scored=scored, stride="window / 4",
                  **CONVENTIONS, depths=config.depths, trials=config.trials,
                  seconds=time.perf_counter() - started) | {"rope": base.rope.to_dict()}


def generate_command(config, _):
    if not config.prompt:
        raise UserError("--prompt is empty: give a text to continue")
    text = config.prompt
    if text.startswith("@"):
        if not Path(text[1:]).is_file() or (text := read_text(Path(text[1:]))) is None:
            raise UserError(f"--prompt {config.prompt}: no such file, or not UTF-8 text")
    if config.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {config.max_new_tokens}: has to be at least 1")
    model, tokenizer = load(config)
    prompt = torch.tensor([tokenizer.encode(text, bos=True)], device=model.device)
    total = prompt.shape[1] + config.max_new_tokens
    print(f"prompt     {prompt.shape[1]} tokens, BOS ({tokenizer.bos_id}) in front, no chat template"
          + (f"; up to {total} with the answer, beyond the window" if total > model.config.max_seq_len else "") + "\n")
    started, new, shown, first = time.perf_counter(), [], "", 0.0
    before = tokenizer.decode(prompt[0].tolist())
    print(text, end="", flush=True)
    for token in stream(model, prompt, config.max_new_tokens, config.temperature, config.top_p, (tokenizer.eos_id,), config.seed):
        first = first or time.perf_counter() - started
        new.append(int(token[0]))
        said = tokenizer.decode(prompt[0].tolist() + [t for t in new if t != tokenizer.eos_id])[len(before):]
        if not said.endswith("\ufffd"):  # a character whose bytes are not all there yet
            print(said[len(shown):], end="", flush=True)
            shown = said
    seconds = time.perf_counter() - started
    speed = (len(new) - 1) / max(seconds - first, 1e-9)
    print(f"\n\n{len(new)} tokens: the first after {first:.2f} s, then {speed:.1f} tok/s")
    return result(model, config.seed, prompt=text, text=said, prompt_tokens=prompt.shape[1], new_tokens=len(new), first_token_seconds=first,
                  tokens_per_second=speed, temperature=config.temperature, top_p=config.top_p, seconds=seconds)


COMMANDS = {"ppl": (PerplexityConfig, perplexity_command, "sliding-window perplexity"),
            "passkey": (PasskeyConfig, passkey_command, "passkey retrieval by length and depth"),
            "needle": (NeedleConfig, needle_command, "a sentence hidden in text, by length and depth"),
            "compare": (CompareConfig, compare_command, "every scaling method, without training, at every length"),
            "generate": (GenerateConfig, generate_command, "continue a text")}


def main(argv=None):
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, (settings, _, text) in COMMANDS.items():
        add_flags(commands.add_parser(name, help=text, description=text), settings)
    flags = vars(parser.parse_args(argv))
    settings, command, _ = COMMANDS[flags.pop("command")]
    config = settings(**flags)
    keep = Kept(config.out)
    measured = command(config, keep)
    if config.out:
        write_json(config.out, measured)
        keep.done()
        print(f"wrote {config.out}")
        if "methods" in measured:
            print(f"wrote {plot_compare(read_json(config.out), Path(config.out).with_suffix('.png'))}")


if __name__ == "__main__":
    run(main)
