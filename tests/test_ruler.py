"""extras/ruler.py: the protocol's own bytes, prompts that fit, a metric and an effective length
that are known beforehand."""
import json
import random
import re
from collections import Counter

import pytest
import torch

from common.cache import ResultCache
from common.cli import run_command
from common.errors import UserError
from data.passkey import GARBAGE
from extras import ruler
from extras.ruler import TASKS, TaskPrompts, effective_length, string_match
from model import LLaMA, ModelConfig
from weights import save_model

ESSAY = ("The first sentence stands here. Is there another? There is! And so on it goes, without "
         "an end.").split() * 30


class Letters:
    """A tokenizer of characters: what is a length in tokens can be counted by hand."""
    bos_id, eos_id = 1, 2

    def encode(self, text, bos=False):
        return [self.bos_id] * bos + [3 + ord(c) for c in text]

    def decode(self, ids):
        return "".join(chr(i - 3) for i in ids if i > 2)


LETTERS = Letters()


def prompts(task, length, seed=42, tokenizer=LETTERS, **more):
    return TaskPrompts(tokenizer, task, length, seed, ESSAY, **more)


# --------------------------------------------------------------------------------------------------
# The words of the protocol


def test_niah_word_for_word():
    _, (value,), text, _ = prompts("niah_single_1", 0).sample(0, 2)
    key = re.search("magic numbers for (.+) is:", text)[1]
    lines = ["A special magic number is hidden within the following text. Make sure to memorize it."
             " I will quiz you about the number afterwards.",
             GARBAGE,
             GARBAGE,
             f"What is the special magic number for {key} mentioned in the provided text? The "
             f"special magic number for {key} mentioned in the provided text is"]
    found = text.split("\n")
    needle = found.pop(1 if found[1] != GARBAGE else 2)
    assert found == lines and needle == f"One of the special magic numbers for {key} is: {value}."
    assert re.fullmatch("[a-z]+-[a-z]+", key) and re.fullmatch("[1-9][0-9]{6}", value)


def test_several_answers_are_asked_for_in_the_plural():
    ids, answers, text, _ = prompts("niah_multiquery", 0).sample(0, 40)
    keys = [re.search(f"numbers for (\\S+) is: {a}", text)[1] for a in answers]
    query = "{}, {}, {}, and {}".format(*keys)
    assert text.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it."
        " I will quiz you about the numbers afterwards.\n")
    assert text.endswith(
        f"\nWhat are all the special magic numbers for {query} mentioned in the provided text? The "
        f"special magic numbers for {query} mentioned in the provided text are")
    assert len(set(keys)) == 4 and ids == Letters().encode(text, bos=True)


def test_variable_tracking_word_for_word():
    _, answers, text, _ = prompts("vt", 0).sample(3, 5)
    parts = re.fullmatch("(.*?they are:  )(.*?)\n\n(Memorize.*)", text, re.S)
    example, shown, task = parts.groups()
    for part, names, letters, noise in ((example[:-1], shown.split(), 3, 10),
                                        (task, answers, 5, 5)):
        value = re.search("VAR [A-Z]+ = ([0-9]{5})\n", part)[1]
        assert len(set(names)) == 5 and all(re.fullmatch(f"[A-Z]{{{letters}}}", n) for n in names)
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {b} = VAR {a} " for a, b in zip(names, names[1:])]
        context = part.split("following text.\n\n")[1].split("\nQuestion:")[0]
        lines = context.split("\n")
        assert [line for line in lines if line != GARBAGE] == chain
        assert lines.count(GARBAGE) == noise and lines[-1] == GARBAGE
        assert part == (
            "Memorize and track the chain(s) of variable assignment hidden in the following text."
            f"\n\n{context}\nQuestion: Find all variables that are assigned the value {value} in "
            "the text above. Answer: According to the chain(s) of variable assignment in the text "
            f"above, 5 variables are assigned the value {value}, they are: ")


def test_common_words_are_fitted_up_to_the_last_word_there_is(monkeypatch):
    monkeypatch.setattr(ruler, "PAIRS", ruler.PAIRS[:300])
    room = len(prompts("cwe", 4096).sample(0, 290)[0]) + 120
    built = prompts("cwe", room)
    assert len(built.build(0)[0]) + 120 <= room
    assert 280 <= built.size <= 300, "320, the next power, are more than there are"


