"""Where a long command of several phases is, and how long all of it still takes."""
import time
from collections.abc import Sequence


class Progress:
    """A line before each phase. The time left is that of the work so far, scaled.

    phases: (name, work), in the order in which they come; work in any unit, operations say.
    """

    def __init__(self, phases: Sequence[tuple[str, float]], quiet: bool = False):
        self.phases = list(phases)
        self.quiet = quiet
        self.begun = 0  # phases so far
        self.started = time.perf_counter()

    def next(self) -> None:
        """Say that the next phase begins."""
        name, _ = self.phases[self.begun]
        done = sum(work for _, work in self.phases[:self.begun])
        left = sum(work for _, work in self.phases[self.begun:])
        line = f"{self.begun + 1} of {len(self.phases)}     {name}"
        if done:
            minutes = (time.perf_counter() - self.started) * left / done / 60
            line += f" (the whole: about {minutes:.1f} minutes more)"
        if not self.quiet:
            print(line, flush=True)
        self.begun += 1
