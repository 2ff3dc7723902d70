"""Every command with wrong input: one line `error: what, and what to do`, exit code 2, and nothing
half-written. Then the flags and errors of common/cli.py."""
import dataclasses
import json
import math
import os
import resource
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.cli import field, parse, run_command
from common.errors import UserError
from data.tokenizer import train_tokenizer
from model import LLaMA, ModelConfig
from weights import save_model

ROOT = Path(__file__).resolve().parent.parent

# ---- Wrong input ---------------------------------------------------------------------------------
# In a case, @x is the file or folder x of `things`. Of a flag given twice the second counts.

COMMANDS = {
    "train.py": "--dim 16 --n-layers 1 --n-heads 2 --max-seq-len 80 --steps 2 --batch-size 2 "
                "--device cpu --out out --corpus @corpus --tokenizer @model/tokenizer.model",
    "finetune.py": "--model @model --corpus @corpus --steps 2 --warmup 1 --depths 2 --trials 1 "
                   "--max-tokens 100 --device cpu --out out --results results.json",
    "eval.py ppl": "--model @model --text @long.txt --device cpu --out result.json",
    "eval.py passkey": "--model @model --lengths 90 --depths 2 --trials 1 --device cpu "
                       "--out result.json",
    "data/prepare.py": "--text @long.txt --out tokens --tokenizer @model/tokenizer.model",
    "-m weights info": "",
    "plot.py": "--out figures",
}
BROKEN_MODELS = {
    "@missing": "Hugging Face's (config.json", "@long.txt": "a file: give the folder",
    "@empty": "no params.json", "@truncated": "cut off", "@evil": "would run code",
    "@strangers": "pieces", "@no_json": "not a JSON file",
    "@no_weights": "no consolidated.00.pth",
}
BROKEN_MODEL_FLAGS = {f"--model {model}": words for model, words in BROKEN_MODELS.items()}
UNREADABLE_MODELS = {**BROKEN_MODEL_FLAGS, "--model @nan": "NaN",
                     "--model @no_tokenizer": "tokenizer.model"}
