"""extras/harness.py: the evaluation harness is told what the model says, computed by other means;
whole tasks on local files."""
import json
import math
import re
import types
from pathlib import Path

import pytest
import torch

from common.cache import ResultCache
from common.cli import run_command
from common.errors import UserError
from eval import perplexity
from extras import harness
from extras.harness import Harness, ScoredRow, means_by_group
from methods import RopeConfig
from model import LLaMA, ModelConfig, generate
from weights import load_model, save_model
from weights.export import export

DYNAMIC = RopeConfig("dynamic", 2.0, 16)
PAIRS = [("def f(x):\n    re", "turn x"), ("import numpy as np\n", "print(np)"), ("", "class A:"),
         ("x = ", "[1, 2, 3]"), ("  ", "pass"),
         ("for i in range(10):\n    print(i)\n", "print('done')"), ("a", "b")]


def make(tokenizer, window=64, rope=None, seed=0):
    """A small LLaMA with weights large enough that what it says depends on all it reads."""
    model = LLaMA(ModelConfig(dim=32, n_layers=2, n_heads=2, vocab_size=tokenizer.vocab_size,
                              multiple_of=16, max_seq_len=window, rope=rope or RopeConfig()))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                scale = 1 if "embed" in name else 1.5 / math.sqrt(p.shape[1])
                p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return model


def asked(*args):
    return [types.SimpleNamespace(args=each) for each in args]


@torch.no_grad()
def plainly(model, ids, n):
    """ln p of the last n ids, one row, no batch, no cut, in float64; and whether greedy decoding
    would have said them."""
    logits = model(torch.tensor([ids[:-1]]))[0].double()
    p = logits.log_softmax(-1)
    wanted = range(len(ids) - n, len(ids))
    greedy = all(logits[i - 1].argmax().item() == ids[i] for i in wanted)
    return sum(p[i - 1, ids[i]].item() for i in wanted), greedy


def scored_tokens(tokenizer, context, ids):
    """How many of the ids of context and continuation are scored: at least one, as "ab" is one
    piece."""
    return max(1, len(ids) - len(tokenizer.encode(context.rstrip(), bos=True)))


# --------------------------------------------------------------------------------------------------
# How probable is a continuation?


@pytest.mark.parametrize("rope", [None, DYNAMIC], ids=["default", "dynamic"])
def test_likelihoods_are_those_of_each_row_alone(tokenizer, rope):
    model = make(tokenizer, rope=rope)
    told = Harness(model, tokenizer).loglikelihood(asked(*PAIRS))
    for (context, continuation), (logprob, greedy) in zip(PAIRS, told):
        ids = tokenizer.encode(context + continuation, bos=True)
        n = scored_tokens(tokenizer, context, ids)
        assert logprob == pytest.approx(plainly(model, ids, n)[0], abs=1e-4) and not greedy
    assert len({round(logprob, 3) for logprob, _ in told}) == len(PAIRS)


def test_what_greedy_decoding_says_is_greedy(tokenizer):
    model = make(tokenizer)
    ids = generate(model, torch.tensor([tokenizer.encode("while True:", bos=True)]), 5)[0].tolist()
    adapter = Harness(model, tokenizer)
    rows = [ScoredRow(ids, 5), ScoredRow(ids[:-1] + [ids[-1] ^ 1], 5)]
    (logprob, greedy), (_, other) = adapter.score(rows, "likelihoods")
    assert greedy is True and other is False
    assert logprob == pytest.approx(plainly(model, ids, 5)[0], abs=1e-4)


