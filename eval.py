"""What a window is worth: sliding-window perplexity, passkey retrieval, all methods side by side; and a model's own words.

    python eval.py ppl     --model data/tiny --window 1024 --rope linear --factor 4
    python eval.py passkey --model data/tiny --lengths 256 512 1024 --depths 10 --trials 10
    python eval.py compare --model data/tiny                  # every method of rope.py, untrained -> a table, a JSON file and a figure
    python eval.py generate --model data/tiny --prompt "def main("          # the proof that the weights are right

A model's folder knows its own RoPE scaling; --rope and --factor replace it, for a model that was not fine-tuned. --rope takes a method's
name or a JSON object with its settings. Each command prints what it measured and under which conditions, and with --out writes it as JSON.
"""
import dataclasses
import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cli import (Parser, UserError, add_flags, choose_device, choose_dtype, command_line, describe_device, field, read_json, run, versions,
                 write_json)
from data.batches import TokenFile
from data.passkey import PasskeyPrompts, random_key
from data.prepare import ensure_corpus, read_text
from model import generate, stream
from plot import plot_compare
from rope import METHODS, RopeConfig, depends_on_length, inv_freq, rope_argument
from weights import load_config, load_model, load_tokenizer, original_window, with_rope

BATCH_TOKENS = 16384  # tokens in a forward pass: windows are batched up to this


