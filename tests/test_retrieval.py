"""Passkey retrieval: one pass gives the verdict of generation, and the table counts verdicts."""
import re

import numpy as np
import pytest
import torch

import eval as evaluation
from common.errors import UserError
from data.passkey import PasskeyPrompts, encode_inside, random_key
from eval import k_max, passkey
from evaluation import grid
from evaluation.grid import accuracy_grid
from evaluation.retrieval import judge, most_probable, retrieve_passkeys
from methods import RopeConfig
from small_models import Scripted, small_model


@pytest.fixture(scope="module")
def builder(tokenizer):
    return PasskeyPrompts(tokenizer)


# ---- The verdict ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text, verdict, ended", [
    (" 12345.", True, True), ("12345 ", True, True), ("\n12345\n", True, True),
    (" is 12345. 9", True, True), (" 12345abc", True, True),
    (" 12345\u0661", True, True),  # another script's digit does not belong to the key
    (" 12346.", False, False), (" 123456", False, False), (" 1234.", False, False),
    (" 7, no: 12345.", False, False), (" 2345", False, False), (" 012345.", False, False),
    (" 12 345.", False, False), (" 9", False, False), ("12,345.", False, False),
    ("", None, False), (" ", None, False), ("the key is", None, False), (" 1", None, False),
    (" 1234", None, False), (" 12345", None, True)])
def test_judge_reads_the_first_number(text, verdict, ended):
    """verdict: while more text may come; ended: when none does."""
    assert judge(text, "12345") is verdict
    assert judge(text, "12345", ended=True) is ended


def wrong(key, n):
    """`key` with its n-th digit changed."""
    return key[:n] + str((int(key[n]) + 1) % 10) + key[n + 1:]


# What a model may say after "The pass key is", and whether its first number is the key. {} is the
# key, {first} its first digits, | is EOS.
TRUE_SAYINGS = [" {}.", " {}|", " {}\n", " {}x", " {} 6", "{}", "\n{}.", " the {}.", " {}\u0661",
                "  {}|"]
FALSE_SAYINGS = [*(" {wrong[%d]}." % n for n in range(5)), *("{wrong[%d]}" % n for n in range(5)),
                 " {}6", "{}6.", " {first4}.", " {first3}|", " {first3}| {}", " {last4}.", " 7 {}.",
                 "|{}", "\n" * 12, "\n" * 6 + "{}", " {first2} {last3}."]
SAYINGS = [(saying, True) for saying in TRUE_SAYINGS] + [(s, False) for s in FALSE_SAYINGS]


def spell(saying, key, tokenizer):
    """The tokens of a saying. EOS and every line break are tokens of their own."""
    text = saying.format(key, wrong=[wrong(key, n) for n in range(5)], first2=key[:2],
                         first3=key[:3], first4=key[:4], last3=key[2:], last4=key[1:])
    tokens = []
    for part in re.split(r"([|\n])", text):
        tokens += [tokenizer.eos_id] if part == "|" else encode_inside(tokenizer, part)
    return tokens


def test_one_pass_gives_the_verdict_of_generation(tokenizer, builder):
    rng = np.random.default_rng(0)
    keys = ["00000", "99999", *(random_key(rng) for _ in range(4))]
    expected = [verdict for _, verdict in SAYINGS]
    for key in keys:
        # The distance of the key tells the model which saying is wanted.
        nearest = len(builder.information(key)) + len(builder.question)

        def script(key, distance, nearest=nearest):
            return spell(SAYINGS[distance - nearest][0], key, tokenizer)
        built = [builder.build(key, builder.shortest + 40, distance=nearest + n)
                 for n in range(len(SAYINGS))]
        prompts, answers = zip(*built)
        model = Scripted(tokenizer, builder, script)
        given = model, tokenizer, prompts, answers, [key] * len(prompts)
        assert retrieve_passkeys(*given, generation=True) == expected
        assert retrieve_passkeys(*given) == expected


