"""What every command shares: flags made from a dataclass, one-line errors, the device, files written whole, JSON results.

torch is imported only where it is needed, so that `-h` and a mistyped flag answer at once.
"""
import argparse
import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import platform
import re
import shlex
import sys
import tempfile
import threading
import types
import typing
import warnings
from pathlib import Path


class UserError(ValueError):
    """A mistake of the user's: one line that says what is wrong and what to do. Anything else is a bug and keeps its traceback."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C, after everything was saved: the message says how to go on."""


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line too. Flags are not abbreviated: a typing error should not find another flag."""

    def __init__(self, **kwargs):
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **kwargs})

    def error(self, message):
        raise UserError(f"{message}; python {self.prog} -h lists the flags")


def run(main):
    """Call main() as a command: a UserError, a full disk or an exhausted memory is one line on stderr and exit code 2."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        sys.exit(main() or 0)
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt as stop:
        print(f"\n{stop}" if isinstance(stop, Stopped) else "\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `python eval.py ... | head`: the reader has gone, and that is its right
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # no space left, permission denied, not a directory: the system's own words and the file it means
        message = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        message = "out of memory: use a shorter window or --dtype bfloat16; in training also a smaller --batch-size or --recompute"
    message = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))  # names in files come from strangers
    print(f"error: {message if len(message) <= 1000 else message[:1000] + ' ...'}", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# Flags

def field(default, help, **kwargs):
    """A dataclass field that becomes a flag. `choices=...` and `nargs=...` are passed on to argparse."""
    metadata = {"help": help, **kwargs}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def add_flags(parser, settings):
    """One flag a field of the dataclass: max_seq_len: int = 256 becomes --max-seq-len INT, a bool becomes --flag and --no-flag."""
    hints = typing.get_type_hints(settings)
    for f in dataclasses.fields(settings):
        if "help" not in f.metadata:
            continue
        extra = {k: v for k, v in f.metadata.items() if k != "help"}
        kind, default = hints[f.name], f.default if f.default is not dataclasses.MISSING else f.default_factory()
        options = [a for a in typing.get_args(kind) if a is not type(None)]
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            kind = options[0]
        if typing.get_origin(kind) is list:
            kind, extra["nargs"] = typing.get_args(kind)[0], extra.get("nargs", "+")
        if kind is bool:
            extra["action"] = argparse.BooleanOptionalAction
        else:
            extra["type"] = kind
            extra.setdefault("metavar", kind.__name__.upper() if "choices" not in extra else None)
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        note = "" if default in (None, [], "") or kind is bool and not default else f" [{shown}]"
        parser.add_argument("--" + f.name.replace("_", "-"), default=default, help=(f.metadata["help"] + note).replace("%", "%%"), **extra)


def parse(settings, description, argv=None):
    """The command line as an instance of the dataclass `settings`."""
    parser = Parser(description=description)
    add_flags(parser, settings)
    return settings(**vars(parser.parse_args(argv)))


# ---------------------------------------------------------------------------------------------------------------------
# Device and precision

def choose_device(name="auto"):
    """`auto` takes CUDA, then Apple's MPS, then the CPU. Returns a torch.device; a device that is not there is a UserError."""
    import torch
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if available["cuda"] else "mps" if available["mps"] else "cpu"
    if not available.get(name.split(":")[0], False):
        raise UserError(f"--device {name}: this machine has {', '.join(k for k, v in available.items() if v)}; use one of them")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no name of a device; write cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs, the first of which is cuda:0")
    return device


def choose_dtype(name, device):
    """`auto` is bfloat16 on a CUDA device that computes in it, else float32. Returns a torch.dtype."""
    import torch
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in names:
        raise UserError(f"--dtype {name}: choose auto, {', '.join(names)}")
    return names[name]


@contextlib.contextmanager
def matmul_precision(name):
    """torch.set_float32_matmul_precision for the block: highest, high or medium; whatever happens in it, what follows is computed as what
    came before."""
    import torch
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def describe_device(device):
    """The device in words, for headers and results: 'cuda (NVIDIA H100 80GB HBM3)' or 'cpu (2 threads)'."""
    import torch
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({torch.get_num_threads()} threads)"


# ---------------------------------------------------------------------------------------------------------------------
# Files and results

@contextlib.contextmanager
def whole_file(path, mode="wb"):
    """Open a file that appears under its name only when it is complete: temporary name, fsync, rename. The one before stays until then."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files private to their owner; a result is an ordinary file
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    if os.name != "nt":  # the rename itself reaches the disk with the folder, which Windows does not open
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def write_json(path, value):
    """Write `value` as readable JSON, whole or not at all. NaN and infinity become null: JSON has no word for them."""
    def clean(x):
        if isinstance(x, dict):
            return {str(k): clean(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [clean(v) for v in x]
        return None if isinstance(x, float) and (x != x or x in (float("inf"), float("-inf"))) else x
    text = json.dumps(clean(value), indent=1, allow_nan=False)
    # Numbers of one list on one line. A line end inside the brackets is never part of a string: JSON writes those as \n.
    text = re.sub(r'\[\n([^][{}"]*)\n *\]', lambda numbers: f"[{' '.join(numbers[1].split())}]", text)
    with whole_file(path, "w") as file:
        file.write(text + "\n")


def read_json(path):
    """Read a JSON file; a missing or malformed one is a UserError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, a number with thousands of digits
        raise UserError(f"{path}: not a JSON file ({error})") from None


class Kept:
    """What a long command has measured so far, a JSON line each in OUT.partial: an interruption costs only what was in hand.

    keep(key, compute) is the value kept under `key`, or what compute() returns, which is then kept; either way as JSON gives it back. A key
    says everything that its value depends on; within() puts conditions in front of all keys that follow. Without `out` nothing is written.
    """

    def __init__(self, out="", quiet=False):
        if out and (str(out).endswith(("/", os.sep)) or Path(out).is_dir()):
            raise UserError(f"{out}: is a folder: give the name of a JSON file")
        self.path, self.values, self.conditions, self.lock = Path(f"{out}.partial") if out else None, {}, [], threading.Lock()
        if self.path and self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a kill cut
                    line = json.loads(line)
                    self.values[line["key"]] = line["value"]
            if not quiet:
                print(f"{self.path} holds {len(self.values)} measurements of an interrupted run: those that fit are not made again "
                      "(to make them again, delete it)")

    def within(self, *conditions):
        """The same store, for keys that begin with more conditions."""
        inner = copy.copy(self)
        inner.conditions = [*self.conditions, *conditions]
        return inner

    def name(self, key):
        return hashlib.sha256(json.dumps([*self.conditions, key], sort_keys=True).encode()).hexdigest()[:32]

    def __contains__(self, key):
        return self.name(key) in self.values

    def __call__(self, key, compute):
        name = self.name(key)
        if name not in self.values:
            line = json.dumps({"key": name, "value": compute()})
            with self.lock:  # several threads may measure
                if self.path:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    with open(self.path, "a+b") as file:
                        if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                            file.write(b"\n")  # ends the line that a kill cut
                        file.write(line.encode() + b"\n")
                self.values[name] = json.loads(line)["value"]
        return self.values[name]

    def done(self):
        """The result is written: what was kept has had its use."""
        if self.path:
            self.path.unlink(missing_ok=True)


def versions():
    """Versions of what computed a result."""
    import numpy
    import torch
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}


def command_line():
    """The command as typed, for results: the script without its folder."""
    return shlex.join(["python", os.path.relpath(sys.argv[0]) if sys.argv[0] else "-c", *sys.argv[1:]])