@pytest.mark.parametrize("length, often, seldom, example", [(4095, 6, 1, (20, 3, 1)),
                                                            (4096, 30, 3, (40, 10, 3))])
def test_common_words_word_for_word(length, often, seldom, example):
    _, answers, text, _ = prompts("cwe", length).sample(0, 50)
    head = ("Below is a numbered list of words. In these words, some appear more often than "
            "others. Memorize the ones that appear most often.\n")
    tail = ("\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 "
            "words that appear most often in the list are:")
    head, tail = re.escape(head), re.escape(tail)
    lists = re.fullmatch(f"{head}(.*?){tail} (.*?)\n{head}(.*?){tail}", text).groups()
    shown, listed, asked = ([re.fullmatch(f"{i}\\. (\\S+)", word)[1] for i, word
                             in enumerate(re.split(r" (?=\d+\. )", each), start=1)]
                            for each in lists)
    for words, common, (size, many, few) in ((shown, listed, example),
                                             (asked, answers, (50, often, seldom))):
        counts = Counter(words)
        assert len(common) == len(set(common)) == 10
        assert {w for w, n in counts.items() if n == many} == set(common)
        assert len(counts) == size
        assert sorted(counts.values()) == [few] * (size - 10) + [many] * 10


def test_frequent_words_word_for_word():
    _, answers, text, _ = prompts("fwe", 1000).sample(0, 300)
    head = ("Read the following coded text and track the frequency of each coded word. "
            "Find the three most frequently appeared coded words. ")
    tail = ("\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are "
            "the three most frequently appeared words in the above coded text? Answer: According "
            "to the coded text above, the three most frequently appeared words are:")
    counts = Counter(re.fullmatch(re.escape(head) + "(.*)" + re.escape(tail), text)[1].split(" "))
    ranked = counts.most_common()
    assert [w for w, _ in ranked[:4]] == ["...", *answers]
    assert all(re.fullmatch("[a-z]{6}", w) for w, _ in ranked[1:])
    zeta = sum(k**-2.0 for k in range(1, 10**6))
    expected = [int(300 / k**2 / zeta) for k in range(1, 21)]  # a vocabulary of 1000 // 50
    assert [n for _, n in ranked] == [n for n in expected if n]


@pytest.mark.parametrize("size", range(30, 120))
def test_the_three_most_frequent_words_are_never_a_matter_of_taste(size):
    _, answers, text, _ = prompts("fwe", 512).sample(0, size)
    coded = text.split("coded words. ")[1].split("\nQuestion")[0] + "\n"
    words = Counter(re.findall(r"\b[a-z]{6}\b(?=[ \n])", coded))
    counts = [n for _, n in words.most_common(4)]
    assert counts[0] > counts[1] > counts[2] > (counts[3] if len(counts) > 3 else 0)


@pytest.mark.parametrize("name, expected", [("base", "{}"),
                                            ("llama-2-chat", "[INST] {} [/INST]"),
                                            ("U: {task}\nA:", "U: {}\nA:")])
def test_the_answer_begins_behind_the_template(name, expected):
    template = ruler.TEMPLATES.get(name, name)
    text = prompts("fwe", 1000, template=template).sample(0, 60)[2]
    plain = prompts("fwe", 1000, template="{task}").sample(0, 60)[2]
    task, answer = plain.split(" Answer:")
    assert text == expected.format(task) + " Answer:" + answer


def test_bos_stands_once():
    class Marked(Letters):
        bos_id = 3 + ord("^")

    for template in ("{task}", "^{task}$"):
        marked = prompts("fwe", 1000, template=template, tokenizer=Marked())
        ids, _, text, _ = marked.sample(0, 60)
        assert ids == Letters().encode("^" + text.removeprefix("^"))


def test_no_word_is_a_part_of_another():
    words = ruler.NOUNS + ruler.ADJECTIVES
    assert len(set(words)) == len(words)
    assert not [(a, b) for a in words for b in words if a != b and a in b]


# --------------------------------------------------------------------------------------------------
# Samples


