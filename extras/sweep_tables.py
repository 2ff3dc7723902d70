"""The tables of a sweep, in the form of the papers'. Its rows are those of extras/sweep.py."""
import math
import statistics
from collections.abc import Callable, Sequence

from plot import method_label

Table = tuple[str, list[str], list[list[str]]]  # title, header, rows of text


def cell(values: Sequence[float | None], digits: int) -> str:
    """Mean over the seeds, and half the range between them. None is infinity in JSON."""
    if not values:
        return ""
    values = [math.inf if value is None else value for value in values]
    mean = statistics.fmean(values)
    digits = digits if mean < 100 else 0
    text = f"{mean:,.{digits}f}"
    if len(values) > 1 and math.isfinite(mean):
        text += f" ±{(max(values) - min(values)) / 2:.{digits}f}"
    return text


def sweep_tables(result: dict) -> list[Table]:
    """As many of the papers' tables as the rows of a sweep's JSON file allow."""
    rows = result["rows"]
    kind = list(rows[0]["perplexity"])[0]

    tables = [
        table_by_window(rows, [str(n) for n in result["lengths"]]),
        table_by_steps(rows, "Perplexity at L' after so many steps (PI Table 3)",
                       lambda row: (row["perplexity"][kind], str(row["window"])), 2),
        table_by_steps(rows, "k_max after so many steps (PI Table 4)",
                       lambda row: (row, "k_max"), 0)]
    return [table for table in tables if table[2]]


def grouped_by_seed(rows: Sequence[dict]) -> dict[tuple[float, str, int], list[dict]]:
    """{(factor, method, steps): rows that differ in the seed}"""
    groups = {}
    for row in rows:
        groups.setdefault((row["factor"], row["method"], row["steps"]), []).append(row)
    return groups


def table_by_window(rows: Sequence[dict], lengths: Sequence[str]) -> Table:
    """Every method untrained and after all its steps."""
    kinds = list(rows[0]["perplexity"])
    columns = [(kind, n) for kind in kinds for n in lengths]
    last = {}
    for row in rows:
        last[row["method"]] = max(row["steps"], last.get(row["method"], 0))
    whole = [row for row in rows if len(row["perplexity"]) == len(kinds)]
    whole.sort(key=lambda row: (row["factor"], row["steps"] > 0))
    body = []
    for (factor, method, steps), group in grouped_by_seed(whole).items():
        if steps not in (0, last[method]):
            continue
        keys = [row for row in group if "k_max" in row]
        body.append([f"{factor:g}", method_label(method), str(steps),
                     *(cell([row["perplexity"][kind][n] for row in group], 2)
                       for kind, n in columns),
                     cell([row["k_max"] for row in keys], 0),
                     cell([row["accuracy_at_target"] for row in keys], 2)])
    return ("Perplexity by window, and passkey retrieval at L' (PI Tables 1, 2 and 5; DPRoPE "
            "Tables 1 and 4)",
            ["s", "method", "steps", *(f"{kind} {n}" for kind, n in columns), "k_max at L'",
             "passkey at L'"], body)


def table_by_steps(rows: Sequence[dict], title: str, place: Callable[[dict], tuple[dict, str]],
                   digits: int) -> Table:
    """Methods that were measured after at least three numbers of steps. place(row): the dict and
    the key of its value there, if it was measured."""
    steps = sorted({row["steps"] for row in rows})
    groups = grouped_by_seed(rows)
    methods = sorted(dict.fromkeys((row["factor"], row["method"]) for row in rows),
                     key=lambda pair: pair[0])
    body = []
    for factor, method in methods:
        cells = []
        for n in steps:
            places = [place(row) for row in groups.get((factor, method, n), [])]
            cells.append(cell([where[key] for where, key in places if key in where], digits))
        if len([text for text in cells if text]) > 2:
            body.append([f"{factor:g}", method_label(method), *cells])
    return title, ["s", "method", *map(str, steps)], body


def markdown(title: str, header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [f"\n{title}\n", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])
