"""Rotary position embedding (RoPE) and the ways to stretch it over a longer window.

RoPE (Su et al. 2021, arXiv 2104.09864) turns the i-th pair of a query or key at position m by the angle m * theta_i,

    theta_i = base^(-2i/D),   i = 0 .. D/2-1,

so that the score <R_m q, R_n k> depends on the distance m - n alone. Every method here answers one question: which angles
should a model see at positions that it was never trained on? Position Interpolation (Chen et al. 2023) answers: only angles
that it knows. Squeeze position m to m / s, with s = L'/L, and the window L' covers the same arc that L did.

    L   original window (`original_max_position_embeddings`)      L'  target window      s = L'/L  (`factor`)
    l   length of the text so far    B  batch    T  positions     H  heads    D  head_dim    i  pair, 0 .. D/2-1

A method is one function, (theta [D/2], head_dim, config, seq_len) -> (frequencies [D/2], attention_factor). It stands in this file once:
its keywords are its own settings, with their defaults, and the line above it says the rest. docs/maths.md derives them.

    default        theta_i, extrapolation            longrope       a divisor for each pair, found by search
    linear         Position Interpolation            abf            another base
    ntk            a stretched base                  dprope         by the distribution of the angles
    dynamic        ntk that grows with the text      proportional   slow pairs stand still (p-RoPE)
    ntk_by_parts   slow pairs slowed, fast ones not  clex           learned
    yarn           that, and a temperature           nope, drope    no rotation
    dynamic_yarn   yarn that grows with the text     alibi, xpos    a bias, a decay (positions.py)
    llama3         ntk_by_parts with other limits
"""
import dataclasses
import functools
import inspect
import json
import math
import warnings
from dataclasses import dataclass, field

import numpy as np
import torch

import theory
from cli import UserError

# ---------------------------------------------------------------------------------------------------------------------
# The methods. Each takes theta [D/2], the unscaled frequencies in float64, and returns (frequencies [D/2], attention_factor).

METHODS, ALIASES = {}, {"pi": "linear", "none": "default", "su": "longrope", "ntk-by-parts": "ntk_by_parts", "dynamic-yarn": "dynamic_yarn"}


def method(needs_window=False, grows=False, rotary=True, hugging_face=False, train_on="target", whole_head=False, adds=None, options=None):
    """Enter the function below into METHODS under its own name. What the rest of the project has to know about it:

    needs_window    it computes with L
    grows           frequencies change with the length of the text
    rotary          it is RoPE: a model trained with plain RoPE may be stretched by it
    hugging_face    True if transformers has it under the same name and keys, or a function (config, dim) -> the dict that means the same
    train_on        rows of fine-tuning: of L' tokens ("target"), or of L ("original", or "random" places of a longer text)
    whole_head      partial_rotary_factor does not make the head smaller
    adds            what it adds to angles: a "bias" or a "decay" (positions.py), or a "network" (CLEX)
    options         the function whose keywords it shares, if not its own
    """
    def enter(function):
        parameters = inspect.signature(options or function).parameters.values()
        function.options = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
        function.needs_window, function.grows, function.rotary = needs_window, grows, rotary
        function.hugging_face, function.train_on, function.whole_head, function.adds = hugging_face, train_on, whole_head, adds
        METHODS[function.__name__] = function
        return function
    return enter


@method(hugging_face=True)
def default(theta, head_dim, config, seq_len):
    """Plain RoPE: theta_i. Beyond L this is extrapolation. (Su et al. 2021, section 3.2)"""
    return theta, 1.0


@method(hugging_face=True)
def linear(theta, head_dim, config, seq_len):
    """Position Interpolation: theta_i / s, the same as position m -> m / s.

    (Chen et al. 2023, arXiv 2306.15595, eq. 4; found at the same time by kaiokendev)"""
    return theta / config.factor, 1.0


@method(hugging_face=lambda config, dim: {"rope_type": "default", "rope_theta": config.base * config.factor ** (dim / max(dim - 2, 1))})
def ntk(theta, head_dim, config, seq_len):
    """NTK-aware: base -> base * s^(D/(D-2)). The first pair keeps its frequency, the last becomes theta/s.

    (bloc97 2023; Peng et al. 2023, arXiv 2309.00071, appendix A)"""
    return stretch_base(theta, head_dim, config.factor), 1.0