@pytest.mark.parametrize("task", TASKS)
def test_prompts_use_their_length_and_never_more(task, tokenizer):
    """By characters, and by pieces, of which a prompt has more or fewer for the same haystack."""
    for kind, lengths in ((Letters(), (2500, 4000, 9000)), (tokenizer, (2000, 6000))):
        for length in lengths:
            builder = prompts(task, length, tokenizer=kind)
            assert builder.shortest(4) <= length
            for i in range(4):
                ids, answers, text, _ = builder.build(i)
                assert ids == kind.encode(text, bos=True)
                assert 0.8 * length < len(ids) + TASKS[task].new_tokens <= length
                question = text.rindex("\nQuestion" if task in ("vt", "cwe", "fwe") else "\nWhat")
                assert all(answer in text[:question] for answer in answers)
            larger = len(builder.sample(0, builder.size + 1)[0])
            assert larger + TASKS[task].new_tokens > length or task == "fwe"


def test_tokens_to_generate_and_answers_are_the_protocols():
    expected = dict.fromkeys(TASKS, (128, 1)) | {
        "niah_multivalue": (128, 4), "niah_multiquery": (128, 4), "vt": (30, 5), "cwe": (120, 10),
        "fwe": (50, 3)}
    assert len(TASKS) == 11
    assert {t: (TASKS[t].new_tokens, len(prompts(t, 4096).sample(0, 60)[1]))
            for t in TASKS} == expected


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_is_a_function_of_seed_task_length_and_index(task):
    one = prompts(task, 5000).build(1)
    other = prompts(task, 5000)
    assert [other.build(i) for i in (2, 1)][1] == one, "whatever was built before"
    assert one != prompts(task, 5000).build(0) and one != prompts(task, 5000, seed=1).build(1)
    assert one[1] != prompts(task, 5001).build(1)[1]


def test_needles_lie_at_every_depth_of_an_essay():
    depths = []
    for i in range(300):
        text = prompts("niah_single_2", 0).sample(i, 396)[2].split("\n")[1]
        before, after = text.split("One of the special magic")
        assert before == "" or before.endswith((". ", "? ", "! ")), "between sentences"
        depths.append(len(before) / (len(before) + len(after)))
        fact = re.search(r"One of .*?: \d+\.", text)[0]
        assert " ".join(text.replace(fact, "").split()) == " ".join(ESSAY[:396])
    assert min(depths) == 0 and max(depths) > 0.9 and len({round(d, 1) for d in depths}) == 11
    percents = ruler.FACT_DEPTHS
    assert percents[0] == 0 and percents[-1] == 100 and percents[1:4] == [3, 5, 8]
    assert len(set(percents)) == 40


def test_needles_keep_their_order_where_two_fall_at_one_place():
    class Rng(random.Random):
        def sample(self, population, k):
            return [50, 52, 100]

    words = "One. Two. Three. Four.".split()
    text = ruler.hide_in_essay(Rng(), words, ["A.", "B.", "C."])
    assert text == "One. Two. A. B. Three. Four. C."


def test_distractors_are_told_apart_from_the_needle(monkeypatch):
    monkeypatch.setattr(ruler, "NOUNS", ruler.NOUNS[:3])  # few words: the same key comes up often
    monkeypatch.setattr(ruler, "ADJECTIVES", ruler.ADJECTIVES[:3])
    for task, size in (("niah_multikey_2", 300), ("niah_multikey_1", 100),
                       ("niah_multikey_3", 30)):
        _, (answer,), text, _ = prompts(task, 0).sample(0, size)
        needles = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", text)
        key = re.search(r"What is the special magic \w+ for (\S+) mentioned", text)[1]
        assert [value for name, value in needles if name == key] == [answer]
        assert len(needles) == {"niah_multikey_1": 4}.get(task, size + 1)
    text = prompts("niah_multivalue", 0).sample(0, 100)
    key = re.search(r"numbers for (\S+) mentioned", text[2])[1]
    assert sorted(re.findall(f"for {key} is: (\\d+)", text[2])) == sorted(text[1])


# --------------------------------------------------------------------------------------------------
# Scores


