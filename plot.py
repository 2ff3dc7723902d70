"""Figures from result files; no torch, nothing of ours.

    python plot.py results/*.json out/base/metrics.jsonl          # a PNG beside each file, and one comparison of all `ppl` results given

What a file holds decides its figure: `rows` (finetune.py), `perplexity` (eval.py ppl), `accuracy` (eval.py passkey), a metrics.jsonl.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator, NullLocator

# Okabe & Ito's colours: told apart by every kind of colour vision, and by line style and marker in print
COLOURS = ["#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"]
STYLES = [("--", "o"), (":", "s"), ("-", "D"), ("-.", "^"), ("-", "v"), ("--", "P"), (":", "X")]
NAMES = {"extrapolation": "no change (extrapolation)", "pi_zero_shot": "PI, no training", "pi_finetuned": "PI, fine-tuned",
         "direct_finetuned": "fine-tuned directly"}


def style(i):
    dashes, marker = STYLES[i % len(STYLES)]
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": dashes, "marker": marker, "markersize": 5, "linewidth": 1.8}


def line(axis, values, label, i):
    """A line through {length: value}, left out where the value is infinite (null in JSON)."""
    points = sorted((n, v) for n, v in values.items() if v is not None and math.isfinite(v))
    axis.plot([n for n, _ in points], [v for _, v in points], label=label, **style(i))


def length_axis(axis, lengths, label):
    axis.set_xscale("log", base=2)
    axis.set_xlim(min(lengths) / 1.2, max(lengths) * 1.2)
    axis.set_xticks(lengths, [str(n) for n in lengths])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel(label)
    axis.grid(alpha=0.3)


def perplexity_axis(axis):
    """A logarithmic axis that says 6, 8, 10, 15 and not 6 x 10^0, with as many ticks as there is room for."""
    axis.set_yscale("log")
    if axis.get_ylim()[0] <= 0:  # nothing finite to draw
        axis.set_ylim(1, 1000)
    low, high = axis.get_ylim()
    for digits in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1,)):
        ticks = [d * 10**n for n in range(10) for d in digits if low <= d * 10**n <= high]
        if len(ticks) <= 10:
            break
    if len(ticks) < 3:
        ticks = [t for t in MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= t <= high]
    axis.set_yticks(ticks, [f"{t:,.10g}" for t in ticks])
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_ylabel("perplexity (lower is better)")


def mark_windows(axis, windows):
    """Dashed verticals at the windows, {label: tokens}, named above the frame."""
    for label, n in windows.items():
        axis.axvline(n, color="grey", linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        axis.annotate(label, (n, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points", ha="center")


def whose(result):
    """Model and RoPE scaling in words: data/tiny, linear x4."""
    rope = result["rope"]
    scaling = "plain RoPE" if rope["rope_type"] == "default" else f"{rope['rope_type']} x{rope.get('factor', 1):g}"
    return f"{'/'.join(Path(result['model']).parts[-2:])}, {scaling}"


def save(figure, path):
    """Write a PNG, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, dpi=150, format="png")
        temporary.replace(path)
    finally:
        plt.close(figure)
        temporary.unlink(missing_ok=True)
    return path


