"""RoPE in Hugging Face's words: what is written gives the same angles, here and in transformers,
and what is read is what transformers computes."""
import json
import random

import numpy as np
import pytest
import torch
from reference import complete

from common.errors import UserError
from methods import METHODS, RopeConfig, inv_freq
from weights.rope_dialects import (HUGGING_FACE_METHODS, rope_from_hugging_face,
                                   rope_to_hugging_face)

LENGTHS = (None, 10, 64, 65, 500)
ORIGINAL = "original_max_position_embeddings"
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}


def config_of(name, head_dim=16, **settings):
    """The RopeConfig of a method with s = 4, L = 64, and what it cannot do without."""
    return RopeConfig.from_dict(complete({"rope_type": name, **settings}, head_dim))


def in_transformers(rope, head_dim, seq_len, max_position_embeddings=None):
    """(inv_freq, attention_factor) of transformers for a dict of rope_parameters."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    # LLaMA's own embedding does not know a partial_rotary_factor, Phi's does.
    from transformers.models.phi.modeling_phi import PhiRotaryEmbedding
    longest = max_position_embeddings
    if longest is None:
        longest = int(rope.get(ORIGINAL, 64) * rope.get("factor", 1))
    config = LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim,
                         max_position_embeddings=longest, rope_parameters=dict(rope))
    if rope["rope_type"] == "default":
        return PhiRotaryEmbedding(config).inv_freq, 1.0
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", seq_len=seq_len)


def read(given, window, quiet=True):
    """The RopeConfig of a config.json; quiet: nothing in it is ignored."""
    notes = []
    config = rope_from_hugging_face(given, window, notes)
    assert bool(notes) != quiet
    return config


# --------------------------------------------------------------------------------------------------
# Writing

EXPORTS = [*((name, {}) for name in METHODS),
           *((name, {"partial_rotary_factor": 0.5}) for name in METHODS),
           *((name, {"resonance": True}) for name in METHODS),
           ("yarn", {"ramp": "turns"}),
           ("yarn", {"ramp": "turns", "mscale": 1.0, "mscale_all_dim": 0.5}),
           ("yarn", {"truncate": False, "attention_factor": 1.3}),
           ("dprope", {"interpolated_dims": 14}),
           ("ntk", {"rope_theta": 5e5}), ("ntk", {"partial_rotary_factor": 0.0625}),
           ("abf", {"new_rope_theta": 3e6, "rope_theta": 5e5}),
           ("ntk_by_parts", {"beta_fast": 8.0, "beta_slow": 0.5})]


def label(value):
    if isinstance(value, dict):
        return " ".join(f"{key}={setting}" for key, setting in value.items())
    return value


def exported(name, settings):
    """(config, its Hugging Face dict), or None where transformers has no words for it. Which those
    are follows from the method's properties."""
    config, method = config_of(name, 32, **settings), METHODS[name]
    moving = bool((inv_freq(config, 32)[0] > 0).all())
    fixed = (method.extends_rope and not method.length_dependent and moving
             and not method.distance_map)
    if fixed or name in HUGGING_FACE_METHODS and not config.resonance:
        return config, rope_to_hugging_face(config, 32)
    with pytest.raises(UserError, match=f"^rope_type {name}: "):
        rope_to_hugging_face(config, 32)
    return None


@pytest.mark.parametrize("name, settings", EXPORTS, ids=label)
def test_what_is_written_comes_back_as_the_same_angles(name, settings):
    pair = exported(name, settings)
    if pair is None:
        return
    config, rope = pair
    other_words = {"ntk": "default", "abf": "default", "ntk_by_parts": "llama3"}
    if settings.get("resonance") or "ramp" in settings:
        expected = "longrope"
    elif name in HUGGING_FACE_METHODS:
        expected = name
    else:
        expected = other_words.get(name, "longrope")
    assert rope["rope_type"] == expected
    again = RopeConfig.from_dict(json.loads(json.dumps(rope)))
    for length in LENGTHS:
        theta, factor = inv_freq(config, 32, length)
        back, factor_back = inv_freq(again, 32, length)
        torch.testing.assert_close(back, theta, rtol=2e-7, atol=0)
        assert factor_back == pytest.approx(factor, rel=1e-12)


