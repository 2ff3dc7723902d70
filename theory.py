"""Why interpolation works where extrapolation fails, in numbers.

    python theory.py            prints them beside those of the papers, and writes them for plot.py

The score of one query and one key is a curve over their distance x, a sum of D/2 waves:

    a(x) = Re sum_i h_i e^(j x theta_i),    theta_i = base^(-2i/D),    h_i = q_i conj(k_i).

Training shows a model this curve at the distances 0, 1, .., L-1. Extrapolation reads it beyond L,
interpolation between the integers. Three experiments show the difference: a curve fitted inside
the window and read outside of it, bounds on what any h can do, and a count of the angles that are
new to the model. docs/maths.md, sections 2 and 3, has the derivations.

    D  head_dim    P = D/2  pairs    N  distances    L  window    s  factor, L' = sL

Arrays are float64 unless a precision is named. No model is needed.
"""
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np
from numpy import ndarray

from common.cli import Parser, run_command
from common.files import check_output, write_json
from common.environment import command_line, versions
from rope import (angle_disturbance, angle_histogram, default, disturbance_of_both, linear, ntk,
                  pairs_to_interpolate, rope_frequencies, yarn)

# ---- The curve -----------------------------------------------------------------------------------

def waves(x: ndarray, theta: ndarray) -> ndarray:
    """e^(j x theta_i): x [N], theta [P] -> complex [N, P]."""
    return np.exp(1j * np.outer(x, theta))


def score_curve(h: ndarray, theta: ndarray, x: ndarray) -> ndarray:
    """a(x) = Re sum_i h_i e^(j x theta_i): h complex [P], theta [P], x [N] -> [N].
    (Chen et al. 2023, arXiv 2306.15595, section 2)"""
    return (waves(x, theta) @ h).real


def slow_pairs(theta: ndarray, length: int) -> ndarray:
    """The pairs whose wavelength 2 pi / theta_i exceeds `length`: they never complete a turn."""
    return np.flatnonzero(2 * np.pi / theta > length)


def critical_dimension(head_dim: int, length: int, base: float = 10000.0) -> int:
    """How many dimensions belong to pairs that complete a turn: 2 ceil(D/2 log_base(L / 2 pi)).
    (Liu et al. 2023, arXiv 2310.05209)"""
    return 2 * math.ceil(head_dim / 2 * math.log(length / (2 * math.pi), base))


def first_negative(theta: ndarray, length: int) -> int | None:
    """The first distance x < length at which sum_i cos(x theta_i) < 0, or None.

    From there on a key like the query scores less on average than a random key: the base bounds
    the window. (Men et al. 2024, arXiv 2405.14591)

    As cos(x + y) = cos x cos y - sin x sin y, the sums at many x and y are two matrix products."""
    step, block = 64, 4096
    near = np.outer(theta, np.arange(step))                                 # [P, 64]
    for start in range(0, length, block):
        far = np.outer(np.arange(start, min(start + block, length), step), theta)       # [<= 64, P]
        sums = (np.cos(far) @ np.cos(near) - np.sin(far) @ np.sin(near)).ravel()
        negative = np.flatnonzero(sums[:length - start] < 0)
        if len(negative):
            return start + int(negative[0])
    return None


def base_bounds(head_dim: int, windows: Sequence[int], bases: ndarray) -> list[dict]:
    """Which of `bases`, in rising order, serve a window: those that have no first_negative in it.

    For each window the least that does (Men et al.'s bound), the largest that does not, and the
    number of intervals of bases that do: between the two a larger base is not always better. Of
    `bases` some have to serve, and some not."""
    longest = max(windows)
    reach = [first_negative(rope_frequencies(head_dim, base).numpy(), longest) or longest
             for base in bases.tolist()]
    rows = []
    for window in windows:
        serves = np.array(reach) >= window
        begins = serves & ~np.concatenate(([False], serves[:-1]))
        rows.append({"window": window, "least": float(bases[serves].min()),
                     "last_failing": float(bases[~serves].max()), "intervals": int(begins.sum())})
    return rows


