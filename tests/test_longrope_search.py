"""extras/longrope_search.py and its evolution: candidates stay in bounds, a planted optimum is
found, an interrupted search ends as an uninterrupted one, and what is written can be used."""
import json
import math

import numpy as np
import pytest
import torch

import extras.longrope_search as longrope_search
from common.errors import UserError
from data.corpus import validation_documents
from data.needle import ACTIVITIES
from eval import perplexity
from extras.evolution import EvolutionFlags, cross, evolve, mutate
from extras.longrope_search import (LongRopeFlags, main, mean_loss, starting_points,
                                    texts_to_search_on, with_other_rope)
from methods import RopeConfig, inv_freq
from model import LLaMA, ModelConfig
from rope import yarn_mscale
from training.extension import load_extended
from weights import load_model, save_model, with_rope
from weights.flags import ModelFlags, rope_from_flags
from weights.rope_dialects import rope_to_hugging_face

from small_models import Countdown, small_model

L, LARGEST = 64, 500  # of s = 4


# ---- The evolution -------------------------------------------------------------------------------


def random_factors(rng, pairs):
    return tuple(sorted(rng.integers(100, LARGEST, pairs, endpoint=True).tolist()))


def in_bounds(factors):
    return 100 <= factors[0] and factors[-1] <= LARGEST and list(factors) == sorted(factors)


@pytest.mark.parametrize("pairs", [1, 2, 32])
def test_mutants_and_crossings_do_not_fall_and_stay_in_range(pairs):
    rng = np.random.default_rng(0)
    for probability in (0.3, 1.0):
        for _ in range(200):
            one, other = random_factors(rng, pairs), random_factors(rng, pairs)
            mutant = mutate(rng, one, LARGEST, probability)
            child = cross(rng, one, other)
            assert in_bounds(mutant) and in_bounds(child) and len(mutant) == len(child) == pairs
            assert all(type(factor) is int for factor in mutant + child)
            assert all(min(a, b) <= f <= max(a, b) for f, a, b in zip(child, one, other))
    assert mutate(rng, one, LARGEST, 1e-9) == one
    assert cross(rng, one, one) == one


def test_mutation_draws_between_the_neighbours_and_reaches_both_ends():
    rng = np.random.default_rng(0)
    parent = (105, 110, 115)
    mutants = [mutate(rng, parent, 120, 0.4) for _ in range(2000)]
    middle = {m[1] for m in mutants if m[0] == 105 and m[2] == 115}
    assert middle == set(range(105, 116))
    assert min(m[0] for m in mutants) == 100 and max(m[2] for m in mutants) == 120
    changed = np.mean([m[0] != 105 for m in mutants])
    assert changed == pytest.approx(0.4 * 10 / 11, abs=0.03), "one draw in 11 is the old factor"


def square_distance(target, asked=None):
    """A fitness with its optimum at `target`. asked: a list of the candidates it was asked for."""
    def measure(candidates):
        if asked is not None:
            asked.extend(candidates)
        return [float(np.mean((np.array(c) - target) ** 2)) for c in candidates]
    return measure


def test_a_planted_optimum_is_found():
    """From PI, NTK and YaRN, with the constants of the paper, to within 0.1 for each factor."""
    starts = list(starting_points(ModelConfig(dim=32, n_heads=1, max_seq_len=256), 4.0).values())
    target = np.array([100] * 3 + [110, 130, 135, 250, 255] + [400] * 6 + [450, 500])
    asked = []
    generations = [min(losses.values()) for losses in evolve(
        starts, LARGEST, square_distance(target, asked), EvolutionFlags(),
        np.random.default_rng(0))]
    assert len(generations) == 41 and generations == sorted(generations, reverse=True)
    assert generations[0] > 900 and generations[-1] < 10**2
    assert 1200 < len(asked) <= 64 + 40 * 32 and len(asked) == len(set(asked)), "each only once"
    assert all(map(in_bounds, asked)) and asked[:3] == starts


def test_a_search_that_runs_out_of_candidates_ends():
    """One pair, and two hundredths to choose from."""
    *_, losses = evolve([(100,)], 101, square_distance(101), EvolutionFlags(iterations=5),
                        np.random.default_rng(0))
    assert losses == {(100,): 1.0, (101,): 0.0}


def test_the_search_begins_at_the_formulas():
    config = ModelConfig(dim=128, n_heads=2, max_seq_len=256)
    starts = starting_points(config, 4.0)
    assert starts["linear"] == (400,) * 32 and starts["ntk"][0] == 100 and starts["ntk"][-1] == 400
    theta, _ = inv_freq(config.rope, 64)
    for method, factors in starts.items():
        assert in_bounds(factors)
        expected, _ = inv_freq(with_rope(config, {"rope_type": method, "factor": 4.0}).rope, 64)
        assert (theta / torch.tensor(factors) * 100).tolist() == pytest.approx(
            expected.tolist(), rel=5.1e-3), "half a step of the grid"


