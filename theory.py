"""Why interpolation works where extrapolation fails: `python theory.py` prints the numbers beside those of the papers.

The score of one query and one key is a curve over their distance x, a sum of D/2 waves (docs/maths.md, sections 2 and 3):

    a(x) = Re sum_i h_i e^(j x theta_i),   theta_i = base^(-2i/D),   h_i = q_i conj(k_i).

Training shows a model this curve at 0, 1, .., L-1. Extrapolation reads it beyond L, interpolation between the integers. Three
experiments follow: a curve fitted in the window and read outside of it, bounds on what h can do, and which angles are new at all.

    D  head_dim    P  pairs = D/2    N  positions or distances    L  window    s  stretch, L' = sL    eta = max |h_i|

Everything is numpy in float64, unless a precision is named. Nothing here needs a model, and rope.py builds on it.
"""
import math
from fractions import Fraction

import numpy as np

# What the papers print: the distributional paper's Table 3 in 1e-3, window 4096, for stretches 2 and 4
TABLE_3 = {2: {"linear": 24.08, "yarn": 25.55, "chosen": 6.71}, 4: {"linear": 33.67, "yarn": 35.44, "chosen": 22.92}}
MODELS = [("LLaMA 1", 128, 1e4, 2048), ("LLaMA 2", 128, 1e4, 4096), ("LLaMA 3 8B", 128, 5e5, 8192), ("tiny", 64, 1e4, 256)]

# ---------------------------------------------------------------------------------------------------------------------
# The curve


def rope_frequencies(head_dim, base=10000.0):
    """theta_i = base^(-2i/D) in radians per token, [P]. (Su et al. 2021, arXiv 2104.09864, section 3.2)"""
    return base ** (-np.arange(0, head_dim, 2) / head_dim)


def score_curve(h, theta, x):
    """a(x) = Re sum_i h_i e^(j x theta_i): h [P] complex, theta [P], x [N] -> [N]. (Chen et al. 2023, arXiv 2306.15595, section 2)"""
    return (np.exp(1j * np.multiply.outer(x, theta)) @ h).real


def slow_pairs(theta, length):
    """The pairs whose wavelength 2 pi / theta_i exceeds `length`: they never complete a turn in it."""
    return np.flatnonzero(2 * np.pi / theta > length)


def critical_dimension(head_dim, length, base=10000.0):
    """2 ceil(D/2 log_base(length / 2 pi)): how many dimensions belong to pairs that complete a turn. (Liu et al. 2023, arXiv 2310.05209)"""
    return 2 * math.ceil(head_dim / 2 * math.log(length / (2 * math.pi), base))


def first_negative(theta, length):
    """The first distance below `length` at which sum_i cos(x theta_i) < 0, or None. From there on a key like the query counts on average
    less than a random one. (Men et al. 2024, arXiv 2405.14591: the base bounds the window)"""
    below = np.flatnonzero(np.cos(np.multiply.outer(np.arange(length), theta)).sum(axis=1) < 0)
    return int(below[0]) if len(below) else None


# ---------------------------------------------------------------------------------------------------------------------
# A fit that explodes: Figure 2 of Chen et al.


def design_matrix(x, theta, dtype=np.float64):
    """X = [sin x theta, cos x theta]: x [N] -> [N, D]. X w is a(x) with h_i = w_{P+i} - j w_i; angles in the given precision, too."""
    angles = np.multiply.outer(x.astype(dtype), theta.astype(dtype))
    return np.concatenate((np.sin(angles), np.cos(angles)), axis=1)


def fit_curve(y, theta, ridge=0.0, dtype=np.float64):
    """The curve through y at distances 0 .. L-1: w of (X'X + ridge I) w = X'y, for y [L] or [L, curves]. (Chen et al., appendix C.1)

    In terms of the singular values S_k of X, noise of size 1 enters w as S_k / (S_k^2 + ridge). Dozens of the S_k are almost 0: sums of
    slow waves that cancel within the window. Without a ridge they are weighted by 1 / S_k, so that rounding decides how large w gets.
    """
    X = design_matrix(np.arange(len(y)), theta, dtype)
    return np.linalg.solve(X.T @ X + ridge * np.eye(X.shape[1], dtype=dtype), X.T @ y.astype(dtype))