# ---- A curve fitted inside the window explodes outside of it -------------------------------------

def design_matrix(x: ndarray, theta: ndarray, dtype: str = "float64") -> ndarray:
    """X = [sin x theta, cos x theta]: x [N] -> [N, D], in the given precision throughout.
    X w is the curve a(x) with h_i = w_{P+i} - j w_i."""
    angles = np.outer(x.astype(dtype), theta.astype(dtype))
    return np.concatenate((np.sin(angles), np.cos(angles)), axis=1)


def fit_curve(y: ndarray, theta: ndarray, ridge: float = 0.0, dtype: str = "float64") -> ndarray:
    """The curve through y at the distances 0 .. L-1, ridge regression:

        w  with  (X'X + ridge I) w = X'y        y [L] or [L, curves] -> w [D] or [D, curves]

    With S_k the singular values of X, noise of size 1 enters w as S_k / (S_k^2 + ridge). Dozens of
    them are almost 0: sums of slow waves that cancel within the window. Without a ridge their
    weight is 1 / S_k, and rounding decides how large w gets. (Chen et al., appendix C.1)"""
    X = design_matrix(np.arange(len(y)), theta, dtype)
    penalty = ridge * np.eye(X.shape[1], dtype=dtype)
    return np.linalg.solve(X.T @ X + penalty, X.T @ y.astype(dtype))


def fit_sizes(theta: ndarray, length: int = 2048, ridge: float = 0.0, dtype: str = "float64",
              seeds: Iterable[int] = range(5)) -> dict[str, list[float]]:
    """The largest |a| of curves fitted to noise, for each seed: at the integers of [0, L), at the
    half-integers between them, beyond on [L, 2L); and the largest |coefficient|."""
    w = fit_curve(noise_targets(length, seeds), theta, ridge, dtype)
    inside = np.arange(length)
    return {"inside": largest_score(inside, theta, w),
            "between": largest_score(inside[:-1] + 0.5, theta, w),
            "beyond": largest_score(inside + length, theta, w),
            "coefficient": np.abs(w).max(axis=0).tolist()}


def largest_score(x: ndarray, theta: ndarray, w: ndarray) -> list[float]:
    """max |a(x)| of each curve: w [D, curves]."""
    return np.abs(design_matrix(x, theta, w.dtype.name) @ w).max(axis=0).tolist()


def noise_targets(length: int, seeds: Iterable[int]) -> ndarray:
    """Standard normal noise to fit, [L, seeds]."""
    return np.stack([np.random.default_rng(seed).standard_normal(length) for seed in seeds], axis=1)


# ---- Bounds, in units of eta = max |h_i| ---------------------------------------------------------
#
# Between two integers, at the fraction r of the way, a(x) is close to the straight line through its
# neighbours, whatever h is. (Chen et al., Theorem 2.1)

def printed_bound(head_dim: int, base: float = 10000.0, r: float = 0.5) -> float:
    """The bound on |a(x) - straight line| as the paper prints it, D r (1-r) / (8 ln base).
    It does not hold: see corrected_bound. (Chen et al., eqs. 5 and 7)"""
    return head_dim * r * (1 - r) / (8 * math.log(base))


def corrected_bound(theta: ndarray, r: float = 0.5) -> float:
    """r (1-r) / 2 sum_i theta_i^2. The paper replaces the sum by D / (4 ln base), which is smaller,
    and not larger as a bound needs. (docs/maths.md)"""
    return r * (1 - r) / 2 * (theta**2).sum()


def gaps(theta: ndarray, x: ndarray) -> ndarray:
    """How far each wave is from its straight line: x [N] -> complex [N, P].

        c_i(x) = e^(j x theta_i) - (1-r) e^(j n theta_i) - r e^(j (n+1) theta_i)

    with n = floor(x) and r = x - n. The curve's own distance is Re sum_i h_i c_i(x)."""
    n = np.floor(x)
    r = (x - n)[:, None]
    line = waves(n, theta) * (1 - r + r * np.exp(1j * theta))
    return waves(x, theta) - line