COUNTS = ["steps", "batch-size", "accumulate", "log-every", "eval-every", "save-every"]
SHARES = ["weight-decay", "clip", "min-lr", "beta2"]
CASES = {
    "train.py": {
        **{f"--{name} {value}": name for name in COUNTS for value in (0, -3)},
        **{f"--lr={value}": "--lr" for value in ("0", "-1", "nan", "inf")},
        **{f"--{name}={value}": f"--{name}" for name in SHARES for value in ("-1", "nan", "inf")},
        "--warmup -1": "--warmup",
        "--min-lr 2": "--min-lr",
        "--beta2 1": "--beta2",
        "--seed -1": "--seed",
        "--seed 9223372036854775808": "--seed",
        "--dim 0": "dim",
        "--dim 17": "dim 17",
        "--dim 18 --n-heads 6": "head_dim",
        "--n-heads 0": "n_heads",
        "--n-layers 0": "n_layers",
        "--n-heads 4 --n-kv-heads 3": "n_kv_heads 3",
        "--n-kv-heads 0": "n_kv_heads",
        "--multiple-of 0": "multiple_of",
        "--max-seq-len 0": "max_seq_len",
        "--max-seq-len -80": "max_seq_len",
        "--max-seq-len 9999999": "fewer than one row",
        "--max-seq-len 40": "passkey prompt needs",
        "--rope-theta 0.5": "rope_theta",
        "--rope-theta nan": "rope_theta",
        '--rope {"rope_type":"ntk","rope_theta":500}': "give it as --rope-theta",
        '--rope {"rope_type":"ntk","original_max_position_embeddings":40}': "--max-seq-len",
        **{f"--passkey-share={value}": "share" for value in ("1.5", "-1", "nan")},
        "--tokenizer @missing": "@missing: No such file",
        "--tokenizer @empty": "@empty",
        "--tokenizer @long.txt": "not a SentencePiece model",
        "--tokenizer @strangers/tokenizer.model": "another tokenizer",
        "--corpus @cut": "cut off",
        "--corpus @long.txt": "@long.txt",
        "--corpus @model": "@model",
        "--device abacus": "abacus",
        "--device cpu:x": "cpu:x",
        "--device cuda": "cuda",
        "--device cuda:99": "cuda:99",
        "--out @long.txt": "long.txt",
        "--out @long.txt/out": "long.txt",
    },
    "finetune.py": {
        **UNREADABLE_MODELS,
        **{f"--factor={value}": "--factor"
           for value in ("nan", "inf", "-inf", "0", "0.5", "1", "1.001", "-2")},
        "--rope rotten": "rope_type 'rotten' is unknown",
        "--factor 1000": "the corpus holds",
        "--lr nan": "--lr",
        "--seed -1": "--seed",
        "--depths 0": "depths 0",
        "--trials -1": "trials -1",
        "--corpus @cut": "cut off",
        "--model @short": "passkey prompt needs",
        "--passkey-share 7": "share",
        "--device cuda": "cuda",
        "--model llama-2-7b --lr 1e-5": "huggingface.co/meta-llama",
        "--out @model/../model": "written over",
    },
    "eval.py ppl": {
        **UNREADABLE_MODELS,
        "--window 0": "at least 1",
        "--window -8": "at least 1",
        "--stride 0": "at least 1",
        "--stride -1": "at least 1",
        "--window 16 --stride 17": "stride 17",
        "--model llama-2-7b": "huggingface.co/meta-llama",
        "--max-tokens -1": "--max-tokens",
        "--max-tokens 50 --window 100": "--max-tokens 50 is below the window 100",
        "--max-tokens 100 --window 100": "at least 101",
        '--rope {"rope_type":"linear","factor":2,"original_max_position_embeddings":40}':
            "original_max_position_embeddings 40: the model was trained with a window of 160",
        "--text @short.txt": "longer text",
        "--text @missing": "no such file",
        "--text @empty": "@empty",
        "--text @latin1.txt": "not UTF-8",
        "--text @binary.txt": "@binary.txt",
        "--rope rotten": "unknown",
        "--rope linear --factor 0.5": "0.5",
        "--rope linear --factor nan": "finite",
        "--rope linear --factor inf": "finite",
        "--factor 2": "--rope",
        "--device cuda": "cuda",
        "--out @long.txt/result.json": "long.txt",
    },
    "eval.py passkey": {
        "--model @nan": "NaN",
        "--model @strangers": "pieces",
        "--lengths 0": "too short",
        "--lengths -5": "too short",
        "--lengths 90 10": "too short",
        "--depths 0": "at least 1",
        "--trials -1": "at least 1",
        "--seed -1": "seed",
        "--rank 1": "--rank 1: give the number of candidates",
        "--rank 101": "from 2 to 100",
        "--rank -3": "--rank -3",
    },
    "data/prepare.py": {
        "--text @missing": "no such file",
        "--text @latin1.txt": "not UTF-8",
        "--text @binary.txt": "binary",
        "--text @nothing.txt": "empty",
        "--text @empty": "no text",
        **{f"--val-fraction={value}": "--val-fraction" for value in ("2", "-1", "nan")},
        **{f"--max-mb={value}": "--max-mb" for value in ("0", "-1", "nan")},
        "--books 5": "--books",
        "--mirror ftp://x": "--mirror",
        "--tokenizer @missing": "@missing: No such file",
        "--tokenizer @long.txt": "not a SentencePiece model",
        "--train-tokenizer 400": "does not exist yet",
        "--train-tokenizer 10 --tokenizer new.model": "need 360",
        "--train-tokenizer -5 --tokenizer new.model": "need 360",
        "--train-tokenizer 90000 --tokenizer new.model": "cannot be trained",
        "--out @model": "something other",
        "--out @long.txt": "something other",
        "--out @long.txt/tokens": "long.txt",
    },
    "-m weights info": BROKEN_MODEL_FLAGS,
    "plot.py": {f"@{name}": f"@{name}" for name in (
        "missing", "empty", "long.txt", "latin1.txt", "cut.json", "number.json", "list.json",
        "no_lines.jsonl", "lines.jsonl", "rows.json", "row.json", "values.json", "ppl.json",
        "passkey.json")},
}
BROKEN_RESULTS = {
    "cut.json": '{"rows": [',
    "number.json": "3",
    "list.json": "[1, 2]",
    "no_lines.jsonl": "",
    "lines.jsonl": '{"step": 1}\nhello',
    "rows.json": '{"rows": 3, "lengths": [1]}',
    "row.json": '{"rows": [{"name": "a", "perplexity": [1], "passkey": 2}], "lengths": [1]}',
    "values.json": '{"rows": [{"name": "a", "perplexity": {"1": "x"}, "passkey": {"1": {}}}], '
                   '"lengths": [1], "original_window": 1}',
    "ppl.json": '{"perplexity": 3}',
    "passkey.json": '{"accuracy_by_depth": 3, "accuracy": 4, "lengths": [1]}',
}


