"""common/locks.py: one process at a time writes a folder, and the second says who holds it."""
import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import common.locks
import finetune
from common.errors import UserError
from common.locks import locked, locked_beside
from data.prepare import replaced_folder
from toy_training import read_state, settings, tiny_model, toy_batches, train_tiny
from train import fit
from weights import load_model
from weights.export import export

ROOT = Path(__file__).resolve().parent.parent


def test_the_second_says_who_holds_it(tmp_path):
    path = tmp_path / "new" / ".lock"
    with locked(path, "--out run"):
        with pytest.raises(UserError, match=rf"^--out run: process {os.getpid()} \(.* is writing "
                                            "it: wait until that has ended, or choose another"):
            with locked(path, "--out run"):
                raise AssertionError("two hold one lock")
    assert not path.exists()
    with locked(path, "--out run"):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    script = ("import os, sys; from common.locks import locked\n"
              "with locked(sys.argv[1], 'x'): os.kill(os.getpid(), 9)")
    killed = subprocess.run([sys.executable, "-c", script, tmp_path / ".lock"], cwd=ROOT)
    assert killed.returncode == -9
    assert (tmp_path / ".lock").exists()
    with locked(tmp_path / ".lock", "x"):
        assert f"process {os.getpid()}" in (tmp_path / ".lock").read_text(encoding="utf-8")
    assert not (tmp_path / ".lock").exists()


def test_never_two_at_a_time(tmp_path, capfd):
    """Also where the holder removes the file that others have open."""
    order = []

    def work(number):
        with locked(tmp_path / ".lock", "the baseline", wait=True):
            order.append(number)
            time.sleep(0.02)
            order.append(number)
    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(order) == sorted(2 * list(range(6)))
    assert order[::2] == order[1::2], "never two at a time"
    assert "which is writing the baseline" in capfd.readouterr().out
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EROFS])
def test_where_nothing_can_be_locked_the_work_goes_on(tmp_path, monkeypatch, number):
    def refused(*given):
        raise OSError(number, "no locks here")
    monkeypatch.setattr(common.locks, "flock", refused)
    train_tiny(tmp_path)
    assert read_state(tmp_path)["step"] == 20


def test_a_full_disk_is_no_missing_lock(tmp_path, monkeypatch):
    def refused(*given):
        raise OSError(errno.EIO, "the disk is broken")
    monkeypatch.setattr(common.locks, "flock", refused)
    with pytest.raises(OSError, match="the disk is broken"):
        with locked(tmp_path / ".lock", "x"):
            raise AssertionError("unlocked")


def test_a_command_that_is_no_utf_8(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", os.fsdecode(b"caf\xe9")])
    with locked(tmp_path / ".lock", "x"):
        with pytest.raises(UserError, match="train.py --out caf"):
            with locked(tmp_path / ".lock", "x"):
                raise AssertionError("two hold one lock")


def test_a_training_holds_its_folder(tmp_path):
    """A second one in it is refused, or waits and finds the work done."""
    def intruding(step, *share):
        if step == 4:
            with pytest.raises(UserError, match="is writing it"):
                train_tiny(tmp_path)
        return toy_batches(step, *share)
    train_tiny(tmp_path, intruding)
    assert read_state(tmp_path)["step"] == 20
    assert not (tmp_path / ".lock").exists()

    with locked(tmp_path / ".lock", "x"):
        waiting = tiny_model()
        thread = threading.Thread(target=fit, args=(
            waiting, settings(tmp_path, waits=True), lambda *_: pytest.fail("a step is repeated")))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive(), "it waits"
    thread.join()
    for name, p in load_model(tmp_path).named_parameters():
        assert torch.equal(p, waiting.get_parameter(name)), "and has the result"


def test_the_baseline_that_several_methods_share_is_waited_for(tmp_path):
    config = finetune.FinetuneConfig(model="data/tiny", baseline=True)
    base = finetune.load_config("data/tiny")
    rows = finetune.list_experiments(config, {"rope_type": "linear", "factor": 2.0}, "out/d", base)
    assert [(row.training.out, row.training.waits) for row in rows if row.training] == [
        ("", False), ("out/d", True)]


def test_an_export_holds_its_name(tmp_path):
    out = tmp_path / "model"
    with locked_beside(out):
        for to in ("hf", "meta"):
            with pytest.raises(UserError, match="model: process .* is writing it"):
                export("data/tiny", to, out)
    export("data/tiny", "meta", out)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    """A whole model, perhaps. What has another name stays."""
    script = ("import os, sys; from common.files import whole_file\n"
              "with whole_file(sys.argv[1]) as file: os.kill(os.getpid(), 9)")
    out = tmp_path / "[m].gguf"
    subprocess.run([sys.executable, "-c", script, out], cwd=ROOT)
    (tmp_path / ".[m].gguf.old.tmp").touch()
    (tmp_path / ".m.gguf.abcdefgh.tmp").touch()
    assert len(list(tmp_path.iterdir())) == 3
    with locked_beside(out):
        names = {path.name for path in tmp_path.iterdir()}
    assert names == {".[m].gguf.lock", ".[m].gguf.old.tmp", ".m.gguf.abcdefgh.tmp"}


def test_only_who_has_the_lock_removes_what_is_left(tmp_path, monkeypatch):
    """Where no lock can be had, it may be the file of a process at work. What cannot be removed
    stays. And whole_file writes beside what a link leads to."""
    leftover = tmp_path / ".m.gguf.abcdefgh.tmp"
    leftover.touch()
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "m"
    link.symlink_to(tmp_path / "m.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(common.locks, "flock", None)
        with locked_beside(tmp_path / "m.gguf"):
            assert leftover.exists()
    with locked_beside(link):
        assert not leftover.exists()
    leftover.mkdir()
    with locked_beside(link):
        assert leftover.exists()


@pytest.mark.parametrize("linked", [False, True])
def test_a_folder_of_tokens_is_replaced_by_one_at_a_time(tmp_path, linked):
    """What was killed before, also between the two renames, is cleared away or brought back. A link
    to the folder stays one."""
    out = tmp_path / "tokens"
    if linked:
        out = tmp_path / "links" / "python"
        out.parent.mkdir()
        out.symlink_to(tmp_path / "tokens")
    (tmp_path / ".tokens.tmp").mkdir()
    (tmp_path / ".tokens.tmp" / "half").touch()
    (tmp_path / ".tokens.old.tmp").mkdir()
    (tmp_path / ".tokens.old.tmp" / "before").touch()
    with pytest.raises(KeyError):
        with replaced_folder(out):
            assert [path.name for path in out.iterdir()] == ["before"]
            raise KeyError
    assert [path.name for path in out.iterdir()] == ["before"]
    with replaced_folder(out) as folder:
        (folder / "meta.json").write_text(json.dumps({}), encoding="utf-8")
        assert (tmp_path / ".tokens.lock").exists()
    assert out.is_symlink() == linked
    assert {path.name for path in tmp_path.iterdir()} - {"links"} == {"tokens"}
    assert [path.name for path in out.iterdir()] == ["meta.json"]


def test_a_first_corpus_where_there_are_no_locks(tmp_path, monkeypatch):
    """Windows: no lock makes the folders above it."""
    monkeypatch.setattr(common.locks, "flock", None)
    with replaced_folder(tmp_path / "data" / "corpora" / "python") as folder:
        (folder / "meta.json").touch()
    assert (tmp_path / "data" / "corpora" / "python" / "meta.json").exists()