def test_what_is_written_is_the_same_in_transformers():
    pytest.importorskip("transformers")
    count = 0
    for name, settings in EXPORTS:
        pair = exported(name, settings)
        if pair is None:
            continue
        config, rope = pair
        for length in LENGTHS:
            expected, factor = in_transformers(rope, 32, length, 64 if name == "dynamic" else None)
            theta, attention_factor = inv_freq(config, 32, length)
            np.testing.assert_allclose(theta, expected, rtol=2e-5,
                                       err_msg=f"{name} {settings} at {length}")
            assert attention_factor == pytest.approx(factor, rel=1e-6), name
            count += 1
    assert count > 100


def test_what_transformers_has_no_words_for_is_refused_by_name():
    for name in ("dynamic_yarn", "clex", "nope", "drope", "alibi", "xpos"):
        assert exported(name, {}) is None
    assert exported("proportional", {"resonance": True, "partial_rotary_factor": 0.5}) is None
    assert exported("dynamic", {"resonance": True}) is None
    with pytest.raises(UserError, match="random_positions"):
        rope_to_hugging_face(RopeConfig(random_positions=100), 16)
    with pytest.raises(UserError, match=f"rope_type linear .*{ORIGINAL}"):
        rope_to_hugging_face(RopeConfig("linear", 2.0, resonance=True), 16)