@pytest.mark.parametrize("text, answers, expected", [
    ("1234567", ["1234567"], 100), (" : 1234567.", ["1234567"], 100), ("123456", ["1234567"], 0),
    ("", ["a"], 0), ("ab, CD", ["AB", "cd"], 100), ("ab", ["ab", "cd"], 50),
    ("b c", ["a", "b", "c", "d"], 50), ("a\x00b", ["a\nb"], 100), ("\x1f\n x \x07", ["x"], 100),
    ("xab", ["ab"], 100)])
def test_string_match_all(text, answers, expected):
    assert string_match(text, answers) == expected


@pytest.mark.parametrize("averages, threshold, expected", [
    ({4096: 90.0, 8192: 86.0, 16384: 85.5}, 85.6, 8192),
    ({4096: 85.6}, 85.6, 4096),
    ({4096: 85.59}, 85.6, 0),
    ({4096: 80.0, 8192: 99.0}, 85.6, 0),  # it has to hold at every shorter length too
    ({8192: 99.0, 4096: 99.0, 16384: 70.0, 32768: 99.0}, 85.6, 8192),
    ({512: 60.0, 1024: 50.0}, 50, 1024),
    ({}, 85.6, 0)])
def test_effective_length(averages, threshold, expected):
    assert effective_length(averages, threshold) == expected


def make(window=64, vocab_size=300):
    torch.manual_seed(0)
    return LLaMA(ModelConfig(dim=16, n_layers=1, n_heads=2, vocab_size=vocab_size, multiple_of=8,
                             max_seq_len=window))


def oracle(prompt):
    """The answer, read off the prompt by other means than those that made it."""
    if "special magic" in prompt:
        keys = prompt.rsplit(" for ", 1)[1].split(" mentioned")[0]
        keys = keys.replace(", and ", ", ").split(", ")
        return " and ".join(value for key in keys
                            for value in re.findall(rf"for {key} is: (\S+)\.", prompt))
    if "VAR" in prompt:
        names = [re.findall("VAR (.....) = [0-9]{5}", prompt)[-1]]
        while after := re.findall(f"VAR (.....) = VAR {names[-1]} ", prompt):
            names += after
        return " ".join(names)
    if "numbered list" in prompt:
        counts = Counter(re.findall(r"\d+\. (\S+)", prompt[prompt.rindex("Memorize"):]))
        return ", ".join(word for word, _ in counts.most_common(10)).upper()
    coded = prompt.split("coded words. ")[1].split("\nQuestion")[0]
    return ", ".join(word for word, _ in Counter(re.findall("[.a-z]+", coded)).most_common(4))


def measure(monkeypatch, speak, lengths=(2500, 7000), tasks=tuple(TASKS), samples=3, **more):
    """What ruler() measures of a model that answers speak(prompt), and the batches of prompts."""
    asked = []

    def greedy_answers(model, tokenizer, prompts, new):
        asked.append([tokenizer.decode(p) for p in prompts])
        assert all(p[0] == 1 and len(p) + new <= max(lengths) for p in prompts)
        return [speak(p) for p in asked[-1]]

    monkeypatch.setattr(ruler, "greedy_answers", greedy_answers)
    measured = ruler.ruler(make(), Letters(), lengths, tasks, samples, ESSAY, progress=False,
                           **more)
    return measured, asked


def test_who_reads_the_prompt_rightly_scores_100_and_who_is_silent_0(monkeypatch):
    measured, asked = measure(monkeypatch, oracle)
    assert measured["scores"] == {task: {2500: 100.0, 7000: 100.0} for task in TASKS}
    assert measured["averages"] == {2500: 100.0, 7000: 100.0}
    assert measured["effective_length"] == 7000 and measured["left_out"] == {}
    assert sum(map(len, asked)) == 11 * 2 * 3
    measured, _ = measure(monkeypatch, lambda prompt: "")
    assert set(measured["averages"].values()) == {0.0} and measured["effective_length"] == 0


def test_who_forgets_beyond_a_length_has_it_as_effective_length(monkeypatch):
    def reach(prompt):
        return oracle(prompt) if len(prompt) < 3000 or "VAR" in prompt else ""

    measured, _ = measure(monkeypatch, reach, lengths=(7000, 2500))
    assert measured["averages"] == {2500: 100, 7000: pytest.approx(100 / 11)}
    assert measured["effective_length"] == 2500
    assert measure(monkeypatch, reach, threshold=9)[0]["effective_length"] == 7000


