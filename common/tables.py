"""Measurements as text."""
import math
from collections.abc import Sequence
from typing import Any


def format_table(rows: Sequence[dict[str, Any]], lengths: Sequence[int], windows: dict[str, int]
                 ) -> str:
    """Rows with a name, `perplexity` and `passkey`, both {length: number}, side by side. windows:
    {"L": 256, ...}, marked in the header."""
    titles = []
    for n in lengths:
        marks = [name for name, window in windows.items() if window == n]
        titles.append(" ".join([str(n), *marks]).ljust(10))
    width = max(20, 2 + max(len(row["name"]) for row in rows))
    lines = [" " * width + "perplexity at window".ljust(10 * len(lengths))
             + "  passkey accuracy at length",
             " " * width + "".join(titles) + "  " + "".join(titles)]
    for row in rows:
        perplexities = [f"{row['perplexity'][n]:<10.3f}" for n in lengths]
        accuracies = [format_accuracy(row["passkey"][n]).ljust(10) for n in lengths]
        lines.append(row["name"].ljust(width) + "".join(perplexities) + "  " + "".join(accuracies))
    return "\n".join(lines)


def format_accuracy(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