@method(needs_window=True, grows=True, hugging_face=True)
def dynamic(theta, head_dim, config, seq_len):
    """Dynamic NTK: NTK-aware with s growing with the length l of the text: s = f l/L - (f-1) beyond L, else 1. f is `factor`; with
    f = 1 there is nothing to choose: s = l/L.

    (emozilla 2023)"""
    length, window = seq_len or 0, config.original_max_position_embeddings
    scale = config.factor * length / window - (config.factor - 1) if length > window else 1.0
    return stretch_base(theta, head_dim, scale), 1.0


@method(needs_window=True, hugging_face=lambda config, dim: {
    "rope_type": "llama3", "factor": config.factor, "original_max_position_embeddings": config.original_max_position_embeddings,
    "low_freq_factor": config.setting("beta_slow"), "high_freq_factor": config.setting("beta_fast")})
def ntk_by_parts(theta, head_dim, config, seq_len, *, beta_fast: float = 32.0, beta_slow: float = 1.0):
    """NTK-by-parts: theta where a pair turns more than beta_fast times within L, theta/s where fewer than beta_slow times, a blend that is
    linear in the number of turns between.

    (Peng et al. 2023, arXiv 2309.00071, section 3.2, where the two are called beta and alpha)"""
    keep = keep_by_turns(theta, config.original_max_position_embeddings, beta_slow, beta_fast)
    return keep * theta + (1 - keep) * theta / config.factor, 1.0


@method(needs_window=True, hugging_face=True)
def yarn(theta, head_dim, config, seq_len, *, beta_fast: float = 32.0, beta_slow: float = 1.0, truncate: bool = True, ramp: str = "index",
         attention_factor: float | None = None, mscale: float | None = None, mscale_all_dim: float | None = None):
    """YaRN: NTK-by-parts, and a temperature: cos and sin, hence q and k both, times 0.1 ln s + 1, so that scores grow by its square.

    ramp "index" is YaRN as everyone deploys it: the blend is linear in the pair's number, between the pairs that turn beta_fast and
    beta_slow times, rounded outwards if `truncate`. "turns" is the blend that the paper prints. mscale and mscale_all_dim (DeepSeek): the
    temperature is (0.1 mscale ln s + 1) / (0.1 mscale_all_dim ln s + 1); attention_factor gives it outright.

    (Peng et al. 2023, arXiv 2309.00071, sections 3.2-3.4; the authors' code)"""
    s, window = config.factor, config.original_max_position_embeddings
    if ramp not in ("index", "turns"):
        raise UserError(f"yarn ramp '{ramp}': choose index (the deployed one) or turns (the paper's)")
    if ramp == "turns":
        keep = keep_by_turns(theta, window, beta_slow, beta_fast)
    else:
        keep = keep_by_index(theta, window, beta_slow, beta_fast, head_dim, config.base, truncate)
    if attention_factor is None:
        both = mscale and mscale_all_dim
        attention_factor = yarn_mscale(s, mscale if both else 1.0) / (yarn_mscale(s, mscale_all_dim) if both else 1.0)
    return keep * theta + (1 - keep) * theta / s, attention_factor


@method(needs_window=True, grows=True, options=yarn)
def dynamic_yarn(theta, head_dim, config, seq_len, **options):
    """Dynamic YaRN: YaRN with s = max(factor, l/L). factor 1 suits a model without fine-tuning; after it, the factor of the training.

    (Peng et al. 2023, arXiv 2309.00071, "Dynamic Scaling")"""
    if (seq_len or 0) > config.factor * config.original_max_position_embeddings:
        config = dataclasses.replace(config, factor=seq_len / config.original_max_position_embeddings)
    return yarn(theta, head_dim, config, seq_len, **options)


@method(needs_window=True, hugging_face=True)
def llama3(theta, head_dim, config, seq_len, *, low_freq_factor: float = 1.0, high_freq_factor: float = 4.0):
    """LLaMA 3.1: with r = L theta / 2 pi turns inside L, theta/s where r < low, theta where r > high, a linear blend between. That is
    ntk_by_parts with beta_slow = low_freq_factor and beta_fast = high_freq_factor.

    (Meta's llama-models)"""
    if not low_freq_factor < high_freq_factor:
        raise UserError("llama3 needs low_freq_factor < high_freq_factor")
    keep = keep_by_turns(theta, config.original_max_position_embeddings, low_freq_factor, high_freq_factor)
    return keep * theta + (1 - keep) * theta / config.factor, 1.0


