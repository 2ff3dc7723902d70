"""What a result was made by: versions, the command as typed, the cores. Needs no torch to import,
so that `-h` answers at once."""
import os
import platform
import shlex
import sys

from common.errors import UserError


def versions() -> dict[str, str]:
    """Versions of everything that computed a result; PyTorch's, if it has been imported."""
    import numpy
    found = {"python": platform.python_version()}
    if "torch" in sys.modules:  # data/prepare.py has no use for it, and it takes seconds
        found["torch"] = sys.modules["torch"].__version__
    return found | {"numpy": numpy.__version__}


def command_line() -> str:
    """The command as typed, the script relative to the current folder."""
    script = os.path.relpath(sys.argv[0]) if sys.argv[0] else "-c"
    return shlex.join(["python", script, *sys.argv[1:]])


def world_size() -> int:
    """The number of processes that torchrun started; 1 without it."""
    given = os.environ.get("WORLD_SIZE", "1")
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if given != "1" else ()
    missing = [name for name in needed if name not in os.environ]
    if missing or not given.isdecimal() or int(given) < 1:
        others = f", {', '.join(missing)} not" if missing else ""
        raise UserError(f"WORLD_SIZE={given:.20} is set{others}: start several processes with "
                        "torchrun, which sets all that is needed, or unset it")
    return int(given)


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
