"""common/: files that are whole or not there, JSON, devices, and the command as it was typed."""
import ctypes
import json
import math
import os
import re
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
import eval as eval_script
import finetune
import theory
from common.device import choose_device, choose_dtype, matmul_precision
from common.environment import command_line
from common.errors import UserError
from common.files import (check_output, read_json, read_json_object, require_new_folder,
                          whole_file, whole_folder, write_json)
from extras import compare, long_window, longrope_search, memory, real_model, sweep

ROOT = Path(__file__).resolve().parent.parent

# ---- Whole files ---------------------------------------------------------------------------------


def names(folder):
    return sorted(path.name for path in folder.iterdir())


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
    assert path.read_bytes() == "eins ▁ é\n".encode()
    with pytest.raises(KeyboardInterrupt):
        with whole_file(path) as file:
            file.write(b"other")
            raise KeyboardInterrupt
    assert names(path.parent) == ["a.txt"]
    assert path.read_bytes() == "eins ▁ é\n".encode()


def test_whole_file_has_ordinary_permissions(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one")
    umask = os.umask(0o027)
    try:
        with whole_file(path) as file:
            file.write(b"other")
    finally:
        os.umask(umask)
    assert path.read_bytes() == b"other"
    assert path.stat().st_mode & 0o777 == 0o640


def test_whole_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Power may fail: first the content, then the name, then the folder that holds the name."""
    done, fsync, replace = [], os.fsync, os.replace

    def noting_fsync(file):
        is_folder = stat.S_ISDIR(os.fstat(file).st_mode)
        done.append("folder" if is_folder else "content")
        fsync(file)

    def noting_replace(*paths):
        done.append("name")
        replace(*paths)
    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    with whole_file(tmp_path / "a") as file:
        file.write(b"x")
    assert done == ["content", "name", "folder"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.json").write_text("{}", encoding="utf-8")
    link = tmp_path / "a.json"
    link.symlink_to(tmp_path / "there" / "a.json")
    write_json(link, {"a": 1})
    assert link.is_symlink()
    assert read_json(tmp_path / "there" / "a.json") == {"a": 1}
    assert names(tmp_path / "there") == ["a.json"]


def test_a_pipe_is_written_into_and_stays_one(tmp_path):
    """As a device would: root could replace /dev/null by a file."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for name in (pipe, link):
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        write_json(name, {"a": 1})
        assert json.loads(os.read(reader, 1000)) == {"a": 1}
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert link.is_symlink()
    assert names(tmp_path) == ["link", "pipe"]


def test_a_file_in_memory_is_a_file(tmp_path):
    """Of all that is in /dev, /dev/shm holds ordinary files, also behind a link."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        (tmp_path / "out").symlink_to(folder)
        for name in (Path(folder), tmp_path / "out"):
            write_json(name / "a.json", {"command": "x"})
            inode = (name / "a.json").stat().st_ino
            check_output(name / "a.json", beside=[".png"])
            write_json(name / "a.json", {"command": "y"})
            assert (name / "a.json").stat().st_ino != inode, "replaced whole"
            assert read_json(name / "a.json") == {"command": "y"}


def test_standard_output_in_a_file_keeps_what_was_printed(tmp_path):
    """/dev/stdout leads to that file, which is then an ordinary one."""
    script = ("from common.files import write_json\n"
              "print('a table', flush=True); write_json('/dev/stdout', {'a': 1}); print('the end')")
    with open(tmp_path / "printed", "wb") as printed:
        subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=printed, check=True)
    text = (tmp_path / "printed").read_text(encoding="utf-8")
    assert text.startswith("a table\n{") and text.endswith("}\nthe end\n")
    assert names(tmp_path) == ["printed"]


@pytest.mark.parametrize("name, words", [
    ("folder", "folder: is a folder: give the name of a JSON file"),
    ("new/", "is a folder"),
    ("book.txt", "--out .*book.txt: holds something other than a result: give another name"),
    ("tokenizer.json", "holds something other than a result"),
    ("book.txt/r.json", "cannot be written .Not a directory"),
    ("r.png", "r.png: the .png file beside it gets this name: end it"),
    ("pipe", ".png files are written beside it: give the name of a file")])
def test_what_cannot_be_a_result_is_refused_before_the_work(tmp_path, name, words):
    (tmp_path / "folder").mkdir()
    (tmp_path / "book.txt").write_text("Once upon a time", encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text('{"model": {}}', encoding="utf-8")
    os.mkfifo(tmp_path / "pipe")
    before = names(tmp_path)
    with pytest.raises(UserError, match=words):
        check_output(f"{tmp_path}/{name}", beside=[".png"])
    assert names(tmp_path) == before


def test_what_may_be_a_result(tmp_path):
    (tmp_path / "r.json").write_text('{"command": "python eval.py ppl"}', encoding="utf-8")
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.json").symlink_to(tmp_path / "r.json")
    for name in ("r.json", "empty", "new/r.json", "r", "link.json"):
        check_output(tmp_path / name, beside=[".png"])
    check_output(tmp_path / "pipe")
    check_output("/dev/null")
    assert not (tmp_path / "new").exists()


COMMANDS = {"eval": (eval_script.main, ["ppl", "--out"]), "compare": (compare.main, ["--out"]),
            "finetune": (finetune.main, ["--results"]), "bench": (bench.main, ["--out"]),
            "theory": (theory.main, ["--out"]), "sweep": (sweep.main, ["--out"]),
            "real_model": (real_model.main, ["--model", "data/tiny", "--out"]),
            "memory": (memory.main, ["--out"]), "long_window": (long_window.main, ["--out"]),
            "longrope": (longrope_search.main, ["--out"])}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_looks_at_its_output_first(tmp_path, command, capsys):
    """A book is not written over, and what cannot be written is found before the work."""
    main, flags = COMMANDS[command]
    (tmp_path / "book.txt").write_text("Once upon a time", encoding="utf-8")
    for name, words in (("book.txt", "something other than a result"), ("", "is a folder"),
                        ("book.txt/r.json", "cannot be written")):
        with pytest.raises(UserError, match=words):
            main([*flags, f"{tmp_path}/{name}"])
    assert (tmp_path / "book.txt").read_text(encoding="utf-8") == "Once upon a time"
    assert names(tmp_path) == ["book.txt"]
    if command not in ("eval", "bench", "theory", "memory"):
        with pytest.raises(UserError, match="r.png: the .png file beside it gets this name"):
            main([*flags, str(tmp_path / "r.png")])
    assert capsys.readouterr().out == ""


def test_whole_folder_is_whole_or_not_there(tmp_path):
    out = tmp_path / "new" / "model"
    with pytest.raises(KeyboardInterrupt):
        with whole_folder(out) as folder:
            (folder / "half").write_text("x", encoding="utf-8")
            raise KeyboardInterrupt
    assert names(out.parent) == []
    out.parent.joinpath(".model.saving").mkdir()  # of a save that was killed
    out.parent.joinpath(".model.saving", "old").touch()
    with whole_folder(out) as folder:
        (folder / "whole").write_text("x", encoding="utf-8")
        assert not out.exists()
    assert names(out.parent) == ["model"]
    assert names(out) == ["whole"]
    (tmp_path / "killed" / ".saving").mkdir(parents=True)
    (tmp_path / "killed" / ".saving" / "half").touch()
    with whole_folder(tmp_path / "killed") as folder:
        (folder / "whole").write_text("x", encoding="utf-8")
    assert names(tmp_path / "killed") == ["whole"]
    with pytest.raises(UserError, match="exists and is not empty: name a new folder"):
        with whole_folder(out):
            raise AssertionError("the folder that is there would be written over")
    assert names(out) == ["whole"]


def test_only_a_new_or_empty_folder_is_new(tmp_path):
    require_new_folder(tmp_path / "new")
    require_new_folder(tmp_path)
    (tmp_path / ".saving").mkdir()  # of a save that was killed: the same command goes on
    require_new_folder(tmp_path)
    (tmp_path / "file").touch()
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="is not empty"):
            require_new_folder(taken)


# ---- Memory --------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc does this")
def test_freed_memory_is_kept():
    """Tensors of 32 MB, made and freed again and again, are the same 8,192 pages after a while."""
    script = ("import resource, torch; from common.device import keep_freed_memory\n"
              "def faults():\n"
              "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
              "    for i in range(4): torch.ones(2**23)\n"
              "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
              "before = faults(); keep_freed_memory()\n"
              "for i in range(9): faults()\n"
              "print(before, faults())")
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    before, after = map(int, ended.stdout.split())
    assert after < 100 < before, (before, after)


# ---- JSON ----------------------------------------------------------------------------------------


def test_numbers_that_are_not_finite_are_null(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {1: [math.nan, (math.inf, -math.inf)],
                      "é": {"x": 1.5, "y": None, "z": True}})
    assert read_json(path) == {"1": [None, [None, None]], "é": {"x": 1.5, "y": None, "z": True}}


def test_numbers_of_a_list_are_one_line_and_text_is_never_touched(tmp_path):
    path = tmp_path / "a.json"
    words = {"a [ 1 ]": ["[ -f a ]", "[\n 1,\n 2\n]", "[  2  3 ]"], "n": [1, 2.5, None],
             "m": [[1, 2], [3]], "e": []}
    write_json(path, words)
    assert read_json(path) == words
    assert '"n": [1, 2.5, null]' in path.read_text(encoding="utf-8")


def test_json_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_json(path, {"a": 1, "b": np.float32(1)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"{'a': 1}", b"[" * 100_000],
                         ids=["empty", "cut", "no UTF-8", "Python", "deep"])
def test_broken_json_is_one_line(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: not a JSON file"):
        read_json(path)
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "b.json")


def test_a_json_object_may_be_missing_but_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    assert read_json_object(path) == {}
    write_json(path, {"a": 1})
    assert read_json_object(path) == {"a": 1}
    write_json(path, [1])
    with pytest.raises(UserError, match="holds no object"):
        read_json_object(path)


def test_command_line_can_be_typed_again(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "eval.py"), "ppl", "--text", "a b.txt"])
    assert command_line() == "python eval.py ppl --text 'a b.txt'"


# ---- Devices -------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_a_machine_without_gpu_has_its_cpu(no_gpu):
    cpu = torch.device("cpu")
    assert choose_device("auto") == choose_device("cpu") == cpu
    assert choose_dtype("auto", cpu) == torch.float32
    assert choose_dtype("bfloat16", cpu) == torch.bfloat16
    for name in ("cuda", "cuda:0", "mps", "tpu", "", "cpu:x"):
        with pytest.raises(UserError, match="--device"):
            choose_device(name)
    with pytest.raises(UserError, match="--dtype int8"):
        choose_dtype("int8", cpu)


def test_cuda_comes_before_mps(no_gpu, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="2 GPUs"):
        choose_device("cuda:2")


def test_how_float32_is_multiplied_is_put_back_whatever_happens():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), matmul_precision("medium"):
        assert torch.get_float32_matmul_precision() == "medium" != before
        1 // 0
    assert torch.get_float32_matmul_precision() == before