def test_a_part_of_the_tasks_has_no_effective_length(monkeypatch):
    some = [task for task in TASKS if task != "vt"]
    measured, _ = measure(monkeypatch, oracle, tasks=some)
    assert measured["averages"] == {2500: 100.0, 7000: 100.0}
    assert measured["effective_length"] is None
    measured, _ = measure(monkeypatch, oracle, lengths=(1500, 7000))
    assert set(measured["left_out"]) and measured["effective_length"] is None


def test_the_effective_length_is_printed(capsys):
    measured = {"averages": {64: 90.0}, "scores": {}, "left_out": {}, "effective_length": 64,
                "threshold": 85.6, "samples": 2, "rank": 0, "seconds": 1.0}
    ruler.print_scores(measured)
    printed = capsys.readouterr().out
    assert "effective length 64 (average at least 85.6, there and at every shorter" in printed
    assert "no effective length" not in printed


def test_batches_keep_to_the_budget_and_answers_to_their_prompts(monkeypatch):
    monkeypatch.setattr(ruler, "rows_per_pass", lambda model, length, generating=False: 2)

    def right(prompt):
        return oracle(prompt) if int(re.findall(r"\d{7}", prompt)[0]) % 2 else ""

    measured, asked = measure(monkeypatch, right, lengths=(2500,),
                              tasks=("niah_single_1", "niah_single_2"), samples=7)
    assert [len(batch) for batch in asked] == [2, 2, 2, 1] * 2
    for batch in (asked[:4], asked[4:]):
        lengths = [len(p) for b in batch for p in b]
        assert lengths == sorted(lengths)
    odd = [int(re.findall(r"\d{7}", p)[0]) % 2 for b in asked for p in b]
    shares = [100 * sum(part) / 7 for part in (odd[:7], odd[7:])]
    scores = [measured["scores"][t][2500] for t in ("niah_single_1", "niah_single_2")]
    assert scores == pytest.approx(shares)
    assert 0 < sum(odd) < 14


def test_tasks_that_do_not_fit_are_left_out_and_said_to_need_what_they_need(monkeypatch):
    measured, _ = measure(monkeypatch, oracle, lengths=(700, 2500))
    assert measured["scores"]["niah_single_1"] == {700: 100, 2500: 100}
    assert measured["scores"]["vt"] == {2500: 100}
    assert list(measured["scores"]) == [task for task in TASKS if task in measured["scores"]]
    needed = measured["left_out"]["vt"][700]
    assert 700 < needed < 2500 and prompts("vt", needed).shortest(3) <= needed
    again, _ = measure(monkeypatch, oracle, lengths=(needed,), tasks=["vt"])
    assert again["left_out"] == {} and again["averages"] == {needed: 100}
    # From 4,096 on there is five times as much of a word.
    measured, _ = measure(monkeypatch, oracle, lengths=(2500, 5000), tasks=["cwe"])
    assert measured["scores"] == {"cwe": {2500: 100}}
    assert list(measured["left_out"]["cwe"]) == [5000]
    with pytest.raises(UserError, match=f"no task fits 700 tokens: vt needs {needed}"):
        measure(monkeypatch, oracle, lengths=(700,), tasks=["vt"])


def test_the_length_that_is_said_to_be_needed_holds_its_own_samples():
    for seed in range(30):
        enough = prompts("niah_multiquery", 400, seed).with_enough_length(3)
        assert 400 < enough.length and enough.shortest(3) <= enough.length
    ample = prompts("niah_multiquery", 4000)
    assert ample.with_enough_length(3) is ample


def test_cached_answers_are_not_generated_again(monkeypatch, tmp_path):
    tasks = ["niah_single_2", "fwe"]

    def measured(speak, **more):
        cache = ResultCache(tmp_path / "out.json")
        return measure(monkeypatch, speak, tasks=tasks, cache=cache, **more)

    first, asked = measured(oracle)
    batches = len(asked)
    assert batches == len(ResultCache(tmp_path / "out.json").values) > 0
    second, asked = measured(lambda prompt: "")
    assert asked == [] and second["scores"] == first["scores"]
    _, asked = measured(oracle, seed=1)
    assert len(asked) == batches > 3, "another seed makes other prompts"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "manual_seed", lambda seed: None)  # other weights
        _, asked = measured(oracle)
    assert len(asked) == batches, "another model has other answers"


