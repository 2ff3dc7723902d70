"""RoPE scaling in the words of Hugging Face's config.json, read and written.

transformers 5 keeps it as `rope_parameters`, everything older as `rope_scaling`. A model has two
windows, L of pre-training and L' that it was stretched to. Which of them
`max_position_embeddings` means depends on the method:

    linear                    it is L', and L = L' / factor
    dynamic                   it is L, whatever else the file says, and L' = factor L
    yarn, llama3, longrope    it is L', and original_max_position_embeddings is L; if that is
                              missing, it is L

Two of our settings are words of other classes than LLaMA's, which are LLaMA in all else:

    temperature llama4        Ministral 3's llama_4_scaling_beta, in the dict
    no_rope_layer_interval    SmolLM3's no_rope_layers, beside it
"""
import dataclasses

from common.errors import UserError
from methods import METHODS, RopeConfig, inv_freq
from rope import rope_frequencies

# The methods that transformers has under the same name and with the same settings.
HUGGING_FACE_METHODS = {"default", "linear", "dynamic", "yarn", "llama3", "longrope",
                        "proportional"}
ORIGINAL = "original_max_position_embeddings"
LLAMA, SMOLLM3, MINISTRAL3 = "LlamaForCausalLM", "SmolLM3ForCausalLM", "Ministral3ForCausalLM"
BETA, LLAMA4_BETA = "llama_4_scaling_beta", 0.1  # the key, and the value of temperatures.llama4


def rope_from_hugging_face(given: dict, window: int, notes: list[str], name: str = LLAMA
                           ) -> RopeConfig:
    """The RopeConfig of a config.json.

    given: the object in config.json. window: its max_position_embeddings. notes: a list that gets
    a line for each setting that is ignored. name: the class in transformers.
    """
    found = []
    for key in ("rope_scaling", "rope_parameters"):
        if given.get(key):
            found.append(read_dict(given[key], given, window, notes, name))
    if not found and name == MINISTRAL3:
        raise UserError("rope_parameters is missing: take the config.json of the checkpoint")
    if not found:
        found = [read_dict({}, given, window, notes, name)]
    if found[0] != found[-1]:
        raise UserError("rope_scaling and rope_parameters contradict each other: remove one")
    if name == SMOLLM3:
        return dataclasses.replace(found[0], no_rope_layer_interval=unrotated_interval(given))
    return found[0]


def unrotated_interval(given: dict) -> int | None:
    """n where every n-th layer is unrotated, None where all are rotated. In no_rope_layers a 1
    stands for a layer that is rotated, whatever the name says, and a 0 for one that is not."""
    n_layers, rotated = given["num_hidden_layers"], given.get("no_rope_layers")
    if rotated is None:
        every = given.get("no_rope_layer_interval")
        if every == 0:
            raise UserError("no_rope_layer_interval 0: has to be a positive whole number")
        return every
    if (not isinstance(rotated, list) or len(rotated) < n_layers
            or any(value not in (0, 1) for value in rotated)):
        raise UserError(f"no_rope_layers {rotated!r:.60}: has to be a list, for each layer a 1 "
                        "or a 0")
    rotated = rotated[:n_layers]
    if all(rotated):
        return None
    every = rotated.index(0) + 1
    if rotated != rotated_layers(every, n_layers):
        raise UserError(f"no_rope_layers {rotated!r:.60}: only models that leave every n-th layer "
                        "unrotated load")
    return every


def rotated_layers(every: int, n_layers: int) -> list[int]:
    """SmolLM3's no_rope_layers: a 0 for every n-th layer, a 1 for all others."""
    return [int(layer % every != 0) for layer in range(1, n_layers + 1)]