def plot_finetune(result, path):
    """finetune.py's table: perplexity and passkey accuracy against length, a line a row."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
    lengths = [int(n) for n in result["lengths"]]
    for i, row in enumerate(result["rows"]):
        label = NAMES.get(row["name"], row["name"].replace("_", " "))
        for axis, key in ((left, "perplexity"), (right, "passkey")):
            line(axis, {int(n): v for n, v in row[key].items()}, label, i)
    for axis in (left, right):
        length_axis(axis, lengths, "window (tokens)" if axis is left else "prompt length (tokens)")
        mark_windows(axis, {"L": result["original_window"], "L'": result["window"]})
    perplexity_axis(left)
    right.set_ylabel("passkey accuracy (higher is better)")
    right.set_ylim(-0.04, 1.04)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return save(figure, path)


def plot_perplexity(results, path):
    """eval.py ppl: perplexity against window, a line for each model and RoPE scaling."""
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    lines = {}
    for r in results:
        lines.setdefault((r["model"], whose(r)), {})[r["window"]] = r["perplexity"]
    for i, ((_, label), values) in enumerate(lines.items()):
        line(axis, values, label, i)
    length_axis(axis, sorted({r["window"] for r in results}), "window (tokens)")
    perplexity_axis(axis)
    axis.legend(frameon=False)
    return save(figure, path)


def plot_passkey(result, path):
    """eval.py passkey: accuracy by length and depth as a map, the mean of each length beside it."""
    lengths, depths = [str(n) for n in result["lengths"]], [f"{100 * d:.0f}" for d in result["depths"]]
    grid = [result["accuracy_by_depth"][n] for n in lengths]
    figure, axis = plt.subplots(figsize=(7.5, 0.4 * len(lengths) + 1.3), layout="constrained")
    axis.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    small = len(depths) > 16  # the paper's 32 places, say
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            axis.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=5 if small else 9, color="black" if value > 0.5 else "white")
    every = range(0, len(depths), math.ceil(len(depths) / 16))
    axis.set_xticks(every, [depths[i] for i in every])
    axis.set_yticks(range(len(lengths)), lengths)
    axis.set_xlabel("place of the key (% of the garbage that is before it)")
    axis.set_ylabel("prompt (tokens)")
    means = axis.secondary_yaxis("right")
    means.set_yticks(range(len(lengths)), [f"mean {result['accuracy'][n]:.2f}" for n in lengths])
    means.tick_params(length=0)
    axis.set_title(f"passkey accuracy, {whose(result)}, k_max {result['k_max']}", fontsize=10)
    return save(figure, path)


def plot_training(lines, path):
    """metrics.jsonl: training loss (every line faint, the mean of each line's surroundings bold) and validation loss, in nats a token."""
    train, val = [r for r in lines if "loss" in r], [r for r in lines if "val_loss" in r]
    steps, losses = [r["step"] for r in train], [r["loss"] for r in train]
    if not losses:
        raise ValueError("no line has a loss")
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    smooth = []
    for i in range(len(losses)):
        reach = min(i, max(2, len(losses) // 50))  # as far back as ahead, so that the mean does not lag where the loss falls steeply
        around = losses[i - reach:i + reach + 1]
        smooth.append(sum(around) / len(around))
    axis.plot(steps, losses, color=COLOURS[6], linewidth=0.6, alpha=0.6)
    axis.plot(steps, smooth, color=COLOURS[2], linewidth=1.8, label="training")
    if val:
        axis.plot([r["step"] for r in val], [r["val_loss"] for r in val], label="validation (text only)", **style(3))
    axis.set_xlabel("step")
    axis.set_ylabel("loss (nats per token)")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return save(figure, path)


def read(path):
    """A result (a dict), or the lines of a metrics.jsonl (a list of them)."""
    text = path.read_text(encoding="utf-8")
    value = [json.loads(each) for each in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    if not all(isinstance(v, dict) for v in (value if isinstance(value, list) else [value])):
        raise ValueError(f"it is {text.strip():.20}")
    return value


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="result files [results/*.json]")
    parser.add_argument("--out", default="", help="folder of the figures [beside each file]")
    flags = parser.parse_args()
    paths = [Path(f) for f in flags.files] or sorted(Path("results").glob("*.json"))
    if not paths:
        return "no result files: run finetune.py or eval.py first, or name the files"
    figures, perplexities = [], {}  # figures: (function, what it draws, file of the figure, file it comes from)
    for path in paths:
        target = (Path(flags.out) if flags.out else path.parent) / f"{path.stem}.png"
        try:
            result = read(path)
        except OSError as error:
            return f"{path}: {error.strerror}: name a file that eval.py, finetune.py or train.py wrote"
        except (ValueError, RecursionError) as error:
            return f"{path}: not a result of eval.py, finetune.py or train.py ({error})"
        if isinstance(result, list):
            figures.append((plot_training, result, target, path))
        elif "rows" in result:
            figures.append((plot_finetune, result, target, path))
        elif "accuracy_by_depth" in result:
            figures.append((plot_passkey, result, target, path))
        elif "perplexity" in result:
            perplexities[str(path)], together = result, target.with_name("perplexity.png")
        else:
            print(f"{path}: nothing to draw", file=sys.stderr)
    if perplexities:
        figures.append((plot_perplexity, list(perplexities.values()), together, ", ".join(perplexities)))
    for plot, content, target, source in figures:
        try:
            print(f"wrote {plot(content, target)}")
        except OSError as error:
            return f"{error.filename or target}: {error.strerror}"
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            return f"{source}: not a result of eval.py, finetune.py or train.py ({type(error).__name__}: {error})"
    return None if figures else "nothing to draw: name files that eval.py, finetune.py or train.py wrote"


if __name__ == "__main__":
    problem = main()
    if problem:
        print(f"error: {' '.join(problem.split())}", file=sys.stderr)
        sys.exit(2)
