"""What a training leaves and how it is interrupted: metrics.jsonl, and Ctrl-C that saves first."""
import contextlib
import json
import signal
from pathlib import Path
from types import FrameType

from common.files import whole_file


class MetricsLog:
    """metrics.jsonl: a JSON object a line.

    Lines of steps that an interruption threw away are dropped, so that no step is there twice.
    """

    def __init__(self, path: Path, first_step: int):
        self.path = path
        self.last_step = first_step
        kept = []
        if path.exists() and first_step > 0:
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # a line that a kill cut
                    if json.loads(line)["step"] <= first_step:
                        kept.append(line + "\n")
        with whole_file(path, "w") as file:
            file.writelines(kept)

    def write(self, step: int, **numbers: float) -> None:
        self.last_step = step
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")


class StopSignals:
    """Ctrl-C and SIGTERM let the step in hand finish and the run save itself (`pending`). A second
    Ctrl-C stops at once."""

    def __enter__(self) -> "StopSignals":
        self.pending = False
        self.handlers_before = {}
        with contextlib.suppress(ValueError):  # handlers belong to the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers_before[number] = signal.signal(number, self.note)
        return self

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.pending and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.pending = True

    def __exit__(self, *error) -> None:
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)
