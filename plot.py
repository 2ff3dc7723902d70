"""Figures from result files. Needs matplotlib, but no torch.

    python plot.py results/*.json out/base/metrics.jsonl

draws a PNG beside each file, and one figure of all `eval.py ppl` results that belong together: of
the same text, cut by the same tokenizer. The keys of a result decide how it is drawn: see FIGURES
and SHARED_FIGURES. A metrics.jsonl is a training curve.

A method (plain RoPE, PI, YaRN, ...) has the same colour and marker in every figure. Where some
lines are trained and others not, those that are not are dotted, with hollow markers.
"""
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ["MPLBACKEND"] = "agg"    # figures become files: whatever is set, no window is opened

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from common.cli import Parser, run_command
from common.errors import UserError
from common.files import read_json, whole_file

# The first seven are Okabe & Ito's: told apart by every kind of colour vision. In print markers do.
COLOURS = ["#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8B5A2B",
           "#808080", "#B5A400", "#5D3A9B", "#00B7C3", "#7A0019", "#0F2080", "#6B8E23", "#FF69B4",
           "#4B4B4B", "#C0A0E0", "#E15759", "#4E79A7", "#F28E2B", "#59A14F", "#B07AA1", "#9C755F"]
MARKERS = ["o", "s", "D", "^", "v", "P", "X", "<", ">", "p", "*", "h"]
# Method i has colour and marker i. Methods that are not here take those that follow.
METHOD_ORDER = ["default", "ntk", "linear", "yarn", "ntk_by_parts", "dprope", "dynamic", "llama3",
                "dynamic_yarn", "abf", '{"rope_type": "dprope", "interpolated_dims": 40}', "alibi",
                "xpos", "nope", '{"rope_type": "default", "random_positions": 2048}', "clex",
                "drope", "rerope", "leaky_rerope", "self_extend", "dca", "streaming",
                '{"rope_type": "default", "no_rope_layer_interval": 4}']
plt.rcParams.update({"figure.constrained_layout.use": True, "savefig.dpi": 150,
                     "axes.titlesize": 10, "axes.grid": True, "grid.alpha": 0.3,
                     "lines.linewidth": 1.8, "lines.markersize": 5, "legend.frameon": False})

# ---- Parts of a figure ---------------------------------------------------------------------------