def test_what_is_written_says_all_that_it_has_to():
    """Defaults of settings too, and no key that transformers does not know."""
    base = {"rope_theta": 10000.0}
    assert rope_to_hugging_face(config_of("linear"), 16) == {
        "rope_type": "linear", **base, "factor": 4.0}
    assert rope_to_hugging_face(RopeConfig(rope_theta=5e5), 16) == {
        "rope_type": "default", "rope_theta": 5e5}
    assert rope_to_hugging_face(config_of("llama3"), 16) == {
        "rope_type": "llama3", **base, "factor": 4.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, ORIGINAL: 64}
    assert rope_to_hugging_face(config_of("yarn", mscale=0.7, mscale_all_dim=0.5), 16) == {
        "rope_type": "yarn", **base, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": True, "mscale": 0.7, "mscale_all_dim": 0.5, ORIGINAL: 64}
    assert rope_to_hugging_face(config_of("dynamic"), 16) == {
        "rope_type": "dynamic", **base, "factor": 4.0, ORIGINAL: 64}
    assert rope_to_hugging_face(RopeConfig("longrope", 4.0, 64, options=FACTORS), 8) == {
        "rope_type": "longrope", **base, "factor": 4.0, **FACTORS, ORIGINAL: 64}
    assert rope_to_hugging_face(config_of("proportional", partial_rotary_factor=0.5), 16) == {
        "rope_type": "proportional", **base, "factor": 4.0, "partial_rotary_factor": 0.5}
    assert rope_to_hugging_face(RopeConfig("ntk", 4.0), 128) == {
        "rope_type": "default", "rope_theta": pytest.approx(40889.9424, rel=1e-7)}
    assert rope_to_hugging_face(config_of("ntk_by_parts", beta_fast=8.0), 16) == {
        "rope_type": "llama3", **base, "factor": 4.0, "low_freq_factor": 1.0,
        "high_freq_factor": 8.0, ORIGINAL: 64}
    assert rope_to_hugging_face(RopeConfig("abf"), 16) == {
        "rope_type": "default", "rope_theta": 500000.0}


def test_a_longrope_of_any_fixed_method_has_the_quotients_as_factors():
    rope = rope_to_hugging_face(RopeConfig("linear", 4.0, 64, resonance=True), 8)
    wavelengths = [6.28318, 62.8318, 628.318, 6283.18]
    expected = [round(4 * w) / w for w in wavelengths]
    assert rope["short_factor"] == rope["long_factor"] == pytest.approx(expected, rel=1e-5)
    assert (rope["factor"], rope["attention_factor"], rope[ORIGINAL]) == (4.0, 1.0, 64)
    yarn = config_of("yarn", ramp="turns")
    assert rope_to_hugging_face(yarn, 16)["attention_factor"] == inv_freq(yarn, 16)[1] > 1


# --------------------------------------------------------------------------------------------------
# Reading

@pytest.mark.parametrize("rope, beside, config", [
    # linear: max_position_embeddings is L'
    ({"type": "linear", "factor": 4}, {}, RopeConfig("linear", 4.0, 16)),
    ({"type": "pi", "factor": 4}, {}, RopeConfig("linear", 4.0, 16)),
    ({"rope_type": "linear", "factor": 4, ORIGINAL: 20}, {}, RopeConfig("linear", 4.0, 20)),
    ({"rope_type": "linear", "factor": 4}, {ORIGINAL: 20}, RopeConfig("linear", 4.0, 20)),
    ({"rope_type": "linear", "factor": 4, ORIGINAL: 20}, {ORIGINAL: 99},
     RopeConfig("linear", 4.0, 20)),
    ({"rope_type": "linear", "factor": 1000}, {}, RopeConfig("linear", 1000.0, 1)),
    # dynamic: it is L
    ({"type": "dynamic", "factor": 2.0}, {}, RopeConfig("dynamic", 2.0, 64)),
    ({"type": "dynamic", "factor": 2.0, ORIGINAL: 64}, {}, RopeConfig("dynamic", 2.0, 64)),
    # yarn, llama3, longrope: L' if L is said, and L if it is not; the one beside the dict wins
    ({"rope_type": "yarn", "factor": 4.0}, {}, RopeConfig("yarn", 4.0, 64)),
    ({"rope_type": "yarn", "factor": 4.0, ORIGINAL: 16}, {}, RopeConfig("yarn", 4.0, 16)),
    ({"rope_type": "yarn", "factor": 4.0, ORIGINAL: 8}, {ORIGINAL: 16},
     RopeConfig("yarn", 4.0, 16)),
    ({"rope_type": "yarn", "factor": None}, {ORIGINAL: 16}, RopeConfig("yarn", 4.0, 16)),
    ({"rope_type": "yarn", "factor": 2.0, "mscale": None, "attention_factor": None, ORIGINAL: 16},
     {}, RopeConfig("yarn", 2.0, 16)),
    ({"rope_type": "llama3", "factor": 4.0, ORIGINAL: 8}, {ORIGINAL: 16},
     RopeConfig("llama3", 4.0, 16)),
    ({"rope_type": "longrope", **FACTORS, ORIGINAL: 8}, {ORIGINAL: 16},
     RopeConfig("longrope", 4.0, 16, options=FACTORS)),
    ({"type": "su", **FACTORS}, {ORIGINAL: 16}, RopeConfig("longrope", 4.0, 16, options=FACTORS)),
    ({"type": "su", **FACTORS, ORIGINAL: 128}, {},
     RopeConfig("longrope", 1.0, 128, options=FACTORS)),  # a window smaller than that of training
    # plain RoPE; a factor has no effect on it
    ({}, {}, RopeConfig()), ({"rope_type": "default", "factor": 3}, {}, RopeConfig()),
    ({"rope_type": "default", "factor": None}, {}, RopeConfig()),
    # the base, in the dict before beside it
    ({"rope_type": "default"}, {"rope_theta": 5e5}, RopeConfig(rope_theta=5e5)),
    ({"rope_type": "default", "rope_theta": 1e6}, {"rope_theta": 5e5}, RopeConfig(rope_theta=1e6)),
    ({"rope_type": "default", "rope_theta": None}, {"rope_theta": 5e5},
     RopeConfig(rope_theta=5e5)),
    ({"rope_type": "proportional"}, {"partial_rotary_factor": 0.5},
     RopeConfig("proportional", partial_rotary_factor=0.5)),
])
def test_which_window_is_which(rope, beside, config):
    assert read({"rope_parameters": rope, **beside}, 64) == config
    assert read({"rope_scaling": rope, **beside}, 64) == config
    assert read({"rope_scaling": rope, "rope_parameters": rope, **beside}, 64) == config


@pytest.mark.parametrize("inside, beside", [(16, None), (None, 16), (16, 32), (64, 16),
                                            ("\n" * 99, None)])
def test_an_original_window_that_dynamic_ignores_is_said(inside, beside):
    rope, notes = {"type": "dynamic", "factor": 2.0, ORIGINAL: inside}, []
    config = rope_from_hugging_face({"rope_scaling": rope, ORIGINAL: beside}, 64, notes)
    assert config == RopeConfig("dynamic", 2.0, 64)
    if inside == 64:
        assert notes == []
    else:
        assert len(notes) == 1 and notes[0].isprintable()
        assert "is ignored: dynamic begins at max_position_embeddings, 64" in notes[0]


def test_two_dicts_that_contradict_each_other_are_refused():
    linear = {"rope_type": "linear", "factor": 4.0}
    for other in ({"rope_type": "linear", "factor": 2.0}, {"rope_type": "ntk", "factor": 4.0},
                  {"rope_type": "default"}, {**linear, ORIGINAL: 17},
                  {**linear, "rope_theta": 5e5}):
        with pytest.raises(UserError, match="rope_scaling and rope_parameters contradict"):
            read({"rope_scaling": linear, "rope_parameters": other}, 64)
    assert read({"rope_scaling": linear, "rope_parameters": {**linear, ORIGINAL: 16}}, 64) == \
        RopeConfig("linear", 4.0, 16)


@pytest.mark.parametrize("given, words", [
    ({"rope_scaling": "linear"}, "rope 'linear': has to be an object"),
    ({"rope_parameters": {"factor": 2.0}}, "factor 2.0 without a method"),
    ({"rope_parameters": {"type": "default", "rope_type": "linear", "factor": 2.0}},
     "contradict each other"),
    ({"rope_parameters": {"rope_type": "linear", "factr": 2.0}}, "unknown key 'factr'"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}, ORIGINAL: "16"}, ORIGINAL),
    ({"rope_parameters": {"rope_type": "linear", "factor": None}}, "factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5: transformers' LLaMA turns whole"),
    ({"rope_parameters": {"rope_type": "clex", "factor": 2.0}}, "rope_type clex: transformers has "
                                                                "no words for it"),
], ids=str)
def test_what_is_wrong_is_refused(given, words):
    with pytest.raises(UserError, match=words) as error:
        read(given, 64)
    assert "\n" not in str(error.value)


