"""The table of all methods: for each name its function, and what the other files have to know.

To add a method write one function, in rarer.py or a file of its own, and one row in METHODS. Every
command then takes it by its name, model folders keep its settings, and the tests try it.
"""
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import rope
from methods import clex, distance_maps, rarer


@dataclass(frozen=True)
class Setting:
    """A setting of one method, as it is written in a rope dict."""
    kind: str                   # float, int, bool, str, or list (of positive numbers, one a pair)
    default: object = None
    required: bool = False


@dataclass(frozen=True)
class Method:
    """`function(head_dim, base, *arguments, **settings)` returns (inv_freq, attention_factor)."""
    function: Callable
    arguments: tuple[str, ...] = ()         # what it takes besides head_dim and base, see angles.py
    settings: dict[str, Setting] = field(default_factory=dict)
    extends_rope: bool = True               # a model trained with plain RoPE may be stretched by it
    trained_on: str = "target"              # training rows: "target" (L' tokens), "original" (L),
                                            # or "random" (L tokens at places of a longer text)
    full_head: bool = False                 # it gets the whole head, and its rotated share
    mechanism: str = "angles"               # "bias" on scores, "decay", "network", "distances"
    distance_map: Callable | None = None    # of distance_maps.py, where the mechanism is distances

    @property
    def needs_window(self) -> bool:
        """It computes with L."""
        return "original_window" in self.arguments or self.distance_map is not None

    @property
    def length_dependent(self) -> bool:
        """The frequencies change with the length of the text."""
        return "seq_len" in self.arguments

    @property
    def needs_settings(self) -> bool:
        """It does not work without settings of its own (LongRoPE's factors)."""
        return any(setting.required for setting in self.settings.values())


def folding(distance_map: Callable, settings: dict[str, Setting]) -> Method:
    """A row for a distance map."""
    return Method(rope.default, (), settings, mechanism="distances", distance_map=distance_map)


STRETCH = ("factor",)
STRETCH_OF_WINDOW = ("factor", "original_window")
STRETCH_BY_LENGTH = ("factor", "original_window", "seq_len")

BETAS = {"beta_fast": Setting("float", 32.0), "beta_slow": Setting("float", 1.0)}
YARN = {**BETAS,
        "truncate": Setting("bool", True),
        "ramp": Setting("str", "index"),
        "attention_factor": Setting("float"),
        "mscale": Setting("float"),
        "mscale_all_dim": Setting("float")}

METHODS = {
    "default": Method(rope.default),
    "linear": Method(rope.linear, STRETCH),                             # Position Interpolation
    "ntk": Method(rope.ntk, STRETCH),
    "dynamic": Method(rope.dynamic, STRETCH_BY_LENGTH),
    "ntk_by_parts": Method(rope.ntk_by_parts, STRETCH_OF_WINDOW, BETAS),
    "yarn": Method(rope.yarn, STRETCH_OF_WINDOW, YARN),
    "dynamic_yarn": Method(rope.dynamic_yarn, STRETCH_BY_LENGTH, YARN),
    "llama3": Method(rope.llama3, STRETCH_OF_WINDOW, {
        "low_freq_factor": Setting("float", 1.0),
        "high_freq_factor": Setting("float", 4.0)}),
    "longrope": Method(rarer.longrope, STRETCH_BY_LENGTH, {
        "short_factor": Setting("list", required=True),
        "long_factor": Setting("list", required=True),
        "attention_factor": Setting("float")}),
    "abf": Method(rarer.abf, (), {"new_rope_theta": Setting("float", 500000.0)}),
    # Cached, as it counts the angles of all positions.
    "dprope": Method(functools.lru_cache(rope.dprope), STRETCH_OF_WINDOW, {
        "threshold": Setting("float", 0.0),
        "interpolated_dims": Setting("int"),
        "bins": Setting("int")}),
    "proportional": Method(rarer.proportional, ("factor", "partial_rotary_factor"),
                           full_head=True),
    "clex": Method(clex.clex, STRETCH_BY_LENGTH, {"max_factor": Setting("float", 16.0)},
                   trained_on="random", mechanism="network"),
    "nope": Method(rarer.nope, extends_rope=False),
    "drope": Method(rarer.drope, ("original_window", "seq_len"),
                    {"log_scale": Setting("float", 0.412)},
                    extends_rope=False, trained_on="original", full_head=True),
    # Distance maps: plain RoPE at other places, see distance_maps.py. Their settings go to the map.
    "rerope": folding(distance_maps.rerope, {
        "window": Setting("int")}),
    "leaky_rerope": folding(distance_maps.leaky_rerope, {
        "window": Setting("int"),
        "stretch": Setting("float")}),
    "self_extend": folding(distance_maps.self_extend, {
        "window": Setting("int"),
        "group": Setting("int")}),
    "dca": folding(distance_maps.dca, {
        "chunk": Setting("int"),
        "local": Setting("int")}),
    "streaming": folding(distance_maps.streaming, {
        "sinks": Setting("int", 4),
        "window": Setting("int")}),
    # These two do more than rotate: baselines.py.
    "alibi": Method(rarer.nope, extends_rope=False, mechanism="bias"),
    "xpos": Method(rope.linear, STRETCH, extends_rope=False, mechanism="decay"),
}

ALIASES = {"pi": "linear", "none": "default", "su": "longrope", "ntk-by-parts": "ntk_by_parts",
           "dynamic-yarn": "dynamic_yarn", "self-extend": "self_extend",
           "leaky-rerope": "leaky_rerope"}