def line_style(i: int, trained: bool = True, again: int = 0) -> dict[str, Any]:
    """Colour, marker and dashes of method i. again: for the second, third, ... line of the method
    in one figure, which has the same colour, another marker and other dashes."""
    style = {"color": COLOURS[i % len(COLOURS)], "linestyle": ["-", "--"][again % 2],
             "marker": MARKERS[(i + 3 * again + i // len(COLOURS)) % len(MARKERS)]}
    if not trained:
        style |= {"linestyle": [":", "-."][again % 2], "markerfacecolor": "white"}
    return style


def map_name(method: str) -> str:
    """The rope_type of a --methods flag."""
    return json.loads(method)["rope_type"] if method.startswith("{") else method


def method_numbers(methods: Iterable[str]) -> dict[str, int]:
    """{method: i} for a figure of these methods. One with a temperature has the number of its
    rope_type, unless another method of the figure has that rope_type, too."""
    different = dict.fromkeys(methods)
    numbers = {method: i for i, method in enumerate(dict.fromkeys([*METHOD_ORDER, *different]))}
    names = Counter(map(map_name, different))
    for method in different:
        if "temperature" in method and names[map_name(method)] == 1:
            numbers[method] = numbers.get(map_name(method), numbers[method])
    return numbers


def line_styles(lines: Sequence[tuple[str, bool]]) -> list[dict[str, Any]]:
    """The style of each (method, trained) of a figure."""
    numbers = method_numbers(method for method, _ in lines)
    return [line_style(numbers[method], trained, again=lines[:n].count((method, trained)))
            for n, (method, trained) in enumerate(lines)]


def draw_line(axis: Axes, values: dict[float, float | None], label: str, style: dict) -> None:
    """A line through {x: y}. Points are left out where y is infinite (null in JSON)."""
    points = sorted((x, y) for x, y in values.items() if y is not None and math.isfinite(y))
    axis.plot([x for x, _ in points], [y for _, y in points], label=label, **style)


def draw_map(axis: Axes, shades: list[list[float]], texts: list[list[str]], fontsize: int) -> None:
    """A map with a text in each cell, over shades from 0 (dark) to 1 (light)."""
    axis.grid(False)
    axis.imshow(shades, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for y, row in enumerate(texts):
        for x, text in enumerate(row):
            color = "black" if shades[y][x] > 0.5 else "white"
            axis.text(x, y, text, ha="center", va="center", fontsize=fontsize, color=color)


def length_axis(axis: Axes, lengths: list[int], label: str) -> None:
    """A logarithmic x axis with a tick at each length."""
    axis.set_xscale("log", base=2)
    axis.set(xlim=(min(lengths) / 1.2, max(lengths) * 1.2), xlabel=label)
    axis.set_xticks(lengths, [str(n) for n in lengths])
    axis.xaxis.set_minor_locator(NullLocator())


def y_ticks(axis: Axes, ticks: Sequence[float]) -> None:
    """Ticks at these values only, written as 0.05, 6.5, 1,000."""
    axis.set_yticks(ticks, [f"{t:,.10g}".replace("-", "−") for t in ticks])
    axis.yaxis.set_minor_locator(NullLocator())


def perplexity_axis(axis: Axes) -> None:
    """A logarithmic y axis that says 6, 8, 10, 15 and not 6 x 10^0, with at most ten ticks."""
    axis.set_yscale("log")
    if axis.get_ylim()[0] <= 0:  # nothing finite to draw
        axis.set_ylim(1, 1000)
    low, high = axis.get_ylim()
    for digits in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1,)):
        ticks = [d * 10**n for n in range(10) for d in digits if low <= d * 10**n <= high]
        if len(ticks) <= 10:
            break
    if len(ticks) < 3:  # a narrow range: 6.1, 6.15, 6.2, ...
        locator = MaxNLocator(6, steps=[1, 2, 5, 10])
        ticks = [t for t in locator.tick_values(low, high) if low <= t <= high]
    y_ticks(axis, ticks)
    axis.set_ylabel("perplexity (lower is better)")


def mark_windows(axis: Axes, windows: dict[str, float]) -> None:
    """Dashed verticals at {label: x}, with the labels above the frame."""
    for label, x in windows.items():
        axis.axvline(x, color="grey", linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        axis.annotate(label, (x, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3),
                      textcoords="offset points", ha="center")


def length_panels(left: Axes, right: Axes, lengths: list[int], windows: dict[str, int]) -> None:
    """The axes of two panels: perplexity and passkey accuracy against length."""
    length_axis(left, lengths, "window (tokens)")
    length_axis(right, lengths, "prompt length (tokens)")
    mark_windows(left, windows)
    mark_windows(right, windows)
    perplexity_axis(left)
    right.set(ylabel="passkey accuracy (higher is better)", ylim=(-0.04, 1.04))


def model_and_rope(result: dict) -> str:
    """Model and RoPE scaling in words: data/tiny, linear x4."""
    model = "/".join(Path(result["model"]).parts[-2:])
    rope = result["rope"]
    if rope["rope_type"] == "default":
        return f"{model}, plain RoPE"
    words = [rope["rope_type"], *settings_in_words(rope), f"x{rope.get('factor', 1):g}"]
    return f"{model}, {' '.join(words)}"


def settings_in_words(rope: dict) -> list[str]:
    """The settings of a rope dict that its method has by itself: ["interpolated dims 40"]."""
    common = ("rope_type", "factor", "original_max_position_embeddings", "rope_theta")
    return [f"{key.replace('_', ' ')} {value}" for key, value in rope.items() if key not in common]


def save_figure(figure: Figure, path: Path) -> Path:
    """Write the PNG, whole or not at all, and close the figure."""
    try:
        with whole_file(path) as file:
            figure.savefig(file, format="png")
    finally:
        plt.close(figure)
    return path


# ---- Results of finetune.py, eval.py, train.py and extras/compare.py -----------------------------

ROW_LABELS = {"extrapolation": "no change (extrapolation)", "pi_zero_shot": "PI, no training",
              "pi_finetuned": "PI, fine-tuned", "direct_finetuned": "fine-tuned directly"}


def plot_finetune(result: dict, path: Path) -> Path:
    """finetune.py: perplexity and passkey accuracy against length, a line for each row."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4))
    rows = result["rows"]
    for row, style in zip(rows, line_styles([method_of_row(row["name"]) for row in rows])):
        label = ROW_LABELS.get(row["name"], row["name"].replace("_", " "))
        draw_line(left, {int(n): v for n, v in row["perplexity"].items()}, label, style)
        draw_line(right, {int(n): v for n, v in row["passkey"].items()}, label, style)
    lengths = [int(n) for n in result["lengths"]]
    windows = {"L": result["original_window"], "L'": result["window"]}
    length_panels(left, right, lengths, windows)
    if all(v is None for row in rows for v in row["passkey"].values()):  # --trials 0
        right.text(0.5, 0.5, "not measured", ha="center", transform=right.transAxes)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return save_figure(figure, path)


def method_of_row(name: str) -> tuple[str, bool]:
    """The method of a row of finetune.py, and whether it was trained: ("yarn", True)."""
    method = name.removesuffix("_zero_shot").removesuffix("_finetuned")
    others = {"pi": "linear", "extrapolation": "default", "direct": "default"}
    return others.get(method, method), name.endswith("_finetuned")


def method_of_result(result: dict) -> tuple[str, bool]:
    """The method of a result of eval.py, and whether its model was trained with it: not where
    --rope replaced the model's own."""
    words = [result["rope"]["rope_type"], *settings_in_words(result["rope"])]
    return " ".join(words), not re.search(" --rope[ =]", result.get("command", ""))


def plot_perplexity(results: list[dict], path: Path) -> Path:
    """eval.py ppl: perplexity against window, a line for each model and RoPE scaling."""
    figure, axis = plt.subplots(figsize=(6.5, 4))
    lines = {}  # {(model, label): its results}; two models may have the same label
    for result in results:
        lines.setdefault((result["model"], model_and_rope(result)), []).append(result)
    styles = line_styles([method_of_result(line[0]) for line in lines.values()])
    for ((_, label), line), style in zip(lines.items(), styles):
        draw_line(axis, {r["window"]: r["perplexity"] for r in line}, label, style)
    length_axis(axis, sorted({r["window"] for r in results}), "window (tokens)")
    perplexity_axis(axis)
    axis.legend()
    return save_figure(figure, path)


def plot_context(results: list[dict], path: Path) -> Path:
    """eval.py ppl --bins: loss against the tokens of context that a prediction had."""
    figure, axis = plt.subplots(figsize=(7.5, 4))
    for result, style in zip(results, line_styles([method_of_result(r) for r in results])):
        starts = result["context"]
        ends = [*starts[1:], result["window"] + 1]
        bins = zip(starts, ends, result["nll_by_context"], result["tokens_by_context"])
        # sqrt(..): the middle of the bin on a logarithmic axis
        values = {math.sqrt(start * (end - 1)): nll for start, end, nll, tokens in bins if tokens}
        draw_line(axis, values, f"{model_and_rope(result)}, window {result['window']}", style)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda n, _: f"{n:.0f}")
    axis.set(xlabel="tokens of context", ylabel="loss (nats a token, lower is better)")
    axis.legend()
    return save_figure(figure, path)


def plot_passkey(result: dict, path: Path) -> Path:
    """eval.py passkey and extras/needle.py: accuracy by length and depth, and the means."""
    lengths = [str(n) for n in result["lengths"]]
    depths = [f"{100 * d:.0f}" for d in result["depths"]]
    grid = [result["accuracy_by_depth"][n] for n in lengths]
    figure, axis = plt.subplots(figsize=(7.5, 0.4 * len(lengths) + 1.3))
    texts = [[f"{accuracy:.2g}" for accuracy in row] for row in grid]
    draw_map(axis, grid, texts, fontsize=5 if len(depths) > 16 else 9)
    labelled = range(0, len(depths), math.ceil(len(depths) / 16))
    axis.set_xticks(labelled, [depths[i] for i in labelled])
    axis.set_yticks(range(len(lengths)), lengths)
    axis.set_ylabel("prompt (tokens)")
    name = model_and_rope(result)
    if "k_max" in result:
        judged = f"ranked among {result['rank']} keys, " if result.get("rank") else ""
        axis.set(title=f"passkey accuracy, {judged}{name}, k_max {result['k_max']} at "
                       f"{lengths[-1]}",
                 xlabel="place of the key (% of the garbage that is before it)")
    else:
        axis.set(title=f"needle: share of the answer's tokens, {name}",
                 xlabel="place of the needle (% of the text that is before it)")
    means = axis.secondary_yaxis("right")
    means.set_yticks(range(len(lengths)), [f"mean {result['accuracy'][n]:.2f}" for n in lengths])
    means.tick_params(length=0)
    return save_figure(figure, path)


def plot_compare(result: dict, path: Path) -> Path:
    """extras/compare.py: a row for each method, a column for each length. Dark is good."""
    rows = result["methods"]
    lengths = [str(n) for n in result["lengths"]]
    measured = [key for key in ("perplexity", "passkey")
                if any(value is not None for row in rows for value in row[key].values())]
    size = (2.3 + 3.6 * len(measured), 0.28 * len(rows) + 1.2)
    figure, axes = plt.subplots(1, len(measured), figsize=size, sharey=True, squeeze=False)
    for axis, key in zip(axes[0], measured):
        grid = [[math.nan if row[key][n] is None else row[key][n] for n in lengths] for row in rows]
        if key == "perplexity":
            # The logarithm, or one perplexity of thousands would give all others the same colour
            finite = [value for row in grid for value in row if math.isfinite(value)]
            low, high = min(finite), max(finite)
            span = max(math.log(high / low), 1e-9)
            shades = [[math.log(value / low) / span for value in row] for row in grid]
            axis.set(xlabel="window (tokens)", title="perplexity (lower is better)")
        else:
            shades = [[1 - accuracy for accuracy in row] for row in grid]
            axis.set(xlabel="prompt (tokens)", title="passkey accuracy (higher is better)")
        draw_map(axis, shades, [[short_number(v) for v in row] for row in grid], fontsize=9)
        original = str(result["original_window"])
        axis.set_xticks(range(len(lengths)), [f"{n}\n(L)" if n == original else n for n in lengths])
    axes[0, 0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    space = "\n" if len(measured) == 1 else " "
    figure.suptitle(f"{Path(result['model']).stem}:{space}its positions changed, without "
                    "training", fontsize=11)
    return save_figure(figure, path)


def short_number(value: float) -> str:
    """6.05, 120, 3e+05; NaN stands for a perplexity that is infinite."""
    if math.isnan(value):
        return "inf"
    if value < 100:
        return f"{value:.2f}"
    return f"{value:.0f}" if value < 1e5 else f"{value:.0e}"


def plot_longrope(result: dict, path: Path) -> Path:
    """extras/longrope_search.py: the factor of each pair, found and by formula, and how low the
    search came in each generation, beside the formula it began at that is the best."""
    starts = result["starts"]
    factors = {method: start["factors"] for method, start in starts.items()}
    factors["longrope"] = result["found"]["long_factor"]
    labels = {"linear": "PI", "ntk": "NTK-aware", "yarn": "YaRN", "longrope": "found by the search"}
    styles = dict(zip(factors, line_styles([(method, True) for method in factors])))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4))
    for method, values in factors.items():
        draw_line(left, dict(enumerate(values)), labels[method], styles[method])
    left.set(xlabel="pair i, from the fastest to the slowest", ylabel="factor $f_i$")

    best = min(starts, key=lambda method: starts[method]["perplexity"])
    generations = result["generations"]
    at_start = dict.fromkeys((0, len(generations) - 1), starts[best]["perplexity"])
    draw_line(right, at_start, "", styles[best] | {"marker": "", "linestyle": "--"})
    draw_line(right, dict(enumerate(generations)), "", styles["longrope"] | {"marker": ""})
    right.set(xlabel="generation", title="the best so far, on what was searched on",
              ylabel="perplexity (lower is better)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return save_figure(figure, path)


def plot_training(lines: list[dict], path: Path) -> Path:
    """metrics.jsonl: training loss (faint, and its running mean) and validation loss."""
    train = [r for r in lines if "loss" in r]
    validation = [r for r in lines if "val_loss" in r]
    if not train:
        raise ValueError("no line has a loss")
    steps = [r["step"] for r in train]
    losses = [r["loss"] for r in train]
    smooth = []
    for i in range(len(losses)):
        # As far back as ahead: the mean would lag behind a loss that falls steeply.
        reach = min(i, max(2, len(losses) // 50))
        around = losses[i - reach:i + reach + 1]
        smooth.append(sum(around) / len(around))
    figure, axis = plt.subplots(figsize=(6.5, 4))
    axis.plot(steps, losses, color=COLOURS[6], linewidth=0.6, alpha=0.6)
    axis.plot(steps, smooth, color=COLOURS[2], linewidth=1.8, label="training")
    if validation:
        values = {r["step"]: r["val_loss"] for r in validation}
        draw_line(axis, values, "validation (text only)", line_style(3))
    axis.set(xlabel="step", ylabel="loss (nats per token)")
    axis.legend()
    return save_figure(figure, path)


# ---- Results of extras/sweep.py ------------------------------------------------------------------

def plot_sweep(result: dict, path: Path) -> Path:
    """extras/sweep.py: panels for each factor s, in each a line for each method."""
    rows = result["rows"]
    factors = sorted({r["factor"] for r in rows if r["steps"]})
    methods = list(dict.fromkeys(r["method"] for r in rows))
    from_scratch = factors == [1]
    if len({r["rope"].get("interpolated_dims") for r in rows} - {None}) > 1:
        draw_panels, columns = draw_sweep_by_dims, 1
    elif from_scratch:
        draw_panels, columns = draw_sweep_from_scratch, 2
    else:
        draw_panels, columns = draw_sweep_by_steps, 3
    size = (5 * columns, 3.7 * len(factors) + 0.6)
    figure, axes = plt.subplots(len(factors), columns, figsize=size, squeeze=False)
    for factor, panels in zip(factors, axes):
        group = [r for r in rows if r["factor"] == factor]
        draw_panels(result, group, methods, panels)
        for axis in panels:
            if not from_scratch:
                axis.set_title(f"s = {factor:g}, L' = {group[0]['window']}")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    figure.legend(unique.values(), unique.keys(), loc="outside upper center",
                  ncols=min(6, len(unique)))
    return save_figure(figure, path)


def plot_real_model(result: dict, path: Path) -> Path:
    """extras/real_model.py: for each kind of text, perplexity by position, untrained and after the
    last step, and perplexity in the last quarter of L' against the steps of fine-tuning.
    Where nothing was trained, the kinds of text stand side by side."""
    rows = [r | {"method": f"{method_label(r['method'])}, LoRA r = {r['lora_rank']}"}
            if r.get("lora_rank") else r for r in result["rows"]]
    window, kinds = result["window"], list(rows[0]["nll_by_position"])
    methods = list(dict.fromkeys(r["method"] for r in rows))
    last = {method: max(r["steps"] for r in rows if r["method"] == method) for method in methods}
    trained = max(last.values()) > 0
    high, wide = (len(kinds), 2) if trained else (1, len(kinds))
    figure, axes = plt.subplots(high, wide, squeeze=False, figsize=(5 * wide, 3.7 * high + 0.6))
    for kind, (left, *right) in zip(kinds, axes if trained else axes.T):
        for r in rows:
            if r["seed"] != result["seed"] or r["steps"] not in (0, last[r["method"]]):
                continue
            nll = r["nll_by_position"][kind]
            position = [(i + 0.5) * window / len(nll) for i in range(len(nll))]
            label = method_label(r["method"]) + (f", {r['steps'] or 'no'} steps" if trained else "")
            style = line_style(method_numbers(methods)[r["method"]], trained=r["steps"] > 0)
            draw_line(left, dict(zip(position, map(math.exp, nll))), label, style)
        mark_windows(left, {"L": result["original_window"]})
        left.set_xlabel("position in the text (tokens)")
        left.set_title(kind, loc="left" if window <= 2 * result["original_window"] else "right")
        perplexity_axis(left)
        points = [(r["method"], r["steps"], last_quarter(r["nll_by_position"][kind])) for r in rows]
        for axis in right:
            draw_means(axis, points, methods)
            axis.set(xlabel="fine-tuning steps", title=f"{kind}: the last quarter of L' = {window}")
            perplexity_axis(axis)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center",
                  ncols=3 if wide > 1 else 1)
    return save_figure(figure, path)


def plot_long_window(result: dict, path: Path) -> list[Path]:
    """extras/long_window.py: perplexity and passkeys against length, a line for each method; and
    beside it what each distance map does to the distance."""
    rows, lengths = result["long_window"], [str(n) for n in result["lengths"]]
    counts = Counter(temperature_of(row["method"]) for row in rows)
    temperatures = [name for name in counts if counts[name] > 2] or list(counts)  # lines to compare
    best = min(value for row in rows for value in row["perplexity"].values())
    figure, axes = plt.subplots(len(temperatures), 2, figsize=(10, 2.9 * len(temperatures) + 0.4),
                                squeeze=False, sharey="col")
    numbers = method_numbers(map_name(row["method"]) for row in rows)
    for temperature, (left, right) in zip(temperatures, axes):
        for row in rows:
            if temperature_of(row["method"]) != temperature:
                continue
            name = map_name(row["method"])
            style = line_style(numbers[name])
            draw_line(left, {int(n): row["perplexity"][n] for n in lengths}, name, style)
            draw_line(right, {int(n): row["passkey"][n] for n in lengths}, name, style)
        length_panels(left, right, result["lengths"], {"L": result["original_window"]})
        left.set_title(f"temperature: {temperature}", loc="right")
        left.set_ylim(top=min(left.get_ylim()[1], 3 * best))            # plain RoPE leaves it
    handles = {label: handle for axis in axes[:, 0]
               for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)
    maps = path.with_name(f"{path.stem}-maps.png")
    return [save_figure(figure, path), plot_distance_maps(result, maps)]


def temperature_of(method: str) -> str:
    rope = json.loads(method) if method.startswith("{") else {}
    return rope.get("temperature", "the method's own")


def plot_distance_maps(result: dict, path: Path) -> Path:
    """The distance that the model sees against the distance in the text, for each map."""
    maps, L = result["seen_distances"], result["original_window"]
    figure, axes = plt.subplots(1, len(maps), figsize=(2.4 * len(maps), 2.7), sharey=True)
    for axis, (name, seen) in zip(axes, maps.items()):
        distances = [i * max(1, L // 64) for i in range(len(seen))]
        axis.plot(distances, [math.nan if d is None else d for d in seen], ".", markersize=2)
        axis.axhline(L, linestyle=":", color="gray")
        axis.set(title=name, xlabel="distance in the text")
    axes[0].set_ylabel("distance that the model sees")
    axes[0].annotate("L", (0, L), xytext=(0, -12), textcoords="offset points")
    return save_figure(figure, path)


def last_quarter(nll: list[float]) -> float:
    """Perplexity over the last quarter of the parts."""
    part = nll[-len(nll) // 4:]
    return math.exp(sum(part) / len(part))


def draw_sweep_from_scratch(result: dict, rows: list[dict], methods: list[str],
                            panels: Sequence[Axes]) -> None:
    """Perplexity and passkey accuracy against length."""
    lengths = [int(n) for n in result["lengths"]]
    perplexity = [(r["method"], n, perplexity_at(n, r)) for r in rows for n in lengths]
    accuracy = [(r["method"], n, r["passkey"].get(str(n))) for r in rows for n in lengths]
    draw_means(panels[0], perplexity, methods)
    draw_means(panels[1], accuracy, methods)
    length_panels(*panels, lengths, {"L": result["original_window"]})


def draw_sweep_by_dims(result: dict, rows: list[dict], methods: list[str],
                       panels: Sequence[Axes]) -> None:
    """Perplexity at L' against the number of interpolated dimensions, before and after training."""
    rows = [r for r in rows if r["rope"].get("interpolated_dims") is not None]
    name = rows[0]["rope"]["rope_type"]
    for steps in sorted({0, max(r["steps"] for r in rows)}):
        points = [(r["rope"]["interpolated_dims"], perplexity_at(r["window"], r))
                  for r in rows if r["steps"] == steps]
        style = line_style(method_numbers([name])[name], trained=steps > 0)
        draw_line(panels[0], means(points), "fine-tuned" if steps else "untrained", style)
    panels[0].set_xlabel("interpolated dimensions")
    perplexity_axis(panels[0])


def draw_sweep_by_steps(result: dict, rows: list[dict], methods: list[str],
                        panels: Sequence[Axes]) -> None:
    """Perplexity at L' and k_max against the steps of fine-tuning. Third panel: perplexity before
    training against the disturbance of the angles."""
    perplexity = [(r["method"], r["steps"], perplexity_at(r["window"], r)) for r in rows]
    draw_means(panels[0], perplexity, methods)
    panels[0].set_xlabel("fine-tuning steps")
    perplexity_axis(panels[0])

    measured = {(r["method"], r["steps"]) for r in result["rows"] if "k_max" in r}
    times = Counter(method for method, _ in measured)
    often = [m for m in methods if times[m] > 2] or methods
    k_max = [(r["method"], r["steps"], r.get("k_max")) for r in rows if r["method"] in often]
    draw_means(panels[1], k_max, methods)
    panels[1].set(xlabel="fine-tuning steps", ylabel="k_max (tokens, higher is better)")

    disturbance = [(r["method"], r["disturbance"], perplexity_at(r["window"], r))
                   for r in rows if not r["steps"] and r.get("disturbance") is not None]
    draw_means(panels[2], disturbance, methods, trained=False)
    panels[2].set(xscale="log", xlabel="disturbance of the rotary angles (nats), untrained")
    perplexity_axis(panels[2])


def draw_means(axis: Axes, points: list[tuple[str, float, float | None]], methods: list[str],
               trained: bool = True) -> None:
    """A line for each method through the means over the seeds. points: [(method, x, y)]."""
    numbers = method_numbers(methods)
    for method in methods:
        values = means([(x, y) for name, x, y in points if name == method])
        if any(mean is not None for mean in values.values()):
            draw_line(axis, values, method_label(method), line_style(numbers[method], trained))


def means(points: list[tuple[float, float | None]]) -> dict[float, float | None]:
    """{x: mean of its ys}. One infinite perplexity (None) makes the mean infinite."""
    values = {}
    for x, y in points:
        values.setdefault(x, []).append(y)
    return {x: None if None in ys else sum(ys) / len(ys) for x, ys in values.items()}


def perplexity_at(length: int, row: dict) -> float | None:
    """On the first text of the sweep; None if it is infinite or was not measured."""
    first = next(iter(row["perplexity"].values()))
    return first.get(str(length))


def method_label(method: str) -> str:
    """A method, which is a name or a JSON object, in a legend or a table."""
    if not method.startswith("{"):
        return {"default": "plain RoPE", "linear": "PI"}.get(method, method)
    rope = json.loads(method)
    name = rope.pop("rope_type")
    words = ["RoPE" if name == "default" else name]
    words += [f"{key.replace('_', ' ')} {value}" for key, value in rope.items()]
    return " ".join(words)


# ---- Results of theory.py ------------------------------------------------------------------------

def plot_theory(result: dict, path: Path) -> str:
    """theory.py: six figures, theory-score.png and so on. Returns their names."""
    functions = {"score": plot_score, "fit": plot_fit, "bounds": plot_bounds,
                 "extrapolation": plot_extrapolation, "angles": plot_angles,
                 "disturbance": plot_disturbance}
    paths = [function(result["theory"], path.with_name(f"{path.stem}-{name}.png"))
             for name, function in functions.items()]
    return ", ".join(map(str, paths))


def plot_score(theory: dict, path: Path) -> Path:
    """The score of a key equal to its query against distance, a line for each method."""
    scores = theory["scores"]
    labels = {"default": "plain RoPE", "linear": "PI, s = 4", "ntk": "NTK-aware, s = 4",
              "yarn": "YaRN, s = 4"}
    figure, axis = plt.subplots(figsize=(8, 4))
    numbers = method_numbers(scores["curves"])
    for (name, values), dashes in zip(scores["curves"].items(), ["--", "-.", "-", ":"]):
        look = {"color": COLOURS[numbers[name]], "linestyle": dashes, "linewidth": 1.3}
        axis.plot(scores["x"], values, label=labels.get(name, name), **look)
    axis.set_xscale("symlog", base=2, linthresh=1)
    ticks = [0, 1, 4, 16, 64, 256, 1024, 4096, 16384]
    axis.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axis.set(xlim=(0, scores["reach"] * scores["window"]), xlabel="distance x (tokens)",
             ylabel="score of a key equal to its query\n(units of the score at distance 0)")
    axis.axhline(0, color="black", linewidth=0.8)
    mark_windows(axis, {"L": scores["window"]})
    axis.legend()
    return save_figure(figure, path)


def plot_fit(theory: dict, path: Path) -> Path:
    """A curve fitted to noise in [0, L), with and without a ridge: inside, beyond, and close up.
    (Chen et al., Figure 2)"""
    fit = theory["fit"]
    L, start, step = fit["window"], fit["near_start"], fit["far_step"]
    integers = range(start, start + 51)
    figure, axes = plt.subplot_mosaic([["inside", "beyond"], ["near", "near"]], figsize=(9.5, 5.3))
    inside, beyond, near = axes["inside"], axes["beyond"], axes["near"]
    handles = inside.plot(range(L), fit["points"], ".", color=COLOURS[6], markersize=2, alpha=0.7,
                          label="noise to be fitted", zorder=1)
    near.plot(integers, [fit["points"][x] for x in integers], ".", color=COLOURS[6], markersize=8)
    looks = [{"color": COLOURS[3], "linewidth": 1.6, "linestyle": "-"},
             {"color": COLOURS[2], "linewidth": 1.2, "linestyle": "--"}]
    for curve, look in zip(fit["curves"], looks):
        far_x = [step * n for n in range(len(curve["far"]))]
        near_x = [start + fit["near_step"] * n for n in range(len(curve["near"]))]
        handles += beyond.plot(far_x, curve["far"], color=look["color"], linewidth=0.9,
                               label=f"fitted curve a(x), ridge {curve['ridge']:g}")
        near.plot(near_x, curve["near"], **look)
    one_curve = fit["curves"][0]["far"][:math.ceil(L / step)]  # inside, the others lie upon it
    inside.plot(range(0, L, step), one_curve, color=COLOURS[3], linewidth=0.7)

    inside.set_title("fitted in the window, where all ridges give one curve")
    beyond.set_title("the same curves beyond it: note the logarithmic axis")
    near.set_title("between the integers (dashed)")
    beyond.set_yscale("symlog", linthresh=1)
    y_ticks(beyond, [-1000, -10, 0, 10, 1000])
    mark_windows(beyond, {"": L})
    near.vlines(integers, 0, 1, transform=near.get_xaxis_transform(), color="grey",
                linewidth=0.5, linestyle=(0, (4, 3)), zorder=0)
    near.set_xlim(start, start + 50)
    near.grid(False)
    for axis, ticks in ((inside, [0, L // 2, L]), (beyond, [0, L // 2, L, L + L // 2, 2 * L])):
        axis.set(xlim=(0, ticks[-1]), xticks=ticks)
    for axis in axes.values():
        axis.set(xlabel="distance x (tokens)", ylabel="score a(x)")

    legend = figure.legend(handles=handles, loc="outside upper center", ncols=3)
    for handle in legend.legend_handles:
        handle.set(linewidth=1.8, markersize=6)
    return save_figure(figure, path)


def plot_bounds(theory: dict, path: Path) -> Path:
    """How far a score strays from the straight line between two integers, and its bounds."""
    rows = theory["bounds"]["rows"]
    figure, axis = plt.subplots(figsize=(6.5, 4))
    draw_line(axis, {r["head_dim"]: r["printed"] for r in rows}, "bound as printed", line_style(3))
    draw_line(axis, {r["head_dim"]: r["search"] for r in rows}, "found by search", line_style(0))
    draw_line(axis, {r["head_dim"]: r["corrected"] for r in rows}, "corrected bound",
              line_style(2) | {"linestyle": "--"})
    length_axis(axis, [r["head_dim"] for r in rows], "head_dim D")
    axis.set(yscale="log", ylabel="deviation half way between\ntwo integers (units of max |h|)")
    y_ticks(axis, [0.05, 0.1, 0.2, 0.5])
    axis.legend()
    return save_figure(figure, path)


def plot_extrapolation(theory: dict, path: Path) -> Path:
    """B(x)/D, the bound on extrapolation, for several head_dims. (Chen et al., Figure 5)"""
    bounds = theory["bounds"]
    rows = sorted(bounds["rows"], key=lambda row: -row["head_dim"])
    figure, axes = plt.subplots(math.ceil(len(rows) / 2), 2, figsize=(9.5, 5), sharex=True,
                                sharey=True, squeeze=False)
    for axis, row in zip(axes.flat, rows):
        values = bounds["B"][str(row["head_dim"])]
        x = [bounds["every"] * n for n in range(len(values))]
        axis.plot(x, [max(v, 1) for v in values], color=COLOURS[2], linewidth=0.7)
        axis.plot(x, [min(v, 1) for v in values], color=COLOURS[3], linewidth=0.7)
        smallest = (row["B_argmin"], row["B_min"])
        axis.plot(*smallest, "v", color="black", markersize=6)
        axis.annotate(f"smallest {row['B_min']:.3g}", smallest, xytext=(0, -11),
                      textcoords="offset points", ha="right", va="top")
        axis.axhline(1, color="black", linewidth=1.2)
        axis.set_title(f"D = {row['head_dim']}: {row['B_below_1']:,} of {bounds['window']:,} "
                       "distances below 1 (orange)", loc="left")
        axis.set(xlim=(0, bounds["window"]), xticks=[n * bounds["window"] // 4 for n in range(5)],
                 ylim=(0.1, 30), yscale="log", xlabel="distance x (tokens)", ylabel="B(x) / D")
        axis.label_outer()
        y_ticks(axis, [0.3, 1, 3, 10])
    return save_figure(figure, path)


def plot_angles(theory: dict, path: Path) -> Path:
    """How often a pair shows each angle up to 60 degrees: in the window, and in one of twice its
    length, interpolated and left alone. New angles are hatched."""
    angles = theory["angles"]
    L, pairs, bins = angles["window"], angles["histograms"], angles["bins"] // 6
    edges = [60 * k / bins for k in range(bins + 1)]
    old_look = {"facecolor": COLOURS[2], "edgecolor": "white"}
    new_look = {"facecolor": COLOURS[3], "edgecolor": "white", "hatch": "////"}
    titles = {"original": f"original, {L:,} positions", "interpolated": f"interpolated, {2 * L:,}",
              "left_alone": f"left alone, {2 * L:,}"}
    figure, axes = plt.subplots(3, len(pairs), figsize=(9.5, 5.3), sharex=True, sharey="col",
                                squeeze=False)
    for column, pair in zip(axes.T, pairs):
        seen = [share > 0 for share in pair["original"][:bins]]
        for axis, (name, title) in zip(column, titles.items()):
            old = [100 * share if s else 0 for share, s in zip(pair[name], seen)]
            new = [0 if s else 100 * share for share, s in zip(pair[name], seen)]
            axis.stairs(old, edges, fill=True, linewidth=0, **old_look)
            axis.stairs(new, edges, fill=True, linewidth=0, **new_look)
            axis.set_title(title, loc="left")
            axis.set_xlim(0, 60)
            axis.grid(False)
        column[0].set_title(f"pair {pair['pair']}, {pair['fraction']} of a turn per token\n"
                            f"{titles['original']}", loc="left")
        column[-1].set_xlabel("angle (degrees, the first 60 of 360)")
    for axis in axes[:, 0]:
        axis.set_ylabel("% of positions")
    patches = [plt.Rectangle((0, 0), 1, 1, **look) for look in (old_look, new_look)]
    figure.legend(patches, ["angles that training showed", "angles that are new"],
                  loc="outside upper center", ncols=2)
    return save_figure(figure, path)


def plot_disturbance(theory: dict, path: Path) -> Path:
    """How far each pair's angles move away from those of training, left alone and interpolated.
    Bars below mark the pairs that are interpolated."""
    slow_from, stretches = theory["angles"]["slow_from"], theory["angles"]["stretches"]
    figure, axes = plt.subplots(len(stretches), 1, figsize=(9.5, 5.3), sharex=True, squeeze=False)
    values = [v for stretch in stretches for v in stretch["left_alone"] + stretch["interpolated"]]
    low = min(v for v in values if v > 1e-9) / 12
    labels = {"left_alone": "left alone (extrapolation)", "interpolated": "interpolated"}
    for axis, stretch in zip(axes[:, 0], stretches):
        pairs, chosen = len(stretch["left_alone"]), stretch["chosen"]
        for key, method in (("left_alone", "default"), ("interpolated", "linear")):
            look = line_style(METHOD_ORDER.index(method)) | {"markersize": 4, "linewidth": 1.2}
            y = [v if v > low else math.nan for v in stretch[key]]
            axis.plot(range(pairs), y, label=labels[key], **look)
        axis.set(yscale="log", ylim=(low, 4), xlim=(-1, pairs), ylabel="disturbance (nats)")
        for i, value in enumerate(stretch["interpolated"]):
            if value <= low:  # 0 has no place on a logarithmic axis
                axis.annotate(f"pair {i}: 0", (i, low * 4), ha="center", color=COLOURS[2])
        axis.bar(chosen, [low * 2.5] * len(chosen), width=1, color=COLOURS[2], alpha=0.55,
                 label="pairs that are interpolated")
        mark_windows(axis, {"": slow_from - 0.5})
        axis.set_title(f"L' = {stretch['factor']}L: {len(chosen)} of {pairs} pairs are "
                       "interpolated", loc="left")
        axis.set_yticks([1e-6, 1e-4, 1e-2, 1])
        axis.yaxis.set_minor_locator(NullLocator())
    axes[0, 0].annotate("never a whole turn in L", (slow_from - 0.5, 1), xytext=(4, 3),
                        xycoords=("data", "axes fraction"), textcoords="offset points")
    axes[-1, 0].set_xlabel("pair i, from the fastest to the slowest")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return save_figure(figure, path)


# ---- The command ---------------------------------------------------------------------------------

# The first of these keys that a result has decides how it is drawn.
FIGURES = {"bands": plot_real_model, "long_window": plot_long_window,
           "generations": plot_longrope, "methods": plot_compare,
           "plan": plot_sweep, "rows": plot_finetune, "accuracy_by_depth": plot_passkey,
           "theory": plot_theory, "lines": plot_training}
# Then these: all results with the key go into one figure, if they belong together.
SHARED_FIGURES = {"nll_by_context": (plot_context, "context.png"),
                  "perplexity": (plot_perplexity, "perplexity.png")}
LONE = "one perplexity makes no line: name others of the same text beside it"
NOT_A_RESULT = "not a result of eval.py, finetune.py or train.py"


def read_result(path: Path) -> dict | list[dict]:
    """A result, or the lines of a metrics.jsonl."""
    if path.suffix != ".jsonl":
        result = read_json(path)
        objects = [result]
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            objects = result = [json.loads(line) for line in lines]
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: {NOT_A_RESULT} ({error})") from None
    if not all(isinstance(each, dict) for each in objects):
        raise UserError(f"{path}: {NOT_A_RESULT} (it holds {str(result):.20})")
    return result


def kind_of(result: dict | list[dict]) -> str:
    """The key of FIGURES or SHARED_FIGURES that decides how it is drawn; "" if there is none."""
    if isinstance(result, list):
        return "lines"
    return next((key for key in [*FIGURES, *SHARED_FIGURES] if key in result), "")


def belong_together(result: dict) -> str:
    """Equal for results of eval.py ppl that one figure can compare: the same text in the same
    tokens, original window and dtype, and windows that overlap, or that do not."""
    names = ("tokens", "documents", "bytes", "original_window", "dtype")
    overlap = result.get("stride") != result.get("window")
    return repr([result.get(name) for name in names] + [overlap])


def shared_figures(results: dict[Path, dict], key: str, name: str) -> dict[str, list[Path]]:
    """{file name of a figure: the files of the results in it}. A second figure, of another text or
    base model, is named after its first model, too. A lone perplexity, a point, is in none."""
    groups: dict[str, list[Path]] = {}
    for path, result in results.items():
        groups.setdefault(belong_together(result), []).append(path)
    figures = {}
    for paths in groups.values():
        if key == "perplexity" and len(paths) == 1:
            continue
        file, n = name, 1
        while file in figures:
            model = Path(str(results[paths[0]].get("model"))).stem
            file, n = f"{Path(name).stem}-{model}{f'-{n}' if n > 1 else ''}.png", n + 1
        figures[file] = paths
    return figures


def draw_file(function: Callable, content: Any, target: Path, sources: list[Path]) -> None:
    """Draw one figure. sources: the files that `content` comes from."""
    try:
        written = function(content, target)
        print(f"wrote {', '.join(map(str, written)) if isinstance(written, list) else written}")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{', '.join(map(str, sources))}: {NOT_A_RESULT} "
                        f"({type(error).__name__}: {error})") from None


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("files", nargs="*", help="result files [results/*.json]")
    parser.add_argument("--out", default="", help="folder of the figures [beside each file]")
    flags = parser.parse_args(argv)
    paths = [Path(file) for file in flags.files] or sorted(Path("results").glob("*.json"))
    if not paths:
        raise UserError("no result files: run finetune.py or eval.py first, or name the files")
    results = {path: read_result(path) for path in paths}
    kinds = {path: kind_of(result) for path, result in results.items()}
    if not any(kinds.values()):
        raise UserError("nothing to draw: name files that eval.py, finetune.py or train.py wrote")
    left_out = {path: "nothing to draw" for path, kind in kinds.items() if not kind}
    for path, kind in kinds.items():
        folder = Path(flags.out) if flags.out else path.parent
        if kind in FIGURES:
            draw_file(FIGURES[kind], results[path], folder / f"{path.stem}.png", [path])
    for key, (function, name) in SHARED_FIGURES.items():
        shared = {path: results[path] for path, kind in kinds.items() if kind == key}
        left_out |= dict.fromkeys(shared, LONE)
        for file, sources in shared_figures(shared, key, name).items():
            folder = Path(flags.out) if flags.out else sources[-1].parent
            draw_file(function, [results[path] for path in sources], folder / file, sources)
            left_out = {path: why for path, why in left_out.items() if path not in sources}
    notes = [f"{path}: {why}" for path, why in left_out.items()]
    if len(notes) == len(paths):
        raise UserError("; ".join(notes))
    for note in notes:
        print(note, file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
