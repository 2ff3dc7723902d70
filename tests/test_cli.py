"""cli.py, and what every command does with wrong input: one line `error: what, and what to do`, exit code 2, and nothing half-written."""
import dataclasses
import json
import math
import os
import re
import resource
import runpy
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import cli
from cli import UserError, choose_device, choose_dtype, field, matmul_precision, parse, read_json, run, whole_file, write_json
from data.tokenizer import train_tokenizer
from model import LLaMA, ModelConfig
from weights import save_model

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------------------------------------------------------------
# Wrong input. In a case, @x is the file or folder x of `things`; a flag that is given twice counts the second time.

COMMANDS = {
    "train.py": "--dim 16 --n-layers 1 --n-heads 2 --max-seq-len 80 --steps 2 --batch-size 2 --device cpu --out out --corpus @corpus "
                "--tokenizer @model/tokenizer.model",
    "finetune.py": "--model @model --corpus @corpus --steps 2 --warmup 1 --depths 2 --trials 1 --eval-tokens 100 --device cpu --out out "
                   "--results results.json",
    "eval.py ppl": "--model @model --text @long.txt --device cpu --out result.json",
    "eval.py passkey": "--model @model --lengths 90 --depths 2 --trials 1 --device cpu --out result.json",
    "data/prepare.py": "--text @long.txt --out tokens --tokenizer @model/tokenizer.model",
    "weights.py info": "",
    "plot.py": "--out figures",
}
BROKEN_MODELS = {
    "@missing": "no such folder", "@long.txt": "a file: give the folder", "@empty": "no params.json", "@truncated": "cut off",
    "@evil": "would run code", "@strangers": "pieces", "@no_json": "not a JSON file", "@no_weights": "no consolidated.00.pth",
}
CASES = {
    "train.py": {
        **{f"--{name} {value}": name for name in ("steps", "batch-size", "accumulate", "log-every", "eval-every", "save-every")
           for value in (0, -3)},
        **{f"--lr={value}": "--lr" for value in ("0", "-1", "nan", "inf")},
        **{f"--{name}={value}": f"--{name}" for name in ("weight-decay", "clip", "min-lr", "beta2") for value in ("-1", "nan", "inf")},
        "--warmup -1": "--warmup",
        "--min-lr 2": "--min-lr", "--beta2 1": "--beta2", "--seed -1": "--seed", "--seed 9223372036854775808": "--seed",
        "--dim 0": "dim", "--dim 17": "dim 17", "--dim 18 --n-heads 6": "head_dim", "--n-heads 0": "n_heads", "--n-layers 0": "n_layers",
        "--n-heads 4 --n-kv-heads 3": "n_kv_heads 3", "--n-kv-heads 0": "n_kv_heads", "--multiple-of 0": "multiple_of",
        "--max-seq-len 0": "max_seq_len", "--max-seq-len -80": "max_seq_len", "--max-seq-len 9999999": "fewer than one row",
        "--rope-theta 0.5": "rope_theta", "--rope-theta nan": "rope_theta", "--max-seq-len 40": "passkey prompt needs",
        **{f"--passkey-share={value}": "share" for value in ("1.5", "-1", "nan")},
        "--tokenizer @missing": "@missing: No such file", "--tokenizer @empty": "@empty",
        "--tokenizer @long.txt": "not a SentencePiece model", "--tokenizer @strangers/tokenizer.model": "another tokenizer",
        "--corpus @cut": "cut off", "--corpus @long.txt": "@long.txt", "--corpus @model": "@model",
        "--device abacus": "abacus", "--device cpu:x": "cpu:x", "--device cuda": "cuda", "--device cuda:99": "cuda:99",
        "--out @long.txt": "long.txt", "--out @long.txt/out": "long.txt",
    },
    "finetune.py": {
        **{f"--model {model}": words for model, words in BROKEN_MODELS.items()},
        "--model @nan": "NaN", "--model @no_tokenizer": "tokenizer.model",
        **{f"--factor={value}": "--factor" for value in ("nan", "inf", "-inf", "0", "0.5", "1", "1.001", "-2")},
        "--rope rotten": "rope_type 'rotten' is unknown", "--factor 1000": "no validation document has",
        "--lr nan": "--lr", "--seed -1": "--seed", "--depths 0": "depths 0", "--trials -1": "trials -1",
        "--corpus @cut": "cut off", "--model @short": "passkey prompt needs",
        "--passkey-share 7": "share", "--device cuda": "cuda", "--out @model/../model": "written over",
    },
    "eval.py ppl": {
        **{f"--model {model}": words for model, words in BROKEN_MODELS.items()},
        "--model @nan": "NaN", "--model @no_tokenizer": "tokenizer.model",
        "--window 0": "at least 1", "--window -8": "at least 1", "--stride 0": "at least 1", "--stride -1": "at least 1",
        "--window 16 --stride 17": "stride 17", "--max-tokens -1": "--max-tokens",
        "--text @short.txt": "longer text", "--text @missing": "no such file", "--text @empty": "@empty", "--text @latin1.txt": "not UTF-8",
        "--text @binary.txt": "@binary.txt", "--rope rotten": "unknown", "--rope linear --factor 0.5": "0.5",
        "--rope linear --factor nan": "finite", "--rope linear --factor inf": "finite", "--factor 2": "--rope",
        "--device cuda": "cuda", "--out @long.txt/result.json": "long.txt",
    },
    "eval.py passkey": {
        "--model @nan": "NaN", "--model @strangers": "pieces",
        "--lengths 0": "too short", "--lengths -5": "too short", "--lengths 90 10": "too short",
        "--depths 0": "at least 1", "--trials -1": "at least 1", "--seed -1": "seed",
    },
    "data/prepare.py": {
        "--text @missing": "no such file", "--text @latin1.txt": "not UTF-8", "--text @binary.txt": "binary",
        "--text @nothing.txt": "empty", "--text @empty": "no text",
        **{f"--val-fraction={value}": "--val-fraction" for value in ("2", "-1", "nan")},
        **{f"--max-mb={value}": "--max-mb" for value in ("0", "-1", "nan")}, "--books 5": "--books", "--mirror ftp://x": "--mirror",
        "--tokenizer @missing": "@missing: No such file", "--tokenizer @long.txt": "not a SentencePiece model",
        "--train-tokenizer 400": "does not exist yet", "--train-tokenizer 10 --tokenizer new.model": "need 360",
        "--train-tokenizer -5 --tokenizer new.model": "need 360", "--train-tokenizer 90000 --tokenizer new.model": "cannot be trained",
        "--out @model": "something else", "--out @long.txt": "something else", "--out @long.txt/tokens": "long.txt",
    },
    "weights.py info": {f"--model {model}": words for model, words in BROKEN_MODELS.items()},
    "plot.py": {f"@{name}": f"@{name}" for name in ("missing", "empty", "long.txt", "latin1.txt", "cut.json", "number.json", "list.json",
                "no_lines.jsonl", "lines.jsonl", "rows.json", "row.json", "values.json", "ppl.json", "passkey.json")},
}
BROKEN_RESULTS = {
    "cut.json": '{"rows": [', "number.json": "3", "list.json": "[1, 2]", "no_lines.jsonl": "", "lines.jsonl": '{"step": 1}\nhello',
    "rows.json": '{"rows": 3, "lengths": [1]}', "row.json": '{"rows": [{"name": "a", "perplexity": [1], "passkey": 2}], "lengths": [1]}',
    "values.json": '{"rows": [{"name": "a", "perplexity": {"1": "x"}, "passkey": {"1": {}}}], "lengths": [1], "original_window": 1}',
    "ppl.json": '{"perplexity": 3}', "passkey.json": '{"accuracy_by_depth": 3, "accuracy": 4, "lengths": [1]}',
}


