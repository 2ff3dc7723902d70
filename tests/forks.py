"""Tests in processes that may die: a test file that is also a script, whose ACTIONS run side by
side, forked from one process that has imported everything.

It sees no GPU: autograd with a GPU cannot be forked, and ranks on one machine shall use gloo.
"""
import gc
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import torch


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def forked(run):
    """Call run() in a child process; returns its pid. The child ends with 0, or with 1 and a
    traceback."""
    pid = os.fork()
    if pid:
        return pid
    try:
        run()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def exit_status(pid):
    """Of a child that ends, or minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def begin_script(script, folder, actions):
    """Start these actions of a test file, beside the tests. finish_script waits for them."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with open(folder / "statuses", "wb") as out, open(folder / "errors", "wb") as errors:
        return subprocess.Popen([sys.executable, "-u", script, folder, *actions], env=environment,
                                stdout=out, stderr=errors, start_new_session=True)


def finish_script(process, folder):
    """Returns printed(action): what it printed; it has to have ended well."""
    status = process.wait(timeout=900)
    assert status == 0, (folder / "errors").read_text(encoding="utf-8")

    def printed(action):
        out = (folder / f"{action}.txt").read_text(encoding="utf-8")
        assert f"{action}: 0\n" in (folder / "statuses").read_text(encoding="utf-8"), out
        return out
    return printed


def be_the_script(table, prepare):
    """The script's side: `FOLDER ACTION ...`, each in a child that prints into ACTION.txt.

    table: {name: function(FOLDER/name)}. prepare(FOLDER) comes first: what the first step of all
    imports takes seconds, once here and not in every child. No child's garbage collector then looks
    through all that was imported."""
    torch.set_num_threads(1)
    # It is for power failures: files of a killed process stay written, and these tests save often.
    os.fsync = lambda file: None
    folder, *names = sys.argv[1:]
    folder = Path(folder)
    prepare(folder)
    gc.freeze()

    def act(name):
        with open(folder / f"{name}.txt", "w", encoding="utf-8") as printed:
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
        table[name](folder / name)
    children = {name: forked(lambda name=name: act(name)) for name in names}
    for name, child in children.items():
        print(f"{name}: {exit_status(child)}")