def read_dict(rope: dict, given: dict, window: int, notes: list[str], class_name: str
              ) -> RopeConfig:
    """The RopeConfig of one of the two dicts, completed as transformers completes it."""
    if not isinstance(rope, dict):
        raise UserError(f"rope {rope!r:.60}: has to be an object like "
                        "{\"rope_type\": \"linear\", \"factor\": 2}")
    # A factor of null means L' / L, which from_dict computes.
    rope = {key: value for key, value in rope.items() if value is not None or key == "factor"}
    for key in ("rope_theta", "partial_rotary_factor"):  # older files have them beside the dict
        if given.get(key) is not None:
            rope.setdefault(key, given[key])
    beta = rope.pop(BETA, 0) if class_name == MINISTRAL3 else 0
    if beta not in (0, LLAMA4_BETA):
        raise UserError(f"{BETA} {beta!r:.60}: only {LLAMA4_BETA} loads, or 0, which is none")
    name = rope.get("rope_type", rope.get("type"))
    if name == "default":
        rope.pop("factor", None)  # transformers ignores it; here it would divide the window

    beside = given.get(ORIGINAL)
    if beside is not None and (name in ("yarn", "llama3", "longrope") or ORIGINAL not in rope):
        rope[ORIGINAL] = beside
    if name == "dynamic":
        original = rope.get(ORIGINAL, window)
        if original != window and beta:
            raise UserError(f"{BETA} counts from {ORIGINAL} {original!r:.60}, and dynamic from "
                            f"max_position_embeddings {window}: only one window loads")
        if original != window:
            notes.append(f"{ORIGINAL} {original!r:.60} is ignored: dynamic begins at "
                         f"max_position_embeddings, {window}, as in transformers")
        rope[ORIGINAL] = window

    config = RopeConfig.from_dict(rope, max_position_embeddings=window)
    refuse_what_transformers_lacks(config)
    if config.rope_type == "linear" and config.original_max_position_embeddings is None:
        original = max(1, round(window / config.factor))
        config = dataclasses.replace(config, original_max_position_embeddings=original)
    return dataclasses.replace(config, temperature="llama4") if beta else config


def refuse_what_transformers_lacks(rope: RopeConfig) -> None:
    """A UserError for what transformers' LLaMA cannot compute, whether read or written."""
    method = METHODS[rope.rope_type]
    if rope.partial_rotary_factor != 1 and not method.full_head:
        raise UserError(f"partial_rotary_factor {rope.partial_rotary_factor:g}: transformers' "
                        "LLaMA turns whole heads; only Meta's layout has this model")
    refuse_beyond_frequencies(rope)
    if method.mechanism == "network":
        raise UserError(f"rope_type {rope.rope_type}: transformers has no words for it, nor a "
                        "place for what it learns; only Meta's layout has this model")


def beyond_frequencies(rope: RopeConfig) -> str | None:
    """What else than frequencies this model's positions are made of: neither transformers' LLaMA
    nor llama.cpp's has it."""
    found = []
    if METHODS[rope.rope_type].distance_map is not None:
        found.append(f"rope_type {rope.rope_type}")
    if rope.temperature not in (None, "none"):
        found.append(f"temperature {rope.temperature}")
    if rope.no_rope_layer_interval is not None:
        found.append(f"no_rope_layer_interval {rope.no_rope_layer_interval}")
    return ", and ".join(found) or None


def refuse_beyond_frequencies(rope: RopeConfig) -> None:
    if beyond_frequencies(rope):
        raise UserError(f"{beyond_frequencies(rope)}: transformers has no LLaMA with it; only "
                        "Meta's layout has this model")


def refuse_two_temperatures(rope: RopeConfig, head_dim: int) -> None:
    """A UserError for Ministral 3's temperature beside YaRN's: in transformers both act, and here
    one takes the other's place. Where mscale = mscale_all_dim, as in its releases, YaRN's is 1."""
    if rope.temperature is None:
        return
    _, own = inv_freq(dataclasses.replace(rope, temperature=None), head_dim)
    if own != 1:
        raise UserError(f"{BETA}, and {rope.rope_type} has an attention factor of {own:.4g}: a "
                        "model with two temperatures does not load")


def class_and_rope(rope: RopeConfig) -> tuple[str, RopeConfig]:
    """The class in transformers that computes this model, and what is left for its dict:

        every n-th layer unrotated       SmolLM3's
        temperature llama4               Ministral 3's; the method has no factor of its own, then
        else                             LLaMA's
    """
    if rope.no_rope_layer_interval is not None and rope.temperature in (None, "none"):
        return SMOLLM3, dataclasses.replace(rope, no_rope_layer_interval=None)
    if rope.no_rope_layer_interval is None and rope.temperature == "llama4":
        return MINISTRAL3, dataclasses.replace(rope, temperature="none")
    return LLAMA, rope


