"""A training that is killed at any moment, or shared by two processes, is the same run.

As a script this file is the processes that die: `python tests/test_kills.py FOLDER crash kills`
runs these of its ACTIONS side by side.
"""
import io
import mmap
import os
import random
import signal
import struct
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.distributed import whole
from common.errors import Stopped, UserError
from forks import be_the_script, begin_script, exit_status, finish_script, forked
from toy_training import (fingerprint, interrupting, logged_steps, read_metrics, read_state,
                          toy_batches, train_tiny)
from weights import load_model

pytestmark = pytest.mark.slow


def begin(folder):
    """conftest.py calls it before the first test of all."""
    return begin_script(__file__, folder, ACTIONS)


@pytest.fixture(scope="module")
def finish(begun):
    """finish(action): what an action printed. All of them run side by side."""
    return finish_script(*begun)


# ---- Kills: each in a process of its own, forked from one that has imported everything -----------

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate",
               "shutil.rmtree"}


def changes_files(event, arguments):
    """Whether this event of Python's audit is one, and not the opening of a file to read it."""
    if event == "open":
        return bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in FILE_EVENTS


class Shared:
    """Two numbers that outlive a killed process: the first step of a part, and its steps done."""

    def __init__(self):
        self.memory = mmap.mmap(-1, 16)

    @property
    def first(self):
        return struct.unpack_from("q", self.memory, 0)[0]

    @first.setter
    def first(self, value):
        struct.pack_into("q", self.memory, 0, value)

    @property
    def done(self):
        return struct.unpack_from("q", self.memory, 8)[0]

    @done.setter
    def done(self, value):
        struct.pack_into("q", self.memory, 8, value)


def part_of_a_run(folder, shared, **changes):
    """Train, noting in `shared` the first step of this part and the number of steps done."""
    def batches(step, *share):
        if shared.first < 0:
            shared.first = step
        shared.first = min(step, shared.first)
        return toy_batches(step, *share)

    def count(*_):
        shared.done += 1
    shared.first = -1
    shared.done = 0
    register_optimizer_step_post_hook(count)
    train_tiny(folder, batches, **changes)


def run_part(folder, shared, **changes):
    """A part in a child process. Returns its exit status."""
    return exit_status(forked(lambda: part_of_a_run(folder, shared, **changes)))


def check_after_death(folder, had_model):
    """Whatever the moment: a model that loads, or none because none had been finished; and no state
    beside a model that does not load."""
    if had_model or (folder / "state.pt").exists():
        load_model(folder)
        return True
    try:
        load_model(folder)
        return True
    except UserError:
        return False


def die_at_operation(folder, n):
    """From now on this process dies before the n-th operation that changes a file in `folder`."""
    seen = []

    def audit(event, arguments):
        if changes_files(event, arguments) and any(str(folder) in str(a) for a in arguments):
            seen.append(event)
            if len(seen) > n:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(audit)


