"""What a model's folder says about its positions: RopeConfig."""
import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from common.errors import UserError
from methods.checks import FIELD_KINDS, check_config, check_value, method_name
from methods.table import METHODS


@dataclass(frozen=True, eq=False)
class RopeConfig:
    """How a model knows positions. It travels with the weights, as a "rope dict" in Hugging Face's
    words: {"rope_type": "linear", "factor": 2}. A UserError if it cannot work."""

    rope_type: str = "default"                            # a key of METHODS
    factor: float = 1.0                                   # s = L'/L, always from the original L
    original_max_position_embeddings: int | None = None   # L
    rope_theta: float | None = None                       # the base; None: 10000, or the model's
    partial_rotary_factor: float = 1.0                    # share of each head that is rotated
    resonance: bool = False                               # whole wavelengths, after any method
    random_positions: int | None = None                   # N: texts sit at random places below N
    temperature: str | None = None                        # of queries: log_n, llama4; "none" takes
                                                          # the method's own away, too (YaRN's)
    no_rope_layer_interval: int | None = None             # every n-th layer is left unrotated
    options: dict = field(default_factory=dict)           # the method's own settings

    def __post_init__(self):
        for name, value in check_config(self).items():
            object.__setattr__(self, name, value)         # as checked; the class is frozen

    def __eq__(self, other: object) -> bool:
        """Equal if they mean the same: a base that is not given is 10000."""
        return isinstance(other, RopeConfig) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(repr(self.to_dict()))

    @property
    def base(self) -> float:
        return 10000.0 if self.rope_theta is None else self.rope_theta

    def setting(self, name: str) -> Any:
        """One of the method's own settings: the given value, or its default."""
        return self.options.get(name, METHODS[self.rope_type].settings[name].default)

    @classmethod
    def from_dict(cls, d: dict[str, Any] | None, max_position_embeddings: int | None = None
                  ) -> "RopeConfig":
        """From a Hugging Face `rope_scaling` or `rope_parameters` dict (`type` or `rope_type`).

        None is plain RoPE; an unknown key is a UserError. max_position_embeddings, given here or
        in the dict, is L for a method that needs L and has none, and L' where the factor is null.
        """
        if d is not None and not isinstance(d, dict):
            raise UserError(f"rope {d!r:.200}: give an object like "
                            "{'rope_type': 'linear', 'factor': 2}")
        given = dict(d or {})
        given.pop("finetuned", None)                      # a remark of YaRN's authors
        rope_type = take_rope_type(given)
        fill_in_window_and_factor(given, rope_type, max_position_embeddings)

        settings = METHODS[rope_type].settings
        known = ["rope_type", *FIELD_KINDS, *settings]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise UserError(f"rope: unknown key {', '.join(map(repr, unknown))} of rope_type "
                            f"{rope_type}; known are {', '.join(known)}")
        options = {name: given.pop(name) for name in settings if name in given}
        return cls(rope_type, **given, options=options)

    def to_dict(self) -> dict[str, Any]:
        """The flat dict that from_dict reads back: rope_type, rope_theta, and all that differs from
        the defaults."""
        d = {"rope_type": self.rope_type, "rope_theta": self.base}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name not in ("rope_type", "rope_theta", "options") and value != f.default:
                d[f.name] = value
        return d | self.options


def take_rope_type(given: dict[str, Any]) -> str:
    """Remove `type` and `rope_type`, two spellings of one key, and return the method's name."""
    old, new = given.pop("type", None), given.pop("rope_type", None)
    if old is not None and new is not None and old != new:
        raise UserError(f"rope: type '{old}' and rope_type '{new}' contradict each other; keep "
                        "rope_type")
    name = new if new is not None else old
    if name is None and given.get("factor", 1) != 1:
        raise UserError(f"rope: factor {given['factor']} without a method: name one as rope_type "
                        "(linear is Position Interpolation)")
    return method_name("default" if name is None else name)


def fill_in_window_and_factor(given: dict[str, Any], rope_type: str, longest: int | None) -> None:
    """Fill in a needed L, and a null s, from max_position_embeddings. longest: the model's own."""
    longest = check_value("max_position_embeddings",
                          given.pop("max_position_embeddings", longest), "int", optional=True)
    window = check_value("original_max_position_embeddings",
                         given.get("original_max_position_embeddings"), "int", optional=True)
    if not longest:
        return
    needs_window = METHODS[rope_type].needs_window or given.get("temperature") not in (None, "none")
    if not window and needs_window:
        window = longest
        given["original_max_position_embeddings"] = window
    factor_is_null = "factor" in given and given["factor"] is None
    phi3_style = rope_type == "longrope" and "factor" not in given
    if window and (factor_is_null or phi3_style):
        given["factor"] = max(1.0, longest / window)


def parse_rope_flag(text: str) -> dict[str, Any]:
    """A --rope flag, the name of a method or a JSON object with its settings, as a dict. Its
    rope_type is a key of METHODS: aliases (pi) are resolved."""
    given = {"rope_type": text}
    if text.lstrip().startswith("{"):
        try:
            given = json.loads(text)
        except (ValueError, RecursionError) as error:  # also endless digits and brackets
            raise UserError(f"--rope {text:.200}: neither a method's name nor a JSON object "
                            f"({error})") from None
    rope_type = take_rope_type(dict(given))
    given.pop("type", None)
    return given | {"rope_type": rope_type}