def worst_deviation(theta: ndarray, x: ndarray) -> ndarray:
    """The largest deviation that any h with |h_i| <= 1 has at each x, [N]:

        sum_i |c_i(x)|    attained by    h_i = conj(c_i) / |c_i|

    |c_i| depends on r alone. At r = 1/2 it is 1 - cos(theta_i / 2): the counter-example to the
    printed bound is h_i = e^(-j theta_i / 2) at x = 1/2."""
    return np.abs(gaps(theta, x)).sum(axis=1)


def search_deviation(theta: ndarray, length: int = 4096, restarts: int = 16, sweeps: int = 80,
                     seed: int = 0) -> float:
    """The same by trial and error: change one h_i or x at random, in ever smaller steps, and keep
    the change if the curve then deviates more. Returns the best of all restarts."""
    rng = np.random.default_rng(seed)
    P = len(theta)
    h = random_step(rng, np.zeros((restarts, P)), 1)
    x = rng.uniform(0, length, restarts)
    n = np.floor(x)
    c = gaps(theta, x)                                                       # [restarts, P]
    for step in 0.9 ** np.arange(sweeps):
        for i in range(P):
            trial = random_step(rng, h[:, i], step)
            better = ((trial - h[:, i]) * c[:, i]).real > 0                  # only term i changes
            h[:, i] = np.where(better, trial, h[:, i])
        moved = np.clip(x + step * rng.standard_normal(restarts), n, n + 1 - 1e-9)
        better = (h * gaps(theta, moved)).real.sum(axis=1) > (h * c).real.sum(axis=1)
        x = np.where(better, moved, x)
        c = gaps(theta, x)
    return float((h * c).real.sum(axis=1).max())


def random_step(rng: np.random.Generator, center: ndarray, step: float) -> ndarray:
    """A complex normal step from `center`, and back into the unit disc."""
    z = center + step * (rng.standard_normal(center.shape) + 1j * rng.standard_normal(center.shape))
    return z / np.maximum(1, np.abs(z))


def extrapolation_bound(theta: ndarray, x: ndarray) -> ndarray:
    """B(x) = sum_k |sum_{i <= k} e^(j x theta_i)|, with |a(x)| <= 2 eta B(x): x [N] -> [N].
    (Su et al. 2021, section 3.4.3; Chen et al., Figure 5)"""
    return np.abs(waves(x, theta).cumsum(axis=1)).sum(axis=1)


# ---- The angles: rope.py counts them, angle_histogram and what follows it ------------------------

def turn_fraction(theta_i: float, bins: int = 360) -> tuple[Fraction, float]:
    """The fraction p/q of a turn that a pair makes per token, with q <= bins, and the drift that is
    left, in bins per token.

    Such a pair visits q angles and comes back. At theta_i / 2 it makes p/2q of a turn: the same q
    angles if p is even, 2q angles, half of them new, if p is odd. So parity decides whether
    interpolation disturbs a fast pair."""
    turn = theta_i / (2 * math.pi)
    fraction = Fraction(turn).limit_denominator(bins)
    return fraction, (turn - float(fraction)) * bins


# ---- The experiments: what the JSON file holds ---------------------------------------------------

HEAD_DIM, BASE, WINDOW = 128, 10000.0, 4096     # LLaMA 2, unless an experiment names another model
# (name, head_dim, base, window)
MODELS = [("LLaMA 1", 128, 1e4, 2048), ("LLaMA 2", 128, 1e4, 4096), ("LLaMA 3 8B", 128, 5e5, 8192),
          ("tiny", 64, 1e4, 256)]
# Table 3 of the DPRoPE paper (Wu et al. 2024) in 1e-3, for the factors 2 and 4, and its pairs
TABLE_3 = {2: {"linear": 24.08, "yarn": 25.55, "chosen": 6.71},
           4: {"linear": 33.67, "yarn": 35.44, "chosen": 22.92}}
