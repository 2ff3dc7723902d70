"""Files that are whole or not there, and JSON."""
import contextlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, IO

from common.errors import UserError

SAVING = ".saving"  # in a model's folder: the files of a save at work


@contextlib.contextmanager
def whole_file(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file that appears under its name only when it is complete.

    It is written under a temporary name, flushed to the disk and renamed. The file that had the
    name before stays until then. A link stays a link: what it leads to is replaced. A stream
    (is_stream) is written into.
    """
    if is_stream(path):
        with open_stream(path, mode) as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp",
                                             dir=path.parent)
    encoding = None if "b" in mode else "utf-8"
    try:
        with os.fdopen(descriptor, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, ordinary_permissions())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def is_stream(path: str | Path) -> bool:
    """Whether a name is that of something which no file may replace: a device, a pipe, standard
    output, a file of /proc."""
    path = Path(path).absolute()
    if not path.exists() or path.is_dir():
        return False
    if not path.is_file():
        return True
    names = (path, Path(os.path.realpath(path)))    # /dev/stdout may lead to an ordinary file
    inside = [name for name in names if name.is_relative_to("/dev") or name.is_relative_to("/proc")]
    return any(not name.is_relative_to("/dev/shm") for name in inside)


def open_stream(path: str | Path, mode: str) -> IO:
    """A stream, open for writing. Standard output may be a file: opened by its name, /dev/stdout, a
    second time, it would be written over from its beginning."""
    target: str | Path | int = path
    if sys.stdout is not None:      # it may be closed
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        if os.path.samestat(os.stat(path), os.fstat(1)):
            target = os.dup(1)
    return open(target, mode, encoding=None if "b" in mode else "utf-8")


def check_output(out: str | Path, flag: str = "--out", beside: Sequence[str] = ()) -> None:
    """A UserError at once, not after the work, if a result could not be written as `out`, or would
    replace something other than a result. beside: suffixes of other files that the command writes
    next to it."""
    path = Path(out)
    if str(out).endswith(("/", os.sep)) or path.is_dir():
        raise UserError(f"{out}: is a folder: give the name of a JSON file")
    if is_stream(path):
        if beside:
            raise UserError(f"{flag} {out}: {' and '.join(beside)} files are written beside it: "
                            "give the name of a file")
        return
    if path.suffix in beside:
        raise UserError(f"{flag} {out}: the {path.suffix} file beside it gets this name: end it "
                        "with .json")
    if path.exists() and path.stat().st_size > 0 and not is_result(path):
        raise UserError(f"{flag} {out}: holds something other than a result: give another name")
    there = next(folder for folder in Path(os.path.realpath(path)).parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"{flag} {out}: cannot be written ({error.strerror}): give another name") \
            from None


def is_result(path: Path) -> bool:
    """Whether a file is JSON that a command of this repository wrote."""
    try:
        return "command" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def ordinary_permissions() -> int:
    """Permissions of a new file. mkstemp makes private ones; a result is an ordinary file."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def sync_folder(folder: Path) -> None:
    """Bring a rename to the disk. Windows does not open folders."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_new_folder(out: str | Path) -> None:
    """Refuse a folder that holds something: its files and ours would be mixed. What a save that was
    killed left of itself, .saving, is nothing."""
    out = Path(out)
    if out.is_symlink() and not out.exists():
        raise UserError(f"--out {out}: is a link that leads nowhere: name a new folder")
    if out.exists() and not (out.is_dir() and {file.name for file in out.iterdir()} <= {SAVING}):
        raise UserError(f"--out {out}: exists and is not empty: name a new folder")


@contextlib.contextmanager
def whole_folder(out: str | Path) -> Iterator[Path]:
    """A new folder that appears under its name only when it is complete.

    It is filled beside its place, as .NAME.saving, and then renamed.
    """
    require_new_folder(out)
    out = Path(os.path.realpath(out))
    saving = out.with_name(f".{out.name}.saving")
    shutil.rmtree(saving, ignore_errors=True)
    saving.mkdir(parents=True)
    try:
        yield saving
        shutil.rmtree(out / SAVING, ignore_errors=True)     # left by a save that was killed
        os.replace(saving, out)
    except BaseException:
        shutil.rmtree(saving, ignore_errors=True)
        raise


# --------------------------------------------------------------------------------------------------
# JSON

def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as readable JSON, whole or not at all.

    NaN and infinity become null, as JSON has no word for them. A list of numbers is one line.
    """
    text = json.dumps(without_infinities(value), indent=1, allow_nan=False)
    # A line end inside brackets is never part of a string: JSON writes those as \n.
    text = re.sub(r'\[\n([^][{}"]*)\n *\]',
                  lambda numbers: f"[{' '.join(numbers[1].split())}]", text)
    with whole_file(path, "w") as file:
        file.write(text + "\n")


def without_infinities(value: Any) -> Any:
    """`value` with text as keys, and null for every number that is not finite."""
    if isinstance(value, dict):
        return {str(k): without_infinities(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_infinities(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_json(path: str | Path) -> Any:
    """The value in a JSON file. A missing or malformed one is a UserError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8, endless digits
        raise UserError(f"{path}: not a JSON file ({error})") from None


def read_json_object(path: str | Path) -> dict:
    """The object in a JSON file; {} where there is no such file."""
    if not Path(path).is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no object {{...}}: copy it again")
    return value
