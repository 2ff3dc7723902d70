"""Ranking instead of generating: the same log-likelihoods as whole texts without a cache, and a
chance of 1/k for whoever knows nothing."""
import json
import random

import numpy as np
import pytest
import torch

import eval as evaluation
from common.kv_cache import KVCache
from data.passkey import PasskeyPrompts
from eval import passkey
from evaluation import ranking
from evaluation.ranking import log_likelihoods, other_keys, wins
from extras import ruler
from extras.ruler import TASKS, ranking_score
from methods import RopeConfig
from model import LLaMA, ModelConfig
from plot import main as plot
from small_models import VOCAB, small_model
from test_ruler import ESSAY, LETTERS, Letters, prompts
from weights import load_model

ROPES = {
    "default": RopeConfig(),
    "yarn": RopeConfig("yarn", 4.0, original_max_position_embeddings=16),
    "dynamic": RopeConfig("dynamic", 4.0, original_max_position_embeddings=16),
    "random positions": RopeConfig(random_positions=500),
    "xpos": RopeConfig("xpos", 2.0), "alibi": RopeConfig("alibi")}


# ---- Log-likelihoods -----------------------------------------------------------------------------


def naive(model, prompt, candidate):
    """ln p(candidate | prompt), by definition: one text, no cache."""
    text = torch.tensor([[*prompt, *candidate]])
    with torch.no_grad():
        log_p = model(text[:, :-1])[0].log_softmax(-1)
    places = range(len(prompt) - 1, text.shape[1] - 1)
    return sum(log_p[place, text[0, place + 1]].item() for place in places)


def sharp_model(**changes):
    """Attention so sharp that its angles decide what is said."""
    model = small_model(**changes)
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.wq.weight *= 5
    return model


def cases(rng):
    """Prompts shorter and longer than L = 16, some equally long; candidates of 1 to 4 tokens."""
    texts = [[int(i) for i in rng.integers(0, VOCAB, n)] for n in (9, 30, 9, 1, 15, 9)]
    lengths = [[1, 4, 2, 4, 3], [2, 2, 2, 2, 2], [1, 4, 2, 4, 3], [3, 1, 1, 2, 4], [4, 4, 1, 3, 2],
               [2, 1, 3, 1, 2]]
    answers = [[[int(i) for i in rng.integers(0, VOCAB, n)] for n in row]
               for row in lengths]
    return texts, answers


@pytest.mark.parametrize("attention", ["naive", "tiled", "sdpa"])
@pytest.mark.parametrize("name", ROPES)
def test_a_candidate_has_the_log_likelihood_of_the_whole_text(name, attention):
    """Across L too, and for methods whose angles depend on the length of the text."""
    model = sharp_model(rope=ROPES[name], n_kv_heads=1)
    model.attention = attention
    texts, answers = cases(np.random.default_rng(0))
    for prompt, row, found in zip(texts, answers, log_likelihoods(model, texts, answers)):
        expected = [naive(model, prompt, candidate) for candidate in row]
        assert found == pytest.approx(expected, abs=2e-4)


def test_the_angles_of_dynamic_ntk_are_those_of_prompt_and_answer():
    """What the test above would miss if one token more or less hardly mattered."""
    model = sharp_model(rope=ROPES["dynamic"])
    text = torch.randint(VOCAB, (1, 30), generator=torch.Generator().manual_seed(0))
    longer = torch.cat([text, text[:, :3]], dim=1)
    with torch.no_grad():
        assert (model(text)[0, -1] - model(longer)[0, 29]).abs().max() > 0.01


@pytest.mark.parametrize("name, reads", [("default", 1), ("dynamic", 3)])
def test_the_prompt_is_read_once(monkeypatch, name, reads):
    """With dynamic NTK once for each length of a candidate."""
    read = []
    add = KVCache.add_tokens

    def count(cache, tokens, *rest):
        read.append(tokens.shape[1])
        return add(cache, tokens, *rest)
    monkeypatch.setattr(KVCache, "add_tokens", count)
    model = small_model(rope=ROPES[name])
    log_likelihoods(model, [[5] * 30], [[[1, 2], [3], [4, 5, 6], [7, 8], [9], [1, 3]]])
    assert sum(n >= 30 for n in read) == reads and len(read) == 6


def test_rewinding_a_cache_forgets_what_followed():
    model = small_model()
    text = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    cache = KVCache(model.config, 2, 12)
    with torch.no_grad():
        model(text[:, :8], cache=cache)
        model(text[:, 2:5], cache=cache)
        cache.rewind(8)
        found = model(text[:, 8:], cache=cache)
        assert cache.length == 12 and cache.positions.tolist() == list(range(12))
        torch.testing.assert_close(found, model(text)[:, 8:])


