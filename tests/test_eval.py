"""eval.py: perplexity scores every token once, with the context that it says; passkey gives in one pass the verdict of generation."""
import functools
import json
import math
import re
import runpy
import sys
import threading
import time
import types
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import reference
import retrieval
from cli import Kept, UserError, matmul_precision, run
from data.needle import NeedlePrompts
from data.passkey import PasskeyPrompts, inside, random_key
from data.tokenizer import Tokenizer
from eval import bits_per_byte, main, needle, passkey, perplexity, sliding_windows, validation_documents, window_nll
from model import LLaMA, ModelConfig
from passes import in_turn, rows_at_once
from retrieval import judge, k_max, recall, retrieve
from rope import RopeConfig
from weights import load_model, load_tokenizer, save_model

ROOT = Path(evaluation.__file__).parent
TINY = ROOT / "data" / "tiny"
COMMON = {"model", "rope", "seed", "dtype", "matmul", "attention", "device", "versions", "command"}  # what every result says


def make(seed=0, std=0.3, **changes):
    """A small LLaMA with an opinion: weights large enough that its predictions depend on the context and on the positions."""
    model = LLaMA(ModelConfig(**{**dict(dim=16, n_layers=2, n_heads=2, vocab_size=37, multiple_of=8, max_seq_len=16), **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + (1 if parameter.dim() == 1 else 0))
    return model


def documents(*lengths, vocab_size=37, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, n) for n in lengths]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TINY / "tokenizer.model")