@pytest.fixture(scope="module")
def things(tmp_path_factory, corpus_folder, tokenizer):
    """Good and broken models, corpora, texts and results."""
    folder = tmp_path_factory.mktemp("things")
    torch.manual_seed(0)
    shape = dict(dim=16, n_layers=1, n_heads=2, multiple_of=16, vocab_size=tokenizer.vocab_size)
    model = LLaMA(ModelConfig(**shape, max_seq_len=160))
    for name in ("model", "truncated", "evil", "no_json", "no_weights", "no_tokenizer"):
        save_model(model, folder / name, tokenizer)
    (folder / "no_tokenizer" / "tokenizer.model").unlink()
    (folder / "no_weights" / "consolidated.00.pth").unlink()
    (folder / "no_json" / "params.json").write_text("{", encoding="utf-8")
    weights = folder / "truncated" / "consolidated.00.pth"
    weights.write_bytes(weights.read_bytes()[:20_000])
    torch.save({"tok_embeddings.weight": Evil(folder / "harm")}, folder / "evil" / "consolidated.00.pth")
    save_model(LLaMA(ModelConfig(**shape, max_seq_len=64)), folder / "short", tokenizer)
    model.layers[0].attention.wq.weight.data[3, 5] = math.nan
    save_model(model, folder / "nan", tokenizer)
    other = train_tokenizer(["some other words " * 50], folder / "other.model", 370)
    save_model(LLaMA(ModelConfig(**shape, max_seq_len=160)), folder / "strangers", other)

    for name in ("corpus", "cut"):
        shutil.copytree(corpus_folder, folder / name)
    train = folder / "cut" / "train.bin"
    train.write_bytes(train.read_bytes()[:-100])
    (folder / "empty").mkdir()
    (folder / "nothing.txt").write_text("", encoding="utf-8")
    (folder / "long.txt").write_text("Once upon a time, in 1 window. " * 100, encoding="utf-8")
    (folder / "short.txt").write_text("Once upon a time.", encoding="utf-8")
    (folder / "latin1.txt").write_bytes("über die Länge ".encode("latin-1") * 300)
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 20)
    for name, text in BROKEN_RESULTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