@method(needs_window=True, grows=True, hugging_face=True)
def longrope(theta, head_dim, config, seq_len, *, short_factor: list, long_factor: list, attention_factor: float | None = None):
    """LongRoPE: theta_i / f_i with a factor for each pair, found by a search: short_factor while l <= L, long_factor beyond. cos and sin
    are multiplied by sqrt(1 + ln s / ln L) = sqrt(ln L' / ln L), within L too, unless attention_factor is given.

    (Ding et al. 2024, arXiv 2402.13753; Phi-3's code)"""
    window = config.original_max_position_embeddings
    if not len(short_factor) == len(long_factor) == len(theta):
        raise UserError(f"longrope: {len(short_factor)} short and {len(long_factor)} long factors for {len(theta)} pairs: give one a pair")
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(config.factor) / math.log(window)) if config.factor > 1 and window > 1 else 1.0
    factors = long_factor if (seq_len or 0) > window else short_factor
    return theta / torch.tensor(factors, dtype=theta.dtype, device=theta.device), attention_factor


@method(hugging_face=lambda config, dim: {"rope_type": "default", "rope_theta": config.setting("new_rope_theta")})
def abf(theta, head_dim, config, seq_len, *, new_rope_theta: float = 500000.0):
    """Adjusted base frequency: another base, b'^(-2i/D), whatever s. (Xiong et al. 2023, arXiv 2309.16039: 500000; Code Llama: 1000000)"""
    if new_rope_theta <= 1:
        raise UserError(f"abf new_rope_theta {new_rope_theta:g}: has to be greater than 1")
    return theta ** (math.log(new_rope_theta) / math.log(config.base)), 1.0


@method(needs_window=True)
def dprope(theta, head_dim, config, seq_len, *, threshold: float = 0.0, interpolated_dims: int | None = None, bins: int | None = None):
    """DPRoPE: a pair is interpolated if that disturbs the distribution of its angles less than extrapolating does, by more than threshold:

        theta_i / s  where rho(theta_i over L') > rho(theta_i/s over L') + threshold,  else theta_i.

    rho is the divergence KL(original || extended) of the histograms of m theta_i mod 2 pi, m < L against m < L' (theory.disturbance; eq. 8
    prints the other order). interpolated_dims takes that many dimensions, twice the pairs, by the size of the difference instead. bins: 360
    at L = 4096 as in the paper, at most 360, and fewer in proportion for a shorter window, whose histograms would be nearly empty.

    (Wu et al. 2024, EMNLP, eqs. 5-9)"""
    window = config.original_max_position_embeddings
    if interpolated_dims is not None and not 0 <= interpolated_dims <= head_dim:
        raise UserError(f"dprope interpolated_dims {interpolated_dims}: give a number from 0 to {head_dim}, the dimensions that turn")
    if bins is not None and not 1 <= bins <= max(window, 360):
        raise UserError(f"dprope bins {bins}: give the number of parts of a turn, about a tenth of the window")
    if window * config.factor > 2**22:
        raise UserError(f"dprope counts the angles of all positions, and {window * config.factor:.0f} are too many: give a smaller factor")
    bins = bins or min(360, max(4, round(window * 360 / 4096)))
    left_alone, interpolated = disturbances(tuple(theta.tolist()), config.factor, window, int(bins))
    pairs = None if interpolated_dims is None else interpolated_dims // 2
    chosen = torch.from_numpy(theory.interpolated_pairs(left_alone, interpolated, threshold, pairs))
    return torch.where(chosen, theta / config.factor, theta), 1.0