class Evil:
    """Pickled: "make this folder"."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def make_models(folder, tokenizer):
    """Good and broken models, each in a folder of its own."""
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
    evil = {"tok_embeddings.weight": Evil(folder / "harm")}
    torch.save(evil, folder / "evil" / "consolidated.00.pth")
    save_model(LLaMA(ModelConfig(**shape, max_seq_len=64)), folder / "short", tokenizer)
    model.layers[0].attention.wq.weight.data[3, 5] = math.nan
    save_model(model, folder / "nan", tokenizer)
    other = train_tokenizer(["some other words " * 50], folder / "other.model", 370)
    save_model(LLaMA(ModelConfig(**shape, max_seq_len=160)), folder / "strangers", other)


@pytest.fixture(scope="module")
def things(tmp_path_factory, corpus_folder, tokenizer):
    """Good and broken models, corpora, texts and results."""
    folder = tmp_path_factory.mktemp("things")
    make_models(folder, tokenizer)
    for name in ("corpus", "cut"):
        shutil.copytree(corpus_folder, folder / name)
    train = folder / "cut" / "train.bin"
    train.write_bytes(train.read_bytes()[:-100])
    (folder / "empty").mkdir()
    texts = {"nothing.txt": "", "long.txt": "Once upon a time, in 1 window. " * 100,
             "short.txt": "Once upon a time.", **BROKEN_RESULTS}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "latin1.txt").write_bytes("über die Länge ".encode("latin-1") * 300)
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 20)
    return folder


def files(folder):
    """Every file with its time and size."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_size)
            for path in folder.rglob("*") if path.is_file()}


def run_as_python_does(words, monkeypatch):
    """`python WORDS`: a script, or -m and a package."""
    if words[0] == "-m":
        package = words[1]
        monkeypatch.setattr(sys, "argv", [str(ROOT / package / "__main__.py"), *words[2:]])
        runpy.run_module(package, run_name="__main__")
    else:
        script = str(ROOT / words[0])
        monkeypatch.setattr(sys, "argv", [script, *words[1:]])
        runpy.run_path(script, run_name="__main__")


