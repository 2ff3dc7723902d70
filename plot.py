"""Figures from result files; no torch, nothing of ours.

    python plot.py results/*.json out/base/metrics.jsonl          # a PNG beside each file, and one comparison of all `ppl` results given

What a file holds decides its figure: `rows` (finetune.py), `plan` (extras/sweep.py), `methods` (eval.py compare), `perplexity` (eval.py ppl),
`nll_by_context` (eval.py ppl --bins), `accuracy_by_depth` (eval.py passkey and needle), `theory`, a metrics.jsonl.
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
    dashes, marker = STYLES[(i + i // len(COLOURS)) % len(STYLES)]  # the eighth line has the first's colour, in another style
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


def plot_context(results, path):
    """eval.py ppl --bins: loss by the tokens of context that a prediction had, a line for each model, RoPE scaling and window."""
    figure, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for i, result in enumerate(results):
        edges = [*result["context"], result["window"] + 1]
        bins = zip(edges, edges[1:], result["nll_by_context"], result["tokens_by_context"])
        middles = {math.sqrt(a * (b - 1)): nll for a, b, nll, n in bins if n}
        line(axis, middles, f"{whose(result)}, window {result['window']}", i)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda n, _: f"{n:.0f}")
    axis.set_xlabel("tokens of context")
    axis.set_ylabel("loss (nats a token, lower is better)")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return save(figure, path)


def plot_passkey(result, path):
    """eval.py passkey and needle: accuracy by length and depth as a map, the mean of each length beside it."""
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
    key = "k_max" in result
    axis.set_xlabel("place of the key (% of the garbage that is before it)" if key else "place of the needle (% of the text that is before it)")
    axis.set_ylabel("prompt (tokens)")
    means = axis.secondary_yaxis("right")
    means.set_yticks(range(len(lengths)), [f"mean {result['accuracy'][n]:.2f}" for n in lengths])
    means.tick_params(length=0)
    axis.set_title(f"passkey accuracy, {whose(result)}, k_max {result['k_max']} at {lengths[-1]}" if key else
                   f"needle: share of the answer's tokens, {whose(result)}", fontsize=10)
    return save(figure, path)


def plot_compare(result, path):
    """eval.py compare: a row for each method, a column for each length; perplexity left, passkey accuracy right, the numbers written in."""
    rows, lengths = result["methods"], [str(n) for n in result["lengths"]]
    titles = {"perplexity": "perplexity (lower is better)", "passkey": "passkey accuracy (higher is better)"}
    titles = {key: title for key, title in titles.items() if any(v is not None for row in rows for v in row[key].values())}
    figure, axes = plt.subplots(1, len(titles), figsize=(2.3 + 3.6 * len(titles), 0.28 * len(rows) + 1.2), layout="constrained", sharey=True,
                                squeeze=False)
    for axis, (key, title) in zip(axes[0], titles.items()):
        grid = [[math.nan if row[key][n] is None else row[key][n] for n in lengths] for row in rows]
        finite = [v for row in grid for v in row if math.isfinite(v)]
        low, high = (min(finite), max(finite)) if key == "perplexity" else (0, 1)
        # dark is good on both: a logarithm for perplexity, whose blow-ups would otherwise leave everything else in one colour
        shade = [[math.log(v / low) / max(math.log(high / low), 1e-9) if key == "perplexity" else 1 - v for v in row] for row in grid]
        axis.imshow(shade, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                text = "inf" if math.isnan(value) else f"{value:.2f}" if value < 100 else f"{value:.0f}" if value < 1e5 else f"{value:.0e}"
                axis.text(x, y, text, ha="center", va="center", fontsize=9, color="black" if shade[y][x] > 0.5 else "white")
        original = result["original_window"]
        axis.set_xticks(range(len(lengths)), [f"{n}\n(L)" if int(n) == original else n for n in lengths])
        axis.set_xlabel("window (tokens)" if key == "perplexity" else "prompt (tokens)")
        axis.set_title(title, fontsize=10)
    axes[0, 0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    figure.suptitle(f"{Path(result['model']).stem}:{chr(10) if len(titles) == 1 else ' '}its frequencies changed, without training", fontsize=11)
    return save(figure, path)


def plot_sweep(result, path):
    """extras/sweep.py, a row of panels for each s: perplexity at L' (scratch: at every window) as training goes on, or by the number of
    interpolated dimensions; the distance up to which keys are found; the disturbance of the angles against perplexity before training."""
    rows, lengths = result["rows"], [int(n) for n in result["lengths"]]
    kind, factors = next(iter(rows[0]["perplexity"])), sorted({r["factor"] for r in rows if r["steps"]})
    methods = list(dict.fromkeys(r["method"] for r in rows))

    def mean(group, value):
        values = [value(r) for r in group]
        return None if not values or None in values else sum(values) / len(values)  # one blow-up is no number for all

    def at_target(r):
        return r["perplexity"][kind].get(str(r["window"]))

    def panel(axis, factor, x_of, value, chosen=methods):
        for i, method in enumerate(methods):
            group = [r for r in rows if r["method"] == method and r["factor"] == factor] if method in chosen else []
            points = {x: mean([r for r in group if x_of(r) == x], value) for x in sorted({x_of(r) for r in group} - {None})}
            if any(v is not None for v in points.values()):
                line(axis, points, sweep_name(method), i)

    def dims(r):
        return r["rope"].get("interpolated_dims")

    by_dims, scratch = len({dims(r) for r in rows} - {None}) > 1, factors == [1]
    columns = 1 if by_dims else 2 if scratch else 3
    figure, axes = plt.subplots(len(factors), columns, figsize=(5 * columns, 3.7 * len(factors) + 0.6), layout="constrained", squeeze=False)
    for factor, panels in zip(factors, axes):
        target = next(r["window"] for r in rows if r["factor"] == factor)
        if scratch:
            for i, method in enumerate(methods):
                group = [r for r in rows if r["method"] == method]
                line(panels[0], {n: mean(group, lambda r: r["perplexity"][kind][str(n)]) for n in lengths}, sweep_name(method), i)
                line(panels[1], {n: mean(group, lambda r: r["passkey"].get(str(n))) for n in lengths}, sweep_name(method), i)
            for axis, words in zip(panels, ("window", "prompt length")):
                length_axis(axis, lengths, f"{words} (tokens)")
                mark_windows(axis, {"L": result["original_window"]})
            panels[1].set_ylabel("passkey accuracy (higher is better)")
            panels[1].set_ylim(-0.04, 1.04)
        elif by_dims:
            chosen = [m for m in methods if any(r["method"] == m and dims(r) is not None for r in rows)]
            for i, (label, trained) in enumerate((("untrained", False), ("fine-tuned", True))):
                group = [r for r in rows if r["method"] in chosen and r["factor"] == factor and bool(r["steps"]) == trained]
                last = max((r["steps"] for r in group), default=0)
                middle = {d: mean([r for r in group if (dims(r), r["steps"]) == (d, last)], at_target) for d in map(dims, group)}
                line(panels[0], middle, label, i)
            panels[0].set_xlabel("interpolated dimensions")
        else:
            panel(panels[0], factor, lambda r: r["steps"], at_target)
            measured = {m: {r["steps"] for r in rows if r["method"] == m and "k_max" in r} for m in methods}
            panel(panels[1], factor, lambda r: r["steps"], lambda r: r.get("k_max"), [m for m in methods if len(measured[m]) > 2] or methods)
            panels[0].set_xlabel("fine-tuning steps")
            panels[1].set_xlabel("fine-tuning steps")
            panels[1].set_ylabel("k_max (tokens, higher is better)")
            panel(panels[2], factor, lambda r: None if r["steps"] else r.get("disturbance"), at_target)
            panels[2].set_xscale("log")
            panels[2].set_xlabel("disturbance of the rotary angles (nats), untrained")
            perplexity_axis(panels[2])
        for axis in panels:
            axis.grid(alpha=0.3)
            axis.set_title("" if scratch else f"s = {factor:g}, L' = {target}", fontsize=10)
        perplexity_axis(panels[0])
    handles = dict(zip(*reversed([axes[0, 0].get_legend_handles_labels()[i] for i in (0, 1)])))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(6, len(handles)), frameon=False)
    return save(figure, path)


def sweep_name(method):
    """A method of a sweep, a name or JSON, in a legend."""
    if not method.startswith("{"):
        return {"default": "plain RoPE", "linear": "PI"}.get(method, method)
    rope = json.loads(method)
    name = rope.pop("rope_type")
    return " ".join(["RoPE" if name == "default" else name, *(f"{k.replace('_', ' ')} {v}" for k, v in rope.items())])


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


def plot_theory(result, path):
    """theory.py: six figures, theory-fit.png and so on, named beside `path`. Returns their files as one text."""
    theory, path = result["theory"], Path(path)
    draw = {"score": plot_score, "fit": plot_fit, "bounds": plot_bounds, "extrapolation": plot_extrapolation, "angles": plot_angles,
            "disturbance": plot_disturbance}
    return ", ".join(str(function(theory, path.with_name(f"{path.stem}-{name}.png"))) for name, function in draw.items())


def plot_score(theory, path):
    """The score of a key equal to its query against distance, a line for each method."""
    scores, names = theory["scores"], {"default": "plain RoPE", "linear": "PI, s = 4", "ntk": "NTK-aware, s = 4", "yarn": "YaRN, s = 4"}
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for i, (name, values) in enumerate(scores["curves"].items()):
        axis.plot(scores["x"], values, label=names.get(name, name), **{**style(i), "marker": None, "linewidth": 1.3})
    axis.set_xscale("symlog", base=2, linthresh=1)
    ticks = [0, 1, 4, 16, 64, 256, 1024, 4096, 16384]
    axis.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axis.set_xlim(0, scores["reach"] * scores["window"])
    axis.axhline(0, color="black", linewidth=0.8)
    mark_windows(axis, {"L": scores["window"]})
    axis.set_xlabel("distance x (tokens)")
    axis.set_ylabel("score of a key equal to its query\n(units of the score at distance 0)")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return save(figure, path)


def plot_fit(theory, path):
    """A curve fitted to noise in [0, L), read on to 2L, and close up: Figure 2 of Position Interpolation, with a ridge beside it."""
    fit = theory["fit"]
    L, start = fit["window"], fit["near_start"]
    figure, axes = plt.subplot_mosaic([["inside", "beyond"], ["near", "near"]], figsize=(9.5, 5.3), layout="constrained")
    axes["inside"].plot(range(L), fit["points"], ".", color=COLOURS[6], markersize=2, alpha=0.7, label="noise to be fitted", zorder=1)
    axes["near"].plot(range(start, start + 51), fit["points"][start:start + 51], ".", color=COLOURS[6], markersize=8)
    for curve, colour, width, dashes in zip(fit["curves"], (COLOURS[3], COLOURS[2]), (1.6, 1.2), ("-", "--")):
        look = {"color": colour, "linewidth": width, "linestyle": dashes, "label": f"fitted curve a(x), ridge {curve['ridge']:g}"}
        far = [fit["far_step"] * n for n in range(len(curve["far"]))]
        inside = sum(x < L for x in far)
        if curve is fit["curves"][0]:  # the others lie upon it
            axes["inside"].plot(far[:inside], curve["far"][:inside], **{**look, "linewidth": 0.7, "linestyle": "-"})
        axes["beyond"].plot(far, curve["far"], **{**look, "linewidth": 0.9, "linestyle": "-"})
        axes["near"].plot([start + fit["near_step"] * n for n in range(len(curve["near"]))], curve["near"], **look)
    axes["inside"].set_title("fitted in the window, where all ridges give one curve", fontsize=10)
    axes["beyond"].set_title("the same curves beyond it: note the logarithmic axis", fontsize=10)
    axes["near"].set_title("between the integers (dashed)", fontsize=10)
    axes["beyond"].set_yscale("symlog", linthresh=1)
    axes["beyond"].set_yticks([-1000, -10, 0, 10, 1000], ["−1,000", "−10", "0", "10", "1,000"])
    axes["beyond"].yaxis.set_minor_locator(NullLocator())
    mark_windows(axes["beyond"], {"": L})
    axes["near"].vlines(range(start, start + 51), 0, 1, transform=axes["near"].get_xaxis_transform(), color="grey", linewidth=0.5,
                        linestyle=(0, (4, 3)), zorder=0)
    axes["near"].set_xlim(start, start + 50)
    for name, axis in axes.items():
        axis.set_xlabel("distance x (tokens)")
        axis.set_ylabel("score a(x)")
        if name != "near":
            axis.set_xlim(0, L if name == "inside" else 2 * L)
            axis.set_xticks([0, L // 2, L] + ([] if name == "inside" else [L + L // 2, 2 * L]))
            axis.grid(alpha=0.3)
    handles, labels = (first[:1] + second for first, second in zip(axes["inside"].get_legend_handles_labels(),
                                                                   axes["beyond"].get_legend_handles_labels()))
    legend = figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    for handle in legend.legend_handles:
        handle.set(linewidth=1.8, markersize=6)
    return save(figure, path)


def plot_bounds(theory, path):
    """How far a score strays from the straight line between two integers: what can happen, and what Theorem 2.1 promises."""
    rows = theory["bounds"]["rows"]
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for i, key, label in ((3, "printed", "bound as printed"), (0, "search", "found by search"), (2, "corrected", "corrected bound")):
        line(axis, {r["head_dim"]: r[key] for r in rows}, label, i)
    length_axis(axis, [r["head_dim"] for r in rows], "head_dim D")
    axis.set_yscale("log")
    axis.set_yticks([0.05, 0.1, 0.2, 0.5], ["0.05", "0.1", "0.2", "0.5"])
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_ylabel("deviation half way between\ntwo integers (units of max |h|)")
    axis.legend(frameon=False)
    return save(figure, path)


def plot_extrapolation(theory, path):
    """B(x)/D: the bound on extrapolation that Position Interpolation compares itself with. Figure 5 there, and for narrower heads."""
    bounds = theory["bounds"]
    rows = sorted(bounds["rows"], key=lambda row: -row["head_dim"])
    figure, axes = plt.subplots(math.ceil(len(rows) / 2), 2, figsize=(9.5, 5), layout="constrained", sharex=True, sharey=True,
                                squeeze=False)
    for axis, row in zip(axes.flat, rows):
        values = bounds["B"][str(row["head_dim"])]
        x = [bounds["every"] * n for n in range(len(values))]
        for limit, colour in ((max, 2), (min, 3)):  # what is above 1 in one colour, what is below in another
            axis.plot(x, [limit(v, 1) for v in values], color=COLOURS[colour], linewidth=0.7)
        axis.plot(row["B_argmin"], row["B_min"], "v", color="black", markersize=6)
        axis.annotate(f"smallest {row['B_min']:.3g}", (row["B_argmin"], row["B_min"]), xytext=(0, -11), textcoords="offset points",
                      ha="right", va="top")
        axis.axhline(1, color="black", linewidth=1.2)
        axis.set_title(f"D = {row['head_dim']}: {row['B_below_1']:,} of {bounds['window']:,} distances below 1 (orange)", fontsize=10,
                       loc="left")
        axis.set_yscale("log")
        axis.set_ylim(0.1, 30)
        axis.set_yticks([0.3, 1, 3, 10], ["0.3", "1", "3", "10"])
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_xlim(0, bounds["window"])
        axis.set_xticks([n * bounds["window"] // 4 for n in range(5)])
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("distance x (tokens)")
    for axis in axes[:, 0]:
        axis.set_ylabel("B(x) / D")
    return save(figure, path)


def plot_angles(theory, path, degrees=60):
    """How often a pair shows each angle: in the window, and at twice its length interpolated and left alone. What is new stands out."""
    angles = theory["angles"]
    bins, L = round(degrees / 360 * angles["bins"]), angles["window"]
    looks = {True: {"facecolor": COLOURS[2], "edgecolor": "white"}, False: {"facecolor": COLOURS[3], "edgecolor": "white", "hatch": "////"}}
    rows = {"original": f"original, {L:,} positions", "interpolated": f"interpolated, {2 * L:,}", "left_alone": f"left alone, {2 * L:,}"}
    figure, axes = plt.subplots(3, len(angles["histograms"]), figsize=(9.5, 5.3), layout="constrained", sharex=True, sharey="col",
                                squeeze=False)
    for column, pair in enumerate(angles["histograms"]):
        seen = [share > 0 for share in pair["original"][:bins]]
        for axis, (name, label) in zip(axes[:, column], rows.items()):
            for known, look in looks.items():
                heights = [100 * share if s is known else 0 for share, s in zip(pair[name], seen)]
                axis.stairs(heights, [degrees * k / bins for k in range(bins + 1)], fill=True, linewidth=0, **look)
            axis.set_title(label, fontsize=10, loc="left")
        axes[0, column].set_title(f"pair {pair['pair']}, {pair['fraction']} of a turn per token\n{rows['original']}", fontsize=10,
                                  loc="left")
        axes[-1, column].set_xlabel(f"angle (degrees, the first {degrees} of 360)")
    for axis in axes.flat:
        axis.set_xlim(0, degrees)
    for axis in axes[:, 0]:
        axis.set_ylabel("% of positions")
    patches = [plt.Rectangle((0, 0), 1, 1, **look) for look in looks.values()]
    figure.legend(patches, ["angles that training showed", "angles that are new"], loc="outside upper center", ncols=2, frameon=False)
    return save(figure, path)


def plot_disturbance(theory, path):
    """How far each pair's angles move away from those of training, left alone and interpolated; a bar below marks the better way."""
    angles = theory["angles"]
    figure, axes = plt.subplots(len(angles["stretches"]), 1, figsize=(9.5, 5.3), layout="constrained", sharex=True, squeeze=False)
    low = min(v for stretch in angles["stretches"] for v in stretch["left_alone"] + stretch["interpolated"] if v > 1e-9) / 12
    for axis, stretch in zip(axes[:, 0], angles["stretches"]):
        for key, label, i in (("left_alone", "left alone (extrapolation)", 3), ("interpolated", "interpolated", 2)):
            axis.plot(range(len(stretch[key])), [v if v > low else math.nan for v in stretch[key]], label=label,
                      **{**style(i), "markersize": 4, "linewidth": 1.2})
        axis.set_yscale("log")
        axis.set_ylim(low, 4)
        for i, value in enumerate(stretch["interpolated"]):
            if value <= low:  # a pair that keeps its angles exactly has no place on a logarithmic axis
                axis.annotate(f"pair {i}: 0", (i, low * 4), ha="center", color=COLOURS[2])
        axis.bar(stretch["chosen"], [low * 2.5] * len(stretch["chosen"]), width=1, color=COLOURS[2], alpha=0.55,
                 label="pairs that are interpolated")
        axis.axvline(angles["slow_from"] - 0.5, color="grey", linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        axis.set_title(f"L' = {stretch['factor']}L: {len(stretch['chosen'])} of {len(stretch['left_alone'])} pairs are interpolated",
                       fontsize=10, loc="left")
        axis.set_ylabel("disturbance (nats)")
        axis.set_yticks([1e-6, 1e-4, 1e-2, 1])
        axis.yaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3)
        axis.set_xlim(-1, len(stretch["left_alone"]))
    axes[0, 0].annotate("never a whole turn in L", (angles["slow_from"] - 0.5, 1), xycoords=("data", "axes fraction"), xytext=(4, 3),
                        textcoords="offset points")
    axes[-1, 0].set_xlabel("pair i, from the fastest to the slowest")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
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
    figures, perplexities, contexts = [], {}, {}  # figures: (function, what it draws, file of the figure, file it comes from)
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
        elif "methods" in result:
            figures.append((plot_compare, result, target, path))
        elif "plan" in result:
            figures.append((plot_sweep, result, target, path))
        elif "rows" in result:
            figures.append((plot_finetune, result, target, path))
        elif "accuracy_by_depth" in result:
            figures.append((plot_passkey, result, target, path))
        elif "theory" in result:
            figures.append((plot_theory, result, target, path))
        elif "nll_by_context" in result:
            contexts[str(path)], by_context = result, target.with_name("context.png")
        elif "perplexity" in result:
            perplexities[str(path)], together = result, target.with_name("perplexity.png")
        else:
            print(f"{path}: nothing to draw", file=sys.stderr)
    if contexts:
        figures.append((plot_context, list(contexts.values()), by_context, ", ".join(contexts)))
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