class Evil:
    """Pickled: "make this folder"."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def files(*folders):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for folder in folders for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def script(things, tmp_path, capsys, monkeypatch):
    """script("eval.py ppl", "--window 0") does what `python eval.py ppl ...` would in an empty folder. Returns (exit code, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def command(name, flags=""):
        file, *verb = name.split()
        argv = verb + f"{COMMANDS[name]} {flags}".replace("@", f"{things}/").split()
        monkeypatch.setattr(sys, "argv", [str(ROOT / file), *argv])
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / file), run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, capsys.readouterr().err
    return command


@pytest.mark.parametrize("name, flags", [(name, flags) for name in CASES for flags in CASES[name]])
def test_wrong_input_is_one_line(script, things, tmp_path, name, flags):
    before, words = files(things), CASES[name][flags].replace("@", f"{things}/")
    code, error = script(name, flags)
    assert code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n"), error
    assert words in error and len(error) < 700
    assert files(things) == before and not (things / "harm").exists()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() or path.name.startswith(".")], "something was left behind"


@pytest.mark.parametrize("name", COMMANDS)
def test_right_input_of_these_cases_works(script, tmp_path, name):
    """Or the cases above might fail for another reason. plot.py draws what eval.py writes."""
    code, error = script(name, {"weights.py info": "--model @model", "plot.py": "@missing"}.get(name, ""))
    if name == "plot.py":
        assert script("eval.py ppl") == script("eval.py passkey", "--out passkey.json") == (0, "")
        code, error = script("plot.py", "result.json passkey.json")
        assert sorted(os.listdir("figures")) == ["passkey.png", "perplexity.png"]
    assert (code, error) == (0, "")


@pytest.mark.parametrize("name, flags", [
    ("train.py", "--steps many"), ("train.py", "--schedule sawtooth"), ("train.py", "--dtype int8"), ("train.py", "--no-such-flag"),
    ("finetune.py", "--factor four"), ("finetune.py", "--factor"), ("eval.py ppl", "--attention flash9"), ("eval.py passkey", "--lengths"),
    ("data/prepare.py", "--source web"), ("weights.py info", ""), ("plot.py", "--colour red")])
def test_what_argparse_refuses(script, tmp_path, name, flags):
    code, error = script(name, flags)
    assert code == 2 and "error: " in error.splitlines()[-1] and "Traceback" not in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", ["train.py", "finetune.py", "eval.py", "plot.py", "weights.py", "data/prepare.py"])