@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize("missing, verdict", [(0, True), (1, False)])
def test_a_number_at_the_end_of_the_last_token_is_complete(tokenizer, builder, generation, missing,
                                                           verdict):
    """Four tokens more than the answer has are generated. A key that goes on behind them is cut
    off."""
    key = "31415"
    prompt, answer = builder.build(key, 120, depth=0.5)
    lines = "\n" * (len(answer) + 4 - len(encode_inside(tokenizer, key)) + missing)
    model = Scripted(tokenizer, builder, lambda key, distance: spell(lines + "{}", key, tokenizer))
    given = model, tokenizer, [prompt], [answer], [key]
    assert retrieve_passkeys(*given, generation=generation) == [verdict]
    assert model.generated > 0


@pytest.mark.parametrize("said", [" {}.", "\n{}.", " {}6", "{}"])
def test_answers_may_differ_in_length(tokenizer, builder, said):
    """As they do with tokenizers that join digits: prompt and answer together have the same length
    in all rows."""
    keys = ["7", "12345", "98", "111"]
    prompts, answers = zip(*(builder.build(key, 130, depth=0.3) for key in keys))
    assert len(set(map(len, answers))) == 4
    model = Scripted(tokenizer, builder,
                     lambda key, distance: encode_inside(tokenizer, said.format(key)))
    expected = [not said.endswith("6")] * 4
    assert retrieve_passkeys(model, tokenizer, prompts, answers, keys) == expected
    if said == " {}.":
        assert model.generated == 0, "each row's answer is looked for at its own place"
    generated = retrieve_passkeys(model, tokenizer, prompts, answers, keys, generation=True)
    assert generated == expected


@pytest.mark.parametrize("n", [0, 1, 2, 10, 14, 20, 22])
def test_nothing_is_generated_where_the_pass_has_decided(tokenizer, builder, n):
    key, (saying, verdict) = "31415", SAYINGS[n]
    model = Scripted(tokenizer, builder, lambda key, distance: spell(saying, key, tokenizer))
    prompt, answer = builder.build(key, 120, depth=0.5)
    assert retrieve_passkeys(model, tokenizer, [prompt], [answer], [key]) == [verdict]
    assert (model.passes, model.generated) == (1, 0)


def greedy(model, prompts, count):
    """`count` most probable tokens after each prompt, by definition: no cache, everything anew for
    each token."""
    ids = torch.from_numpy(prompts)
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids, last=1).argmax(dim=-1)], dim=1)
    return ids[:, prompts.shape[1]:].tolist()


def first_number(tokenizer, tokens):
    if tokenizer.eos_id in tokens:
        tokens = tokens[:tokens.index(tokenizer.eos_id)]
    found = re.search("[0-9]+", tokenizer.decode(tokens))
    return found.group() if found else ""


