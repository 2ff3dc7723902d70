"""Commands: flags made from the fields of a dataclass, and errors of one line.

torch is not imported here: plot.py and data/prepare.py, which need none, answer `-h` at once.
"""
import argparse
import dataclasses
import io
import os
import sys
import types
import typing
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from common.errors import Stopped, UserError, printable_line


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors. Flags are not abbreviated: a typing error should
    not find another flag."""

    def __init__(self, **kwargs):
        defaults = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(**{**defaults, **kwargs})

    def error(self, message: str) -> NoReturn:
        command = self.prog if self.prog.startswith("python ") else f"python {self.prog}"
        raise UserError(f"{message}; {command} -h lists the flags")


OUT_OF_MEMORY = ("out of memory: use a shorter window or --dtype bfloat16; in training also a "
                 "smaller --batch-size or --recompute")
NO_COMPILER = ("torch.compile needs a C++ compiler, and there is none: install g++, or leave out "
               "--compile and --optimizer adamw8bit")
LOST_PEER = ("another process ended, and its message says why, or the processes cannot reach each "
             "other; the same command goes on from the last checkpoint, if there is one")


def run_command(main: Callable[[], Any]) -> NoReturn:
    """Call main() as a command.

    A UserError, a full disk or an exhausted memory is one line on stderr and exit code 2.
    Ctrl-C is exit code 130, and a reader that went away (`... | head`) is 141.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, `2>&-`: the next file that is opened would be it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        sys.exit(exit_code(main))
    except BrokenPipeError:
        sys.exit(141)
    except OSError:             # the error itself could not be printed
        sys.exit(2)
    finally:
        for stream in streams:
            try:
                stream.flush()
            except OSError:     # Python would try again at its end, and complain
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def exit_code(main: Callable[[], Any]) -> int:
    """What a command ends with. Its error is printed."""
    try:
        try:
            code = main() or 0
        except SystemExit as end:       # -h
            code = end.code or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt as stop:
        print(f"\n{stop}" if isinstance(stop, Stopped) else "\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except OSError as error:
        # No space left, permission denied, ...: the system's own words, and the file it means.
        message = error.strerror or str(error)
        if error.filename:
            message += f": {error.filename}"
    except (MemoryError, RuntimeError) as error:
        if is_lost_peer(error):
            message = LOST_PEER
        elif is_out_of_memory(error):
            message = OUT_OF_MEMORY
        elif "InvalidCxxCompiler" in str(error):
            message = NO_COMPILER
        else:
            raise
    print(f"error: {printable_line(message, 1000)}", file=sys.stderr)
    return 2


def is_lost_peer(error: Exception) -> bool:
    """Whether several GPUs could not talk to each other, as one of them has ended. PyTorch reports
    it as a DistError, DistBackendError, ..., and gloo as a RuntimeError."""
    return type(error).__name__.startswith("Dist") or "gloo" in str(error).lower()


def is_out_of_memory(error: Exception) -> bool:
    """PyTorch reports exhausted memory as a RuntimeError, in three wordings."""
    text = str(error)
    return (isinstance(error, MemoryError) or "out of memory" in text
            or "can't allocate memory" in text or "Storage size calculation overflowed" in text)


# --------------------------------------------------------------------------------------------------
# Flags

def field(default: Any, help: str, **kwargs) -> Any:
    """A dataclass field that becomes a flag. `choices=` and `nargs=` go to argparse."""
    metadata = {"help": help, **kwargs}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def add_flags(parser: argparse.ArgumentParser, settings: type) -> None:
    """One flag for each field of the dataclass `settings`: `max_seq_len: int = 256` becomes
    --max-seq-len INT, and a bool becomes --name and --no-name."""
    annotations = typing.get_type_hints(settings)
    for f in dataclasses.fields(settings):
        if "help" in f.metadata:
            add_flag(parser, f, annotations[f.name])


def add_flag(parser: argparse.ArgumentParser, f: dataclasses.Field, annotation: Any) -> None:
    """The flag of one field; `annotation` is its type, `T | None` and `list[T]` included."""
    options = {key: value for key, value in f.metadata.items() if key != "help"}
    kind = annotation
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(a for a in typing.get_args(kind) if a is not type(None))
    if typing.get_origin(kind) is list:
        kind = typing.get_args(kind)[0]
        options.setdefault("nargs", "+")
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = whole_number if kind is int else kind
        if "choices" not in options:
            options.setdefault("metavar", kind.__name__.upper())
    default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
    parser.add_argument("--" + f.name.replace("_", "-"), default=default,
                        help=(f.metadata["help"] + default_note(default)).replace("%", "%%"),
                        **options)


def whole_number(text: str) -> int:
    """An int that PyTorch and numpy can take, and add a little to."""
    try:
        number = int(text)
    except ValueError:  # also more than 4,300 digits
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r:.60}") from None
    if abs(number) >= 2**62:
        raise argparse.ArgumentTypeError(f"{text:.60} is out of range")
    return number


def default_note(default: Any) -> str:
    """The default in brackets for `-h`; nothing where it is empty or off."""
    if default is None or default is False or default == "" or default == []:
        return ""
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    return f" [{shown}]"


def parse(settings: type, description: str, argv: Sequence[str] | None = None) -> Any:
    """The command line as an instance of the dataclass `settings`."""
    parser = Parser(description=description)
    add_flags(parser, settings)
    return settings(**vars(parser.parse_args(argv)))