@method(hugging_face=True, whole_head=True)
def proportional(theta, head_dim, config, seq_len):
    """p-RoPE: only the fastest share p of the pairs turns (`partial_rotary_factor`), the slow rest stands still and knows no position;
    then as linear. (In the other methods that key makes the rotated part a smaller head, with all frequencies from 1 to nearly 1/base.)

    (Barbero et al. 2024, arXiv 2410.06205; Gemma's code)"""
    turning = int(config.partial_rotary_factor * head_dim // 2)
    return theta * (torch.arange(len(theta), device=theta.device) < turning) / config.factor, 1.0


@method(needs_window=True, grows=True, train_on="random", adds="network")
def clex(theta, head_dim, config, seq_len, *, max_factor: float = 16.0):
    """CLEX: frequencies that flow with t = ceil(l/L), by a differential equation whose right side is learned. Untrained, and here, it is
    NTK-aware with 2t - 1 in the place of s, which is `dynamic` with factor 2 in steps of L; class CLEX below is what training adds.

    (Chen et al. 2023, arXiv 2310.16450)"""
    if max_factor < 1:
        raise UserError(f"clex max_factor {max_factor:g}: the largest t, which begins at 1")
    if config.factor > max_factor:
        raise UserError(f"clex max_factor {max_factor:g}: it has to cover factor {config.factor:g}")
    return stretch_base(theta, head_dim, 2 * clex_time(config, seq_len, max_factor) - 1), 1.0


@method(rotary=False)
def nope(theta, head_dim, config, seq_len):
    """NoPE: no position at all but the causal mask. (Kazemnejad et al. 2023, arXiv 2305.19466)"""
    return torch.zeros_like(theta), 1.0


@method(needs_window=True, grows=True, rotary=False, train_on="original", whole_head=True)
def drope(theta, head_dim, config, seq_len, *, log_scale: float = 0.412):
    """DroPE: train with RoPE, then switch it off and recalibrate at length L. Beyond L scores are multiplied by 1 + log_scale ln(l/L),
    q and k by its square root each. 0.412 is for models trained from scratch, 0.103 the paper's for SmolLM.

    (Gelberg et al. 2025, arXiv 2512.12167)"""
    stretch = max(1.0, (seq_len or 0) / config.original_max_position_embeddings)
    return torch.zeros_like(theta), math.sqrt(1 + log_scale * math.log(stretch))


@method(rotary=False, adds="bias")
def alibi(theta, head_dim, config, seq_len):
    """ALiBi: nothing is rotated; positions.alibi_bias adds -slope * distance / s to the scores. (Press et al. 2021, arXiv 2108.12409)"""
    return torch.zeros_like(theta), 1.0


@method(rotary=False, adds="decay")
def xpos(theta, head_dim, config, seq_len):
    """xPos: theta_i / s, and a decay with the distance that differs from pair to pair, positions.xpos_scale. (Sun et al. 2022, arXiv
    2212.10554, "LeX")"""
    return theta / config.factor, 1.0


# ---------------------------------------------------------------------------------------------------------------------
# What the methods are made of


def plain_frequencies(dim, base):
    """base^(-2i/dim), i = 0 .. dim/2-1, in float64. On the CPU by name: frequencies are numbers under `with torch.device("meta")` too,
    and a context here would break compiled graphs."""
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)


def stretch_base(theta, head_dim, scale):
    """(base * scale^(D/(D-2)))^(-2i/D) = theta_i * scale^(-2i/(D-2)): pair 0 is left alone, the last pair is divided by scale."""
    pair = torch.arange(len(theta), dtype=theta.dtype, device=theta.device)
    return theta * scale ** (-2 * pair / max(head_dim - 2, 1))


def keep_by_turns(theta, window, slow, fast):
    """Share of theta that is kept: 0 below `slow` turns within L, 1 above `fast`, linear in the turns r = L theta / 2 pi between."""
    if not slow < fast:
        raise UserError(f"the limits {slow:g} and {fast:g} turns: the slow one has to be the smaller (beta_slow < beta_fast)")
    return ((window * theta / (2 * math.pi) - slow) / (fast - slow)).clamp(0, 1)