def die_in_write(folder, n):
    """From now on this process dies half-way through its n-th torch.save."""
    seen = []
    save = torch.save

    def save_half(value, file):
        seen.append(file)
        if len(seen) <= n:
            return save(value, file)
        buffer = io.BytesIO()
        save(value, buffer)
        file.write(buffer.getvalue()[:len(buffer.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    torch.save = save_half


def crash(folder):
    """Kill a run of two checkpoints before every single change of a file, and inside every write;
    each time go on and compare."""
    changes, shared = dict(steps=4, save_every=2), Shared()
    assert run_part(folder / "whole", shared, **changes) == 0
    expected = fingerprint(folder / "whole")
    points = 0

    def doomed(out, n, die):
        die(out, n)
        part_of_a_run(out, shared, **changes)

    for name, die in (("operation", die_at_operation), ("write", die_in_write)):
        for n in range(1000):
            out, point = folder / f"{name}{n}", f"{name} {n}"
            status = exit_status(forked(lambda: doomed(out, n, die)))
            if status == 0:
                assert fingerprint(out) == expected
                break
            assert status == -signal.SIGKILL, f"{point}: {status}"
            points += 1
            done = shared.done
            loads = check_after_death(out, had_model=done > 2)
            assert run_part(out, shared, **changes) == 0, f"{point}: cannot go on"
            if done < 4 or shared.first >= 0:
                lost = done - shared.first
                assert lost <= 2, f"{point}: {done} steps done, goes on from {shared.first}"
            assert fingerprint(out) == expected, f"{point}: other weights after going on"
            assert logged_steps(out) == [1, 2, 3, 4], point
            left = [file.name for file in out.iterdir() if file.name.startswith(".")]
            assert not left, f"{point}: {left} left behind"
            print(name, n, done, shared.first, loads, flush=True)
    print(f"{points} points")


def saved_step(folder):
    return read_state(folder)["step"] if (folder / "state.pt").exists() else 0


def pause(chance, shared, steps_left):
    """Until a run has done a random number of steps, and then some time: on a busy machine, too,
    kills come before, at and after saves."""
    steps = min(chance.randrange(40), steps_left)
    patience = time.monotonic() + 60
    while shared.done < steps and time.monotonic() < patience:
        time.sleep(0.003)
    time.sleep(chance.uniform(0, 0.03))


def kills(folder):
    """Twenty SIGKILLs after random pauses, whatever the run is doing. A run that ends before its
    kill makes room for another."""
    changes, shared = dict(steps=150, save_every=10, log_every=3), Shared()
    chance = random.Random(0)
    assert run_part(folder / "whole", shared, **changes) == 0
    expected, killed = fingerprint(folder / "whole"), 0
    for n in range(200):
        out = folder / f"killed{n}"
        for _ in range(20):
            before = saved_step(out)
            shared.first, shared.done = -1, 0  # a kill may come before the child sets them
            pid = forked(lambda: part_of_a_run(out, shared, **changes))
            pause(chance, shared, 150 - before)
            if killed < 20:
                os.kill(pid, signal.SIGKILL)
            if exit_status(pid) == 0:
                break
            killed += 1
            if shared.first >= 0:
                assert shared.first == before
                saved, done = saved_step(out), shared.done
                assert before + done - saved <= 10, f"{before} + {done} steps done, {saved} saved"
            check_after_death(out, had_model=False)
        else:
            assert run_part(out, shared, **changes) == 0
        assert fingerprint(out) == expected
        steps = logged_steps(out)
        assert steps == sorted(set(steps))
        if killed == 20:
            break
    print(f"{killed} kills")


def test_killed_at_every_operation_of_a_save(finish):
    """Weights, optimiser and metrics end as those of the uninterrupted run; a model is always
    there; one interval at most is lost."""
    printed = finish("crash").splitlines()
    points = int(printed[-1].split()[0])
    assert points > 40, "too few points: are the operations of a save still seen?"
    writes = [line for line in printed if line.startswith("write")]
    assert len(writes) == 4, "two checkpoints of two files"


def test_killed_at_any_time(finish):
    assert finish("kills").splitlines()[-1] == "20 kills"


# ---- Two processes -------------------------------------------------------------------------------


def rank(me, folder):
    """One of two processes that torchrun would start. Rank 1 alone gets Ctrl-C; both stop after the
    same step, and then go on."""
    os.environ |= {"RANK": str(me), "LOCAL_RANK": str(me), "WORLD_SIZE": "2"}
    changes = dict(batch_size=2, log_every=3)
    try:
        train_tiny(folder, interrupting(7) if me == 1 else toy_batches, **changes)
        raise AssertionError("nobody stopped")
    except Stopped:
        pass
    torch.distributed.barrier()
    model = train_tiny(folder, **changes)
    torch.save({name: whole(tensor) for name, tensor in model.state_dict().items()},
               folder / f"rank{me}.pt")
    print(folder)


def test_two_processes_are_one_run(finish, tmp_path):
    """Rank by rank half of the rows, gradients averaged: the same weights as one process with all
    rows."""
    for action in ("rank0", "rank1"):
        folder = Path(finish(action).splitlines()[-1])
    one = train_tiny(tmp_path / "one", batch_size=4).state_dict()
    two = [torch.load(folder / f"rank{n}.pt", weights_only=True) for n in range(2)]
    for name in one:
        assert torch.equal(two[0][name], two[1][name]), "the two have different weights"
        assert torch.allclose(one[name], two[0][name], atol=1e-6), name
    for name, p in load_model(folder).named_parameters():
        assert torch.equal(p, two[0][name])
    logged = read_metrics(folder)
    alone = {line["step"]: line["loss"] for line in read_metrics(tmp_path / "one")}
    assert len(set(logged_steps(folder))) == len(logged)
    assert logged[-1]["step"] == 20
    for line in logged:
        mean = pytest.approx(alone[line["step"]], abs=1e-5)
        assert line["loss"] == mean, "the logged loss is the mean over all ranks"
    with pytest.raises(UserError, match="rows of a step 4 there, 2 here"):
        train_tiny(folder, batch_size=2, log_every=3)


ACTIONS = {"crash": crash, "kills": kills,
           "rank0": lambda folder: rank(0, folder.parent / "rank"),
           "rank1": lambda folder: rank(1, folder.parent / "rank")}

if __name__ == "__main__":
    be_the_script(ACTIONS, prepare=lambda folder: train_tiny(folder / "first", steps=1))