def fit_sizes(theta, length=2048, ridge=0.0, dtype=np.float64, seeds=range(5)):
    """Largest |a| of curves fitted to standard normal noise, a list over seeds each: `inside` at the integers of [0, L), `between` them at
    the half-integers, `beyond` on [L, 2L); and the largest |coefficient|."""
    w = fit_curve(noise(length, seeds), theta, ridge, dtype)
    where = {"inside": np.arange(length), "between": np.arange(length - 1) + 0.5, "beyond": np.arange(length, 2 * length)}
    sizes = {name: np.abs(design_matrix(x, theta, dtype) @ w).max(axis=0) for name, x in where.items()}
    return {name: [float(v) for v in values] for name, values in {**sizes, "coefficient": np.abs(w).max(axis=0)}.items()}


def noise(length, seeds):
    """The targets to fit, [length, seeds]."""
    return np.stack([np.random.default_rng(seed).standard_normal(length) for seed in seeds], axis=1)


# ---------------------------------------------------------------------------------------------------------------------
# Bounds: Theorem 2.1 of Chen et al. In units of eta, at the fraction r of the way from one integer to the next.


def printed_bound(head_dim, base=10000.0, r=0.5):
    """D r (1-r) / (8 ln base), the bound on |a(x) - straight line| as printed (eq. 5 and 7). It does not hold: see corrected_bound."""
    return head_dim * r * (1 - r) / (8 * math.log(base))


def corrected_bound(theta, r=0.5):
    """r (1-r) / 2 sum_i theta_i^2. The paper replaces that sum by D / (4 ln base), which is smaller and not larger. (docs/maths.md)"""
    return r * (1 - r) / 2 * (theta**2).sum()


def gaps(theta, x):
    """c_i(x) = e^(j x theta_i) - (1-r) e^(j n theta_i) - r e^(j (n+1) theta_i), n = floor(x), r = x - n: x [N] -> [N, P] complex.

    a(x) leaves the straight line through its neighbours at n and n + 1 by Re sum_i h_i c_i(x)."""
    n = np.floor(x)
    r, here = (x - n)[:, None], np.exp(1j * np.multiply.outer(n, theta))
    return np.exp(1j * np.multiply.outer(x, theta)) - here * (1 - r + r * np.exp(1j * theta))


def worst_deviation(theta, x):
    """The largest deviation that any h with |h_i| <= 1 has at each x, [N]: sum_i |c_i(x)|, attained by h_i = conj(c_i) / |c_i|.

    |c_i| knows r alone. At r = 1/2 it is 1 - cos(theta_i / 2), attained by h_i = e^(-j theta_i / 2) at x = 1/2, the counter-example."""
    return np.abs(gaps(theta, x)).sum(axis=1)


def search_deviation(theta, length=4096, restarts=16, sweeps=80, seed=0):
    """The same by trial: change one h_i or x at random, in ever smaller steps, and keep what deviates more. The best of all restarts."""
    rng, P = np.random.default_rng(seed), len(theta)

    def around(center, step):  # a complex normal step from there, back into the unit disc
        z = center + step * (rng.standard_normal(center.shape) + 1j * rng.standard_normal(center.shape))
        return z / np.maximum(1, np.abs(z))

    h, x = around(np.zeros((restarts, P)), 1), rng.uniform(0, length, restarts)
    n, c = np.floor(x), gaps(theta, x)
    for step in 0.9 ** np.arange(sweeps):
        for i in range(P):  # only term i changes, so that it decides
            trial = around(h[:, i], step)
            h[:, i] = np.where(((trial - h[:, i]) * c[:, i]).real > 0, trial, h[:, i])
        moved = np.clip(x + step * rng.standard_normal(restarts), n, n + 1 - 1e-9)
        better = (h * gaps(theta, moved)).real.sum(axis=1) > (h * c).real.sum(axis=1)
        x = np.where(better, moved, x)
        c = gaps(theta, x)
    return float((h * c).real.sum(axis=1).max())