def test_likelihoods_are_those_of_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    model = make(tokenizer)
    save_model(model, tmp_path / "model", tokenizer)
    export(tmp_path / "model", "hf", tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").double()
    told = Harness(model, tokenizer).loglikelihood(asked(*PAIRS))
    for (context, continuation), (logprob, _) in zip(PAIRS, told):
        ids = tokenizer.encode(context + continuation, bos=True)
        n = scored_tokens(tokenizer, context, ids)
        with torch.no_grad():
            p = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(p[i - 1, ids[i]].item() for i in range(len(ids) - n, len(ids)))
        assert logprob == pytest.approx(expected, abs=1e-3)


def test_context_and_continuation_are_encoded_as_one_text(tokenizer):
    adapter = Harness(make(tokenizer), tokenizer)
    context, continuation = PAIRS[0]
    apart = tokenizer.encode(context) + tokenizer.encode(continuation)
    assert apart != tokenizer.encode(context + continuation), "or it says nothing"
    for context, continuation in PAIRS:
        before, after = adapter.split(context, continuation)
        assert before + after == tokenizer.encode(context + continuation, bos=True) and after
        assert before.count(tokenizer.bos_id) == 1
    assert adapter.split("x =  ", "y")[0] == tokenizer.encode("x =", bos=True), (
        "spaces go with the continuation")


def test_bos_stands_once_and_only_where_wanted(tokenizer):
    bos = tokenizer.bos_id
    with_bos, without = (Harness(make(tokenizer), tokenizer, bos=b) for b in (True, False))
    assert with_bos.start([5, 6]) == with_bos.start([bos, 5, 6]) == [bos, 5, 6]
    assert without.start([5, 6], always=True) == without.start([bos, 5, 6]) == [bos, 5, 6]
    assert without.start([5, 6]) == [5, 6] and without.start([]) == [bos] == with_bos.start([])
    assert without.split("", "x")[0] == [bos], "something has to be read first"


def test_a_context_that_is_too_long_is_cut_and_counted(tokenizer):
    model, text = make(tokenizer), "value = index + result\n" * 40
    ids = tokenizer.encode(text + "items", bos=True)
    n = len(ids) - len(tokenizer.encode(text.rstrip(), bos=True))
    adapter = Harness(model, tokenizer)
    (cut, _), (whole, _) = adapter.loglikelihood(asked((text, "items"), ("value", "items")))
    assert adapter.truncated == 1
    assert cut == pytest.approx(plainly(model, ids[:1] + ids[-64:], n)[0], abs=1e-4)
    wide = Harness(model, tokenizer, max_length=1000)
    told = wide.loglikelihood(asked((text, "items")))[0][0]
    assert told == pytest.approx(plainly(model, ids, n)[0], abs=1e-4) and wide.truncated == 0
    row = [tokenizer.bos_id, *range(10, 20)]
    assert adapter.cut(row, 11) == row and adapter.cut(row, 5) == [1, 16, 17, 18, 19]
    assert Harness(model, tokenizer, truncate="middle").cut(row, 6) == [1, 10, 11, 17, 18, 19]
    assert adapter.cut(row, 1) == [19]
    with pytest.raises(UserError, match="longer --max-length"):
        adapter.loglikelihood(asked(("x", text)))


# --------------------------------------------------------------------------------------------------
# How probable is a text?


@pytest.mark.parametrize("stride", [None, 64, 10])
def test_whole_texts_are_scored_as_by_perplexity(tokenizer, stride):
    model, texts = make(tokenizer), ["def f():\n    pass\n" * n for n in (30, 1, 9)]
    adapter = Harness(model, tokenizer, stride=stride)
    told = adapter.loglikelihood_rolling(asked(*((t,) for t in texts), ("",)))
    for text, logprob in zip(texts, told):
        document = tokenizer.encode(text, bos=True)
        expected = perplexity(model, [document], 64, stride, progress=False)
        assert logprob == pytest.approx(-expected["nll"] * expected["tokens"], rel=1e-5)
    assert told[3] == 0.0


# --------------------------------------------------------------------------------------------------
# How does a prompt go on?


def alone(model, tokenizer, prompt, new, until=()):
    """Greedy, one prompt, the whole text anew for every token."""
    ids, text = tokenizer.encode(prompt, bos=True), ""
    for _ in range(new):
        with torch.no_grad():
            token = model(torch.tensor([ids]))[0, -1].argmax().item()
        if token == tokenizer.eos_id:
            break
        ids.append(token)
        text = tokenizer.decode(ids)[len(tokenizer.decode(tokenizer.encode(prompt))):]
        if any(stop in text for stop in until):
            return text[:min(text.find(stop) for stop in until if stop in text)]
    return text


@pytest.mark.parametrize("rope", [None, DYNAMIC], ids=["default", "dynamic"])
def test_answers_are_those_of_each_prompt_alone(tokenizer, rope):
    model = make(tokenizer, rope=rope)
    prompts = ["def", "x = [1, 2", "import numpy as np\nimport os\n", "class"]
    free = [alone(model, tokenizer, prompt, 12) for prompt in prompts]
    stop = free[0][len(free[0]) // 2:][:2]
    assert stop and len(set(free)) == 4
    settings = [{"until": [], "max_gen_toks": 12},
                {"until": [stop, "never said"], "max_gen_toks": 12, "temperature": 0.0},
                {"until": stop, "max_new_tokens": 7, "do_sample": False, "temperature": 1}]
    questions = asked(*((p, s) for s in settings for p in prompts))
    told = Harness(model, tokenizer).generate_until(questions)
    assert told[:4] == free
    assert told[4:8] == [alone(model, tokenizer, p, 12, [stop]) for p in prompts]
    assert told[4] == free[0].split(stop)[0] != free[0]
    assert told[8:] == [alone(model, tokenizer, p, 7, [stop]) for p in prompts]
    first_tokens = [alone(model, tokenizer, prompt, 1) for prompt in prompts]
    n, token = next((n, t) for n, t in enumerate(first_tokens) if len(set(t)) > 1)
    both = {"until": [token[1:], "", token[:1]], "max_gen_toks": 12}
    assert Harness(model, tokenizer).generate_until(asked((prompts[n], both))) == [""], (
        "of two that one token brings, the first in the text counts")


def test_sampling_is_what_a_task_asks_for(tokenizer):
    adapter = Harness(make(tokenizer), tokenizer)
    hot = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 3.0}
    one, two, cold = adapter.generate_until(asked(
        ("def", hot), ("def", hot), ("def", hot | {"do_sample": False})))
    assert one != two and cold == alone(adapter.model, tokenizer, "def", 12)


def test_repeats_of_a_question_are_sampled_each_by_itself(tokenizer, tmp_path, monkeypatch):
    """In batches of one, too, from one --seed to the next, and where answers are kept."""
    model, cache = make(tokenizer), ResultCache(tmp_path / "out.json")
    hot = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 3.0}
    monkeypatch.setattr(harness, "rows_per_pass", lambda *given: 1)

    def sampled(seed):
        return Harness(model, tokenizer, cache=cache, seed=seed).generate_until(
            asked(*[("def", hot)] * 4))

    first, second = sampled(0), sampled(1)
    assert len({*first, *second}) == 8
    assert (sampled(0), sampled(1)) == (first, second)


