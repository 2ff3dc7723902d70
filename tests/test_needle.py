"""extras/needle.py: prompts that say the sentence once, and the share of it that comes back."""
import json
import re
import types

import numpy as np
import pytest
import torch

from common.cache import ResultCache
from common.errors import UserError
from data.needle import NeedlePrompts
from extras import needle as needle_module
from extras.needle import answer_share, main, needle
from model import ModelConfig
from small_models import Countdown, small_model
from weights import save_model


@pytest.fixture(scope="module")
def haystack(tokenizer):
    texts = ["".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(start, start + 90))
             for start in (0, 100)]
    return [np.array(tokenizer.encode(text, bos=True)) for text in texts]


def without_seconds(measured):
    return {key: value for key, value in measured.items() if key != "seconds"}


# --------------------------------------------------------------------------------------------------
# Prompts


def test_a_needle_prompt_says_the_sentence_once_and_begins_it_again(tokenizer, haystack):
    builder = NeedlePrompts(tokenizer, haystack)
    assert builder.tokenizer.decode(builder.parts(0)[0]) == (
        "\nThe best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a "
        "sunny day.\n")
    assert len({tuple(builder.parts(n)[0]) for n in range(64)}) == 64
    for depth in (0, 0.3, 0.5, 1):
        prompt, answer, place = builder.build(np.random.default_rng(7), 300, depth)
        text, end = tokenizer.decode(prompt[1:].tolist()), tokenizer.decode(answer.tolist())
        beginning = text[text.rindex("\n") + 1:]
        assert len(prompt) + len(answer) == 300
        assert prompt[0] == tokenizer.bos_id and not {0, 1} & set(answer.tolist())
        assert beginning.startswith("The best thing to do in") and text.count(beginning) == 2
        assert text.count(beginning + end) == 1 and end.startswith(" ") and end.endswith(".")
        before = tokenizer.decode(prompt[1:place].tolist())
        assert depth in (0, 1) or before.endswith("\n"), "not within a line"
    assert builder.build(np.random.default_rng(7), 300, 0)[2] == 1
    prompt, answer, _ = builder.build(np.random.default_rng(7), 300, None)
    assert tokenizer.decode(answer.tolist()) not in tokenizer.decode(prompt.tolist())
    assert len(prompt) + len(answer) == 300


def test_needle_places_run_from_the_beginning_to_the_end(tokenizer, haystack):
    builder = NeedlePrompts(tokenizer, haystack)
    depths = (0, 0.25, 0.5, 0.75, 1)
    places = [builder.build(np.random.default_rng(3), 400, depth)[2] for depth in depths]
    line = max(len(tokenizer.encode(f"def f{i}(x):\n")) for i in range(200)) + 12
    fill = places[-1] - 1
    assert all(0 <= 1 + d * fill - p <= line for d, p in zip(depths, places))
    assert sorted(set(places)) == places


# --------------------------------------------------------------------------------------------------
# Answers


class Completer:
    """A stand-in for a model. It finds the sentence that was begun if it is at most `reach` tokens
    away, and goes on with it; else it says nothing but line breaks."""
    attention, device = "auto", torch.device("cpu")

    def __init__(self, tokenizer, builder, reach):
        self.config = ModelConfig(dim=2, n_layers=1, n_heads=1, vocab_size=tokenizer.vocab_size)
        self.tok_embeddings = types.SimpleNamespace(weight=torch.zeros(1))
        self.nothing = tokenizer.encode("\n")[0]
        self.sentences = [builder.parts(n) for n in range(64)]
        self.reach = reach

    def next(self, context):
        for whole, beginning, rest in self.sentences:
            for said in range(len(rest)):
                if context[len(context) - said - len(beginning):] == beginning + rest[:said]:
                    seen = [i for i in range(len(context) - len(whole))
                            if context[i:i + len(whole)] == whole]
                    if seen and len(context) - said - seen[0] <= self.reach:
                        return rest[said]
        return self.nothing

    def __call__(self, tokens, positions=None, cache=None, last=None):
        wanted = list(range(tokens.shape[1]))[-(last or tokens.shape[1]):]
        logits = torch.zeros(len(tokens), len(wanted), self.config.vocab_size)
        for row, context in enumerate(tokens.tolist()):
            for n, t in enumerate(wanted):
                logits[row, n, self.next(context[:t + 1])] = 1.0
        return logits