@pytest.fixture
def script(things, tmp_path, capsys, monkeypatch):
    """script("eval.py ppl", "--window 0") does what `python eval.py ppl ...` would in an empty
    folder. Returns (exit code, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def command(name, flags=""):
        given = f"{COMMANDS[name]} {flags}".replace("@", f"{things}/")
        capsys.readouterr()
        try:
            run_as_python_does([*name.split(), *given.split()], monkeypatch)
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, capsys.readouterr().err
    return command


@pytest.mark.parametrize("name, flags", [(name, flags) for name in CASES for flags in CASES[name]])
def test_wrong_input_is_one_line(script, things, tmp_path, name, flags):
    before = files(things)
    words = CASES[name][flags].replace("@", f"{things}/")
    code, error = script(name, flags)
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    assert words in error
    assert len(error) < 700
    assert files(things) == before
    assert not (things / "harm").exists()
    left_behind = [path for path in tmp_path.rglob("*")
                   if path.is_file() or path.name.startswith(".")]
    assert not left_behind


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "plot.py"])
def test_right_input_of_these_cases_works(script, name):
    """Or the cases above might fail for another reason."""
    flags = "--model @model" if name == "-m weights info" else ""
    assert script(name, flags) == (0, "")


def test_plot_draws_what_eval_writes(script):
    assert script("eval.py ppl") == (0, "")
    assert script("eval.py passkey", "--out passkey.json") == (0, "")
    assert script("eval.py ppl", "--window 80 --out second.json") == (0, "")
    assert script("plot.py", "result.json second.json passkey.json") == (0, "")
    assert sorted(os.listdir("figures")) == ["passkey.png", "perplexity.png"]


@pytest.mark.parametrize("name, flags", [
    ("train.py", "--steps many"), ("train.py", "--schedule sawtooth"),
    ("train.py", "--dtype int8"), ("train.py", "--no-such-flag"),
    ("finetune.py", "--factor four"), ("finetune.py", "--factor"),
    ("eval.py ppl", "--attention flash9"), ("eval.py passkey", "--lengths"),
    ("data/prepare.py", "--source web"), ("-m weights info", ""), ("plot.py", "--colour red")])
def test_argparse_refuses(script, tmp_path, name, flags):
    code, error = script(name, flags)
    assert code == 2
    assert "error: " in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["train.py", "finetune.py", "eval.py", "plot.py", "-m weights",
                                  "data/prepare.py", "extras/compare.py", "extras/needle.py"])
def test_help_is_the_manual(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stop:
        run_as_python_does([*name.split(), "-h"], monkeypatch)
    assert stop.value.code == 0
    assert "usage: " in capsys.readouterr().out


@pytest.mark.parametrize("argv, words", [
    ("data/prepare.py --text @latin1.txt --out tokens", "iconv"),
    ("plot.py @cut.json", "cut.json"), ("-m weights info --model @empty", "no params.json")])
def test_as_processes(things, tmp_path, argv, words):
    """Warnings, and lines printed while Python shuts down, are seen here only."""
    argv = argv.replace("@", f"{things}/").replace("tokens", f"{tmp_path}/tokens").split()
    ended = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True,
                           encoding="utf-8", timeout=600)
    error = ended.stderr
    assert ended.returncode == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, flags, limit, stays", [
    ("train.py", "--save-every 1", 30_000, {"out/run.json", "out/metrics.jsonl"}),
    ("finetune.py", "--save-every 1", 30_000,
     {"out/run.json", "out/metrics.jsonl", "results.json.partial"}),
    ("eval.py ppl", "", 100, {"result.json.partial"}),
    ("eval.py passkey", "", 100, {"result.json.partial"}),
    ("data/prepare.py", "", 100, set()),
    ("data/prepare.py", "--tokenizer new.model --train-tokenizer 380", 100, set()),
    ("plot.py", "@curve.jsonl", 1000, set())])
def test_full_disk_leaves_nothing_half_written(script, things, tmp_path, name, flags, limit,
                                               stays):
    """No file may grow beyond `limit` bytes: the system refuses as it does when the disk is full,
    but with another number."""
    (things / "curve.jsonl").write_text('{"step": 1, "loss": 2.0}\n', encoding="utf-8")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        code, error = script(name, flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "too large" in error
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == stays


def test_results_can_be_read_back(script, tmp_path):
    script("eval.py ppl")
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    contract = ("model rope seed device versions command perplexity tokens documents window "
                "stride seconds").split()
    assert set(contract) <= set(result)
    assert result["model"].endswith("/model")


# ---- run_command ---------------------------------------------------------------------------------


def exit_code_and_error(main, capsys):
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    return stop.value.code, capsys.readouterr().err


def raising(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize("error, code, message", [
    (UserError("two\nlines:  go on"), 2, "error: two lines: go on\n"),
    (UserError("a red \x1b[31m name"), 2, "error: a red ?[31m name\n"),
    (UserError("x" * 2000), 2, f"error: {'x' * 1000} ...\n"),
    (FileNotFoundError(2, "No such file or directory", "x"), 2,
     "error: No such file or directory: x\n"),
    (OSError("odd"), 2, "error: odd\n"),
    (KeyboardInterrupt(), 130, "\ninterrupted\n")])
def test_mistakes_are_one_line(capsys, error, code, message):
    assert exit_code_and_error(raising(error), capsys) == (code, message)


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("CUDA out of memory. Tried"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_exhausted_memory_is_one_line(capsys, error):
    code, message = exit_code_and_error(raising(error), capsys)
    assert code == 2
    assert message.startswith("error: out of memory: ")
    assert message.count("\n") == 1


def test_a_missing_compiler_is_one_line(capsys):
    error = RuntimeError("InvalidCxxCompiler: No working C++ compiler found in ...\nSet TORCH_LOGS")
    code, message = exit_code_and_error(raising(error), capsys)
    assert code == 2
    assert message.startswith("error: torch.compile needs a C++ compiler")
    assert message.count("\n") == 1


def test_other_ends_of_a_command(capsys):
    assert exit_code_and_error(lambda: None, capsys) == (0, "")
    assert exit_code_and_error(lambda: 3, capsys) == (3, "")


@pytest.mark.parametrize("bug", [RuntimeError("shapes do not match"), ValueError("bad"),
                                 KeyError("x"), AssertionError()])
def test_bugs_keep_their_traceback(bug):
    with pytest.raises(type(bug)):
        run_command(raising(bug))


def test_a_reader_that_has_gone_is_no_error():
    code = ("from common.cli import run_command\n"
            "def main():\n    for i in range(100000): print(i)\nrun_command(main)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


COMMAND = """if True:
    import os, sys
    from common.cli import run_command
    from common.errors import UserError
    from tqdm import tqdm
    def main():
        assert os.open(os.devnull, os.O_RDONLY) > 2, "a file takes the place of a stream"
        for _ in tqdm(range(1), disable=None):
            print("a table")
        if sys.argv[1] == "wrong":
            raise UserError("wrong")
        if sys.argv[1] == "-h":
            sys.exit(0)
    run_command(main)
