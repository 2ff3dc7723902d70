"""Everything that a user may have written wrong about RoPE is refused here, in one line. So the
methods can trust their arguments."""
import functools
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.errors import UserError
from methods.distance_maps import Band
from methods.table import ALIASES, METHODS
from methods.temperatures import TEMPERATURES
from rope import angle_bins

if TYPE_CHECKING:
    from methods.config import RopeConfig

FIELD_KINDS = {"factor": "float", "original_max_position_embeddings": "int", "rope_theta": "float",
               "partial_rotary_factor": "float", "resonance": "bool", "random_positions": "int",
               "temperature": "str", "no_rope_layer_interval": "int"}
OPTIONAL = {"original_max_position_embeddings", "rope_theta", "random_positions", "temperature",
            "no_rope_layer_interval"}
MOST_POSITIONS = 2**22  # whose angles DPRoPE counts, and whose distances are checked


def method_name(name: object) -> str:
    """The name of a method, aliases resolved."""
    if not isinstance(name, str):
        raise UserError(f"rope_type {name!r:.60}: give the name of a method, one of "
                        f"{', '.join(METHODS)}")
    name = ALIASES.get(name, name)
    if name not in METHODS:
        raise UserError(f"rope_type '{name:.60}' is unknown: choose one of {', '.join(METHODS)} "
                        "(pi is another name of linear)")
    return name


def check_value(name: str, value: Any, kind: str, optional: bool = False) -> Any:
    """`value`, or a UserError if it is not of its kind (see table.Setting). A whole number may be
    written as 64.0. No number is negative but dprope's threshold."""
    if value is None and optional:
        return None
    is_number = (isinstance(value, (int, float)) and not isinstance(value, bool)
                 and abs(value) < 1e15)  # NaN is not less
    if kind == "bool":
        good, wanted = isinstance(value, bool), "true or false"
    elif kind == "list":
        good, wanted = is_list_of_positive_numbers(value), "a list of positive numbers, one a pair"
    elif kind == "str":
        good, wanted = isinstance(value, str), "a word"
    elif kind == "int":
        good, wanted = is_number and value == int(value) and value >= 0, "a whole number"
    else:
        good = is_number and (value >= 0 or name == "threshold")
        wanted = "a finite number, not below 0"
    if not good:
        raise UserError(f"rope {name:.60} = {value!r:.100}: give {wanted}")
    if kind == "int":
        return int(value)
    return list(value) if kind == "list" else value


def is_list_of_positive_numbers(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) == 0:
        return False
    return all(isinstance(v, (int, float)) and 0 < v < 1e15 for v in value)


def check_config(config: "RopeConfig") -> dict[str, Any]:
    """Refuse a RopeConfig that cannot work. Returns its fields in their final form: aliases
    resolved, whole numbers as int, and only those options that differ from the defaults."""
    fields = {name: check_value(name, getattr(config, name), kind, name in OPTIONAL)
              for name, kind in FIELD_KINDS.items()}
    for field_name in ("random_positions", "no_rope_layer_interval"):
        fields[field_name] = fields[field_name] or None                # 0 says: none
    check_fields(fields)
    name = method_name(config.rope_type)
    method = METHODS[name]
    if method.needs_window and fields["original_max_position_embeddings"] is None:
        raise UserError(f"rope_type {name} needs original_max_position_embeddings, the window of "
                        "pre-training")
    options = checked_options(name, config.options)
    check_temperature(fields)
    check_method(name, options, fields)
    fields["rope_type"] = name
    fields["options"] = {option: value for option, value in options.items()
                         if value != method.settings[option].default}
    return fields


def check_fields(fields: dict[str, Any]) -> None:
    """Refuse numbers out of range, whatever the method."""
    factor, base, share = (fields[name] for name in ("factor", "rope_theta",
                                                     "partial_rotary_factor"))
    if factor > 1e6:
        raise UserError(f"rope factor {factor:g}: nothing is stretched a million times; give s = "
                        "target window / original window")
    if factor < 1:
        raise UserError(f"rope factor {factor:g}: give s = target window / original window, which "
                        "is at least 1")
    if base is not None and base <= 1:
        raise UserError(f"rope_theta {base:g}: the base has to be greater than 1 (LLaMA: 10000)")
    if not 0 < share <= 1:
        raise UserError(f"partial_rotary_factor {share:g}: give a share of the head, above 0 and "
                        "at most 1")
    for name in ("original_max_position_embeddings", "random_positions", "no_rope_layer_interval"):
        if fields[name] is not None and fields[name] < 1:
            raise UserError(f"{name} {fields[name]}: has to be a positive whole number")