@pytest.fixture(scope="module")
def builder(tokenizer):
    return PasskeyPrompts(tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# Perplexity


def test_sliding_windows_score_every_target_once_with_the_context_of_the_definition():
    for n, window in product(range(0, 26), range(1, 28)):
        for stride in range(1, window + 1):
            scored = []
            for begin, end, skip in sliding_windows(n, window, stride):
                assert 0 <= begin < end < n and end - begin <= window and 0 <= skip < end - begin
                scored += [(i, begin) for i in range(begin + 1 + skip, end + 1)]
            assert scored == list(reference.sliding_windows(n, window, stride)), (n, window, stride)


def test_sliding_windows_by_hand():
    assert list(sliding_windows(10, 4, 2)) == [(0, 4, 0), (2, 6, 2), (4, 8, 2), (6, 9, 2)]
    assert list(sliding_windows(9, 4, 4)) == [(0, 4, 0), (4, 8, 0)]
    assert list(sliding_windows(5, 9, 3)) == [(0, 4, 0)]
    assert list(sliding_windows(1, 4, 2)) == []


@pytest.mark.parametrize("lengths, window, stride", [
    ([30], 8, 8), ([30], 8, 1), ([30], 8, 3), ([30], 1, 1),    # stride = window, 1, and between
    ([30], 64, 16), ([9], 8, 4), ([8], 8, 2), ([2], 8, 8),     # window > N, N = window + 1, N = window, the shortest document
    ([25, 3, 17, 9, 1, 2, 10], 8, 5)])
def test_perplexity_is_the_brute_force_over_single_tokens(lengths, window, stride):
    model, texts = make(), documents(*lengths)

    @torch.no_grad()
    def logprob(context, token):
        return model(torch.tensor([context]))[0, -1].double().log_softmax(dim=-1)[token].item()

    expected, count = reference.sliding_window_perplexity([d.tolist() for d in texts], window, stride, logprob)
    measured = perplexity(model, texts, window, stride, progress=False)
    assert measured["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert measured["tokens"] == count == sum(n - 1 for n in lengths)
    assert measured["documents"] == len(lengths)
    assert (measured["window"], measured["stride"]) == (window, stride)


def test_stride_equal_to_the_window_is_the_plain_loss():
    model, (text,) = make(), documents(8 * 6 + 1)
    x = torch.from_numpy(text)
    loss = model.loss(x[:-1].view(6, 8), x[1:].view(6, 8)).item()
    assert perplexity(model, [text], 8, 8, progress=False)["nll"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("window, stride", [(8, 8), (8, 3), (64, 1)])
def test_a_uniform_model_gives_the_size_of_its_vocabulary(window, stride):
    model = make()
    torch.nn.init.zeros_(model.output.weight)
    assert perplexity(model, documents(30, 5), window, stride, progress=False)["perplexity"] == pytest.approx(37, rel=1e-6)


class Local(LLaMA):
    """Its predictions depend on the last k tokens and on nothing else; how many rows meet the vocabulary is counted."""
    k, rows = 3, 0

    def hidden(self, tokens, positions=None, cache=None, last=None):
        x = self.tok_embeddings(tokens)
        past = [torch.nn.functional.pad(x, (0, 0, j, 0))[:, :x.shape[1]] * (j + 1) for j in range(self.k)]
        return torch.stack(past).sum(dim=0).tanh()[:, -(last or x.shape[1]):]

    def nll(self, hidden, targets):
        self.rows += len(hidden)
        return super().nll(hidden, targets)


def local(k):
    model = Local(ModelConfig(dim=16, n_layers=1, n_heads=2, vocab_size=37, multiple_of=8))
    torch.manual_seed(0)
    torch.nn.init.normal_(model.tok_embeddings.weight)
    torch.nn.init.normal_(model.output.weight)
    model.k = k
    return model


def test_a_k_local_model_does_not_feel_the_stride():
    """Every token but those of the first window has window - stride + 1 tokens of context or more: one fewer would be felt."""
    texts, window = documents(40, 23), 8
    for k in (1, 3, 5):
        values = {stride: perplexity(local(k), texts, window, stride, progress=False)["nll"] for stride in range(1, window + 1)}
        for stride, value in values.items():
            if window - stride + 1 >= k:
                assert value == pytest.approx(values[1], rel=1e-6)
            else:
                assert abs(value - values[1]) > 1e-3


def test_only_scored_positions_meet_the_vocabulary():
    model = local(3)
    measured = perplexity(model, documents(40, 23, 7), 8, 2, progress=False)
    assert model.rows == measured["tokens"] == 39 + 22 + 6


def test_documents_weigh_by_their_tokens_and_windows_do_not_count():
    model = make()
    long, short = documents(60, 6)
    one, two, both = (perplexity(model, d, 8, 8, progress=False)["nll"] for d in ([long], [short], [long, short]))
    assert both == pytest.approx((59 * one + 5 * two) / 64, rel=1e-6)
    assert abs(both - (one + two) / 2) > 1e-2  # otherwise the test could not tell


def test_batches_do_not_change_the_result(monkeypatch):
    model, texts, values = make(), documents(60, 6, 33, 1, 18), []
    for size in (1, 20, 64, 10**6):
        monkeypatch.setattr(evaluation, "rows_at_once", lambda model, length, generating=False: max(1, size // length))
        values.append(perplexity(model, texts, 8, 3, progress=False)["nll"])
    assert values == pytest.approx([values[0]] * 4, rel=1e-6)


def test_attention_does_not_change_the_result():
    model, texts, values = make(), documents(60, 6), []
    for model.attention in ("naive", "tiled", "sdpa"):
        values.append(perplexity(model, texts, 16, 3, progress=False)["nll"])
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


def test_defaults_are_the_models_window_and_a_quarter_of_it():
    measured = perplexity(make(max_seq_len=12), documents(30), progress=False)
    assert (measured["window"], measured["stride"]) == (12, 3)


def test_token_files_may_be_unsigned():
    model, (text,) = make(), documents(30)
    one, two = (perplexity(model, [ids], 8, 8, progress=False)["nll"] for ids in (text, text.astype(np.uint16)))
    assert one == two


def test_a_hopeless_model_is_infinite_and_a_broken_one_not_a_number():
    model = make()
    torch.nn.init.normal_(model.output.weight, std=1e4)
    measured = perplexity(model, documents(30), 8, 8, progress=False)
    assert measured["perplexity"] == math.inf and math.isfinite(measured["nll"])
    torch.nn.init.constant_(model.output.weight, math.nan)
    assert math.isnan(perplexity(model, documents(30), 8, 8, progress=False)["perplexity"])


@pytest.mark.parametrize("window, stride, texts, words", [
    (0, 1, [30], "at least 1"), (8, 0, [30], "at least 1"), (-3, 1, [30], "at least 1"), (8, 9, [30], "greater than window"),
    (8, 8, [1, 0], "nothing to predict"), (8, 8, [], "nothing to predict")])
def test_perplexity_refuses(window, stride, texts, words):
    with pytest.raises(UserError, match=words):
        perplexity(make(), documents(*texts), window, stride, progress=False)


def write_corpus(folder, texts, tokenizer):
    folder.mkdir()
    ids = np.concatenate(texts).astype(np.uint16)
    for split in ("train", "val"):
        ids.tofile(folder / f"{split}.bin")
        np.save(folder / f"{split}.docs.npy", np.cumsum([0, *map(len, texts)]))
    splits = {split: {"tokens": len(ids), "documents": len(texts)} for split in ("train", "val")}
    meta = {"dtype": "uint16", "source": "text", "tokenizer_sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "splits": splits,
            "left_out": {}, "max_mb": None}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


def test_validation_documents_have_one_length_and_fit_the_tokenizer(tmp_path, tokenizer):
    texts = documents(50, 7, 90, 30, 64, vocab_size=1024)
    corpus = write_corpus(tmp_path / "corpus", texts, tokenizer)
    chosen = validation_documents(corpus, 30, 65, tokenizer)
    assert [d.tolist() for d in chosen] == [texts[0][:30].tolist(), texts[2][:30].tolist()]
    assert len(validation_documents(corpus, 30, 10**9, tokenizer)) == 4
    assert len(validation_documents(corpus, 30, 1, tokenizer)) == 1
    with pytest.raises(UserError, match="no validation document has 91 tokens"):
        validation_documents(corpus, 91, 100, tokenizer)
    with pytest.raises(UserError, match="another tokenizer"):
        validation_documents(corpus, 30, 100, types.SimpleNamespace(sha256="other", path="other.model"))


# ---------------------------------------------------------------------------------------------------------------------
# Passkey: the verdict


@pytest.mark.parametrize("text, verdict, ended", [
    (" 12345.", True, True), ("12345 ", True, True), ("\n12345\n", True, True), (" is 12345. 9", True, True), (" 12345abc", True, True),
    (" 12345\u0661", True, True),                                              # another script's digit does not belong to the key
    (" 12346.", False, False), (" 123456", False, False), (" 1234.", False, False), (" 7, no: 12345.", False, False),
    (" 2345", False, False), (" 012345.", False, False), (" 12 345.", False, False), (" 9", False, False), ("12,345.", False, False),
    ("", None, False), (" ", None, False), ("the key is", None, False), (" 1", None, False), (" 1234", None, False),
    (" 12345", None, True)])
def test_judge_reads_the_first_number(text, verdict, ended):
    """verdict: while more text may come; ended: when none does."""
    assert judge(text, "12345") is verdict
    assert judge(text, "12345", ended=True) is ended


class Scripted:
    """A stand-in for a model: after the question it says script(key, distance of the key), as long as it is given its own words.

    Where it is given other words than its own, as in the teacher-forced pass after a mistake, it turns to the right answer: whoever
    looks at what comes after the first difference is deceived. It keeps count of its passes.
    """
    attention, device = "auto", torch.device("cpu")

    def __init__(self, tokenizer, builder, script):
        self.tokenizer, self.builder, self.script = tokenizer, builder, script
        self.config = ModelConfig(dim=2, n_layers=1, n_heads=1, vocab_size=tokenizer.vocab_size)
        self.tok_embeddings = types.SimpleNamespace(weight=torch.zeros(1))
        self.passes, self.generated, self.asked = 0, 0, functools.cache(self.asked)

    def asked(self, prompt):
        """The key in a prompt, and what the script says to it at its distance from the end."""
        key = re.search("key is ([0-9]+)", self.tokenizer.decode(prompt))[1]
        return key, self.script(key, len(prompt) - self.builder.position(np.array(prompt), key))

    def next(self, context):
        question = self.builder.question
        start = next((i for i in range(len(context), 0, -1) if context[i - len(question):i] == question), None)
        if start is None:
            return 0  # nothing has been asked yet
        key, script = self.asked(tuple(context[:start]))
        said, right = context[start:], self.builder.answer(key)
        words = script if said == script[:len(said)] else right
        return words[len(said)] if len(said) < len(words) else self.tokenizer.encode("\n")[0]

    def __call__(self, tokens, positions=None, cache=None, last=None):
        if cache is not None:
            self.generated += 1
            tokens = cache.context = torch.cat([cache.context, tokens], dim=1) if hasattr(cache, "context") else tokens
        self.passes += 1
        wanted = list(range(tokens.shape[1]))[-(last or tokens.shape[1]):]
        logits = torch.zeros(len(tokens), len(wanted), self.config.vocab_size)
        for row, context in enumerate(tokens.tolist()):
            for n, t in enumerate(wanted):
                logits[row, n, self.next(context[:t + 1])] = 1.0
        return logits


def wrong(key, n):
    """`key` with its n-th digit changed."""
    return key[:n] + str((int(key[n]) + 1) % 10) + key[n + 1:]


# What a model may say after "The pass key is", and whether its first number is the key. EOS is written as |.
SAYINGS = [(lambda k: f" {k}.", True), (lambda k: f" {k}|", True), (lambda k: f" {k}\n", True), (lambda k: f" {k}x", True),
           (lambda k: f" {k} 6", True), (lambda k: k, True), (lambda k: f"\n{k}.", True), (lambda k: f" the {k}.", True),
           (lambda k: f" {k}\u0661", True), (lambda k: f"  {k}|", True),
           *[(lambda k, n=n: f" {wrong(k, n)}.", False) for n in range(5)], *[(lambda k, n=n: wrong(k, n), False) for n in range(5)],
           (lambda k: f" {k}6", False), (lambda k: f"{k}6.", False), (lambda k: f" {k[:4]}.", False), (lambda k: f" {k[:3]}|", False),
           (lambda k: f" {k[:3]}| {k}", False), (lambda k: f" {k[1:]}.", False), (lambda k: f" 7 {k}.", False), (lambda k: f"|{k}", False),
           (lambda k: "\n" * 12, False), (lambda k: "\n" * 6 + k, False), (lambda k: f" {k[:2]} {k[2:]}.", False)]


def spell(saying, tokenizer, builder):
    """The tokens of a saying: | is EOS, and every line break a token of its own."""
    return [i for part in re.split(r"([|\n])", saying) for i in ([tokenizer.eos_id] if part == "|" else inside(tokenizer, part))]


def test_one_teacher_forced_pass_gives_the_verdict_of_generation(tokenizer, builder):
    rng = np.random.default_rng(0)
    keys = ["00000", "99999", *(random_key(rng) for _ in range(4))]
    for key in keys:
        def script(_, distance):
            return spell(SAYINGS[distance - nearest][0](key), tokenizer, builder)
        nearest = len(builder.information(key)) + len(builder.question)  # the distance tells the model which saying is wanted
        built = [builder.build(key, builder.shortest + 40, distance=nearest + n) for n in range(len(SAYINGS))]
        prompts, answers = zip(*built)
        model = Scripted(tokenizer, builder, script)
        expected = [verdict for _, verdict in SAYINGS]
        assert retrieve(model, tokenizer, prompts, answers, [key] * len(prompts), generation=True) == expected
        assert retrieve(model, tokenizer, prompts, answers, [key] * len(prompts)) == expected


@pytest.mark.parametrize("said", [" {}.", "\n{}.", " {}6", "{}"])
def test_answers_may_differ_in_length(tokenizer, builder, said):
    """As they do with tokenizers that join digits: what is the same in all rows is the length of prompt and answer together."""
    keys = ["7", "12345", "98", "111"]
    prompts, answers = zip(*(builder.build(key, 130, depth=0.3) for key in keys))
    assert len(set(map(len, answers))) == 4
    model = Scripted(tokenizer, builder, lambda key, distance: inside(tokenizer, said.format(key)))
    assert retrieve(model, tokenizer, prompts, answers, keys) == [not said.endswith("6")] * 4
    assert said != " {}." or model.generated == 0, "each row's answer is looked for where it is"
    assert retrieve(model, tokenizer, prompts, answers, keys, generation=True) == [not said.endswith("6")] * 4


@pytest.mark.parametrize("saying", [0, 1, 2, 10, 14, 20, 22])
def test_nothing_is_generated_where_the_pass_has_decided(tokenizer, builder, saying):
    key = "31415"
    model = Scripted(tokenizer, builder, lambda key, distance: spell(SAYINGS[saying][0](key), tokenizer, builder))
    prompt, answer = builder.build(key, 120, depth=0.5)
    assert retrieve(model, tokenizer, [prompt], [answer], [key]) == [SAYINGS[saying][1]]
    assert (model.passes, model.generated) == (1, 0)


@pytest.mark.parametrize("rope", [RopeConfig(), RopeConfig("linear", 2.0), RopeConfig("dynamic", 4.0, original_max_position_embeddings=16)])
def test_teacher_forcing_agrees_with_generation_on_a_real_model(tokenizer, builder, rope):
    """A random LLaMA that speaks in digits, spaces, full stops and EOS, asked for what it is about to say, or for nearly that."""
    spoken = inside(tokenizer, "0123456789") + inside(tokenizer, " .") + [tokenizer.eos_id]
    model = make(seed=3, vocab_size=tokenizer.vocab_size, rope=rope)
    with torch.no_grad():
        model.output.weight[[i for i in range(tokenizer.vocab_size) if i not in spoken]] = 0
        model.output.weight[tokenizer.eos_id] *= 0.5
        for layer in model.layers:
            layer.attention.wq.weight *= 5  # sharp attention: the positions decide what it says
    rng, count, room = np.random.default_rng(0), 200, 16
    prompts = rng.integers(3, tokenizer.vocab_size, (count, 14))
    said = torch.from_numpy(prompts)
    with torch.no_grad():
        for _ in range(room):  # greedy by definition: no cache, everything anew for each token
            said = torch.cat([said, model(said, last=1).argmax(dim=-1)], dim=1)
    rows = []
    for prompt, tokens in zip(prompts, said[:, 14:].tolist()):
        number = (re.search("[0-9]+", tokenizer.decode(tokens)) or ["1"])[0][:room - 6]  # answer and four more are what may be said
        key = number if rng.random() < 0.6 else (wrong(number, -1)[:len(number)] if rng.random() < 0.5 else number + "7")
        answer = np.array(builder.answer(key))
        tokens = tokens[:len(answer) + 4]
        text = tokenizer.decode(tokens[:tokens.index(tokenizer.eos_id)] if tokenizer.eos_id in tokens else tokens)
        rows.append((prompt, answer, key, (re.findall("[0-9]+", text) or [""])[0] == key))
    verdicts = [verdict for *_, verdict in rows]
    assert 0.2 < np.mean(verdicts) < 0.8, "the verdicts have to vary, or the test says nothing"
    for length in {len(answer) for _, answer, _, _ in rows}:
        prompts, answers, keys, expected = map(list, zip(*(row for row in rows if len(row[1]) == length)))
        assert retrieve(model, tokenizer, prompts, answers, keys, generation=True) == expected
        assert retrieve(model, tokenizer, prompts, answers, keys) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Passkey: the table


def nearsighted(tokenizer, builder, reach):
    """A model that finds the key up to `reach` tokens from the end, and says five nines beyond."""
    return Scripted(tokenizer, builder, lambda key, distance: inside(tokenizer, f" {key if distance <= reach else '99999'}."))


def test_accuracy_by_depth_runs_from_the_beginning_to_the_end(tokenizer, builder):
    model, lengths = nearsighted(tokenizer, builder, 120), [200, 100]
    measured = passkey(model, tokenizer, lengths, depths=5, trials=3, progress=False)
    assert measured["lengths"] == [100, 200] and measured["depths"] == [0, 0.25, 0.5, 0.75, 1] and measured["trials"] == 3
    nearest = len(builder.information("12345")) + len(builder.question)
    for length, distances in measured["distances"].items():
        # Depth 0: all but the introduction follows. Depth 1: nothing but the key's own sentence and the question.
        farthest = length - len(builder.answer("12345")) - len(builder.introduction)
        assert distances == pytest.approx(np.linspace(farthest, nearest, 5), abs=1)
        assert (distances[0], distances[-1]) == (farthest, nearest)
        assert measured["accuracy_by_depth"][length] == [float(d <= 120) for d in distances]
        assert measured["accuracy"][length] == np.mean([d <= 120 for d in distances])
    assert measured["accuracy"][100] == 1.0 and 0 < measured["accuracy"][200] < 1
    assert measured["k_max"] == max(d for d in measured["distances"][200] if d <= 120)


def test_accuracy_counts_the_trials_of_its_own_depth(tokenizer, builder, monkeypatch):
    asked = []

    def fake(model, tokenizer, prompts, answers, keys, generation):
        asked.extend(keys)
        assert all(builder.position(p, k) > 0 and len(p) + len(a) == 100 for p, a, k in zip(prompts, answers, keys))
        return [k < "50000" for k in keys]

    monkeypatch.setattr(retrieval, "retrieve", fake)
    monkeypatch.setattr(retrieval, "rows_at_once", lambda model, length, generating=False: 7)  # batches end within a depth
    measured = passkey(make(), tokenizer, [100], depths=4, trials=5, progress=False)
    rows = np.array([k < "50000" for k in asked]).reshape(4, 5)
    assert measured["accuracy_by_depth"][100] == rows.mean(axis=1).tolist()
    assert measured["accuracy"][100] == rows.mean()
    assert len(set(measured["accuracy_by_depth"][100])) > 1 and len(set(asked)) == 20


def test_keys_follow_from_the_seed_and_the_length(tokenizer, monkeypatch):
    asked = []
    monkeypatch.setattr(retrieval, "retrieve", lambda _0, _1, _2, _3, keys, _4: asked.extend(keys) or [True] * len(keys))

    def keys(lengths, seed):
        asked.clear()
        passkey(make(), tokenizer, lengths, depths=2, trials=3, seed=seed, progress=False)
        return list(asked)

    assert keys([90, 130], 1) == keys([130, 90, 90], 1) == keys([90], 1) + keys([130], 1)
    assert keys([90], 1) != keys([90], 2) and keys([90], 1) != keys([130], 1)


@pytest.mark.parametrize("distances, accuracy, expected", [
    ([10, 20, 30, 40, 50], [1, 1, 0.2, 0.1, 1], 30), ([10, 20, 30], [0, 0, 0], 0), ([10, 20, 30], [1, 1, 1], 30),
    ([10, 20, 30], [0.1, 1, 1], 0), ([50, 40, 30, 20, 10], [1, 0.1, 0.2, 1, 1], 30), ([30, 10, 50, 20, 40], [0.2, 1, 1, 1, 0.1], 30),
    ([64], [1], 64), ([64], [0], 0)])
def test_k_max_ends_before_the_first_failure(distances, accuracy, expected):
    assert k_max(distances, accuracy) == expected


@pytest.mark.parametrize("changes, words", [
    (dict(lengths=[20]), "too short: this tokenizer needs at least"), (dict(lengths=[0]), "too short"), (dict(depths=0), "at least 1"),
    (dict(trials=0), "at least 1"), (dict(seed=-1), "seed -1")])
def test_passkey_refuses(tokenizer, changes, words):
    with pytest.raises(UserError, match=words):
        passkey(make(), tokenizer, **{"lengths": [100], "progress": False, **changes})


# ---------------------------------------------------------------------------------------------------------------------
# The needle


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return [np.array(tokenizer.encode("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(start, start + 90)), bos=True))
            for start in (0, 100)]


def test_a_needle_prompt_says_the_sentence_once_and_begins_it_again(tokenizer, haystack):
    builder = NeedlePrompts(tokenizer, haystack)
    assert builder.tokenizer.decode(builder.parts(0)[0]) == (
        "\nThe best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.\n")
    assert len({tuple(builder.parts(n)[0]) for n in range(64)}) == 64
    for depth in (0, 0.3, 0.5, 1):
        prompt, answer, place = builder.build(np.random.default_rng(7), 300, depth)
        text, end = tokenizer.decode(prompt[1:].tolist()), tokenizer.decode(answer.tolist())
        beginning = text[text.rindex("\n") + 1:]
        assert len(prompt) + len(answer) == 300 and prompt[0] == tokenizer.bos_id and not {0, 1} & set(answer.tolist())
        assert beginning.startswith("The best thing to do in") and text.count(beginning) == 2
        assert text.count(beginning + end) == 1 and end.startswith(" ") and end.endswith(".")
        before = tokenizer.decode(prompt[1:place].tolist())
        assert depth in (0, 1) or before.endswith("\n"), "not within a line"
    assert builder.build(np.random.default_rng(7), 300, 0)[2] == 1
    prompt, answer, _ = builder.build(np.random.default_rng(7), 300, None)
    assert tokenizer.decode(answer.tolist()) not in tokenizer.decode(prompt.tolist()) and len(prompt) + len(answer) == 300


def test_needle_places_run_from_the_beginning_to_the_end(tokenizer, haystack):
    builder = NeedlePrompts(tokenizer, haystack)
    places = [builder.build(np.random.default_rng(3), 400, depth)[2] for depth in (0, 0.25, 0.5, 0.75, 1)]
    line = max(len(tokenizer.encode(f"def f{i}(x):\n")) for i in range(200)) + 12
    fill = places[-1] - 1
    assert all(0 <= 1 + d * fill - p <= line for d, p in zip((0, 0.25, 0.5, 0.75, 1), places)) and sorted(set(places)) == places


class Completer(Scripted):
    """Finds the sentence that was begun if it is at most `reach` tokens away, and goes on with it; else it says nothing but line breaks."""

    def __init__(self, tokenizer, builder, reach):
        super().__init__(tokenizer, builder, None)
        self.reach, self.sentences = reach, [builder.parts(n) for n in range(64)]

    def next(self, context):
        nothing = self.tokenizer.encode("\n")[0]
        for whole, beginning, rest in self.sentences:
            for said in range(len(rest)):
                if context[len(context) - said - len(beginning):] == beginning + rest[:said]:
                    seen = next((i for i in range(len(context) - len(whole)) if context[i:i + len(whole)] == whole), None)
                    if seen is not None and len(context) - said - seen <= self.reach:
                        return rest[said]
        return nothing


def test_recall_is_the_share_of_the_answer_that_is_most_probable(tokenizer, haystack):
    builder = NeedlePrompts(tokenizer, haystack)
    model = Completer(tokenizer, builder, 120)
    measured = needle(model, tokenizer, haystack, [220], depths=5, trials=2, progress=False)
    assert measured["accuracy_by_depth"][220] == [float(d <= 120) for d in measured["distances"][220]]
    assert 0 < measured["accuracy"][220] < 1 and measured["floor"] == {220: 0.0}
    prompt, answer, _ = builder.build(np.random.default_rng(0), 220, 1)
    spoilt = answer.copy()
    spoilt[2] = (spoilt[2] + 1) % tokenizer.vocab_size
    assert recall(model, [prompt], [answer]) == [1.0]
    assert recall(model, [prompt], [spoilt]) == [2 / len(answer)], "after a word that is not the sentence's it knows nothing"


def test_needle_refuses_what_does_not_fit(tokenizer, haystack):
    with pytest.raises(UserError, match="too short: this tokenizer needs at least"):
        needle(make(), tokenizer, haystack, [20], progress=False)
    with pytest.raises(UserError, match="the text holds .* give a longer one"):
        needle(make(), tokenizer, haystack, [50_000], progress=False)


# ---------------------------------------------------------------------------------------------------------------------
# What helps where, and in which unit


def test_loss_by_context_splits_the_mean_by_tokens_read():
    model, text = make(), documents(41, 12)
    whole = perplexity(model, text, 8, 8, progress=False)
    parts = perplexity(model, text, 8, 8, progress=False, bins=4)
    assert parts["nll"] == pytest.approx(whole["nll"], rel=1e-12) and parts["context"] == [1, 3, 5, 7]
    assert parts["tokens_by_context"] == [2 * 7, 2 * 6 + 1, 2 * 6, 2 * 6]     # 7 windows, of which the last has 3 predictions
    for first in range(0, 8, 2):  # by single passes with explicit context
        losses = []
        for document in text:
            for begin in range(0, len(document) - 1, 8):
                for n in range(first, first + 2):
                    if begin + n + 1 < len(document):
                        x = torch.from_numpy(document[None, begin:begin + n + 1])
                        losses.append(-model(x)[0, -1].log_softmax(-1)[document[begin + n + 1]].item())
        assert parts["nll_by_context"][first // 2] == pytest.approx(np.mean(losses), rel=1e-5)
    with pytest.raises(UserError, match="9 bins"):
        perplexity(model, text, 8, 8, progress=False, bins=9)


def test_bits_per_byte_is_a_sum_over_bytes(tokenizer):
    text = "def f(x):\n    return 'naïve'\n"
    ids = np.array(tokenizer.encode(text, bos=True))
    measured = bits_per_byte(2.0, [ids, ids[:1]], tokenizer)
    assert measured["bytes"] == len(text.encode())
    assert measured["bits_per_byte"] == pytest.approx(2.0 * (len(ids) - 1) / math.log(2) / len(text.encode()))


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions


class Countdown:
    """Lets so many calls of a function pass and then interrupts, as Ctrl-C would."""

    def __init__(self, function, calls):
        self.function, self.calls, self.made = function, calls, 0

    def __call__(self, *args):
        if self.made == self.calls:
            raise KeyboardInterrupt
        self.made += 1
        return self.function(*args)


@pytest.mark.parametrize("module, name, measure", [
    (evaluation, "window_nll", lambda model, tokenizer, haystack, keep: perplexity(model, documents(90, 41), 16, 8, progress=False, bins=2, keep=keep)),
    (retrieval, "retrieve", lambda model, tokenizer, haystack, keep: passkey(model, tokenizer, [90, 100], 3, 4, progress=False, keep=keep)),
    (retrieval, "recall", lambda model, tokenizer, haystack, keep: needle(model, tokenizer, haystack, [110, 100], 2, 3, progress=False, keep=keep))])
def test_what_was_measured_before_an_interruption_is_not_measured_again(module, name, measure, tokenizer, haystack, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "rows_at_once", lambda model, length, generating=False: 2)
    model, function, out = make(vocab_size=tokenizer.vocab_size), getattr(module, name), tmp_path / "out.json"
    torch.set_num_threads(1)
    expected = measure(model, tokenizer, haystack, None)
    everything = Countdown(function, 10**6)
    monkeypatch.setattr(module, name, everything)
    measure(model, tokenizer, haystack, None)
    assert everything.made > 5
    monkeypatch.setattr(module, name, broken := Countdown(function, 4))
    with pytest.raises(KeyboardInterrupt):
        measure(model, tokenizer, haystack, Kept(out))
    with open(f"{out}.partial", "ab") as file:
        file.write(b'{"key": "cut by a ki')
    monkeypatch.setattr(module, name, rest := Countdown(function, 10**6))
    resumed = measure(model, tokenizer, haystack, keep := Kept(out))
    assert broken.made == 4 and rest.made == everything.made - 4
    assert {k: v for k, v in resumed.items() if k != "seconds"} == {k: v for k, v in expected.items() if k != "seconds"}
    with torch.no_grad():
        model.norm.weight[0] = 2.0  # another model: nothing that was kept is its
    monkeypatch.setattr(module, name, other := Countdown(function, 10**6))
    measure(model, tokenizer, haystack, Kept(out))
    assert other.made == everything.made
    keep.done()
    assert list(tmp_path.iterdir()) == []


def test_what_was_measured_of_another_shape_of_texts_cut_elsewhere_or_multiplied_otherwise_is_not_kept(tmp_path, monkeypatch):
    model, (text,) = make(), documents(30)
    def measured(texts):
        return perplexity(model, texts, 8, 4, progress=False, keep=Kept(tmp_path / "out.json"))["nll"]
    first = measured([text[:15], text[15:]])
    assert measured([text[:16], text[16:]]) != first == measured([text[:15], text[15:]])
    model.config.norm_eps = 0.1
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 0.1  # the same weights, another model
    assert measured([text[:15], text[15:]]) != first
    monkeypatch.setattr(evaluation, "window_nll", made := Countdown(window_nll, 10**6))
    for precision, new in (("highest", False), ("medium", True), ("highest", False), ("medium", False)):
        made.made = 0
        with matmul_precision(precision):
            measured([text[:15], text[15:]])
        assert (made.made > 0) == new


def test_what_was_measured_in_another_haystack_is_not_kept_for_this_one(tokenizer, haystack, tmp_path, monkeypatch):
    model, made = make(vocab_size=tokenizer.vocab_size), []
    monkeypatch.setattr(retrieval, "recall", lambda model, prompts, answers: made.append(len(prompts)) or [0.5] * len(prompts))
    for text, new in ((haystack, 9), (haystack, 0), ([haystack[0][::-1].copy()], 9), (haystack, 0)):
        made.clear()
        needle(model, tokenizer, text, [110], 2, 3, progress=False, keep=Kept(tmp_path / "out.json"))
        assert sum(made) == new, "six places and three times no needle"


def test_a_store_tells_conditions_apart(tmp_path):
    asked = []
    for condition, new in (("a", True), ("b", True), ("a", False)):
        asked.clear()
        value = Kept(tmp_path / "out.json").within(condition)("key", lambda: asked.append(1) or [condition, (1, 2.5)])
        assert value == [condition, [1, 2.5]] and bool(asked) is new, "as JSON gives it back, kept or not"


def test_jobs_come_back_in_order_and_the_threads_stay_as_they_were():
    torch.set_num_threads(2)
    waits = {i: (0.03 if i % 2 else 0.0, i) for i in range(8)}
    assert list(in_turn(lambda wait, i: time.sleep(wait) or i, waits, make(), Kept(), 1)) == list(range(8))
    assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError):
        list(in_turn(lambda wait, i: 1 // (i - 3), waits, make(), Kept(), 1))
    assert torch.get_num_threads() == 2


def test_what_is_done_is_kept_although_an_earlier_job_is_not(tmp_path):
    torch.set_num_threads(2)
    others = threading.Event()

    def job(i):
        if i == 0:  # broken off after all others have been done
            others.wait(10)
            raise KeyboardInterrupt
        if i == 7:
            others.set()
        return i
    with pytest.raises(KeyboardInterrupt):
        list(in_turn(job, {i: (i,) for i in range(8)}, make(), Kept(tmp_path / "out.json"), 1))
    kept = Kept(tmp_path / "out.json")
    assert 0 not in kept and all(i in kept for i in range(1, 8))


def test_large_passes_are_not_made_side_by_side():
    torch.set_num_threads(2)
    running, most, lock = [], [], threading.Lock()

    def job(i):
        with lock:
            running.append(i)
            most.append(len(running))
        time.sleep(0.02)
        with lock:
            running.remove(i)
    for size, expected in ((2**20, 2), (2**31, 1)):
        most.clear()
        list(in_turn(job, {i: (i,) for i in range(6)}, make(), Kept(), size))
        assert max(most) == expected


def test_a_forward_pass_has_a_row_at_least_and_more_of_shorter_ones():
    model = make()
    assert rows_at_once(model, 10**9) == 1 and rows_at_once(model, 64) > rows_at_once(model, 4096) > 1
    assert rows_at_once(model, 1024) > rows_at_once(model, 1024, generating=True)
    roomy, model.attention = rows_at_once(model, 1024), "naive"
    assert roomy > rows_at_once(model, 1024)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model folder, a text for it, a corpus for it, and the same model said to be extended twofold by PI."""
    place = tmp_path_factory.mktemp("eval")
    model = make(vocab_size=tokenizer.vocab_size, max_seq_len=64)
    save_model(model, place / "model", tokenizer)
    model.config.rope, model.config.max_seq_len = RopeConfig("linear", 2.0, original_max_position_embeddings=64), 128
    save_model(model, place / "extended", tokenizer)
    text = "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(60))
    (place / "text.py").write_text(text, encoding="utf-8")
    ids = np.array(tokenizer.encode(text, bos=True))
    write_corpus(place / "corpus", [ids[:600], ids[:590], ids[:20]], tokenizer)
    return place


@pytest.fixture
def cli(capsys, tmp_path, folder):
    def call(*argv):
        main([str(a).replace("@", f"{folder}/") for a in argv] + ["--out", str(tmp_path / "new" / "result.json")])
        return json.loads((tmp_path / "new" / "result.json").read_text(encoding="utf-8")), capsys.readouterr().out
    return call


def test_ppl_writes_what_the_contract_says(cli, folder, tokenizer):
    measured, printed = cli("ppl", "--model", "@model", "--text", "@text.py", "@text.py", "--window", 48, "--stride", 16, "--seed", 5)
    assert COMMON | {"perplexity", "tokens", "documents", "window", "stride", "seconds", "bos"} <= set(measured)
    text = np.array(tokenizer.encode((folder / "text.py").read_text(encoding="utf-8"), bos=True))
    assert text[0] == tokenizer.bos_id
    expected = perplexity(load_model(folder / "model"), [text], 48, 16, progress=False)
    assert measured["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
    assert (measured["tokens"], measured["documents"], measured["window"], measured["stride"]) == (2 * len(text) - 2, 2, 48, 16)
    assert measured["model"] == str(folder / "model") and measured["seed"] == 5 and measured["device"].startswith("cpu")
    assert measured["rope"]["rope_type"] == "default" and measured["versions"]["torch"] == torch.__version__ and measured["command"]
    for words in (f"{measured['perplexity']:.4f}", "window 48, stride 16, BOS once", f"{measured['tokens']:,} tokens of 2 documents"):
        assert words in printed


def test_passkey_writes_what_the_contract_says(cli, folder):
    measured, printed = cli("passkey", "--model", "@model", "--lengths", 120, 90, "--depths", 2, "--trials", 3)
    assert COMMON | {"accuracy", "lengths", "trials", "k_max", "accuracy_by_depth"} <= set(measured)
    assert measured["lengths"] == [90, 120] and measured["trials"] == 3 and measured["k_max"] == 0
    assert set(measured["accuracy"]) == {"90", "120"} and all(isinstance(a, float) for a in measured["accuracy"].values())
    assert [len(row) for row in measured["accuracy_by_depth"].values()] == [2, 2]
    assert measured["model"] == str(folder / "model")
    assert "k_max 0 at length 120" in printed and "2 depths x 3 keys, greedy" in printed


def test_the_same_command_gives_the_same_numbers(cli):
    for argv in ("ppl --model @model --corpus @corpus", "passkey --model @model --lengths 100 --depths 2 --trials 2"):
        one, two = cli(*argv.split())[0], cli(*argv.split())[0]
        assert one.pop("seconds") > 0 and two.pop("seconds") > 0
        assert one == two


def test_ppl_without_text_reads_the_validation_documents(cli, folder, tokenizer):
    measured, _ = cli("ppl", "--model", "@model", "--corpus", "@corpus")
    assert (measured["window"], measured["stride"], measured["documents"], measured["tokens"]) == (64, 16, 2, 2 * 511)
    # The same documents, eight original windows long, for every window up to four: the perplexities compare. Then longer ones.
    for window, limit, count, tokens in ((32, 1024, 2, 1022), (256, 1024, 2, 1022), (64, 64, 1, 511), (300, 1024, 1, 599)):
        measured, _ = cli("ppl", "--model", "@model", "--corpus", "@corpus", "--window", window, "--max-tokens", limit)
        assert (measured["window"], measured["documents"], measured["tokens"]) == (window, count, tokens)


def test_max_tokens_cuts_the_text_and_zero_does_not(cli, folder, tokenizer):
    text = len(tokenizer.encode((folder / "text.py").read_text(encoding="utf-8"), bos=True))
    for limit, tokens in ((100, 99), (0, text - 1), (10**6, text - 1)):
        assert cli("ppl", "--model", "@model", "--text", "@text.py", "--max-tokens", limit)[0]["tokens"] == tokens


def test_how_float32_is_multiplied_is_asked_for_said_and_not_kept_for_the_next_command(cli, folder):
    """On a CPU without units for bfloat16 PyTorch multiplies in float32 all the same."""
    exact, printed = cli("ppl", "--model", "@model", "--text", "@text.py")
    assert exact["matmul"] == "highest" and "matmul" not in printed
    medium, printed = cli("ppl", "--model", "@model", "--text", "@text.py", "--matmul", "medium")
    assert medium["matmul"] == torch.get_float32_matmul_precision() == "medium" and "float32 (matmul medium)" in printed
    assert medium["perplexity"] == pytest.approx(exact["perplexity"], rel=1e-2)
    again, _ = cli("ppl", "--model", "@model", "--text", "@text.py")
    assert again["perplexity"] == exact["perplexity"] and torch.get_float32_matmul_precision() == "highest"
    half, printed = cli("ppl", "--model", "@model", "--text", "@text.py", "--matmul", "medium", "--dtype", "bfloat16")
    assert half["matmul"] is None and "matmul" not in printed  # there is no float32 matrix


def test_pytorchs_newer_switches_do_no_harm():
    """get_float32_matmul_precision raises where they and the older one were mixed."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        assert perplexity(make(), documents(30), 8, progress=False)["matmul"] == "by backend"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def test_rope_flags_replace_the_folders_positions(cli, folder):
    """Position Interpolation is position m / s: so says a model without scaling whose positions are divided by hand."""
    plain, _ = cli("ppl", "--model", "@model", "--text", "@text.py", "--window", 128)
    linear, printed = cli("ppl", "--model", "@model", "--text", "@text.py", "--rope", "pi", "--factor", 2)
    assert linear["rope"]["rope_type"] == "linear" and linear["rope"]["factor"] == 2 and linear["original_window"] == 64
    assert linear["window"] == 128 and "window 64 -> 128" in printed  # the window follows the factor
    model, tokenizer = load_model(folder / "model"), load_tokenizer(folder / "model")
    hidden = model.hidden
    model.hidden = lambda tokens, last: hidden(tokens, torch.arange(tokens.shape[1]) / 2, last=last)
    text = tokenizer.encode((folder / "text.py").read_text(encoding="utf-8"), bos=True)
    assert perplexity(model, [text], 128, progress=False)["perplexity"] == pytest.approx(linear["perplexity"], rel=1e-6)
    assert abs(linear["perplexity"] / plain["perplexity"] - 1) > 1e-3


def test_a_fine_tuned_folder_needs_no_flag(cli):
    flags, _ = cli("ppl", "--model", "@model", "--text", "@text.py", "--rope", "linear", "--factor", 2)
    folder, _ = cli("ppl", "--model", "@extended", "--text", "@text.py")
    assert folder["perplexity"] == flags["perplexity"] and folder["window"] == flags["window"] == 128
    assert folder["rope"] == flags["rope"] and folder["original_window"] == 64
    four, _ = cli("ppl", "--model", "@extended", "--text", "@text.py", "--rope", "linear", "--factor", 4)
    assert four["window"] == 256, "a factor counts from the original window, also where the folder has one already"


@pytest.mark.parametrize("argv, words", [
    ("ppl --model @model --text @text.py --max-tokens 64", "give a longer text or a shorter --window"),
    ("ppl --model @model --text @text.py --rope linear --factor 64", "give a longer text or a shorter --window"),
    ("ppl --model @model --corpus @corpus --window 310", "no validation document has 620 tokens"),
    ("passkey --model @model", "too short")])  # half of this model's window of 64; test_cli.py has many more
def test_a_mistake_is_one_line_and_exit_code_2(folder, tmp_path, capsys, argv, words):
    argv = argv.replace("@", f"{folder}/").split() + ["--out", str(tmp_path / "result.json")]
    with pytest.raises(SystemExit) as stop:
        run(lambda: main(argv))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error, error
    assert list(tmp_path.iterdir()) == []


def test_the_command_is_recorded_as_typed(folder, tmp_path, monkeypatch):
    argv = f"passkey --model {folder}/model --lengths 90 --depths 1 --trials 1 --out".split() + [str(tmp_path / "a b.json")]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "eval.py"), *argv])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path("eval.py", run_name="__main__")
    assert stop.value.code == 0
    measured = json.loads((tmp_path / "a b.json").read_text(encoding="utf-8"))
    assert measured["command"] == "python eval.py " + " ".join(argv[:-1]) + f" '{argv[-1]}'"


# ---------------------------------------------------------------------------------------------------------------------
# The model in data/tiny, which train.py made


@pytest.fixture(scope="module")
def tiny():
    return load_model(TINY)


def test_tiny_finds_the_key_inside_its_window_and_not_far_beyond(tiny, tokenizer):
    L = tiny.config.max_seq_len
    measured = passkey(tiny, tokenizer, [L // 2, L, 4 * L], depths=5, trials=4, progress=False)
    assert min(measured["accuracy"][L // 2], measured["accuracy"][L]) >= 0.95
    assert measured["accuracy"][4 * L] <= 0.2


def test_tiny_fails_beyond_its_window_and_interpolation_helps(tiny, tokenizer):
    L = tiny.config.max_seq_len
    texts = [tokenizer.encode((ROOT / name).read_text(encoding="utf-8"), bos=True)[:6 * L] for name in ("model.py", "weights.py")]
    inside, beyond = (perplexity(tiny, texts, n, n // 2, progress=False)["perplexity"] for n in (L, 4 * L))
    assert beyond >= 1.5 * inside
    stretched = load_model(TINY, rope={"rope_type": "linear", "factor": 4.0})
    assert perplexity(stretched, texts, 4 * L, 2 * L, progress=False)["perplexity"] < beyond


def test_tiny_gives_the_same_verdicts_by_generation(tiny, tokenizer):
    L = tiny.config.max_seq_len
    one, two = (passkey(tiny, tokenizer, [L, L + L // 4, 2 * L], depths=5, trials=1, generation=g, progress=False) for g in (False, True))
    assert one["accuracy_by_depth"] == two["accuracy_by_depth"]