TABLE_3_PAIRS = {2: 40, 4: 32}


def measure_models() -> list[dict]:
    """Which pairs of known models never complete a turn in the window."""
    rows = []
    for name, head_dim, base, window in MODELS:
        theta = rope_frequencies(head_dim, base).numpy()
        rows.append({"model": name, "head_dim": head_dim, "base": base, "window": window,
                     "slow_pairs": len(slow_pairs(theta, window)),
                     "critical_dimension": critical_dimension(head_dim, window, base),
                     "first_negative": first_negative(theta, 4 * window)})
    return rows


def measure_bases() -> dict:
    """How large a base the head of LLaMA needs for a window: by the sign of the mean score, and to
    keep LLaMA 2's critical dimension, b^(ln(L'/2 pi) / ln(L/2 pi)). The values are those of a grid:
    a finer one may find narrower intervals."""
    step = 1.005
    bases = 1000 * step ** np.arange(1664)                                       # up to 4 million
    rows = base_bounds(HEAD_DIM, [1024, 2048, 4096, 8192, 16384], bases)
    for row in rows:
        exponent = math.log(row["window"] / (2 * math.pi)) / math.log(WINDOW / (2 * math.pi))
        row["same_critical_dimension"] = BASE ** exponent
    return {"head_dim": HEAD_DIM, "step": step, "rows": rows}