def checked_options(rope_type: str, options: dict[str, Any]) -> dict[str, Any]:
    """The method's own settings that were given, each of its kind, in the order of the table."""
    settings = METHODS[rope_type].settings
    for name in options:
        if name not in settings and options[name] is not None:
            raise UserError(f"rope_type {rope_type} has no setting '{name}'; it has "
                            f"{', '.join(settings) or 'none'}")
    checked = {}
    for name, setting in settings.items():
        value = options.get(name)
        if value is not None:
            checked[name] = check_value(name, value, setting.kind)
        elif setting.required:
            raise UserError(f"rope_type {rope_type} needs {name}")
    return checked


def check_method(rope_type: str, options: dict[str, Any], fields: dict[str, Any]) -> None:
    """Refuse settings of one method that contradict each other."""
    settings = {name: options.get(name, setting.default)
                for name, setting in METHODS[rope_type].settings.items()}
    if settings.get("attention_factor") is not None:
        check_attention_factor(rope_type, settings["attention_factor"])
    if rope_type == "ntk_by_parts":
        check_turns(settings)
    elif rope_type in ("yarn", "dynamic_yarn"):
        check_yarn(settings)
    elif rope_type == "longrope":
        check_factor_counts(settings)
    elif rope_type == "llama3" and settings["low_freq_factor"] >= settings["high_freq_factor"]:
        raise UserError("llama3 needs low_freq_factor < high_freq_factor")
    elif rope_type == "abf" and settings["new_rope_theta"] <= 1:
        raise UserError(f"abf new_rope_theta {settings['new_rope_theta']:g}: has to be greater "
                        "than 1")
    elif rope_type == "dprope":
        check_dprope(settings, fields["original_max_position_embeddings"], fields["factor"])
    elif METHODS[rope_type].distance_map is not None:
        check_distance_map(rope_type, options, fields)
    elif rope_type == "clex" and (settings["max_factor"] < 1 or settings["max_factor"] % 1):
        raise UserError(f"clex max_factor {settings['max_factor']:g}: the largest t, a whole "
                        "number from 1 on")
    elif rope_type == "clex" and fields["factor"] > settings["max_factor"]:
        raise UserError(f"clex max_factor {settings['max_factor']:g}: it has to cover factor "
                        f"{fields['factor']:g}")


def check_temperature(fields: dict[str, Any]) -> None:
    name, L = fields["temperature"], fields["original_max_position_embeddings"]
    if name is None:
        return
    if name not in TEMPERATURES:
        raise UserError(f"temperature '{name:.60}' is unknown: choose one of "
                        f"{', '.join(TEMPERATURES)}")
    if name != "none" and (L is None or L < 2):
        raise UserError(f"temperature {name} needs original_max_position_embeddings, the window of "
                        "pre-training, of at least 2 tokens")
    if name != "none" and fields["partial_rotary_factor"] != 1:
        raise UserError("a temperature scales whole queries: it does not go with a "
                        "partial_rotary_factor below 1")


