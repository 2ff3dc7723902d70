"""Where a long command of several phases is, and how long all of it still takes."""
import time
from collections.abc import Sequence

SHORT = 1.0  # seconds: a phase that took less was kept from an interrupted run, and tells no speed


class Progress:
    """A line before each phase. The time left is that of the work so far, scaled.

    phases: (name, work), in the order in which they come; work in any unit, operations say.
    """

    def __init__(self, phases: Sequence[tuple[str, float]], quiet: bool = False):
        self.phases = list(phases)
        self.quiet = quiet
        self.begun = 0  # phases so far
        self.seconds = 0.0  # of the phases that were not kept from an interrupted run
        self.done = 0.0     # the work of these
        self.last = 0.0     # when the phase in hand began

    def next(self) -> None:
        """Say that the next phase begins."""
        now = time.perf_counter()
        if self.begun and now - self.last > SHORT:
            self.seconds += now - self.last
            self.done += self.phases[self.begun - 1][1]
        line = f"{self.begun + 1} of {len(self.phases)}     {self.phases[self.begun][0]}"
        if self.done:
            left = sum(work for _, work in self.phases[self.begun:])
            minutes = self.seconds * left / self.done / 60
            line += f" (the whole: about {minutes:.1f} minutes more)"
        if not self.quiet:
            print(line, flush=True)
        self.begun += 1
        self.last = now