@pytest.mark.parametrize("true, others, expected", [
    (-1.0, [-2.0, -3.0], 1), (-2.0, [-1.0, -3.0], 0), (-1.0, [-1.0, -2.0], 1 / 2),
    (0.0, [0.0] * 9, 1 / 10), (-5.0, [-4.0, -4.0], 0), (-np.inf, [-1.0], 0), (np.nan, [-1.0], 0)])
def test_the_best_wins_and_ties_are_shared(true, others, expected):
    assert wins(true, others) == expected


# ---- Passkeys ------------------------------------------------------------------------------------


def test_other_keys_have_the_form_of_a_key():
    for key in ("00000", "12345", "99999"):
        others = other_keys(key, 99)
        assert len({key, *others}) == 100 and all(len(k) == 5 and k.isdigit() for k in others)
        assert others[:9] == other_keys(key, 9)
    assert other_keys("12345", 9) != other_keys("12346", 9)


@pytest.fixture(scope="module")
def shortest(tokenizer):
    return PasskeyPrompts(tokenizer).shortest


def one_layer(tokenizer):
    torch.manual_seed(0)
    return LLaMA(ModelConfig(dim=16, n_layers=1, n_heads=1, vocab_size=tokenizer.vocab_size,
                             multiple_of=16, max_seq_len=256))


def test_a_model_that_knows_nothing_has_its_chance(tokenizer, shortest):
    """Exactly where all tokens are equally probable; about that for random weights."""
    model = one_layer(tokenizer)
    found = passkey(model, tokenizer, [shortest], depths=4, trials=100, rank=5, progress=False)
    assert abs(found["accuracy"][shortest] - 0.2) < 4 * (0.2 * 0.8 / 400) ** 0.5
    torch.nn.init.zeros_(model.output.weight)
    found = passkey(model, tokenizer, [shortest], depths=2, trials=3, rank=5, progress=False)
    assert found["accuracy_by_depth"][shortest] == pytest.approx([0.2, 0.2])
    assert (found["rank"], found["chance"], found["k_max"]) == (5, 0.2, 0)


def test_the_tiny_model_finds_passkeys_by_ranking(tokenizer):
    """At its window it does by generation too; with untrained YaRN it does by ranking only."""
    given = dict(depths=4, trials=2, progress=False)
    tiny = load_model("data/tiny")
    at_window = passkey(tiny, tokenizer, [256], rank=10, **given)
    assert at_window["accuracy"] == {256: 1.0} and at_window["k_max"] == max(
        at_window["distances"][256])
    beyond = passkey(tiny, tokenizer, [512], rank=10, **given)
    assert beyond["accuracy"][512] < 0.5
    yarn = load_model("data/tiny", rope={"rope_type": "yarn", "factor": 2})
    assert passkey(yarn, tokenizer, [512], rank=10, **given)["accuracy"] == {512: 1.0}


def test_passkeys_are_ranked_on_the_prompts_of_generation(tokenizer, monkeypatch):
    """And k_max allows for guessing: 20 % known and a third of the others guessed are 0.47."""
    asked = {}

    def generating(model, tokenizer, prompts, answers, keys, generation):
        asked["generation"] = [p.tolist() for p in prompts], keys
        return [True] * len(keys)

    def ranked(model, builder, prompts, keys, rank):
        asked["ranking"] = [p.tolist() for p in prompts], keys
        return [float(i % 20 < 9) for i in range(len(keys))]  # 0.45 of them at every depth

    monkeypatch.setattr(evaluation, "retrieve_passkeys", generating)
    monkeypatch.setattr(evaluation, "rank_passkeys", ranked)
    given = small_model(), tokenizer, [130], 2, 20
    assert passkey(*given, progress=False)["chance"] == 0
    assert passkey(*given, progress=False, rank=3)["k_max"] == 0
    assert passkey(*given, progress=False, rank=4)["k_max"] > 0
    assert asked["generation"] == asked["ranking"]


def test_the_command_says_the_chance(tmp_path, capsys):
    out = tmp_path / "passkey.json"
    evaluation.main(f"passkey --lengths 128 --depths 2 --trials 1 --rank 4 --device cpu --out {out}"
                    .split())
    assert "2 depths x 1 keys, ranked among 4, chance 0.25;" in capsys.readouterr().out
    measured = json.loads(out.read_text(encoding="utf-8"))
    assert (measured["rank"], measured["chance"]) == (4, 0.25)
    plot([str(out)])
    assert out.with_suffix(".png").exists()


# ---- RULER ---------------------------------------------------------------------------------------


class Pieces(Letters):
    dummy_prefix = False


# Where wrong answers stand in the prompt, and how many at least.
IN_PROMPT = {"niah_multikey_1": 3, "niah_multikey_2": 9, "niah_multikey_3": 9, "cwe": 9, "fwe": 9}