@pytest.mark.parametrize("settings, words", [
    ({"until": []}, "256 tokens are to be generated in a window of 64"),
    ({"max_gen_toks": 4, "num_beams": 2}, "asks for num_beams 2"),
    ({"max_gen_toks": 4, "do_sample": True, "top_k": 1}, "asks for top_k 1.* set it to 0"),
    ({"max_gen_toks": 4, "do_sample": True, "min_p": 0.1}, "asks for min_p 0.1"),
    ({"max_gen_toks": 4, "repetition_penalty": 1.3}, "asks for repetition_penalty 1.3")])
def test_what_cannot_be_generated_is_refused(tokenizer, settings, words):
    with pytest.raises(UserError, match=words):
        Harness(make(tokenizer), tokenizer).generate_until(asked(("x", settings)))


def test_what_greedy_answers_do_not_use_may_be_set(tokenizer):
    greedy = {"max_gen_toks": 4, "do_sample": False, "top_k": 50, "min_p": 0.1}
    adapter = Harness(make(tokenizer), tokenizer)
    assert adapter.generate_until(asked(("x", greedy))) == [
        alone(adapter.model, tokenizer, "x", 4)]


def test_a_broken_model_has_no_score(tokenizer):
    model = make(tokenizer)
    torch.nn.init.constant_(model.output.weight, float("nan"))
    with pytest.raises(UserError, match="an answer's probability is not a number"):
        Harness(model, tokenizer).loglikelihood(asked(*PAIRS))


def test_cached_answers_are_not_computed_again(tokenizer, tmp_path, monkeypatch):
    out, computed = tmp_path / "out.json", []

    def everything(seed=0, cached=True):
        """All that a model says, by a new adapter."""
        cache = ResultCache(out) if cached else None
        adapter = Harness(make(tokenizer, seed=seed), tokenizer, cache=cache)
        for name in ("logprobs", "continuations"):
            compute = getattr(adapter, name)
            monkeypatch.setattr(adapter, name, lambda rows, compute=compute:
                                computed.append(rows) or compute(rows))
        told = (adapter.loglikelihood(asked(*PAIRS)),
                adapter.loglikelihood_rolling(asked(("a b",))),
                adapter.generate_until(asked(("def", {"max_gen_toks": 5}))))
        return told, len(computed)

    first, batches = everything()
    assert batches == 3
    assert everything() == (first, 3), "all of it was there"
    other, batches = everything(seed=1)
    assert batches == 6 and other != first, "another model has other answers"
    assert everything(cached=False) == (first, 9)