def measure_scores(factor: int = 4) -> dict:
    """The score of a key equal to its query, averaged over content, against its distance: the curve
    of h_i = 1, divided by its value at 0, for four methods."""
    methods = {"default": default(HEAD_DIM, BASE), "linear": linear(HEAD_DIM, BASE, factor),
               "ntk": ntk(HEAD_DIM, BASE, factor), "yarn": yarn(HEAD_DIM, BASE, factor, WINDOW)}
    longest = factor * WINDOW
    x = np.concatenate([np.arange(16), np.geomspace(16, longest, 400).round()])
    x = np.unique(x).astype(int)
    table_x = np.array([0, 1, 2, 4, 10, 100, 1000, WINDOW, 2 * WINDOW, longest])
    ones = np.ones(HEAD_DIM // 2)
    curves = {}
    table = {}
    for name, (inv_freq, _) in methods.items():
        theta = inv_freq.float().double().numpy()           # as a model has them: float32
        curves[name] = round_digits(score_curve(ones, theta, x) / len(theta))
        table[name] = round_digits(score_curve(ones, theta, table_x) / len(theta))

    # A head that looks one token back: all its waves peak at distance 1. Under PI with s = 2, not
    # fine-tuned, they peak at 2.
    theta = rope_frequencies(32).numpy()
    h = np.exp(-1j * theta)
    near = np.arange(4)
    head = {"default": round_digits(score_curve(h, theta, near)),
            "linear": round_digits(score_curve(h, theta / 2, near))}
    return {"window": WINDOW, "reach": factor, "x": x.tolist(), "curves": curves,
            "table_x": table_x.tolist(), "table": table, "head": head}


def measure_fit(length: int = 2048) -> dict:
    """Chen et al.'s Figure 2: sizes for several precisions and ridges, and two curves to draw."""
    theta = rope_frequencies(HEAD_DIM).numpy()
    rows = []
    for dtype, ridges in (("float32", [0, 1e-3, 1, 10]), ("float64", [0, 1e-8, 1e-6, 1e-3, 1, 10])):
        for ridge in ridges:
            sizes = fit_sizes(theta, length, ridge, dtype)
            rows.append({"precision": dtype, "ridge": ridge, **sizes})
    X = design_matrix(np.arange(length), theta)
    singular = np.linalg.svd(X, compute_uv=False)

    y = noise_targets(length, [0])[:, 0]
    far = np.arange(0, 2 * length, 2)
    near = np.arange(25, 75, 0.125)
    curves = []
    for ridge in (1e-8, 1.0):
        w = fit_curve(y, theta, ridge)
        curves.append({"ridge": ridge, "far": round_digits(design_matrix(far, theta) @ w),
                       "near": round_digits(design_matrix(near, theta) @ w)})
    return {"window": length, "head_dim": HEAD_DIM, "condition": float(singular[0] / singular[-1]),
            "singular_values": round_digits(singular, 3), "rows": rows,
            "points": round_digits(y, 3), "far_step": 2, "near_start": 25, "near_step": 0.125,
            "curves": curves}


def measure_bounds(every: int = 2) -> dict:
    """Theorem 2.1 as printed and corrected, the largest deviations found, and the bound on
    extrapolation beside them, of which every second value is kept to be drawn."""
    rows = []
    lines = {}
    for head_dim in (16, 32, 64, 128):
        theta = rope_frequencies(head_dim).numpy()
        h = np.exp(-0.5j * theta)
        example = (h * gaps(theta, np.array([0.5]))[0]).real.sum()
        worst = worst_deviation(theta, np.linspace(0, 1, 1001)).max()
        B = extrapolation_bound(theta, np.arange(WINDOW)) / head_dim
        rows.append({"head_dim": head_dim, "printed": printed_bound(head_dim),
                     "corrected": float(corrected_bound(theta)), "example": float(example),
                     "worst": float(worst), "search": search_deviation(theta, WINDOW),
                     "B_min": float(B.min()), "B_argmin": int(B.argmin()),
                     "B_mean": float(B.mean()), "B_below_1": int((B < 1).sum())})
        lines[str(head_dim)] = round_digits(B[::every])
    return {"base": BASE, "window": WINDOW, "rows": rows, "every": every, "B": lines}


def measure_angles() -> dict:
    """The disturbance of the angles, of every pair and of whole methods; and histograms of a pair
    that is interpolated at s = 2 and of one that is not."""
    theta = rope_frequencies(HEAD_DIM).numpy()
    histograms = []
    for pair in (6, 22):
        fraction, drift = turn_fraction(theta[pair])
        one = theta[pair:pair + 1]
        histograms.append({
            "pair": pair, "fraction": str(fraction), "drift_bins": drift * WINDOW,
            "original": round_digits(angle_histogram(one, WINDOW)[0]),
            "interpolated": round_digits(angle_histogram(one / 2, 2 * WINDOW)[0]),
            "left_alone": round_digits(angle_histogram(one, 2 * WINDOW)[0])})
    return {"window": WINDOW, "head_dim": HEAD_DIM, "bins": 360,
            "stretches": [measure_stretch(theta, factor) for factor in TABLE_3],
            "histograms": histograms, "slow_from": int(slow_pairs(theta, WINDOW)[0])}


def measure_stretch(theta: ndarray, factor: int) -> dict:
    """Disturbances at one factor. printed: in the order of eq. 8 of the paper."""
    length = factor * WINDOW
    inv_freq, _ = yarn(HEAD_DIM, BASE, factor, WINDOW)
    new_theta = inv_freq.float().double().numpy()           # as a model has them: float32
    left_alone, interpolated = disturbance_of_both(theta, factor, WINDOW)
    chosen = pairs_to_interpolate(left_alone, interpolated)
    as_many = pairs_to_interpolate(left_alone, interpolated, pairs=TABLE_3_PAIRS[factor])
    pairs = {"none": left_alone, "linear": interpolated,
             "yarn": angle_disturbance(theta, new_theta, WINDOW, length),
             "chosen": np.where(chosen, interpolated, left_alone),
             "chosen_as_trained": np.where(as_many, interpolated, left_alone)}
    left_printed, interpolated_printed = disturbance_of_both(theta, factor, WINDOW, printed=True)
    printed = {"none": left_printed, "linear": interpolated_printed,
               "yarn": angle_disturbance(theta, new_theta, WINDOW, length, printed=True)}
    chosen_printed = pairs_to_interpolate(left_printed, interpolated_printed)
    return {"factor": factor, "paper": TABLE_3[factor],
            "mean": {name: 1e3 * float(d.mean()) for name, d in pairs.items()},
            "mean_printed": {name: 1e3 * float(d.mean()) for name, d in printed.items()},
            "chosen": np.flatnonzero(chosen).tolist(),
            "same_set_printed": bool((chosen == chosen_printed).all()),
            "left_alone": round_digits(left_alone, 6),
            "interpolated": round_digits(interpolated, 6)}


def round_digits(values: Iterable[float], digits: int = 4) -> list[float]:
    """Rounded to significant digits: enough for a figure, and a file of readable size."""
    return [float(f"{v:.{digits}g}") for v in values]


# ---- The tables ----------------------------------------------------------------------------------

def print_table(title: str, head: str, rows: list[str], note: str = "") -> None:
    """Print a table. head and rows hold cells between " | "; the columns are made wide enough."""
    cells = [row.split(" | ") for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(title)
    for row in cells:
        padded = [cell.ljust(width) for cell, width in zip(row, widths)]
        print("  " + "   ".join(padded).rstrip())
    print(f"  {note}\n" if note else "")


def span(values: list[float], form: str) -> str:
    return f"{min(values):{form}} .. {max(values):{form}}"


def number_ranges(numbers: Iterable[int]) -> str:
    """Rising numbers in words: [28, 30, 31, 32] -> '28, 30-32'."""
    runs = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def print_models_and_scores(models: list[dict], scores: dict) -> None:
    rows = []
    for m in models:
        first = m["first_negative"] or f"none below {4 * m['window']}"
        rows.append(f"{m['model']} | {m['head_dim']} | {m['base']:,.0f} | {m['window']} | "
                    f"{m['slow_pairs']} of {m['head_dim'] // 2} | {m['critical_dimension']} | "
                    f"{first}")
    print_table("Pairs that never complete a turn in the window, and where keys like the query "
                "start to count less than random ones",
                "model | D | base | L | slow pairs | critical dimension | "
                "sum cos(x theta_i) < 0 from x =", rows)
    head = {name: ", ".join(f"{v:.2f}" for v in row) for name, row in scores["head"].items()}
    print_table("Score of a key equal to its query by distance, in units of the score at 0 "
                f"(D = 128, base 10,000, L = {scores['window']}, s = 4)",
                " | ".join(["method", *(f"x = {x}" for x in scores["table_x"])]),
                [" | ".join([name, *(f"{v:.3f}" for v in row)])
                 for name, row in scores["table"].items()],
                "a head that looks one token back, D = 32, at distances 0, 1, 2, 3: "
                f"{head['default']}; under PI, s = 2: {head['linear']}")


def print_bases(bases: dict) -> None:
    rows = [f"{r['window']} | {r['least']:,.0f} | {r['last_failing']:,.0f} | {r['intervals']} | "
            f"{r['same_critical_dimension']:,.0f}" for r in bases["rows"]]
    print_table(f"The base that a window needs, D = {bases['head_dim']}: sum cos(x theta_i) >= 0 "
                "at every distance x in it (Men et al.)",
                "window | least base that serves | largest that does not | intervals that serve | "
                "base of LLaMA 2's critical dimension", rows,
                f"of bases {100 * (bases['step'] - 1):.1f} % apart")


def print_fit(fit: dict) -> None:
    singular = fit["singular_values"]
    rows = [f"{r['precision']} | {r['ridge']:g} | {span(r['inside'], '.2f')} | "
            f"{span(r['between'], '.2f')} | {span(r['beyond'], '.3g')} | "
            f"{span(r['coefficient'], '.2g')}" for r in fit["rows"]]
    print_table(f"A curve fitted to noise in [0, {fit['window']}), largest |a| over five seeds "
                "(Chen et al., Figure 2: about 1 inside, beyond L more than 8000)",
                "precision | ridge | at integers | between them | beyond L, up to 2L | "
                "largest coefficient", rows,
                f"singular values of X: from {singular[0]:.0f} down to {singular[-1]:.0e} "
                f"({sum(v > 1 for v in singular)} of {len(singular)} above 1): condition "
                f"{fit['condition']:.0e}, so rounding sizes the rows with ridge 0")


def print_bounds(bounds: dict) -> None:
    interpolation = []
    extrapolation = []
    for r in bounds["rows"]:
        D, printed, corrected = r["head_dim"], r["printed"], r["corrected"]
        interpolation.append(f"{D} | {printed:.6f} | {r['example']:.6f} | "
                             f"{100 * (r['example'] / printed - 1):.1f} % | {r['worst']:.6f} | "
                             f"{r['search']:.6f} | {corrected:.6f}")
        extrapolation.append(f"{D} | {r['B_min']:.4f} | {r['B_argmin']} | {r['B_mean']:.3f} | "
                             f"{r['B_below_1']} | {2 * D / printed:.1f} | "
                             f"{2 * D / corrected:.1f} | {D / 2 / corrected:.1f}")
    print_table("Half way between two integers: largest distance from the straight line, in units "
                "of max |h_i| (Chen et al., Theorem 2.1)",
                "D | printed bound | counter-example | exceeds by | worst of all h | "
                "found by search | corrected bound", interpolation)
    print_table(f"Extrapolation: |a(x)| <= 2 max|h_i| B(x), for x below {bounds['window']} "
                "(Chen et al., Figure 5: B(x)/D >= 1)",
                "D | smallest B(x)/D | at x = | mean | positions below 1 | "
                "2D / printed (paper: 600) | 2D / corrected | (D/2) / corrected", extrapolation,
                "|a(x)| <= D/2 max|h_i| holds everywhere and is attained, so the last column is "
                "what remains of the first")


def print_angles(angles: dict) -> None:
    labels = {"none": "no change", "linear": "PI", "yarn": "YaRN",
              "chosen": "the less disturbed of both",
              "chosen_as_trained": "  the same with 40 / 32 pairs"}
    head = ["method"]
    columns = []
    notes = []
    for s in angles["stretches"]:
        head += [f"s = {s['factor']} {words}" for words in ("paper", "here", "Eq. 8 as printed")]
        columns += [s["paper"], s["mean"], s["mean_printed"]]
        notes.append(f"interpolated at s = {s['factor']}: {len(s['chosen'])} pairs, "
                     f"{number_ranges(s['chosen'])}")
    rows = [" | ".join([label, *(f"{c[name]:.2f}" if name in c else "-" for c in columns)])
            for name, label in labels.items()]
    print_table("Disturbance of the rotary angles, mean of all pairs in 1e-3 nats, window "
                f"{angles['window']} (DPRoPE, Table 3)", " | ".join(head), rows,
                "\n  ".join(notes))
    first = angles["stretches"][0]
    rows = [f"{h['pair']} | {h['fraction']} | {h['drift_bins']:.1f} bins | "
            f"{first['left_alone'][h['pair']]:.4f} | {first['interpolated'][h['pair']]:.4f}"
            for h in angles["histograms"]]
    print_table("Why pair 6 is interpolated at s = 2 and pair 22 is not",
                "pair | turns per token | drift over L | D left alone | D interpolated", rows,
                "half of an even numerator are the same angles; half of an odd one are twice as "
                "many, and ln 2 = 0.6931")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", default="out/theory.json", metavar="JSON",
                        help="result file, for plot.py [out/theory.json]")
    flags = parser.parse_args(argv)
    check_output(flags.out)
    theory = {"models": measure_models(), "bases": measure_bases(), "scores": measure_scores(),
              "fit": measure_fit(), "bounds": measure_bounds(), "angles": measure_angles()}
    print_models_and_scores(theory["models"], theory["scores"])
    print_bases(theory["bases"])
    print_fit(theory["fit"])
    print_bounds(theory["bounds"])
    print_angles(theory["angles"])
    write_json(flags.out, {"command": command_line(), "versions": versions(), "theory": theory})
    print(f"wrote {flags.out}; python plot.py {flags.out} --out docs/figures draws it")


if __name__ == "__main__":
    run_command(main)