# ---- The fitness ---------------------------------------------------------------------------------


@pytest.fixture
def texts(corpus_folder, tokenizer):
    """The ids and targets of a fitness at L' = 256."""
    def build(fitness, count=5, seed=0):
        flags = LongRopeFlags(fitness=fitness, texts=count)
        return texts_to_search_on(flags, corpus_folder, tokenizer, 256, np.random.default_rng(seed))
    return build


LONGROPE = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": L,
            "short_factor": [1.0] * 4, "long_factor": [1.0, 2.5, 4.0, 4.5], "attention_factor": 1.2}


def test_the_loss_of_texts_is_that_of_eval(texts, tokenizer, monkeypatch):
    model = small_model(vocab_size=tokenizer.vocab_size, max_seq_len=L)
    ids, targets = texts("text")
    assert ids.shape == targets.shape == (5, 256) and (ids[:, 1:] == targets[:, :-1]).all()
    documents = torch.cat([ids, targets[:, -1:]], dim=1).numpy()
    found = mean_loss(model, LONGROPE, ids, targets)
    expected = perplexity(with_other_rope(model, LONGROPE), list(documents), 256, 256)["nll"]
    assert found == pytest.approx(expected, rel=1e-6)
    assert model.config.rope.rope_type == "default", "the model itself stays as it is"
    monkeypatch.setattr(longrope_search, "rows_per_pass", lambda model, length: 2)
    assert mean_loss(model, LONGROPE, ids, targets) == pytest.approx(found, rel=1e-6)
    assert (texts("text")[0] == ids).all() and not (texts("text", seed=1)[0] == ids).all()


@pytest.mark.parametrize("fitness", ["needles", "passkeys"])
def test_only_the_answers_of_hidden_needles_count(texts, tokenizer, fitness):
    model = small_model(vocab_size=tokenizer.vocab_size, max_seq_len=L)
    ids, targets = texts(fitness)
    assert ids.shape == (5, 255)
    words, total, count = [], 0.0, 0
    for row, wanted in zip(ids, targets):
        answer = wanted[wanted != -100]
        words.append(tokenizer.decode(answer.tolist()))
        text = tokenizer.decode(row.tolist())
        assert text.count(words[-1].strip()) >= 1, "it is hidden in the prompt"
        full = torch.cat([row, answer[-1:]])
        assert (full[-len(answer):] == answer).all()
        logits = with_other_rope(model, LONGROPE)(full[None, :-1])[0, -len(answer):]
        total += torch.nn.functional.cross_entropy(logits, answer, reduction="sum").item()
        count += len(answer)
    assert len(set(words)) > 2
    assert mean_loss(model, LONGROPE, ids, targets) == pytest.approx(total / count, rel=1e-5)
    if fitness == "passkeys":
        assert all(len(word.strip()) == 5 and word.strip().isdigit() for word in words)
    else:
        assert {word.strip().removesuffix(".") for word in words} <= set(ACTIVITIES)


# ---- The command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizer):
    """A model whose predictions depend on its positions, L = 64."""
    torch.manual_seed(0)
    model = LLaMA(ModelConfig(dim=16, n_layers=1, n_heads=1, vocab_size=tokenizer.vocab_size,
                              multiple_of=16, max_seq_len=L))
    for name in ("wq", "wk"):
        torch.nn.init.normal_(getattr(model.layers[0].attention, name).weight, std=0.5)
    folder = tmp_path_factory.mktemp("search") / "model"
    save_model(model, folder, tokenizer)
    return folder


def flags(model, corpus, out):
    return ["--model", str(model), "--corpus", str(corpus), "--texts", "2", "--population", "8",
            "--iterations", "3", "--parents", "4", "--mutations", "3", "--crossovers", "3",
            "--max-tokens", "1100", "--trials", "0", "--out", str(out), "--device", "cpu"]


def without_conditions(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in result.items()
            if key not in ("seconds", "search_seconds", "command")}


def test_an_interrupted_search_ends_as_an_uninterrupted_one(model_folder, corpus_folder, tmp_path,
                                                            monkeypatch, capsys):
    """Bit for bit, and no candidate is measured again."""
    made = []
    for name, calls in (("whole", 10**6), ("cut", 15), ("cut", 3), ("cut", 10**6)):
        counter = Countdown(mean_loss, calls)
        monkeypatch.setattr(longrope_search, "mean_loss", counter)
        arguments = flags(model_folder, corpus_folder, tmp_path / f"{name}.json")
        if calls < 10**6:
            with pytest.raises(KeyboardInterrupt):
                main(arguments)
            assert not (tmp_path / "cut.json").exists() and not (tmp_path / "cut.rope").exists()
        else:
            main(arguments)
        made.append(counter.made)
    assert made[0] == sum(made[1:]) > 20
    assert without_conditions(tmp_path / "cut.json") == without_conditions(tmp_path / "whole.json")
    assert (tmp_path / "cut.rope").read_bytes() == (tmp_path / "whole.rope").read_bytes()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == sorted(
        2 * [".json", ".rope", ".png"])