@pytest.mark.parametrize("task", TASKS)
def test_candidates_are_the_answers_and_others_like_them(task):
    builder = prompts(task, 9000, tokenizer=Pieces(), rank=10)
    ids, answers, text, candidates = builder.build(1)
    size = builder.size
    same = prompts(task, 9000, tokenizer=Pieces())
    assert same.sample(1, size)[:3] == builder.sample(1, size)[:3], "the same prompts"
    assert same.sample(1, size).candidates == []
    words = [LETTERS.decode(candidate) for candidate in candidates]
    beginning = " 1. " if task == "cwe" else " "
    assert all(word.startswith(beginning) for word in words)
    words = [word.removeprefix(beginning) for word in words]
    assert words[:len(answers)] == answers
    wrong = words[len(answers):]
    assert len(wrong) == len(set(wrong)) == 9 and not set(wrong) & set(answers)
    forms = [{(len(w), w.isdigit(), w.isupper(), w.count("-")) for w in part}
             for part in (answers, wrong)]
    assert task == "cwe" or forms[0] == forms[1]
    question = text.rindex("\nQuestion" if task in ("vt", "cwe", "fwe") else "\nWhat")
    inside = [word for word in wrong if word in text[:question]]
    assert len(inside) == IN_PROMPT.get(task, 0) and inside == wrong[:len(inside)]


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_and_its_longest_candidate_take_the_length(task, tokenizer):
    builder = prompts(task, 1500, tokenizer=tokenizer, rank=6)
    for index in range(3):
        prompt = builder.build(index)
        used = len(prompt.ids) + max(map(len, prompt.candidates))
        assert 0.8 * 1500 < used <= 1500


@pytest.mark.parametrize("values, answers, expected", [
    ([-1, -2, -3], 1, 100), ([-2, -1, -3], 1, 0), ([-1, -5, -2, -3], 2, 50),
    ([0, 0, 0, 0], 1, 25), ([0, 0, 0, 0, 0], 2, 25)])
def test_every_right_answer_is_ranked_among_the_wrong_ones(values, answers, expected):
    assert ranking_score(values, answers) == pytest.approx(expected)


def measure(monkeypatch, likelihood, rank=4, **more):
    """ruler() of a model of which likelihood(position of the candidate) is known."""
    def scripted(model, ids, candidates):
        return [[likelihood(i) for i in range(len(row))] for row in candidates]

    monkeypatch.setattr(ruler, "log_likelihoods", scripted)
    monkeypatch.setattr(ruler, "greedy_answers", None)  # nothing is generated
    return ruler.ruler(small_model(), Pieces(), [2500, 7000], list(TASKS), 2, ESSAY,
                       progress=False, rank=rank, **more)


def test_who_knows_the_answers_scores_100_and_who_knows_nothing_the_chance(monkeypatch, capsys):
    measured = measure(monkeypatch, lambda i: -i)
    single = {name: score for name, score in measured["scores"].items()}
    assert all(score == {2500: 100.0, 7000: 100.0} for score in single.values())
    assert measured["effective_length"] is None, "that is one of generation"
    measured = measure(monkeypatch, lambda i: 0.0)
    assert measured["averages"] == pytest.approx({2500: 25.0, 7000: 25.0})
    assert (measured["rank"], measured["chance"]) == (4, 25.0)
    ruler.print_scores(measured)
    assert "2 samples each, ranked among 4 candidates, chance 25.0;" in capsys.readouterr().out


def test_ruler_ranks_by_the_log_likelihood_of_whole_texts(tokenizer):
    """The score of a model, from texts that are read without a cache."""
    model = one_layer(tokenizer)
    with torch.no_grad():
        model.output.weight *= 20
    rank, samples, expected = 3, 8, []
    builder = prompts("niah_single_1", 256, tokenizer=tokenizer, rank=rank)
    for index in range(samples):
        prompt = builder.build(index)
        values = [naive(model, prompt.ids, candidate) for candidate in prompt.candidates]
        expected.append(100 * (np.argmax(values) == 0))
    measured = ruler.ruler(model, tokenizer, [256], ["niah_single_1"], samples, seed=42,
                           progress=False, rank=rank)
    assert measured["scores"]["niah_single_1"][256] == np.mean(expected)
    assert 0 < np.mean(expected) < 100, "or the test says nothing"


def test_nothing_is_drawn_before_it_is_asked_for():
    rng = random.Random(0)
    before = rng.getstate()
    words = ruler.wrong_answers(rng, ["a"], ["a", "b", "c"], iter("abdcdeb").__next__)
    assert rng.getstate() == before
    found = [next(words) for _ in range(4)]
    assert sorted(found[:2]) == ["b", "c"] and found[2:] == ["d", "e"]


def test_candidates_are_limited(tokenizer):
    for rank in (1, -1, ranking.MOST_CANDIDATES + 1):
        with pytest.raises(evaluation.UserError, match=f"--rank {rank}"):
            passkey(small_model(), tokenizer, [100], rank=rank, progress=False)
        with pytest.raises(evaluation.UserError, match=f"--rank {rank}"):
            ruler.ruler(small_model(), tokenizer, [100], ["vt"], 1, rank=rank)