"""


def run_with(streams, how):
    """(exit code, what stdout got, what stderr got) of COMMAND, with streams as the shell says."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reader, gone = os.pipe()
    os.close(reader)
    done = subprocess.run(["bash", "-c", f'exec "$@" {streams.replace("GONE", str(gone))}', "bash",
                           sys.executable, "-c", COMMAND, how], cwd=ROOT, env=buffered,
                          pass_fds=[gone], capture_output=True, encoding="utf-8")
    os.close(gone)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("streams, how, expected", [
    (">&-", "fine", (0, "", "")), ("2>&-", "fine", (0, "a table\n", "")),
    (">&- 2>&-", "wrong", (2, "", "")), (">&-", "wrong", (2, "", "error: wrong\n")),
    ("2>&-", "wrong", (2, "a table\n", "")), (">&GONE", "fine", (141, "", "")),
    (">&GONE", "wrong", (2, "", "error: wrong\n")), ("2>&GONE", "wrong", (141, "a table\n", "")),
    (">/dev/full", "fine", (2, "", "error: No space left on device\n")),
    (">/dev/full", "-h", (2, "", "error: No space left on device\n")),
    ("2>/dev/full", "wrong", (2, "a table\n", ""))])
def test_streams_that_are_closed_or_that_nobody_reads(streams, how, expected):
    """Python itself has a word to say at its end about what it could not write; this has none."""
    assert run_with(streams, how) == expected


# ---- Flags ---------------------------------------------------------------------------------------


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


def test_flags_are_made_from_a_dataclass():
    assert parse(Settings, "words", []) == Settings()
    argv = shlex.split("--steps 4 --share 1e-3 --window 9 --name 'x y' --kind two --lengths 5 6 7 "
                       "--fast --no-slow")
    given = parse(Settings, "words", argv)
    assert given == Settings(4, 1e-3, 9, "x y", "two", [5, 6, 7], True, False)
    assert parse(Settings, "words", []).lengths is not parse(Settings, "words", []).lengths


def test_the_manual_names_kinds_and_defaults(capsys):
    with pytest.raises(SystemExit):
        parse(Settings, "100 % words", ["-h"])
    manual = " ".join(capsys.readouterr().out.split())
    for words in ("100 % words", "--steps INT how many [3]", "--share FLOAT 10 % or so [0.5]",
                  "--window INT tokens [the model's]", "--kind {one,two} which [one]",
                  "--lengths INT [INT ...] several [1 2]", "--fast, --no-fast be fast",
                  "--slow, --no-slow be slow [True]"):
        assert words in manual
    assert "hidden" not in manual


@pytest.mark.parametrize("wrong", ["--hidden 1", "--steps 1.5", "--kind three", "--share x",
                                   "--step 4"])
def test_wrong_flags_are_user_errors(wrong):
    with pytest.raises(UserError, match="-h lists the flags"):
        parse(Settings, "words", wrong.split())


def test_flags_need_no_torch():
    code = "import common.cli, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