@pytest.mark.parametrize("other", [["--seed", "1"], ["--attention-factor", "1"],
                                   ["--fitness", "passkeys"], ["--factor", "3"]])
def test_another_search_takes_nothing_from_an_interrupted_one(model_folder, corpus_folder, tmp_path,
                                                              monkeypatch, other, capsys):
    printed = []
    for wanted in ([], other, other):  # a generation has four candidates, or five
        monkeypatch.setattr(longrope_search, "mean_loss", Countdown(mean_loss, 4))
        with pytest.raises(KeyboardInterrupt):
            main([*flags(model_folder, corpus_folder, tmp_path / "out.json"), "--population", "5",
                  *wanted])
        printed.append("generation 0" in capsys.readouterr().out)
    assert printed[1:] == [False, True], "only its own four losses are taken up"


def test_what_is_written_is_a_rope_that_every_command_takes(model_folder, corpus_folder, tmp_path,
                                                            capsys):
    out = tmp_path / "found.json"
    main(flags(model_folder, corpus_folder, out))
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    text = (tmp_path / "found.rope").read_text(encoding="utf-8")
    assert text.count("\n") == 1, "a line, for --rope"
    rope = rope_from_flags(ModelFlags(rope=text))
    assert rope == result["found"] and rope["short_factor"] == [1.0] * 8
    assert rope["attention_factor"] == yarn_mscale(4.0) == result["attention_factor"]
    factors = [round(100 * factor) for factor in rope["long_factor"]]
    assert in_bounds(factors) and rope["long_factor"] == [factor / 100 for factor in factors]

    model = load_model(model_folder, rope=rope)
    theta, _ = inv_freq(RopeConfig(), 16)
    for n, divisors in ((L, [1.0] * 8), (L + 1, rope["long_factor"])):
        frequencies, attention_factor = model.frequencies(torch.arange(n))
        assert frequencies.tolist() == pytest.approx((theta / torch.tensor(divisors)).tolist())
        assert attention_factor == yarn_mscale(4.0)
    assert model.config.max_seq_len == 4 * L
    assert load_extended(str(model_folder), rope, L, 4 * L, torch.device("cpu"),
                         "auto").config.rope == model.config.rope
    assert rope_to_hugging_face(model.config.rope, 16)["long_factor"] == rope["long_factor"]

    row = result["methods"][-1]
    assert row["name"] == "longrope" and row["rope"] == model.config.rope.to_dict()
    assert [r["name"] for r in result["methods"]] == [*longrope_search.COMPARED, "longrope"]
    for line in ("generation 3 ", "PI ", "NTK ", "YaRN ", "longrope ", "held-out documents"):
        assert line in printed
    assert result["generations"][-1] <= min(s["perplexity"] for s in result["starts"].values())


def test_the_comparison_is_that_of_eval_on_held_out_documents(model_folder, corpus_folder,
                                                              tokenizer, tmp_path, capsys):
    out = tmp_path / "found.json"
    main(flags(model_folder, corpus_folder, out)[:-2])
    result = json.loads(out.read_text())
    documents = validation_documents(corpus_folder, 8 * L, 1100, tokenizer)
    assert result["documents"] == len(documents) == 2
    for row in result["methods"]:
        model = load_model(model_folder, rope=row["rope"])
        for n in (L, 2 * L, 4 * L):
            expected = perplexity(model, documents, n)["perplexity"]
            assert row["perplexity"][str(n)] == pytest.approx(expected, rel=1e-9), row["name"]
        by_document = result["nll_by_document"][row["name"]]
        assert math.exp(np.mean(by_document)) == pytest.approx(row["perplexity"][str(4 * L)],
                                                               rel=1e-6)


@pytest.mark.parametrize("wrong, words", [
    (["--factor", "1"], "--factor 1.0: give a number above 1"),
    (["--texts", "0"], "--texts 0: has to be at least 1"),
    (["--texts", "100"], "100 are wanted"),
    (["--iterations", "-1"], "--iterations -1"),
    (["--trials", "-1"], "--trials -1: has to be at least 0"),
    (["--depths", "0"], "--depths 0: has to be at least 1"),
    (["--max-tokens", "-5"], "--max-tokens -5: has to be at least 1"),
    (["--mutation-probability", "0"], "--mutation-probability"),
    (["--rope", '{"rope_type": "linear", "factor": 2}'], "plain RoPE")])
def test_requests_that_cannot_work_are_refused(model_folder, corpus_folder, tmp_path, wrong, words,
                                               capsys):
    with pytest.raises(UserError, match=words):
        main([*flags(model_folder, corpus_folder, tmp_path / "out.json"), *wrong])
    assert list(tmp_path.iterdir()) == []