def test_the_share_of_the_answer_is_that_of_its_most_probable_tokens(tokenizer, haystack):
    builder = NeedlePrompts(tokenizer, haystack)
    model = Completer(tokenizer, builder, 120)
    measured = needle(model, tokenizer, haystack, [220], depths=5, trials=2, progress=False)
    distances = measured["distances"][220]
    assert measured["accuracy_by_depth"][220] == [float(d <= 120) for d in distances]
    assert 0 < measured["accuracy"][220] < 1 and measured["floor"] == {220: 0.0}
    model.reach = 10**6
    measured = needle(model, tokenizer, haystack, [220], depths=5, trials=2, progress=False)
    assert measured["accuracy"] == {220: 1.0}
    assert measured["floor"] == {220: 0.0}, "it finds nothing where nothing is hidden"
    prompt, answer, _ = builder.build(np.random.default_rng(0), 220, 1)
    spoilt = answer.copy()
    spoilt[2] = (spoilt[2] + 1) % tokenizer.vocab_size
    assert answer_share(model, [prompt], [answer]) == [1.0]
    assert answer_share(model, [prompt], [spoilt]) == [2 / len(answer)], (
        "after a word that is not the sentence's it knows nothing")


def test_needle_refuses_what_does_not_fit(tokenizer, haystack):
    with pytest.raises(UserError, match="too short: this tokenizer needs at least"):
        needle(small_model(), tokenizer, haystack, [20], progress=False)
    with pytest.raises(UserError, match="the text holds .* give a longer one"):
        needle(small_model(), tokenizer, haystack, [50_000], progress=False)


# --------------------------------------------------------------------------------------------------
# Interruptions


def test_needles_of_an_interrupted_run_are_not_measured_again(tokenizer, haystack, tmp_path,
                                                             monkeypatch):
    monkeypatch.setattr("evaluation.grid.rows_per_pass", lambda model, length, generating=False: 2)
    model, out = small_model(vocab_size=tokenizer.vocab_size), tmp_path / "out.json"
    torch.set_num_threads(1)

    def measure(cache, calls=10**6):
        """The result, and how many calls of answer_share it took."""
        counter = Countdown(answer_share, calls)
        monkeypatch.setattr(needle_module, "answer_share", counter)
        try:
            return needle(model, tokenizer, haystack, [110, 100], 2, 3, progress=False,
                          cache=cache), counter.made
        except KeyboardInterrupt:
            return None, counter.made

    expected, everything = measure(None)
    assert everything > 5
    assert measure(ResultCache(out), calls=4) == (None, 4)
    with open(f"{out}.partial", "ab") as file:
        file.write(b'{"key": "cut by a ki')
    cache = ResultCache(out)
    resumed, rest = measure(cache)
    assert rest == everything - 4 and without_seconds(resumed) == without_seconds(expected)
    with torch.no_grad():
        model.norm.weight[0] = 2.0  # another model: nothing that was kept is its
    assert measure(ResultCache(out))[1] == everything
    cache.delete()
    assert list(tmp_path.iterdir()) == []


def test_another_haystack_is_measured_anew(tokenizer, haystack, tmp_path, monkeypatch):
    model, made = small_model(vocab_size=tokenizer.vocab_size), []

    def share(model, prompts, answers):
        made.append(len(prompts))
        return [0.5] * len(prompts)

    monkeypatch.setattr(needle_module, "answer_share", share)
    backwards = [haystack[0][::-1].copy()]
    for text, new in ((haystack, 9), (haystack, 0), (backwards, 9), (haystack, 0)):
        made.clear()
        cache = ResultCache(tmp_path / "out.json")
        needle(model, tokenizer, text, [110], 2, 3, progress=False, cache=cache)
        assert sum(made) == new, "six places and three times no needle"


# --------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize("haystack_flag", ["--text", "--corpus"])
def test_the_command_prints_and_writes_what_needle_measures(tokenizer, corpus_folder, tmp_path,
                                                            capsys, haystack_flag):
    save_model(small_model(vocab_size=tokenizer.vocab_size), tmp_path / "model", tokenizer)
    text, out = tmp_path / "text.txt", tmp_path / "needle.json"
    text.write_text("".join(f"Line {n} is not the one.\n" for n in range(300)), encoding="utf-8")
    source = text if haystack_flag == "--text" else corpus_folder
    main(["--model", str(tmp_path / "model"), haystack_flag, str(source), "--lengths", "120", "100",
          "--depths", "2", "--trials", "1", "--seed", "3", "--rope", "linear", "--factor", "2",
          "--out", str(out), "--device", "cpu"])
    measured, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert {"model", "rope", "seed", "device", "versions", "command", "accuracy", "floor",
            "lengths", "depths", "trials", "accuracy_by_depth", "distances",
            "seconds"} <= set(measured)
    assert measured["lengths"] == [100, 120] == [int(n) for n in measured["floor"]]
    assert measured["seed"] == 3 and measured["rope"]["rope_type"] == "linear"
    assert re.search("^100 .*\n120 ", printed, re.M) and "without the needle" in printed
    assert not list(tmp_path.glob("*.partial"))