def test_a_batch_of_answers_has_room_for_what_is_generated(tokenizer, monkeypatch):
    seen = []

    def rows_per_pass(model, length, generating=False):
        seen.append((length, generating))
        return 4

    monkeypatch.setattr(harness, "rows_per_pass", rows_per_pass)
    Harness(make(tokenizer), tokenizer).generate_until(asked(("def f", {"max_gen_toks": 7})))
    assert seen == [(len(tokenizer.encode("def f", bos=True)) + 7, True)]


def test_scores_by_a_number_in_the_documents():
    samples = [{"doc": {"length": n}, "metrics": ["acc", "words"], "acc": acc, "words": (1, 2)}
               for n, acc in ((10, 1.0), (3999, 0.0), (4000, 1.0), (9000, 0.0), (8000, 0.5))]
    means = means_by_group(samples, "length", [8000, 4000])
    assert means == {"0-4000": {"documents": 2, "acc": 0.5},
                     "4000-8000": {"documents": 1, "acc": 1.0},
                     "8000+": {"documents": 2, "acc": 0.25}}
    twice = [sample | {"filter": name, "acc": sample["acc"] * (name == "strict")}
             for name in ("strict", "loose") for sample in samples]
    assert means_by_group(twice, "length", [8000, 4000]) == means, (
        "a filter has all documents of its own")
    assert means_by_group(samples, "lenght", [4000]) == {}
    assert means_by_group([], "length", [4000]) == {}


# --------------------------------------------------------------------------------------------------
# Whole tasks, by the harness itself