def rope_to_hugging_face(rope: RopeConfig, head_dim: int) -> dict:
    """The `rope_parameters` by which transformers computes the same angles, as

        the method itself     if transformers has it
        another method        whose formula gives the same (in_other_words)
        longrope              for all other fixed frequencies above zero (as_longrope)

    and a UserError if none of them can. For `dynamic`, config.json has to give L, not L', as its
    max_position_embeddings.
    """
    refuse_beyond_frequencies(rope)
    if rope.random_positions:
        raise UserError("random_positions: transformers has no such positions; export without them")
    shared = {"rope_theta": rope.base}
    if rope.partial_rotary_factor != 1:
        shared["partial_rotary_factor"] = rope.partial_rotary_factor
    if rope.resonance or "ramp" in rope.options:  # transformers has neither
        return shared | as_longrope(rope, head_dim)
    if rope.rope_type in HUGGING_FACE_METHODS:
        return shared | under_its_own_name(rope)
    if rope.rope_type in ("ntk", "abf", "ntk_by_parts"):
        return shared | in_other_words(rope, int(head_dim * rope.partial_rotary_factor))
    return shared | as_longrope(rope, head_dim)


def under_its_own_name(rope: RopeConfig) -> dict:
    """A method of HUGGING_FACE_METHODS with all its settings. Defaults are written out too."""
    parameters = {"rope_type": rope.rope_type}
    if rope.rope_type != "default":
        parameters["factor"] = rope.factor
    if METHODS[rope.rope_type].needs_window:
        parameters[ORIGINAL] = rope.original_max_position_embeddings
    for name in METHODS[rope.rope_type].settings:
        if name != "ramp" and rope.setting(name) is not None:
            parameters[name] = rope.setting(name)
    if rope.temperature == "none" and "attention_factor" in METHODS[rope.rope_type].settings:
        parameters["attention_factor"] = 1.0
    return parameters


def in_other_words(rope: RopeConfig, dim: int) -> dict:
    """Three methods that transformers has under another name. dim: of the head that is rotated.

        ntk             default with base s^(D/(D-2))
        abf             default with another base
        ntk_by_parts    llama3 with beta_slow and beta_fast as its limits
    """
    if rope.rope_type == "ntk":
        stretched = rope.base * rope.factor ** (dim / max(dim - 2, 1))
        return {"rope_type": "default", "rope_theta": stretched}
    if rope.rope_type == "abf":
        return {"rope_type": "default", "rope_theta": rope.setting("new_rope_theta")}
    return {"rope_type": "llama3", "factor": rope.factor,
            "low_freq_factor": rope.setting("beta_slow"),
            "high_freq_factor": rope.setting("beta_fast"),
            ORIGINAL: rope.original_max_position_embeddings}


def as_longrope(rope: RopeConfig, head_dim: int) -> dict:
    """Fixed frequencies theta'_i > 0 as a longrope: f_i = theta_i / theta'_i at every length."""
    method = METHODS[rope.rope_type]
    frequencies, attention_factor = inv_freq(rope, head_dim)                       # [D/2]
    fixed = method.extends_rope and not method.length_dependent
    if not fixed or not (frequencies > 0).all():
        raise UserError(f"rope_type {rope.rope_type}: transformers has no words for it, and no "
                        "fixed factors give the same angles")
    if rope.original_max_position_embeddings is None:
        raise UserError(f"rope_type {rope.rope_type} is exported as longrope, which needs "
                        f"{ORIGINAL}")
    plain = rope_frequencies(2 * len(frequencies), rope.base)                      # [D/2]
    factors = (plain / frequencies.double()).tolist()
    return {"rope_type": "longrope", "factor": rope.factor, "attention_factor": attention_factor,
            "short_factor": factors, "long_factor": factors,
            ORIGINAL: rope.original_max_position_embeddings}