def random_rope(rng, kind):
    """(rope_parameters, head_dim, window L) of a method that transformers has."""
    head_dim = rng.choice([16, 32, 64, 80, 96, 128])
    window = rng.choice([64, 256, 2048, 4096, 8192])
    s = rng.uniform(1.5, 32)
    rope = {"rope_type": kind, "rope_theta": 10 ** rng.uniform(4, 6)}
    if kind != "default":
        rope["factor"] = s
    if kind in ("yarn", "llama3", "longrope"):
        rope[ORIGINAL] = window
    if kind == "llama3":
        rope["low_freq_factor"] = rng.uniform(0.5, 2)
        rope["high_freq_factor"] = rng.uniform(3, 8)
    if kind == "yarn":
        for keys in ({"beta_fast": rng.uniform(8, 64), "beta_slow": rng.uniform(0.2, 4)},
                     {"truncate": False}, {"attention_factor": rng.uniform(1, 2)},
                     {"mscale": rng.choice([1.0, 0.7]), "mscale_all_dim": rng.choice([1.0, 0.5])}):
            rope |= keys if rng.random() < 0.4 else {}
    if kind == "longrope":
        rope["short_factor"] = [rng.uniform(1, 2) for _ in range(head_dim // 2)]
        rope["long_factor"] = [rng.uniform(1, s) for _ in range(head_dim // 2)]
        rope |= {"attention_factor": rng.uniform(1, 2)} if rng.random() < 0.3 else {}
    if kind == "proportional":
        rope["partial_rotary_factor"] = rng.choice([0.25, 0.5, 0.75])
    return rope, head_dim, window


def test_random_configs_are_read_as_transformers_reads_them():
    pytest.importorskip("transformers")
    rng = random.Random(0)
    for kind in sorted(HUGGING_FACE_METHODS) * 6:
        rope, head_dim, window = random_rope(rng, kind)
        s = rope.get("factor", 1.0)
        longest = window if kind == "dynamic" else int(s * window)
        config = read({"rope_parameters": rope}, longest)
        for seq_len in (None, window // 2, window, window + 1, 2 * window, int(s * window)):
            expected, factor = in_transformers(rope, head_dim, seq_len, longest)
            theta, attention_factor = inv_freq(config, head_dim, seq_len)
            np.testing.assert_allclose(theta, expected, rtol=2e-5, err_msg=f"{rope} at {seq_len}")
            assert attention_factor == pytest.approx(factor, rel=1e-6), rope