YAML = """task: mine_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
metadata: {{version: 3}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("harness")
    save_model(make(tokenizer), folder / "model", tokenizer)
    (folder / "tasks").mkdir()
    return folder


def write_task(place, name, kind, documents, more):
    file = place / f"{name}.jsonl"
    file.write_text("".join(json.dumps(d) + "\n" for d in documents), encoding="utf-8")
    task = YAML.format(name=name, file=file, kind=kind, more=more)
    (place / "tasks" / f"{name}.yaml").write_text(task, encoding="utf-8")


ACCURACIES = """metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}"""
WORD_PERPLEXITY = """metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}"""
EXACT_MATCH = """generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}"""


def test_three_kinds_of_task_from_local_files_have_the_scores_that_plain_calls_give(
        place, tokenizer, capsys, monkeypatch, tmp_path):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, choices = load_model(place / "model"), ["1 + 2", "x", "[]", "return self"]
    questions = ["def f(a):\n    ", "x =", "import", "for i in", "class A", "return", "print(",
                 "self."]
    documents, right, normalised = [], 0, 0
    for n, question in enumerate(questions):
        question = question.rstrip()  # the harness puts one space between question and choice
        scores = []
        for choice in choices:
            ids = tokenizer.encode(f"{question} {choice}", bos=True)
            answer_tokens = len(ids) - len(tokenizer.encode(question, bos=True))
            scores.append(plainly(model, ids, answer_tokens)[0])
        best = max(range(4), key=lambda i: scores[i])
        answer = best if n % 2 else (best + 1) % 4
        right += answer == best
        normalised += answer == max(range(4), key=lambda i: scores[i] / len(choices[i]))
        documents.append({"question": question, "answer": answer, "length": 1000 * n})
    write_task(place, "choice", "multiple_choice", documents,
               f"doc_to_choice: {json.dumps(choices)}\n{ACCURACIES}")
    texts = ["def f(x):\n    return x\n" * 20, "import os\n"]
    write_task(place, "text", "loglikelihood_rolling",
               [{"question": "", "answer": t} for t in texts], WORD_PERPLEXITY)
    task = place / "tasks" / "text.yaml"
    task.write_text(task.read_text().replace("{{question}}", ""))
    spoken = [alone(model, tokenizer, p, 6, ["\n"]) for p in questions]
    write_task(place, "spoken", "generate_until",
               [{"question": p, "answer": s if n % 4 else s + "?"}
                for n, (p, s) in enumerate(zip(questions, spoken))], EXACT_MATCH)

    out = place / "out.json"
    argv = (f"--model {place}/model --include {place}/tasks "
            f"--tasks mine_choice mine_text mine_spoken --out {out} --stride 16")
    harness.main(argv.split())
    measured, printed = json.loads(out.read_text(encoding="utf-8")), capsys.readouterr().out
    got = {task: {name.split(",")[0]: value for name, value in row.items()}
           for task, row in measured["results"].items()}
    assert got["mine_choice"]["acc"] == right / 8 == 0.5
    assert got["mine_choice"]["acc_norm"] == normalised / 8
    scored = [perplexity(model, [tokenizer.encode(t, bos=True)], 64, 16, progress=False)
              for t in texts]
    nats = sum(each["nll"] * each["tokens"] for each in scored)
    words = sum(len(re.split(r"\s+", t)) for t in texts)
    assert got["mine_text"]["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-4)
    assert got["mine_spoken"]["exact_match"] == 6 / 8
    assert {"model", "rope", "seed", "device", "versions", "command"} <= set(measured)
    assert measured["documents"] == {"mine_choice": 8, "mine_text": 2, "mine_spoken": 8}
    assert measured["stride"] == 16 and measured["task_versions"]["mine_choice"] in (3, 3.0)
    assert "mine_choice" in printed and "BOS once" in printed

    harness.main(f"--model {place}/model --include {place}/tasks --tasks mine_choice --limit 4 "
                 f"--fewshot 0 --by length --edges 2000 --out {out} --max-length 8 --rope yarn "
                 "--factor 2".split())
    measured, printed = json.loads(out.read_text(encoding="utf-8")), capsys.readouterr().out
    assert measured["documents"] == {"mine_choice": 4} and measured["max_length"] == 8
    assert measured["rope"]["rope_type"] == "yarn"
    groups = measured["by"]["mine_choice"]
    assert groups["0-2000"]["documents"] == 2 == groups["2000+"]["documents"]
    assert measured["truncated"] > 0 and f"cut: {measured['truncated']} contexts" in printed


def test_govreport_works_as_printed_in_the_recipes(place, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval"), pytest.importorskip("rouge_score")
    page = Path(harness.__file__).parent.parent / "docs" / "harness.md"
    page = page.read_text(encoding="utf-8")
    (tmp_path / "my_tasks").mkdir()
    for name, kind in (("gov_report.yaml", "yaml"), ("rouge.py", "python")):
        block = re.search(f"```{kind}\n(.*?)```", page, re.S)[1]
        (tmp_path / "my_tasks" / name).write_text(block, encoding="utf-8")
    documents = [{"report": "word " * 3000, "summary": "The words are summarized."}] * 2
    lines = "\n".join(map(json.dumps, documents))
    (tmp_path / "my_tasks" / "gov_report.jsonl").write_text(lines, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Harness, "continuations",
                        lambda self, prompts: ["A word summarizes.\n" for _ in prompts])
    harness.main("--model {}/model --tasks gov_report --include my_tasks/ --truncate middle "
                 "--max-length 1500 --out out.json".format(place).split())
    measured = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    rouge = {name.split(",")[0]: value for name, value in measured["results"]["gov_report"].items()}
    assert measured["truncated"] == 2 and measured["documents"] == {"gov_report": 2}
    # Stems a word summar | the word are summar: two of three said, two of four wanted, in order; no
    # pair of neighbours.
    assert rouge["rouge1"] == rouge["rougeL"] == pytest.approx(400 / 7) and rouge["rouge2"] == 0


@pytest.mark.parametrize("argv, words", [
    ("", "--tasks is empty"), ("--tasks x --limit 0", "--limit"),
    ("--tasks x --fewshot -1", "at least 0"),
    ("--tasks mine_nothing --include @none", "no such folder"),
    ("--tasks x --truncate right", "invalid choice")])
def test_a_mistake_is_one_line_and_exit_code_2(place, capsys, monkeypatch, argv, words):
    if harness.LM is object:
        monkeypatch.setattr(harness, "LM", type("Installed", (), {}))
    if "mine" in argv:
        pytest.importorskip("lm_eval")
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: harness.main(["--model", f"{place}/model",
                                          *argv.replace("@", f"{place}/").split()]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: "), error
    assert error.count("\n") == 1 and words in error, error


def test_without_the_package_one_line_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(harness, "LM", object)
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: harness.main(["--tasks", "hellaswag"]))
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: the evaluation harness is not installed: pip install lm-eval\n")