def test_a_model_is_asked_greedily_from_its_cache(tokenizer):
    """greedy_answers of a real model: each row is the argmax of the whole, up to `new` tokens or
    EOS."""
    model, rng = make(vocab_size=tokenizer.vocab_size), random.Random(0)
    rows = [[1, *(rng.randrange(3, 1000) for _ in range(n))] for n in (9, 4, 17)]
    for bias in (0.0, 3.0):  # then EOS comes early
        with torch.no_grad():
            model.output.weight[tokenizer.eos_id] *= 1 + bias
        expected = []
        for row in rows:
            ids = list(row)
            while len(ids) < len(row) + 6:
                token = model(torch.tensor([ids]))[0, -1].argmax().item()
                if token == tokenizer.eos_id:
                    break
                ids.append(token)
            expected.append(tokenizer.decode(ids[len(row):]))
        assert ruler.greedy_answers(model, tokenizer, rows, 6) == expected


# --------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    place = tmp_path_factory.mktemp("ruler")
    save_model(make(512, tokenizer.vocab_size), place / "model", tokenizer)
    (place / "essay.txt").write_text(" ".join(ESSAY), encoding="utf-8")
    (place / "empty.txt").write_text(" \n", encoding="utf-8")
    return place


def test_the_command_prints_and_writes_all_there_is_to_say(folder, capsys):
    argv = (f"--model {folder}/model --lengths 512 256 --tasks niah_single_2 fwe cwe --samples 2 "
            f"--text {folder}/essay.txt --out {folder}/r.json --rope linear --factor 2").split()
    ruler.main(argv)
    measured = json.loads((folder / "r.json").read_text(encoding="utf-8"))
    printed = capsys.readouterr().out
    assert {"model", "rope", "seed", "device", "versions", "command", "scores", "averages",
            "effective_length", "lengths", "samples", "threshold", "template", "haystack", "note",
            "left_out", "seconds"} <= set(measured)
    assert measured["lengths"] == [256, 512] and measured["samples"] == 2
    assert measured["seed"] == 42 and measured["rope"]["factor"] == 2
    assert set(measured["scores"]) == {"niah_single_2", "fwe"}
    left_out = measured["left_out"]["cwe"]
    assert left_out["512"] > 512
    for words in ("do not compare", f"{len(ESSAY)} words of {folder}/essay.txt",
                  f"left out: cwe at 256 (needs {left_out['256']}), 512",
                  "no effective length, as only a part of the 11 tasks was run (2 samples each",
                  "niah_single_2"):
        assert words in printed
    assert measured["effective_length"] is None
    assert "do not compare" in measured["note"]
    ruler.main(argv)
    again = json.loads((folder / "r.json").read_text(encoding="utf-8"))
    assert measured.pop("seconds") and again.pop("seconds") and again == measured


def test_without_a_text_the_haystack_is_the_corpus(folder, corpus_folder, capsys):
    ruler.main(f"--model {folder}/model --lengths 512 --tasks niah_single_2 --samples 1 "
               f"--corpus {corpus_folder}".split())
    assert f"words of held-out documents of {corpus_folder}" in capsys.readouterr().out


@pytest.mark.parametrize("argv, words", [
    ("--tasks niah", "invalid choice: 'niah'"), ("--lengths 100", "give longer --lengths"),
    ("--samples 0", "samples 0"), ("--lengths 0", "lengths 0"),
    ("--threshold nan", "--threshold nan: give a percentage"), ("--threshold 101", "percentage"),
    ("--template x", "with {task} in it"), ("--text @none.txt", "no such file"),
    ("--text @empty.txt", "no word in it"), ("--factor 2", "needs --rope")])
def test_a_mistake_is_one_line_and_exit_code_2(folder, capsys, argv, words):
    argv = ["--model", f"{folder}/model", "--text", f"{folder}/essay.txt",
            *argv.replace("@", f"{folder}/").split()]
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: ruler.main(argv))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: "), error
    assert error.count("\n") == 1 and words in error, error