def check_distance_map(rope_type: str, options: dict[str, Any], fields: dict[str, Any]) -> None:
    """Refuse a map whose L' tokens are not folded into L. (The last query has to see the largest
    distance; the distances in between are not checked one by one.)"""
    L, names = fields["original_max_position_embeddings"], ", ".join(METHODS[rope_type].settings)
    target = round(L * fields["factor"])
    if target > MOST_POSITIONS:
        raise UserError(f"{rope_type}: {target} tokens are too many: give a smaller factor")
    if L < 4:
        raise UserError(f"{rope_type}: a window of {L} tokens is too short to fold a text into")
    for name, value in options.items():
        if value < 1 and name not in ("sinks", "local"):
            raise UserError(f"{rope_type} {name} {value:g}: has to be at least 1")
    if rope_type == "dca" and 2 * options.get("local", L // 4) > options.get("chunk", 3 * L // 4):
        raise UserError(f"dca local {options.get('local', L // 4)}: has to be at most half of the "
                        "chunk, or distances to near tokens are not exact")
    distance = farthest_seen(rope_type, L, fields["factor"], tuple(options.items()))
    if distance > L:
        raise UserError(f"{rope_type} reaches less than {target} tokens: of these the farthest "
                        f"would stand at a distance of {distance:.0f}, and the model knows {L}; "
                        f"give other settings ({names}) or a smaller factor")


def check_attention(name: str, rope_type: str, device: torch.device) -> None:
    """A UserError for an implementation that cannot merge a distance map's bands."""
    if name == "sdpa" and METHODS[rope_type].distance_map is not None and device.type != "cuda":
        raise UserError("attention sdpa: with a distance map it needs a GPU; choose auto or tiled")


@functools.cache
def farthest_seen(rope_type: str, L: int, factor: float, options: tuple) -> float:
    """The largest distance that the last of L' tokens sees."""
    n = torch.arange(round(L * factor), device="cpu")
    bands = METHODS[rope_type].distance_map(n[-1:], n, L, factor, **dict(options))
    return largest_distance(bands, n)


def largest_distance(bands: Sequence[Band], n: Tensor) -> float:
    """max q(m) - k(n) over all pairs: the distance that the model has to have been trained on."""
    found = 0.0
    for band in bands:
        seen = (n >= band.first[..., None]) & (n < band.stop[..., None])              # [T, S]
        distance = (band.q[..., None] - band.k).double().masked_fill(~seen, 0)
        found = max(found, float(distance.max()))
    return found


def check_turns(settings: dict[str, Any]) -> None:
    slow, fast = settings["beta_slow"], settings["beta_fast"]
    if slow >= fast:
        raise UserError(f"the limits {slow:g} and {fast:g} turns: the slow one has to be the "
                        "smaller (beta_slow < beta_fast)")


def check_yarn(settings: dict[str, Any]) -> None:
    ramp, slow, fast = settings["ramp"], settings["beta_slow"], settings["beta_fast"]
    if ramp not in ("index", "turns"):
        raise UserError(f"yarn ramp '{ramp}': choose index (the deployed one) or turns "
                        "(the paper's)")
    if ramp == "index" and not 0 < slow < fast:
        raise UserError(f"the limits {slow:g} and {fast:g} turns: 0 < beta_slow < beta_fast is "
                        "needed")
    check_turns(settings)


def check_factor_counts(settings: dict[str, Any], pairs: int | None = None) -> None:
    """LongRoPE's two lists are equally long, and have a factor for each of the head's pairs."""
    short, long = len(settings["short_factor"]), len(settings["long_factor"])
    if short != long or pairs not in (None, short):
        head = "" if pairs is None else f" for {pairs} pairs"
        raise UserError(f"longrope: {short} short and {long} long factors{head}: give one a pair")


def check_dprope(settings: dict[str, Any], window: int, factor: float) -> None:
    dims, bins = settings["interpolated_dims"], settings["bins"]
    if dims is not None and dims < 0:
        raise UserError(f"dprope interpolated_dims {dims}: give a number from 0 to head_dim, the "
                        "dimensions that turn")
    if bins is not None and not 1 <= bins <= max(window, 360):
        raise UserError(f"dprope bins {bins}: give the number of parts of a turn, about a tenth of "
                        "the window")
    if window * factor > MOST_POSITIONS:
        raise UserError("dprope counts the angles of all positions, and "
                        f"{window * factor:.0f} are too many: give a smaller factor")
    warn_of_empty_histograms(bins or angle_bins(window), window)


@functools.cache  # each warning once
def warn_of_empty_histograms(bins: int, window: int) -> None:
    suited = max(4, round(window / 11))
    if window / bins < 5 and bins > suited:
        warnings.warn(f"dprope: {bins} bins for a window of {window} leave the histograms nearly "
                      f"empty, and the choice of pairs to chance; about {suited} bins suit it",
                      stacklevel=2)


def check_head(config: "RopeConfig", rotary_dim: int) -> None:
    """Refuse settings that do not fit a head in which rotary_dim elements turn."""
    options, pairs = config.options, rotary_dim // 2
    if config.rope_type == "longrope":
        check_factor_counts(options, pairs)
    if config.rope_type == "dprope" and options.get("interpolated_dims", 0) > rotary_dim:
        raise UserError(f"dprope interpolated_dims {options['interpolated_dims']}: give a number "
                        f"from 0 to {rotary_dim}, the dimensions that turn")


def check_attention_factor(rope_type: str, attention_factor: float) -> None:
    if not 0 < attention_factor < 100:
        raise UserError(f"rope_type {rope_type}: attention_factor {attention_factor:g}: cos and "
                        "sin would be multiplied by it; about 1 is usual")
