"""One process at a time writes a folder or a file."""
import contextlib
import errno
import glob
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from common.errors import UserError, printable_line

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # Windows
    flock = None
# A file system without locks, a folder that may only be read: the work goes on without a lock.
CANNOT_LOCK = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EACCES,
               errno.EPERM, errno.EROFS}


@contextlib.contextmanager
def locked(path: str | Path, what: str, wait: bool = False) -> Iterator[bool]:
    """Hold a lock for the time of the block. The operating system takes it from a process that is
    killed. Yields whether there is one.

    path: the lock's file. It holds number and command of the process that has the lock, and is
        removed at the end.
    what: what is being written, as an error message names it.
    wait: wait until it is free, instead of a UserError that says who has it.
    """
    file = None
    try:
        file = take(Path(path), what, wait)
    except OSError as error:
        if error.errno not in CANNOT_LOCK:
            raise
    try:
        yield file is not None
    finally:
        if file is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)     # still locked: whoever waits for this file notices, in take()
            file.close()


@contextlib.contextmanager
def locked_beside(out: str | Path, wait: bool = False) -> Iterator[None]:
    """locked() for a file or folder that appears under its name only when it is complete. The
    lock's file lies beside it. What whole_file left of one that was killed is removed: with the
    lock, nobody else is writing it."""
    path = Path(os.path.abspath(out))
    target = Path(os.path.realpath(out))        # whole_file writes beside what a link leads to
    with locked(path.with_name(f".{path.name}.lock"), str(out), wait) as alone:
        leftovers = target.parent.glob(f".{glob.escape(target.name)}.????????.tmp")
        for leftover in leftovers if alone else ():
            with contextlib.suppress(OSError):  # somebody else's
                leftover.unlink()
        yield


def take(path: Path, what: str, wait: bool) -> IO:
    """The lock's file, open and locked."""
    if flock is None:
        raise OSError(errno.ENOSYS, "this system has no flock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as opened:
        while True:
            file = opened.enter_context(open(path, "a+", encoding="utf-8", errors="replace"))
            lock(file, what, wait)
            if is_at(file, path):
                break
            opened.close()  # its holder removed it meanwhile
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        holder = f"process {os.getpid()} ({command})"
        with contextlib.suppress(OSError):  # on a full disk it says nothing, and still locks
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), holder.encode(errors="backslashreplace"))
        opened.pop_all()    # it stays open
    return file


def lock(file: IO, what: str, wait: bool) -> None:
    """Lock an open file, or say who has it."""
    try:
        flock(file, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = printable_line(file.read(), 200) or "another process"
        if not wait:
            raise UserError(f"{what}: {holder} is writing it: wait until that has ended, or choose "
                            "another name") from None
        print(f"waiting    for {holder}, which is writing {what}", flush=True)
        flock(file, LOCK_EX)


def is_at(file: IO, path: Path) -> bool:
    """Whether the path still leads to this open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