def result(model, seed, **measured):
    """What every result says: which model with which positions, measured where and by what; then what came out."""
    return {"model": str(getattr(model, "path", "")), "rope": model.config.rope.to_dict(),
            "original_window": original_window(model.config), **measured,
            "seed": seed, "dtype": str(model.tok_embeddings.weight.dtype).removeprefix("torch."), "attention": model.attention,
            "device": describe_device(model.device), "versions": versions(), "command": command_line()}


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
def perplexity(model, documents, window=None, stride=None, seed=0, progress=True):
    """exp of the mean of -ln p over all scored tokens of all documents: one mean over tokens, not a mean of windows or documents.

    documents: arrays of token ids, each beginning with BOS; no window gets another. window: tokens the model reads at a time (default: its
    max_seq_len); stride: tokens by which the window moves on (default: a quarter of it). Returns the dict of the JSON file.
    """
    window, stride = window_and_stride(model, window, stride)
    documents = [np.asarray(d) for d in documents]
    if not any(len(d) > 1 for d in documents):
        raise UserError("no document has two tokens: there is nothing to predict")
    pieces = [(d, *w) for d in documents for w in sliding_windows(len(d), window, stride)]
    pieces.sort(key=lambda p: (p[2] - p[1], p[3]))  # windows of one length together; the sort is stable, so the sum is reproducible
    started, total, tokens = time.perf_counter(), 0.0, 0
    bar = tqdm(total=len(pieces), desc=f"perplexity, window {window}", unit="window", leave=False, disable=None if progress else True)
    while pieces:
        length = pieces[0][2] - pieces[0][1]
        batch = [p for p in pieces[:max(1, BATCH_TOKENS // length)] if p[2] - p[1] == length]
        pieces = pieces[len(batch):]
        x = torch.from_numpy(np.stack([d[begin:end + 1] for d, begin, end, _ in batch]).astype(np.int64)).to(model.device)
        first = torch.tensor([skip for *_, skip in batch], device=model.device)
        scored = torch.arange(length, device=model.device) >= first[:, None]                 # [B, T]
        hidden = model.hidden(x[:, :-1])                                                     # [B, T, C]
        nll = model.nll(hidden[scored], x[:, 1:][scored])                                    # only the scored positions meet the vocabulary
        total, tokens = total + nll.double().sum().item(), tokens + len(nll)
        bar.update(len(batch))
    bar.close()
    mean = total / tokens
    return result(model, seed, perplexity=math.inf if mean > 700 else math.exp(mean), nll=mean, tokens=tokens, documents=len(documents),
                  window=window, stride=stride, bos="once, at the start of each document", seconds=time.perf_counter() - started)


# ---------------------------------------------------------------------------------------------------------------------
# Passkey


def judge(text, key, ended=False):
    """The verdict on a continuation: its first run of digits is the key. True or False; None while more text could still decide,
    which none can when it has ended."""
    found = re.search("[0-9]+", text)
    number = found.group() if found else ""
    if ended or found and found.end() < len(text):
        return number == key
    return None if key.startswith(number) else False  # no digit yet, or the number may go on


def judge_tokens(tokenizer, tokens, key, ended=False):
    """judge() on token ids, which EOS ends."""
    if tokenizer.eos_id in tokens:
        tokens, ended = tokens[:tokens.index(tokenizer.eos_id)], True
    return judge(tokenizer.decode(tokens), key, ended)


@torch.inference_mode()
def retrieve(model, tokenizer, prompts, answers, keys, generation=False):
    """Whether greedy decoding answers each prompt with its key: list of bool. Prompt and answer together have the same length in all rows.

    One teacher-forced pass decides: as long as the most probable tokens are the answer's, generation sees the same context, so it produces
    them. Where they differ, the digits so far nearly always rule the key out already; the rows that they leave open are generated. So are
    all rows if the frequencies depend on the length: the pass would see the first digit with those of the last.
    """
    verdicts = [None] * len(keys)
    if not generation and not depends_on_length(model.config.rope):
        x = torch.from_numpy(np.stack([np.concatenate(pair) for pair in zip(prompts, answers)])).to(model.device)
        longest = max(map(len, answers))
        greedy = model(x, select=slice(x.shape[1] - longest - 1, None)).argmax(dim=-1).cpu()  # [B, longest + 1]: the answer and one more
        for i, answer in enumerate(answers):
            produced = greedy[i, longest - len(answer):].tolist()
            same = next((n for n, (a, b) in enumerate(zip(produced, answer)) if a != b), len(answer))
            verdicts[i] = judge_tokens(tokenizer, produced[:same + 1], keys[i])
    for length in sorted({len(p) for p, v in zip(prompts, verdicts) if v is None}):
        rows = [i for i, v in enumerate(verdicts) if v is None and len(prompts[i]) == length]
        prompt = torch.from_numpy(np.stack([prompts[i] for i in rows])).to(model.device)
        new = generate(model, prompt, len(answers[rows[0]]) + 4, stop=(tokenizer.eos_id,))[:, length:]
        for i, tokens in zip(rows, new.tolist()):
            verdicts[i] = judge_tokens(tokenizer, tokens, keys[i], ended=True)
    return verdicts


def passkey(model, tokenizer, lengths=None, depths=10, trials=10, seed=0, progress=True, generation=False):
    """Accuracy of greedy passkey retrieval at each length (tokens, the answer counted) over `depths` places of the key, `trials` keys each.

    k_max is the PI paper's effective window at the longest length: the greatest distance k of the key from the end such that at every
    distance tried up to k at least 20 % of the trials succeed (0 if none does). Returns the dict of the JSON file.
    """
    lengths = sorted(set(lengths or [model.config.max_seq_len]))
    if depths < 1 or trials < 1:
        raise UserError(f"depths {depths}, trials {trials}: both have to be at least 1")
    if seed < 0:
        raise UserError(f"seed {seed}: give 0 or more")
    if lengths[0] < 1:
        raise UserError(f"a passkey prompt of {lengths[0]} tokens is too short: lengths are numbers of tokens")
    builder, started = PasskeyPrompts(tokenizer), time.perf_counter()
    places = [0.5] if depths == 1 else [i / (depths - 1) for i in range(depths)]
    by_depth, distances = {}, {}
    bar = tqdm(total=len(lengths) * depths * trials, desc="passkey", unit="prompt", leave=False, disable=None if progress else True)
    for length in lengths:
        rng = np.random.default_rng((seed, length))
        keys = [random_key(rng) for _ in range(depths * trials)]
        built = [builder.build(key, length, depth=places[i // trials]) for i, key in enumerate(keys)]
        verdicts, rows = [], max(1, BATCH_TOKENS // length)
        for i in range(0, len(built), rows):
            prompts, answers = zip(*built[i:i + rows])
            verdicts += retrieve(model, tokenizer, prompts, answers, keys[i:i + rows], generation)
            bar.update(len(prompts))
        by_depth[length] = np.reshape(verdicts, (depths, trials)).mean(axis=1).tolist()
        distances[length] = [len(built[d * trials][0]) - builder.position(built[d * trials][0], keys[d * trials]) for d in range(depths)]
    bar.close()
    longest = lengths[-1]
    return result(model, seed, accuracy={n: float(np.mean(a)) for n, a in by_depth.items()},
                  k_max=k_max(distances[longest], by_depth[longest]), lengths=lengths, depths=places, trials=trials,
                  accuracy_by_depth=by_depth, distances=distances, seconds=time.perf_counter() - started)


def k_max(distances, accuracy, threshold=0.2):
    """The largest distance up to which every tried one has at least `threshold` accuracy; 0 if the nearest fails. (PI paper, 3.3)"""
    best = 0
    for distance, value in sorted(zip(distances, accuracy)):
        if value < threshold:
            break
        best = distance
    return best


# ---------------------------------------------------------------------------------------------------------------------
# Both at several lengths


def measure(model, tokenizer, documents, lengths, depths, trials, seed=0):
    """Perplexity, passkey accuracy and the PI paper's k_max at each length: a row of a table."""
    keys = {n: passkey(model, tokenizer, [n], depths, trials, seed) if trials else {"accuracy": {n: math.nan}, "k_max": None} for n in lengths}
    return {"perplexity": {n: perplexity(model, documents, window=n)["perplexity"] for n in lengths},
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
    own, rows, seen = config.rope, [("as it is" if config.rope.rope_type != "default" else "default", config.rope.to_dict())], []
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
    unique = []
    for name, rope in rows:
        one = with_rope(config, rope).rope
        said = one.rope_type if METHODS[one.rope_type].grows or METHODS[one.rope_type].adds else ""
        angles = said, one.factor if said else 0, one.random_positions, *(str(v) for v in inv_freq(one, config.head_dim)[0].tolist()), \
            inv_freq(one, config.head_dim)[1], json.dumps(one.options) if said else ""
        if angles not in seen:
            seen.append(angles)
            unique.append((name, rope))
    return unique


def needs_settings(function):
    """Whether a method does not work without settings of its own (LongRoPE's factors)."""
    return any(option.default is option.empty for option in function.options.values())


# ---------------------------------------------------------------------------------------------------------------------
# Documents and commands


def validation_documents(corpus, at_least, max_tokens, tokenizer):
    """Held-out documents of a token folder, all cut to the same length `at_least`, together about max_tokens, or fewer."""
    corpus = TokenFile(corpus, "val")
    if corpus.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(f"the corpus was tokenised with another tokenizer than {tokenizer.path}: "
                        f"prepare one with data/prepare.py --tokenizer {tokenizer.path}")
    chosen = [d[:at_least] for d, _ in zip(corpus.documents(at_least), range(max(1, max_tokens // at_least)))]
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
    attention: str = field("auto", "auto takes sdpa", choices=["auto", "naive", "tiled", "sdpa"])


@dataclass
class PerplexityConfig(Common):
    text: list[str] = field([], "UTF-8 files, a document each, instead of the corpus")
    corpus: str = field("data/corpora/python", "token folder whose validation documents are used")
    window: int | None = field(None, "tokens the model reads at a time [the model's window]")
    stride: int | None = field(None, "tokens by which the window moves on [window / 4]")
    max_tokens: int = field(65536, "tokens to score, about: of the corpus, or of each --text; 0 is all")


@dataclass
class PasskeyConfig(Common):
    lengths: list[int] = field([], "prompt lengths in tokens, the answer counted [half, one, two and four original windows]")
    depths: int = field(10, "places of the key, from the first to the last")
    trials: int = field(10, "random keys at each place")
    generation: bool = field(False, "judge by generating every answer instead of by one teacher-forced pass: the same verdict, slower")


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
    """The model and tokenizer that the flags name, and the header that every evaluation prints first."""
    device, rope = choose_device(config.device), rope_flags(config)
    model = load_model(config.model, rope=rope, device=device, dtype=choose_dtype(config.dtype, device), attention=config.attention)
    tokenizer = load_tokenizer(config.model, model.config.vocab_size)
    if quiet:
        return model, tokenizer
    dtype = str(model.tok_embeddings.weight.dtype).removeprefix("torch.")
    print(f"device     {describe_device(device)}, {dtype}, attention {config.attention}{' (sdpa)' if config.attention == 'auto' else ''}")
    print(f"model      {config.model}, {model.config.parameters():,} parameters, "
          f"window {original_window(model.config)} -> {model.config.max_seq_len}, rope {model.config.rope.to_dict()}")
    return model, tokenizer


def perplexity_command(config):
    model, tokenizer = load(config)
    window, stride = window_and_stride(model, config.window, config.stride)
    if config.max_tokens < 0:
        raise UserError(f"--max-tokens {config.max_tokens}: give a number of tokens, or 0 for all of them")
    if config.text:
        documents = texts(config.text, tokenizer, config.max_tokens, window)
    else:
        corpus = ensure_corpus(config.corpus, tokenizer.path)
        # Long enough for the window to slide in, and the same ones for every window up to four original ones: their perplexities compare.
        documents = validation_documents(corpus, max(2 * window, 8 * original_window(model.config)), config.max_tokens or 2**62, tokenizer)
    measured = perplexity(model, documents, window, stride, config.seed)
    print(f"perplexity {measured['perplexity']:.4f}   ({measured['nll']:.4f} nats a token; {measured['tokens']:,} tokens of "
          f"{measured['documents']} documents, window {window}, stride {stride}, BOS {measured['bos']}; {measured['seconds']:.1f} s)")
    return measured


def passkey_command(config):
    model, tokenizer = load(config)
    L = original_window(model.config)
    lengths = config.lengths or [L // 2, L, 2 * L, 4 * L]
    measured = passkey(model, tokenizer, lengths, config.depths, config.trials, config.seed, generation=config.generation)
    print("length   accuracy   by depth, from the beginning to the end")
    for length, accuracy in measured["accuracy"].items():
        print(f"{length:<8} {accuracy:<10.3f} " + " ".join(f"{a:.1f}" for a in measured["accuracy_by_depth"][length]))
    print(f"k_max {measured['k_max']} at length {measured['lengths'][-1]}   "
          f"({config.depths} depths x {config.trials} keys, greedy; {measured['seconds']:.1f} s)")
    return measured


def compare_command(config):
    base = load_config(config.model)
    L, rows = original_window(base), []
    if config.rope is not None or config.factor is not None:
        raise UserError("compare tries methods itself: name them with --methods, and their factors with --factors")
    plan = variants(base, config.factors, config.methods)
    for _, rope in plan:  # a mistake in the last of them should not show after the others' minutes
        with_rope(base, rope)
    lengths = sorted(set(config.lengths or [max(L // 2, 1), L, 2 * L, 4 * L]))
    if lengths[0] < 1:
        raise UserError(f"--lengths {lengths[0]}: a window has at least 1 token")
    tokenizer = load_tokenizer(config.model, base.vocab_size)
    if config.text:
        documents = texts(config.text, tokenizer, config.eval_tokens + 1, lengths[-1])
    else:
        documents = validation_documents(ensure_corpus(config.corpus, tokenizer.path), 2 * lengths[-1], config.eval_tokens, tokenizer)
    scored, started = sum(len(d) - 1 for d in documents), time.perf_counter()
    print(f"{len(plan)} rows x {len(lengths)} lengths; {len(documents)} documents, {scored:,} tokens, stride window / 4; "
          f"passkey: {config.depths} depths x {config.trials} keys")
    if not config.methods and METHODS[base.rope.rope_type].rotary:
        left = [name for name, m in METHODS.items() if not m.rotary or needs_settings(m)]
        print(f"left out: {', '.join(left)} (no stretching of RoPE, or in need of settings: --methods takes JSON objects)")
    for name, rope in plan:
        model = load(dataclasses.replace(config, rope=json.dumps(rope), factor=None), quiet=bool(rows))[0]
        rows.append({"name": name, "rope": model.config.rope.to_dict(),
                     **measure(model, tokenizer, documents, lengths, config.depths, config.trials, config.seed)})
        print("\n".join(table(rows, lengths, {"L": L}).splitlines()[0 if len(rows) == 1 else -1:]), flush=True)
    return result(model, config.seed, methods=rows, lengths=lengths, documents=len(documents), tokens_scored=scored, stride="window / 4",
                  depths=config.depths, trials=config.trials, seconds=time.perf_counter() - started) | {"rope": base.rope.to_dict()}


def generate_command(config):
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
    measured = command(config)
    if config.out:
        write_json(config.out, measured)
        print(f"wrote {config.out}")
        if "methods" in measured:
            print(f"wrote {plot_compare(read_json(config.out), Path(config.out).with_suffix('.png'))}")


if __name__ == "__main__":
    run(main)