def test_help_is_the_manual(file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", [file, "-h"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / file), run_name="__main__")
    assert stop.value.code == 0 and "usage: " in capsys.readouterr().out


def subprocess_error(*argv):
    ended = subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True, encoding="utf-8", timeout=600)
    assert ended.returncode == 2, ended
    return ended.stderr


def test_as_processes(things, tmp_path):
    """Warnings, and what is printed while Python shuts down, are seen here only."""
    for argv, words in ((["data/prepare.py", "--text", things / "latin1.txt", "--out", tmp_path / "tokens"], "iconv"),
                        (["plot.py", things / "cut.json"], "cut.json")):
        error = subprocess_error(*argv)
        assert error.startswith("error: ") and error.count("\n") == 1 and words in error, error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, flags, limit, stays", [
    ("train.py", "--save-every 1", 30_000, {"out/run.json", "out/metrics.jsonl"}),
    ("finetune.py", "--save-every 1", 30_000, {"out/run.json", "out/metrics.jsonl", "results.json.partial"}),
    ("eval.py ppl", "", 100, {"result.json.partial"}), ("eval.py passkey", "", 100, {"result.json.partial"}), ("data/prepare.py", "", 100, set()),
    ("data/prepare.py", "--tokenizer new.model --train-tokenizer 380", 100, set()), ("plot.py", "@curve.jsonl", 1000, set())])