def keep_by_index(theta, window, slow, fast, head_dim, base, truncate):
    """The same, linear in the pair's number between the pairs with `fast` and `slow` turns within L: i = D ln(L / 2 pi turns) / 2 ln base.
    `truncate` rounds the two outwards, which widens the blend. All of it is YaRN's code, also the upper limit D-1 of D/2 pairs."""
    if not 0 < slow < fast:
        raise UserError(f"the limits {slow:g} and {fast:g} turns: 0 < beta_slow < beta_fast is needed")
    low, high = (head_dim * math.log(window / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (fast, slow))
    low, high = (math.floor(low), math.ceil(high)) if truncate else (low, high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0
    return 1 - ((torch.arange(len(theta), dtype=theta.dtype, device=theta.device) - low) / (high - low)).clamp(0, 1)


def yarn_mscale(s, weight=1.0):
    """0.1 ln s + 1, which is sqrt(1/t) for YaRN's temperature t: a fit to perplexities of LLaMA. Cos and sin are multiplied by it, so that
    scores are multiplied by 1/t."""
    return 0.1 * weight * math.log(s) + 1 if s > 1 else 1.0


@functools.lru_cache(maxsize=64)
def disturbances(theta, factor, window, bins):
    """rho of each pair over L' positions, left alone and interpolated: two arrays [D/2]."""
    if window / bins < 5 and bins > (suited := max(4, round(window / 11))):
        warnings.warn(f"dprope: {bins} bins for a window of {window} leave the histograms nearly empty, and the choice of pairs to chance; "
                      f"about {suited} bins suit it", stacklevel=2)
    return theory.both_ways(np.array(theta), factor, window, bins)


def resonate(frequencies):
    """Resonance RoPE: the wavelength rounded to whole tokens, so that a pair which completes turns repeats itself exactly. (Wang et al.
    2024, arXiv 2403.00071)"""
    return torch.where(frequencies > 0, 2 * math.pi / (2 * math.pi / frequencies).round().clamp(min=1), frequencies)


def clex_time(config, seq_len, max_factor):
    """t = ceil(l/L), from 1 to max_factor."""
    return min(max(1.0, math.ceil((seq_len or 1) / config.original_max_position_embeddings)), max_factor)


class CLEX(torch.nn.Module):
    """What CLEX learns: how far the log-frequencies z leave those of NTK, y(t) = z(t) - ln theta_NTK(t), with y(1) = 0 and

        dy/dt = W_down tanh(W_up (z + ln theta_NTK(t))),    theta_NTK(t) = NTK-aware with 2t - 1 in the place of s.

    That is the paper's dz/dt = network + d ln theta_NTK/dt, integrated exactly in its second term. W_down begins at zero: y = 0.
    """

    def __init__(self, pairs, width=1):
        super().__init__()
        self.up, self.down = torch.nn.Linear(pairs, width * pairs, bias=False), torch.nn.Linear(width * pairs, pairs, bias=False)
        torch.nn.init.zeros_(self.down.weight)

    def forward(self, theta, t, steps=8):
        """theta [D/2], unscaled -> theta_i(t) / theta_NTK,i(t) = exp y(t), [D/2] in float32; Runge and Kutta's method of order 4, `steps`
        steps for every unit of t (the paper has 100; with 8 the frequencies differ by less than 1e-5)."""
        theta = theta.float().to(self.up.weight.device)
        n_steps = math.ceil((t - 1) * steps)
        y, step = torch.zeros_like(theta), (t - 1) / max(n_steps, 1)

        def slope(t, y):
            ntk = stretch_base(theta, 2 * len(theta), 2 * t - 1).log()
            return self.down.weight.float() @ torch.tanh(self.up.weight.float() @ (y + 2 * ntk))  # float32 in a bfloat16 model, too
        with torch.autocast(theta.device.type, enabled=False):
            for n in range(n_steps):
                now = 1 + n * step
                k1 = slope(now, y)
                k2 = slope(now + step / 2, y + step / 2 * k1)
                k3 = slope(now + step / 2, y + step / 2 * k2)
                k4 = slope(now + step, y + step * k3)
                y = y + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            return y.exp()


# ---------------------------------------------------------------------------------------------------------------------
# What a model's folder says about its positions


@dataclass(frozen=True, eq=False)
class RopeConfig:
    """How a model knows positions, in Hugging Face's words (`rope_scaling`, `rope_parameters`). It travels with the weights."""

    rope_type: str = "default"                            # a key of METHODS
    factor: float = 1.0                                   # s = L'/L, always from the original window
    original_max_position_embeddings: int | None = None   # L
    rope_theta: float | None = None                       # the base; None: not said, which is 10000 or what the model has
    partial_rotary_factor: float = 1.0                    # share of each head that is rotated at all
    resonance: bool = False                               # round wavelengths to whole tokens, after any method
    random_positions: int | None = None                   # N: a text sits at random places of 0 .. N-1 (positions.py)
    options: dict = field(default_factory=dict)           # the method's own settings: the keywords of its function

    def __post_init__(self):
        if not isinstance(self.rope_type, str) or self.rope_type not in METHODS:
            raise UserError(f"rope_type '{self.rope_type:.60}' is unknown: choose one of {', '.join(METHODS)} (pi is another name of linear)")
        for f in dataclasses.fields(self):
            if f.name not in ("rope_type", "options"):
                object.__setattr__(self, f.name, check_setting(f.name, getattr(self, f.name), f.type, f.default))
        if self.factor > 1e6:
            raise UserError(f"rope factor {self.factor:g}: nothing is stretched a million times; give s = target window / original window")
        if self.factor < 1:
            raise UserError(f"rope factor {self.factor:g}: give s = target window / original window, which is at least 1")
        if self.base <= 1:
            raise UserError(f"rope_theta {self.base:g}: the base has to be greater than 1 (LLaMA: 10000)")
        if not 0 < self.partial_rotary_factor <= 1:
            raise UserError(f"partial_rotary_factor {self.partial_rotary_factor:g}: give a share of the head, above 0 and at most 1")
        object.__setattr__(self, "random_positions", self.random_positions or None)  # 0 says: none
        for name in ("original_max_position_embeddings", "random_positions"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: has to be a positive whole number of tokens")
        function = METHODS[self.rope_type]
        if function.needs_window and self.original_max_position_embeddings is None:
            raise UserError(f"rope_type {self.rope_type} needs original_max_position_embeddings, the window of pre-training")
        given = {k: v for k, v in self.options.items() if v is not None}
        for name in given:
            if name not in function.options:
                raise UserError(f"rope_type {self.rope_type} has no setting '{name}'; it has {', '.join(function.options) or 'none'}")
            given[name] = check_setting(name, given[name], function.options[name].annotation, function.options[name].default)
        for name, option in function.options.items():
            if option.default is option.empty and name not in given:
                raise UserError(f"rope_type {self.rope_type} needs {name}")
        given = {name: list(given[name]) if isinstance(given[name], tuple) else given[name] for name in function.options if name in given}
        object.__setattr__(self, "options", {k: v for k, v in given.items() if v != function.options[k].default})
        # Tried once on a small head: settings that contradict each other are refused here, not in the middle of a run.
        pairs = next((len(v) for v in given.values() if isinstance(v, list)), max(4, min(256, -(-given.get("interpolated_dims", 0) // 2))))
        self.frequencies(plain_frequencies(2 * pairs, self.base), 2 * pairs, None)

    def __eq__(self, other):
        """Equal if they mean the same: a base that is not said is 10000."""
        return isinstance(other, RopeConfig) and self.to_dict() == other.to_dict()

    def __hash__(self):
        return hash(repr(self.to_dict()))

    @property
    def base(self):
        return 10000.0 if self.rope_theta is None else self.rope_theta

    def setting(self, name):
        """One of the method's own settings: what was given, or its default."""
        return self.options.get(name, METHODS[self.rope_type].options[name].default)

    def frequencies(self, theta, head_dim, seq_len):
        frequencies, attention_factor = METHODS[self.rope_type](theta, head_dim, self, seq_len, **self.options)
        if not 0 < attention_factor < 100:
            raise UserError(f"rope {self.to_dict()}: cos and sin would be multiplied by {attention_factor:g}; about 1 is usual")
        return frequencies, attention_factor

    @classmethod
    def from_dict(cls, d, max_position_embeddings=None):
        """From a Hugging Face `rope_scaling` or `rope_parameters` dict (`type` or `rope_type`). None is plain RoPE; an unknown key is a
        UserError. max_position_embeddings, if given here or in the dict, stands in for a missing original window or factor."""
        if d is not None and not isinstance(d, dict):
            raise UserError(f"rope {d!r:.200}: give an object like {{'rope_type': 'linear', 'factor': 2}}")
        d = {k: v for k, v in (d or {}).items() if k != "finetuned"}  # a remark of YaRN's authors
        old, new = d.pop("type", None), d.pop("rope_type", None)
        if old is not None and new is not None and old != new:
            raise UserError(f"rope: type '{old}' and rope_type '{new}' contradict each other; keep rope_type")
        if new is None and old is None and d.get("factor", 1) != 1:
            raise UserError(f"rope: factor {d['factor']} without a method: name one as rope_type (linear is Position Interpolation)")
        name = new if new is not None else old if old is not None else "default"
        if not isinstance(name, str):
            raise UserError(f"rope_type {name!r:.60}: give the name of a method, one of {', '.join(METHODS)}")
        name = ALIASES.get(name, name)
        longest, window = d.pop("max_position_embeddings", max_position_embeddings), d.get("original_max_position_embeddings")
        longest = check_setting("max_position_embeddings", longest, "int", None)
        window = check_setting("original_max_position_embeddings", window, "int", None)
        if longest and name in METHODS and METHODS[name].needs_window and not window:
            d["original_max_position_embeddings"] = window = longest
        if longest and window and "factor" in d and d["factor"] is None or longest and window and name == "longrope" and "factor" not in d:
            d["factor"] = max(1.0, longest / window)
        fields = [f.name for f in dataclasses.fields(cls) if f.name not in ("rope_type", "options")]
        settings = METHODS[name].options if name in METHODS else {}
        unknown = sorted(set(d) - set(fields) - set(settings)) if name in METHODS else []
        if unknown:
            raise UserError(f"rope: unknown key {', '.join(map(repr, unknown))} of rope_type {name}; known are "
                            f"{', '.join(['rope_type', *fields, *settings])}")
        return cls(rope_type=name, **{k: v for k, v in d.items() if k in fields}, options={k: v for k, v in d.items() if k in settings})

    def to_dict(self):
        """The flat dict that from_dict reads back: rope_type, rope_theta, and whatever differs from the defaults."""
        return {"rope_type": self.rope_type, "rope_theta": self.base,
                **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                   if f.name not in ("rope_type", "rope_theta", "options") and getattr(self, f.name) != f.default}, **self.options}

    def to_hugging_face(self, head_dim):
        """The `rope_parameters` that give the same angles in transformers. (For `dynamic` it takes L from max_position_embeddings in
        config.json, which therefore has to be L, and not L'.)

        Its own methods keep their name, and some others have one there too (ntk and abf are `default` with another base, ntk_by_parts is
        `llama3`). Any other whose frequencies neither vanish nor change with the length is a `longrope` with explicit
        factors theta_i / theta'_i, exact by definition. What neither can say is a UserError.
        """
        function = METHODS[self.rope_type]
        if self.random_positions:
            raise UserError("random_positions: transformers has no such positions; set it aside to export")
        shared = {"rope_theta": self.base}
        if self.partial_rotary_factor != 1:
            shared["partial_rotary_factor"] = self.partial_rotary_factor
        if callable(function.hugging_face) and not self.resonance:
            dim = int(head_dim * self.partial_rotary_factor)
            return shared | function.hugging_face(self, dim)
        if function.hugging_face and not self.resonance and "ramp" not in self.options:
            defaults = {k: o.default for k, o in function.options.items() if o.default not in (None, o.empty) and k != "ramp"}
            window = {"original_max_position_embeddings": self.original_max_position_embeddings} if function.needs_window else {}
            factor = {} if self.rope_type == "default" else {"factor": self.factor}
            return {"rope_type": self.rope_type, **shared, **factor, **window, **defaults, **self.options}
        frequencies, attention_factor = inv_freq(self, head_dim)
        if function.grows or not function.rotary or not (frequencies > 0).all():
            raise UserError(f"rope_type {self.rope_type}: transformers has no words for it, and no fixed factors give the same angles")
        if self.original_max_position_embeddings is None:
            raise UserError(f"rope_type {self.rope_type} is exported as longrope, which needs original_max_position_embeddings")
        factors = (plain_frequencies(2 * len(frequencies), self.base) / frequencies.double()).tolist()
        return {"rope_type": "longrope", **shared, "factor": self.factor, "attention_factor": attention_factor, "short_factor": factors,
                "long_factor": factors, "original_max_position_embeddings": self.original_max_position_embeddings}


def check_setting(name, value, kind, default):
    """The value, refused if it is not of the annotated kind: float (finite), int, bool, str or list (of positive numbers), `| None` or not.
    An int may be written as 64.0. No number is negative but dprope's threshold."""
    kind = kind.__name__ if isinstance(kind, type) else str(kind)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15  # NaN is not less
    if value is None and default is None:
        return None
    if kind.startswith("bool"):
        good, what = isinstance(value, bool), "true or false"
    elif kind.startswith("list"):
        good = isinstance(value, (list, tuple)) and value and all(isinstance(v, (int, float)) and 0 < v < 1e15 for v in value)
        what = "a list of positive numbers, one a pair"
    elif kind.startswith("str"):
        good, what = isinstance(value, str), "a word"
    elif kind.startswith("int"):
        good, what = number and value == int(value), "a whole number"
    else:
        good, what = number and (value >= 0 or name == "threshold"), "a finite number, not below 0"
    if not good:
        raise UserError(f"rope {name:.60} = {value!r:.100}: give {what}")
    return int(value) if kind.startswith("int") else value


def rope_argument(text):
    """What a --rope flag says, as a dict: the name of a method, or a JSON object with its settings."""
    if not text.lstrip().startswith("{"):
        return {"rope_type": text}
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--rope {text}: neither a method's name nor a JSON object ({error})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Frequencies, angles, rotation


def inv_freq(config, head_dim, seq_len=None, network=None):
    """The angle that each pair turns per position.

    config: RopeConfig; head_dim: D, even; seq_len: tokens seen so far, for methods that depend on it; network: a model's trained CLEX.
    Returns (float32 [D/2] in radians per token, attention_factor: what cos and sin are multiplied by); with a partial_rotary_factor p
    the frequencies are those of a head of p D, and only p D/2. Computed in float64 on the CPU and rounded once.
    """
    if head_dim < 2 or head_dim % 2:
        raise UserError(f"head_dim {head_dim}: RoPE rotates pairs, so it has to be even (dim / n_heads)")
    function = METHODS[config.rope_type]
    rotated = head_dim if function.whole_head else int(head_dim * config.partial_rotary_factor)
    if rotated < 2 or rotated % 2:
        raise UserError(f"partial_rotary_factor {config.partial_rotary_factor:g} of head_dim {head_dim}: has to leave an even number of "
                        "elements to rotate")
    theta = plain_frequencies(rotated, config.base)
    frequencies, attention_factor = config.frequencies(theta, rotated, seq_len)
    if network is not None and function.adds == "network":
        t = clex_time(config, seq_len, config.setting("max_factor"))
        frequencies = frequencies.float().to(network.up.weight.device) * network(theta, t)
    if config.resonance:
        frequencies = resonate(frequencies)
    return frequencies.float(), float(attention_factor)


def learned(config, head_dim):
    """The trainable part of a method: a CLEX, or None."""
    return CLEX(int(head_dim * config.partial_rotary_factor) // 2) if METHODS[config.rope_type].adds == "network" else None


def depends_on_length(config):
    """Whether angles change as the text grows. What a cache holds is then out of date after every change."""
    return METHODS[config.rope_type].grows or config.random_positions is not None


def cos_sin(inv_freq, positions, attention_factor=1.0):
    """Cosine and sine of the angles m * theta_i: positions [T] or [B, T] -> two float32 tensors [..., T, D/2].

    Always float32: in bfloat16 position 257 is 256, and the angle is off by a whole radian.
    """
    with torch.autocast(inv_freq.device.type, enabled=False):
        angles = positions[..., None].float() * inv_freq
        return angles.cos() * attention_factor, angles.sin() * attention_factor


def apply_rope(x, cos, sin):
    """Rotate the pairs (x_0, x_1), (x_2, x_3), ... (Meta's interleaved layout), as many as cos and sin have; what is left stays.

    x [B, H, T, D], cos and sin [T, D/2] or [B, T, D/2] -> [B, H, T, D]: (u, v) -> (u cos - v sin, u sin + v cos), computed in float32.
    """
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]                                      # one row of positions per sequence: [B, 1, T, D/2]
    if 2 * cos.shape[-1] < x.shape[-1]:                                            # partial rotary dimensions
        x, rest = x[..., :2 * cos.shape[-1]], x[..., 2 * cos.shape[-1]:]
        return torch.cat([apply_rope(x, cos, sin), rest], dim=-1)
    pairs = x.float().unflatten(-1, (-1, 2))                                       # [B, H, T, D] -> [B, H, T, D/2, 2]
    if torch.compiler.is_compiling() or x.device.type == "mps":                    # complex numbers are foreign to both
        u, v = pairs.unbind(-1)
        turned = torch.stack((u * cos - v * sin, u * sin + v * cos), dim=-1)
    else:                                                                          # (u + iv)(cos + i sin): the same in one pass over memory
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).type_as(x)                                           # [B, H, T, D/2, 2] -> [B, H, T, D]