def cases_of(model, tokenizer, builder, count=200, room=16):
    """(prompt, answer, key, verdict) of random prompts. A key is the number that the model is about
    to say, or nearly that."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, tokenizer.vocab_size, (count, 14))
    cases = []
    for prompt, tokens in zip(prompts, greedy(model, prompts, room)):
        # The answer and four tokens more are generated: the number has to fit.
        found = re.search("[0-9]+", tokenizer.decode(tokens))
        number = found.group()[:room - 6] if found else "1"
        key = number
        if rng.random() >= 0.6:
            key = wrong(number, -1)[:len(number)] if rng.random() < 0.5 else number + "7"
        answer = np.array(builder.answer(key))
        verdict = first_number(tokenizer, tokens[:len(answer) + 4]) == key
        cases.append((prompt, answer, key, verdict))
    return cases


@pytest.mark.parametrize("rope", [
    RopeConfig(), RopeConfig("linear", 2.0),
    RopeConfig("dynamic", 4.0, original_max_position_embeddings=16)],
    ids=["default", "linear", "dynamic"])
def test_one_pass_agrees_with_generation_on_a_real_model(tokenizer, builder, rope):
    """A random LLaMA that speaks in digits, spaces, full stops and EOS."""
    spoken = [*encode_inside(tokenizer, "0123456789"), *encode_inside(tokenizer, " ."),
              tokenizer.eos_id]
    silent = [i for i in range(tokenizer.vocab_size) if i not in spoken]
    model = small_model(seed=3, vocab_size=tokenizer.vocab_size, rope=rope)
    with torch.no_grad():
        model.output.weight[silent] = 0
        model.output.weight[tokenizer.eos_id] *= 0.5
        for layer in model.layers:
            layer.attention.wq.weight *= 5  # sharp attention: the positions decide what it says
    cases = cases_of(model, tokenizer, builder)
    share = np.mean([verdict for *_, verdict in cases])
    assert 0.2 < share < 0.8, "the verdicts have to vary, or the test says nothing"
    for length in {len(answer) for _, answer, _, _ in cases}:
        rows = [case for case in cases if len(case[1]) == length]
        prompts, answers, keys, expected = map(list, zip(*rows))
        given = model, tokenizer, prompts, answers, keys
        assert retrieve_passkeys(*given, generation=True) == expected
        assert retrieve_passkeys(*given) == expected


def test_most_probable_tokens_stand_beside_the_answer(tokenizer, builder):
    """One more than the answer has, for each row at its own place."""
    keys = ["7", "12345"]
    prompts, answers = zip(*(builder.build(key, 130, depth=0.3) for key in keys))
    model = Scripted(tokenizer, builder,
                     lambda key, distance: encode_inside(tokenizer, f" {key}."))
    produced = most_probable(model, prompts, answers)
    for key, ids in zip(keys, produced):
        assert ids == encode_inside(tokenizer, f" {key}.")


# ---- The table -----------------------------------------------------------------------------------


def nearsighted(tokenizer, builder, reach):
    """A model that finds the key up to `reach` tokens from the end, and says five nines beyond."""
    def script(key, distance):
        said = key if distance <= reach else "99999"
        return encode_inside(tokenizer, f" {said}.")
    return Scripted(tokenizer, builder, script)


@pytest.mark.parametrize("how", [{}, {"generation": True}, {"rank": 3}], ids=str)
def test_a_broken_model_does_not_score_zero(tokenizer, builder, how):
    model = small_model(vocab_size=tokenizer.vocab_size, max_seq_len=builder.shortest)
    torch.nn.init.constant_(model.output.weight, float("nan"))
    with pytest.raises(UserError, match="is not a number: the weights are damaged"):
        passkey(model, tokenizer, depths=1, trials=1, progress=False, **how)


class JoinedDigits:
    """A tokenizer that joins some digits: 98012 has three tokens, 12345 has five."""
    bos_id, eos_id, dummy_prefix = 1, 2, False

    def encode(self, text):
        return [3 + ord(piece[0]) for piece in re.findall("98|01|00|77|.|\n", text)]


def test_prompts_of_a_tokenizer_that_joins_digits():
    builder = PasskeyPrompts(JoinedDigits())
    lengths = {key: builder.shortest_with(key) for key in ("00000", "98012", "12345", "77001")}
    assert lengths["00000"] < lengths["12345"] == builder.shortest
    for key, n in lengths.items():
        prompt, answer = builder.build(key, n, depth=0.5)
        assert len(prompt) + len(answer) == n
        with pytest.raises(UserError, match=f"needs at least {builder.shortest}$"):
            builder.build(key, n - 1, depth=0.5)


def test_a_training_prompt_has_room_for_the_longest_keys():
    """Also where none of the keys that were tried is as long."""
    builder = PasskeyPrompts(JoinedDigits())
    longest = builder.shortest
    builder.shortest -= 3
    for room in (longest, longest - 1):
        seen = {len(builder.document(np.random.default_rng(seed), room)) for seed in range(300)}
        assert max(seen) == room + 1 and len(seen) > 2, "EOS follows"


def test_accuracy_by_depth_runs_from_the_beginning_to_the_end(tokenizer, builder):
    model, lengths = nearsighted(tokenizer, builder, 120), [200, 100]
    measured = passkey(model, tokenizer, lengths, depths=5, trials=3, progress=False)
    assert measured["lengths"] == [100, 200]
    assert measured["depths"] == [0, 0.25, 0.5, 0.75, 1]
    assert measured["trials"] == 3
    nearest = len(builder.information("12345")) + len(builder.question)
    for length, distances in measured["distances"].items():
        # Depth 0: all but the introduction follows. Depth 1: the key's own sentence and the
        # question.
        farthest = length - len(builder.answer("12345")) - len(builder.introduction)
        assert distances == pytest.approx(np.linspace(farthest, nearest, 5), abs=1)
        assert (distances[0], distances[-1]) == (farthest, nearest)
        found = [d <= 120 for d in distances]
        assert measured["accuracy_by_depth"][length] == [float(f) for f in found]
        assert measured["accuracy"][length] == np.mean(found)
    assert measured["accuracy"][100] == 1.0
    assert 0 < measured["accuracy"][200] < 1
    assert measured["k_max"] == max(d for d in measured["distances"][200] if d <= 120)


def test_accuracy_counts_the_trials_of_its_own_depth(tokenizer, builder, monkeypatch):
    asked = []

    def fake(model, tokenizer, prompts, answers, keys, generation):
        asked.extend(keys)
        for prompt, answer, key in zip(prompts, answers, keys):
            assert builder.position(prompt, key) > 0
            assert len(prompt) + len(answer) == 100
        return [key < "50000" for key in keys]

    monkeypatch.setattr(evaluation, "retrieve_passkeys", fake)
    # Batches of seven: they end within a depth.
    monkeypatch.setattr(grid, "rows_per_pass", lambda model, length, generating=False: 7)
    measured = passkey(small_model(), tokenizer, [100], depths=4, trials=5, progress=False)
    verdicts = np.array([key < "50000" for key in asked]).reshape(4, 5)
    assert measured["accuracy_by_depth"][100] == verdicts.mean(axis=1).tolist()
    assert measured["accuracy"][100] == verdicts.mean()
    assert len(set(measured["accuracy_by_depth"][100])) > 1
    assert len(set(asked)) == 20


def test_one_depth_is_the_middle(tokenizer):
    def build(rng, length, depth):
        return (np.arange(length), np.arange(1), depth), round(depth * length)

    def score(cases):
        return [depth for _, _, depth in cases]
    given = [100], 1, 2, 0, None, "middle"
    measured = accuracy_grid(small_model(), build, score, *given, progress=False)
    assert measured["depths"] == [0.5]
    assert measured["accuracy"] == {100: 0.5}
    assert measured["distances"] == {100: [50]}


def test_keys_follow_from_the_seed_and_the_length(tokenizer, monkeypatch):
    asked = []

    def fake(model, tokenizer, prompts, answers, keys, generation):
        asked.extend(keys)
        return [True] * len(keys)
    monkeypatch.setattr(evaluation, "retrieve_passkeys", fake)

    def keys(lengths, seed):
        asked.clear()
        passkey(small_model(), tokenizer, lengths, depths=2, trials=3, seed=seed, progress=False)
        return list(asked)

    assert keys([90, 130], 1) == keys([130, 90, 90], 1) == keys([90], 1) + keys([130], 1)
    assert keys([90], 1) != keys([90], 2)
    assert keys([90], 1) != keys([130], 1)


@pytest.mark.parametrize("distances, accuracy, expected", [
    ([10, 20, 30, 40, 50], [1, 1, 0.2, 0.1, 1], 30), ([10, 20, 30], [0, 0, 0], 0),
    ([10, 20, 30], [1, 1, 1], 30), ([10, 20, 30], [0.1, 1, 1], 0),
    ([50, 40, 30, 20, 10], [1, 0.1, 0.2, 1, 1], 30),
    ([30, 10, 50, 20, 40], [0.2, 1, 1, 1, 0.1], 30), ([64], [1], 64), ([64], [0], 0)])
def test_k_max_ends_before_the_first_failure(distances, accuracy, expected):
    assert k_max(distances, accuracy) == expected


@pytest.mark.parametrize("changes, words", [
    (dict(lengths=[20]), "too short: this tokenizer needs at least"),
    (dict(lengths=[0]), "too short"), (dict(depths=0), "at least 1"),
    (dict(trials=0), "at least 1"), (dict(seed=-1), "seed -1")])
def test_passkey_refuses(tokenizer, changes, words):
    with pytest.raises(UserError, match=words):
        passkey(small_model(), tokenizer, **{"lengths": [100], "progress": False, **changes})