def test_full_disk_leaves_nothing_half_written(script, things, tmp_path, name, flags, limit, stays):
    """No file may grow beyond `limit` bytes: the system's refusal is the same as that of a full disk but for its number."""
    (things / "curve.jsonl").write_text('{"step": 1, "loss": 2.0}\n', encoding="utf-8")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        code, error = script(name, flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and "too large" in error, error
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == stays


# ---------------------------------------------------------------------------------------------------------------------
# cli.py itself


def ending(main, capsys):
    with pytest.raises(SystemExit) as stop:
        run(main)
    return stop.value.code, capsys.readouterr().err


def test_run_turns_mistakes_into_one_line(capsys):
    def raising(error):
        def main():
            raise error
        return main
    assert ending(lambda: None, capsys) == (0, "") and ending(lambda: 3, capsys) == (3, "")
    assert ending(raising(UserError("two\nlines:  go on")), capsys) == (2, "error: two lines: go on\n")
    assert ending(raising(FileNotFoundError(2, "No such file or directory", "x")), capsys) == (2, "error: No such file or directory: x\n")
    assert ending(raising(OSError("odd")), capsys) == (2, "error: odd\n")
    for error in (MemoryError(), RuntimeError("CUDA out of memory. Tried"), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        code, said = ending(raising(error), capsys)
        assert code == 2 and said.startswith("error: out of memory: ") and said.count("\n") == 1
    assert ending(raising(KeyboardInterrupt()), capsys) == (130, "\ninterrupted\n")
    for bug in (RuntimeError("shapes do not match"), ValueError("bad"), KeyError("x"), AssertionError()):
        with pytest.raises(type(bug)):
            run(raising(bug))


def test_a_reader_that_has_gone_is_no_error():
    code = "import cli\ndef main():\n    for i in range(100000): print(i)\ncli.run(main)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


@dataclasses.dataclass
class Settings:
    """For parse."""
    steps: int = field(3, "how many")
    share: float = field(0.5, "10 % or so")
    window: int | None = field(None, "tokens [the model's]")
    name: str = field("a b", "a name")
    kind: str = field("one", "which", choices=["one", "two"])
    lengths: list[int] = field([1, 2], "several")
    fast: bool = field(False, "be fast")
    slow: bool = field(True, "be slow")
    hidden: int = 7


def test_flags_are_made_from_a_dataclass(capsys):
    assert parse(Settings, "words", []) == Settings()
    argv = shlex.split("--steps 4 --share 1e-3 --window 9 --name 'x y' --kind two --lengths 5 6 7 --fast --no-slow")
    given = parse(Settings, "words", argv)
    assert given == Settings(4, 1e-3, 9, "x y", "two", [5, 6, 7], True, False)
    assert parse(Settings, "words", []).lengths is not parse(Settings, "words", []).lengths
    with pytest.raises(SystemExit):
        parse(Settings, "100 % words", ["-h"])
    manual = " ".join(capsys.readouterr().out.split())
    for words in ("--steps INT how many [3]", "--share FLOAT 10 % or so [0.5]", "--window INT tokens [the model's]",
                  "--kind {one,two} which [one]", "--lengths INT [INT ...] several [1 2]", "--fast, --no-fast be fast",
                  "--slow, --no-slow be slow [True]"):
        assert words in manual
    assert "hidden" not in manual
    for wrong in ("--hidden 1", "--steps 1.5", "--kind three", "--share x"):
        with pytest.raises(UserError, match="-h lists the flags"):
            parse(Settings, "words", wrong.split())


def test_device_and_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32 and choose_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    for name in ("cuda", "cuda:0", "mps", "tpu", "", "cpu:x"):
        with pytest.raises(UserError, match="--device"):
            choose_device(name)
    with pytest.raises(UserError, match="--dtype int8"):
        choose_dtype("int8", torch.device("cpu"))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == torch.device("cuda") and choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="2 GPUs"):
        choose_device("cuda:2")


def test_whole_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with pytest.raises(KeyError):
        with whole_file(path, "w") as file:
            file.write("half")
            raise KeyError
    assert not list(path.parent.iterdir())
    with whole_file(path, "w") as file:
        file.write("eins ▁ é\n")
        assert not path.exists()
    assert path.read_bytes() == "eins ▁ é\n".encode("utf-8")
    with pytest.raises(KeyboardInterrupt):
        with whole_file(path) as file:
            file.write(b"other")
            raise KeyboardInterrupt
    assert [file.name for file in path.parent.iterdir()] == ["a.txt"] and path.read_bytes() == "eins ▁ é\n".encode("utf-8")
    umask = os.umask(0o027)
    try:
        with whole_file(path) as file:
            file.write(b"other")
    finally:
        os.umask(umask)
    assert path.read_bytes() == b"other" and path.stat().st_mode & 0o777 == 0o640


def test_whole_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Power may fail: first the content, then the name, then the folder that holds the name."""
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append(stat.S_ISDIR(os.fstat(file).st_mode) or "content") or sync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("name") or replace(*paths))
    with whole_file(tmp_path / "a") as file:
        file.write(b"x")
    assert done == ["content", "name", True]


def test_json(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {1: [math.nan, (math.inf, -math.inf)], "é": {"x": 1.5, "y": None, "z": True}})
    assert read_json(path) == {"1": [None, [None, None]], "é": {"x": 1.5, "y": None, "z": True}}
    words = {"a [ 1 ]": ["[ -f a ]", "[\n 1,\n 2\n]", "[  2  3 ]"], "n": [1, 2.5, None], "m": [[1, 2], [3]], "e": []}
    write_json(tmp_path / "a.json", words)
    assert read_json(path) == words and '"n": [1, 2.5, null]' in path.read_text(encoding="utf-8"), "text is never touched"
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_json(path, {"a": 1, "b": np.float32(1)})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    for content in (b"", b"{", b"\xff\xfe", b"{'a': 1}", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{re.escape(str(path))}: not a JSON file"):
            read_json(path)
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "b.json")


def test_command_line_can_be_typed_again(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "eval.py"), "ppl", "--text", "a b.txt"])
    assert cli.command_line() == "python eval.py ppl --text 'a b.txt'"


def test_results_can_be_read_back(script, tmp_path):
    script("eval.py ppl")
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    contract = "model rope seed device versions command perplexity tokens documents window stride seconds"
    assert set(contract.split()) <= set(result) and result["model"].endswith("/model")


def test_how_float32_is_multiplied_is_put_back_whatever_happens():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), matmul_precision("medium"):
        assert torch.get_float32_matmul_precision() == "medium" != before
        1 // 0
    assert torch.get_float32_matmul_precision() == before