def extrapolation_bound(theta, x):
    """B(x) = sum_k |sum_{i <= k} e^(j x theta_i)|: x [N] -> [N]. |a(x)| <= 2 eta B(x). (Su et al., section 3.4.3; Chen et al., Figure 5)"""
    return np.abs(np.exp(1j * np.multiply.outer(x, theta)).cumsum(axis=1)).sum(axis=1)


# ---------------------------------------------------------------------------------------------------------------------
# The distributional view (DPRoPE, Wu et al., EMNLP 2024): how often does a pair show each angle?


def rotary_histogram(theta, length, bins=360):
    """How the positions 0 .. length-1 share the circle: [P] -> [P, bins]; row i is the share of those whose angle m theta_i mod 2 pi lies
    in [2 pi k / bins, 2 pi (k+1) / bins). Each row sums to 1. (DPRoPE, eq. 5-7)"""
    positions, shares = np.arange(length), np.empty((len(theta), bins))
    several = max(1, 2**19 // length)                                                # pairs at a time, so that 128k positions fit, too
    for first in range(0, len(theta), several):
        angles = np.multiply.outer(theta[first:first + several], positions) % (2 * np.pi)
        k = np.minimum((angles * (bins / (2 * np.pi))).astype(np.int64), bins - 1)  # rounding may reach 2 pi itself
        k += bins * np.arange(len(k))[:, None]
        shares[first:first + several] = np.bincount(k.ravel(), minlength=bins * len(k)).reshape(-1, bins) / length
    return shares


def disturbance(theta, new_theta, length, new_length, bins=360, printed=False, epsilon=1e-12):
    """How far the angles of `new_theta` at new_length positions are from those that training showed, in nats, [P]:

        sum_k F_k ln((F_k + epsilon) / (F'_k + epsilon)),   F of theta over length positions, F' of new_theta over new_length.

    This is KL(original || extended), the order that reproduces Table 3 of the paper. Eq. 8 prints the other one, `printed=True`; it
    diverges as epsilon -> 0, as any angle that training never showed is infinitely surprising. Here epsilon matters only where F' is 0.
    """
    p, q = rotary_histogram(theta, length, bins), rotary_histogram(new_theta, new_length, bins)
    if printed:
        p, q = q, p
    return (p * np.log((p + epsilon) / (q + epsilon))).sum(axis=1)


def both_ways(theta, factor, length, bins=360, **kwargs):
    """Disturbance of each pair at s * length positions: (left alone D_E [P], interpolated D_I [P]). For whole s at most ln s."""
    return tuple(disturbance(theta, new, length, round(factor * length), bins, **kwargs) for new in (theta, theta / factor))


def interpolated_pairs(left_alone, interpolated, threshold=0.0, pairs=None):
    """Which pairs to interpolate, [P] of bool: those with D_E > D_I + t (DPRoPE, eq. 9), or the `pairs` with the largest D_E - D_I.

    A tie is left alone: where a pair is so slow that it stays in one bin, both are 0. The paper's n-hat counts dimensions, 2 * pairs."""
    gain = left_alone - interpolated
    if pairs is None:
        return gain > threshold
    return np.isin(np.arange(len(gain)), np.argsort(-gain, kind="stable")[:pairs])


def turn_fraction(theta, bins=360):
    """The fraction p/q of a turn, q <= bins, that one pair makes per token, but for a drift: (Fraction, drift in bins per token).

    The pair visits q angles and comes back. At theta / 2 it makes p/2q: the same q angles where p is even, 2q angles where p is odd, half
    of them new. This decides which of the fast pairs dislike interpolation."""
    turn = theta / (2 * math.pi)
    fraction = Fraction(turn).limit_denominator(bins)
    return fraction, (turn - float(fraction)) * bins


# ---------------------------------------------------------------------------------------------------------------------
# The experiments, each a dict that goes to the tables, to the JSON file and so to plot.py


def measure_models():
    """Which pairs of known models never complete a turn in the window."""
    rows = []
    for name, head_dim, base, length in MODELS:
        theta = rope_frequencies(head_dim, base)
        rows.append({"model": name, "head_dim": head_dim, "base": base, "window": length, "slow_pairs": len(slow_pairs(theta, length)),
                     "critical_dimension": critical_dimension(head_dim, length, base),
                     "first_negative": first_negative(theta, 4 * length)})
    return rows


def measure_scores(methods, length=4096, reach=4):
    """The score of a key equal to its query, averaged over content, against its distance: a(x) of h_i = 1 over D/2, from 0 to reach * length.
    methods: {name: frequencies [P]}."""
    table = [0, 1, 2, 4, 10, 100, 1000, *(n * length for n in (1, 2, 4) if n <= reach)]
    x = np.unique(np.concatenate([np.arange(16), np.geomspace(16, reach * length, 400).round()])).astype(int)
    curves = {name: (score_curve(np.ones(len(theta)), theta, x) / len(theta)) for name, theta in methods.items()}
    rows = {name: score_curve(np.ones(len(theta)), theta, np.array(table)) / len(theta) for name, theta in methods.items()}
    # The head of docs/maths.md, section 3: all waves peak at distance 1, and under PI with s = 2, not retrained, at 2.
    theta, near = rope_frequencies(32), np.arange(4)
    head = {name: digits(score_curve(np.exp(-1j * theta), t, near)) for name, t in (("default", theta), ("linear", theta / 2))}
    return {"window": length, "reach": reach, "x": x.tolist(), "curves": {name: digits(c) for name, c in curves.items()},
            "table_x": table, "table": {name: digits(r) for name, r in rows.items()}, "head": head}


def measure_fit(length=2048, curve_ridges=(1e-8, 1.0)):
    """Chen et al.'s Figure 2: sizes for several ridges and precisions, and the curves of seed 0 to draw."""
    theta = rope_frequencies(128)
    runs = [(np.float32, r) for r in (0, 1e-3, 1, 10)] + [(np.float64, r) for r in (0, 1e-8, 1e-6, 1e-3, 1, 10)]
    rows = [{"precision": np.dtype(dtype).name, "ridge": ridge, **fit_sizes(theta, length, ridge, dtype)} for dtype, ridge in runs]
    values = np.linalg.svd(design_matrix(np.arange(length), theta), compute_uv=False)
    y, start = noise(length, [0])[:, 0], min(25, length // 4)
    far, near = np.arange(0, 2 * length, 2), np.arange(start, start + 50, 0.125)
    curves = []
    for ridge in curve_ridges:
        w = fit_curve(y, theta, ridge)
        curves.append({"ridge": ridge, "far": digits(design_matrix(far, theta) @ w), "near": digits(design_matrix(near, theta) @ w)})
    return {"window": length, "head_dim": 128, "condition": float(values[0] / values[-1]), "singular_values": digits(values, 3),
            "rows": rows, "points": digits(y, 3), "far_step": 2, "near_start": start, "near_step": 0.125, "curves": curves}


def measure_bounds(head_dims=(16, 32, 64, 128), base=10000.0, length=4096, every=2):
    """Theorem 2.1 as printed and corrected, what h can really do, and the bound on extrapolation beside it; all in units of eta."""
    rows, lines, x = [], {}, np.arange(length)
    for head_dim in head_dims:
        theta = rope_frequencies(head_dim, base)
        example = (np.exp(-0.5j * theta) * gaps(theta, np.array([0.5]))[0]).real.sum()
        B = extrapolation_bound(theta, x) / head_dim
        rows.append({"head_dim": head_dim, "printed": printed_bound(head_dim, base), "corrected": float(corrected_bound(theta)),
                     "example": float(example), "worst": float(worst_deviation(theta, np.linspace(0, 1, 1001)).max()),
                     "search": search_deviation(theta, length), "B_min": float(B.min()), "B_argmin": int(B.argmin()),
                     "B_mean": float(B.mean()), "B_below_1": int((B < 1).sum())})
        lines[str(head_dim)] = digits(B[::every])
    return {"base": base, "window": length, "rows": rows, "every": every, "B": lines}


def measure_angles(yarns, length=4096, head_dim=128, drawn=(6, 22)):
    """Disturbance of every pair and of whole methods at stretches 2 and 4, and histograms of two pairs at stretch 2. yarns: {stretch:
    YaRN's frequencies [P]}."""
    theta, stretches = rope_frequencies(head_dim), []
    for factor, paper in TABLE_3.items():
        (left_alone, interpolated), (E, I) = both_ways(theta, factor, length), both_ways(theta, factor, length, printed=True)
        yarn = yarns[factor]
        chosen, few = (interpolated_pairs(left_alone, interpolated, pairs=n) for n in (None, {2: 40, 4: 32}[factor]))
        means = {"none": left_alone, "linear": interpolated, "yarn": disturbance(theta, yarn, length, factor * length),
                 "chosen": np.where(chosen, interpolated, left_alone), "chosen_as_trained": np.where(few, interpolated, left_alone)}
        printed = {"none": E, "linear": I, "yarn": disturbance(theta, yarn, length, factor * length, printed=True)}
        stretches.append({"factor": factor, "paper": paper, "mean": {name: 1e3 * float(d.mean()) for name, d in means.items()},
                          "mean_printed": {name: 1e3 * float(d.mean()) for name, d in printed.items()},
                          "chosen": np.flatnonzero(chosen).tolist(), "same_set_printed": bool((chosen == interpolated_pairs(E, I)).all()),
                          "left_alone": digits(left_alone, 6), "interpolated": digits(interpolated, 6)})
    histograms = []
    for i in drawn:
        fraction, drift = turn_fraction(theta[i])
        shares = {"original": (theta[i], length), "interpolated": (theta[i] / 2, 2 * length), "left_alone": (theta[i], 2 * length)}
        histograms.append({"pair": i, "fraction": str(fraction), "drift_bins": drift * length,
                           **{name: digits(rotary_histogram(np.array([t]), n)[0]) for name, (t, n) in shares.items()}})
    return {"window": length, "head_dim": head_dim, "bins": 360, "stretches": stretches, "histograms": histograms,
            "slow_from": int(slow_pairs(theta, length)[0])}


def digits(values, n=4):
    """Rounded to n significant digits: what a figure needs, and a file of readable size."""
    return [float(f"{v:.{n}g}") for v in values]


# ---------------------------------------------------------------------------------------------------------------------
# The tables


def ranges(numbers):
    """Rising numbers in words: [28, 30, 31, 32] -> '28, 30-32'."""
    runs = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def table(title, head, rows, note=""):
    """Print rows of text under a head, columns as wide as their widest entry."""
    cells = [head] + [[str(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(title)
    for row in cells:
        print("  " + "   ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip())
    print(f"  {note}\n" if note else "")


def show(theory):
    """All tables, from what the JSON file holds."""
    table("Pairs that never complete a turn in the window, and where keys like the query start to count less than random ones",
          ["model", "D", "base", "L", "slow pairs", "critical dimension", "sum cos(x theta_i) < 0 from x ="],
          [[m["model"], m["head_dim"], f"{m['base']:,.0f}", m["window"], f"{m['slow_pairs']} of {m['head_dim'] // 2}",
            m["critical_dimension"], m["first_negative"] or f"none below {4 * m['window']}"] for m in theory["models"]])

    scores = theory["scores"]
    table(f"Score of a key equal to its query by distance, in units of the score at 0 (D = 128, base 10,000, L = {scores['window']}, s = 4)",
          ["method"] + [f"x = {x}" for x in scores["table_x"]],
          [[name] + [f"{v:.3f}" for v in row] for name, row in scores["table"].items()],
          "a head that looks one token back, D = 32, at distances 0, 1, 2, 3: " + "; under PI, s = 2: ".join(
              ", ".join(f"{v:.2f}" for v in row) for row in scores["head"].values()))

    fit, span = theory["fit"], lambda values, form: f"{min(values):{form}} .. {max(values):{form}}"
    table(f"A curve fitted to noise in [0, {fit['window']}), largest |a| over five seeds (Chen et al., Figure 2: about 1 inside, beyond L "
          "more than 8000)",
          ["precision", "ridge", "at integers", "between them", "beyond L, up to 2L", "largest coefficient"],
          [[r["precision"], f"{r['ridge']:g}", span(r["inside"], ".2f"), span(r["between"], ".2f"), span(r["beyond"], ".3g"),
            span(r["coefficient"], ".2g")] for r in fit["rows"]],
          f"singular values of X: from {fit['singular_values'][0]:.0f} down to {fit['singular_values'][-1]:.0e} "
          f"({sum(v > 1 for v in fit['singular_values'])} of {len(fit['singular_values'])} above 1): condition {fit['condition']:.0e}, "
          "so rounding sizes the rows with ridge 0")

    rows = theory["bounds"]["rows"]
    table("Half way between two integers: largest distance from the straight line, in units of max |h_i| (Chen et al., Theorem 2.1)",
          ["D", "printed bound", "counter-example", "exceeds by", "worst of all h", "found by search", "corrected bound"],
          [[r["head_dim"], f"{r['printed']:.6f}", f"{r['example']:.6f}", f"{100 * (r['example'] / r['printed'] - 1):.1f} %",
            f"{r['worst']:.6f}", f"{r['search']:.6f}", f"{r['corrected']:.6f}"] for r in rows])
    table(f"Extrapolation: |a(x)| <= 2 max|h_i| B(x), for x below {theory['bounds']['window']} (Chen et al., Figure 5: B(x)/D >= 1)",
          ["D", "smallest B(x)/D", "at x =", "mean", "positions below 1", "2D / printed (paper: 600)", "2D / corrected",
           "(D/2) / corrected"],
          [[r["head_dim"], f"{r['B_min']:.4f}", r["B_argmin"], f"{r['B_mean']:.3f}", r["B_below_1"],
            f"{2 * r['head_dim'] / r['printed']:.1f}", f"{2 * r['head_dim'] / r['corrected']:.1f}",
            f"{r['head_dim'] / 2 / r['corrected']:.1f}"] for r in rows],
          "|a(x)| <= D/2 max|h_i| holds everywhere and is attained, so the last column is what remains of the first")

    angles, names = theory["angles"], {"none": "no change", "linear": "PI", "yarn": "YaRN", "chosen": "the less disturbed of both",
                                       "chosen_as_trained": "  the same with 40 / 32 pairs"}
    stretches, form = angles["stretches"], lambda d, name: f"{d[name]:.2f}" if name in d else "-"
    table(f"Disturbance of the rotary angles, mean of all pairs in 1e-3 nats, window {angles['window']} (DPRoPE, Table 3)",
          ["method"] + [f"s = {s['factor']} {what}" for s in stretches for what in ("paper", "here", "Eq. 8 as printed")],
          [[label] + [form(s[key], name) for s in stretches for key in ("paper", "mean", "mean_printed")] for name, label in names.items()],
          "\n  ".join(f"interpolated at s = {s['factor']}: {len(s['chosen'])} pairs, {ranges(s['chosen'])}" for s in stretches))
    table("Why pair 6 is interpolated at s = 2 and pair 22 is not",
          ["pair", "turns per token", "drift over L", "D left alone", "D interpolated"],
          [[h["pair"], h["fraction"], f"{h['drift_bins']:.1f} bins"] +
           [f"{stretches[0][d][h['pair']]:.4f}" for d in ("left_alone", "interpolated")] for h in angles["histograms"]],
          "half of an even numerator are the same angles; half of an odd one are twice as many, and ln 2 = 0.6931")


def main(argv=None):
    from cli import Parser, command_line, versions, write_json  # here, so that the module itself needs numpy alone
    parser = Parser(description=__doc__)
    parser.add_argument("--out", default="results/theory.json", metavar="JSON", help="result file, for plot.py [results/theory.json]")
    flags = parser.parse_args(argv)
    from rope import RopeConfig, inv_freq  # rope.py imports this module; only as a script does it look at what the methods give

    def frequencies(name, factor, window=4096):
        config = {"rope_type": name, "factor": factor, "original_max_position_embeddings": window}
        return inv_freq(RopeConfig.from_dict(config), 128)[0].double().numpy()
    theory = {"models": measure_models(), "scores": measure_scores({n: frequencies(n, 4) for n in ("default", "linear", "ntk", "yarn")}),
              "fit": measure_fit(), "bounds": measure_bounds(), "angles": measure_angles({s: frequencies("yarn", s) for s in TABLE_3})}
    show(theory)
    write_json(flags.out, {"command": command_line(), "versions": versions(), "theory": theory})
    print(f"wrote {flags.out}; python plot.py {flags.out} --out docs/figures draws it")


if __name__ == "__main__":
    from cli import run
    run(main)
