"""methods/: the table and what holds for every method in it, RopeConfig, CLEX, and what a user may
write."""
import inspect
import json
import math
import random

import numpy as np
import pytest
import torch
from cases import CONFIGS, config_of, label
from reference import complete, frequencies

from common.errors import UserError
from methods import (ALIASES, METHODS, RopeConfig, build_clex, depends_on_length, inv_freq,
                     parse_rope_flag)
from methods.angles import rotary_dimensions
from methods.clex import CLEX, clex, clex_time
from methods.rarer import abf, drope, longrope, nope, proportional, resonate
from rope import apply_rope, cos_sin, rope_frequencies

DEFAULT = RopeConfig()
L64 = {"original_max_position_embeddings": 64}
L4096 = {"original_max_position_embeddings": 4096}
STILL = {"nope", "alibi", "drope"}  # methods that turn nothing
MAPS = {name for name, method in METHODS.items() if method.distance_map}

# ---- The table -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_the_table_says_what_the_function_takes(name):
    """Arguments and settings are the function's own, in its order and with its defaults."""
    method = METHODS[name]
    parameters = dict(inspect.signature(method.function).parameters)
    # ALiBi and xPos rotate like these, and do the rest elsewhere (baselines.py).
    rotation = "default" if method.distance_map else name
    assert method.function.__name__ == {"alibi": "nope", "xpos": "linear"}.get(name, rotation)
    if method.distance_map:
        assert method.distance_map.__name__ == name
        parameters = dict(inspect.signature(method.distance_map).parameters)
        assert list(parameters)[:4] == ["m", "n", "original_window", "factor"]
        taken = {key: p.default for key, p in list(parameters.items())[4:]}
        assert taken == {key: setting.default for key, setting in method.settings.items()}
        return
    if parameters.pop("yarn_settings", None):
        assert method.settings == METHODS["yarn"].settings
    else:
        taken = list(parameters)[len(method.arguments) + 2:]
        assert set(taken) == set(method.settings)
        for key, setting in method.settings.items():
            default = parameters[key].default
            assert setting.required == (default is inspect.Parameter.empty)
            assert setting.required or setting.default == default
            assert setting.kind in ("float", "int", "bool", "str", "list")
    assert list(parameters)[:len(method.arguments) + 2] == ["head_dim", "base", *method.arguments]


def test_what_others_know_of_a_method():
    def those(test):
        return {name for name, method in METHODS.items() if test(method)}
    assert those(lambda m: m.needs_window) == {
        "dynamic", "ntk_by_parts", "yarn", "dynamic_yarn", "llama3", "longrope", "dprope", "clex",
        "drope", *MAPS}
    assert those(lambda m: m.length_dependent) == {
        "dynamic", "dynamic_yarn", "longrope", "clex", "drope"}
    assert those(lambda m: m.needs_settings) == {"longrope"}
    assert those(lambda m: not m.extends_rope) == {"nope", "drope", "alibi", "xpos"}
    assert those(lambda m: m.full_head) == {"proportional", "drope"}
    assert {name: m.mechanism for name, m in METHODS.items() if m.mechanism != "angles"} == {
        "clex": "network", "alibi": "bias", "xpos": "decay",
        **dict.fromkeys(MAPS, "distances")}
    assert {name: m.trained_on for name, m in METHODS.items() if m.trained_on != "target"} == {
        "clex": "random", "drope": "original"}


def test_aliases_point_at_methods():
    assert set(ALIASES.values()) <= set(METHODS)
    assert not set(ALIASES) & set(METHODS)
    assert (ALIASES["pi"], ALIASES["none"], ALIASES["su"]) == ("linear", "default", "longrope")


# ---- The rarer methods, called directly ----------------------------------------------------------

FACTORS = {"short_factor": [1 + 0.05 * i for i in range(8)],
           "long_factor": [1.2 + 2.8 * i / 8 for i in range(8)]}
CALLS = [  # (function, arguments after head_dim and base)
    (abf, {}), (abf, {"new_rope_theta": 1e6}), (nope, {}),
    *((longrope, {"factor": 4.0, "original_window": 64, "seq_len": n, **FACTORS, **more})
      for n in (0, 64, 65) for more in ({}, {"attention_factor": 1.25})),
    (proportional, {"factor": 4.0, "partial_rotary_factor": 0.25}),
    (proportional, {"factor": 1.0, "partial_rotary_factor": 0.6}),
    *((drope, {"original_window": 64, "seq_len": n, **more})
      for n in (0, 64, 65, 1000) for more in ({}, {"log_scale": 0.103})),
    *((clex, {"factor": 4.0, "original_window": 64, "seq_len": n, **more})
      for n in (0, 64, 65, 128, 5000) for more in ({}, {"max_factor": 5.0})),
]


@pytest.mark.parametrize("function, arguments", CALLS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_rarer_method_is_its_formula_in_float64(function, arguments):
    theta, attention_factor = function(16, 5e5, **arguments)
    assert theta.dtype == torch.float64 and theta.shape == (8,)
    said = {"rope_type": function.__name__, "rope_theta": 5e5, **arguments}
    said["original_max_position_embeddings"] = said.pop("original_window", 64)
    expected, expected_factor = frequencies(said, 16, arguments.get("seq_len"))
    np.testing.assert_allclose(theta, expected, rtol=1e-12)
    assert attention_factor == pytest.approx(expected_factor, rel=1e-14)


def test_longrope_without_a_stretch_or_a_window_has_no_temperature():
    factors = {"short_factor": [1, 1], "long_factor": [2, 3]}
    assert longrope(4, 1e4, 1.0, 64, 0, **factors)[1] == 1
    assert longrope(4, 1e4, 4.0, 1, 0, **factors)[1] == 1     # ln 1 = 0 would be divided by
    theta, _ = longrope(4, 1e4, 4.0, 64, 65, **factors)
    np.testing.assert_allclose(theta, [1 / 2, 0.01 / 3], rtol=1e-12)


def test_resonate_rounds_to_whole_tokens_and_leaves_still_pairs_alone():
    """A factor of LongRoPE may be so small that a pair turns more than twice a token."""
    wavelengths = np.array([5.4, 5.6, 0.6, 0.3])
    theta = torch.tensor([*2 * math.pi / wavelengths, 0.0], dtype=torch.float64)
    np.testing.assert_allclose(2 * math.pi / resonate(theta)[:4], [5, 6, 1, 1], rtol=1e-12)
    assert resonate(theta)[4] == 0


def test_clex_time_is_the_number_of_windows_rounded_up():
    times = [clex_time(64, n, 5) for n in (0, 1, 64, 65, 128, 129, 320, 321, 10**6)]
    assert times == [1, 1, 1, 2, 2, 3, 5, 5, 5]


# ---- What holds for every method: a new one is tested by being in METHODS ------------------------


def greatest_stretch(config, length):
    """The s that bounds a method's frequencies at a length l: theta / s <= f <= theta."""
    l, L, f = length or 0, config.original_max_position_embeddings, config.factor
    if config.rope_type == "dynamic":
        return f * l / L - (f - 1) if l > L else 1
    if config.rope_type == "dynamic_yarn":
        return max(f, l / L)
    if config.rope_type == "clex":
        return 2 * min(16, max(1, math.ceil(l / L))) - 1
    return f


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("head_dim, base", [(16, 1e4), (64, 5e5)])
def test_every_method_stays_between_extrapolation_and_interpolation(name, head_dim, base):
    plain, _ = inv_freq(RopeConfig(rope_theta=base), head_dim)
    config = config_of(name, head_dim, rope_theta=base, original_max_position_embeddings=1024)
    for length in (None, 1, 1024, 1025, 2100, 50000):
        theta, factor = inv_freq(config, head_dim, length)
        assert theta.shape == (head_dim // 2,) and theta.dtype == torch.float32
        assert theta.device.type == "cpu" and theta.isfinite().all()
        assert 1 <= factor < 2 and type(factor) is float
        if name in STILL:
            assert not theta.any()
            continue
        if name != "abf":                                     # whose base may be the smaller one
            assert (theta <= plain * (1 + 1e-6)).all()
            assert (theta >= plain / greatest_stretch(config, length) * (1 - 1e-6)).all()
        # all others leave the fastest pair alone
        if name not in ("linear", "xpos", "proportional", "dprope"):
            assert theta[0] == 1 or name == "longrope" and length > 1024
        if name != "dprope":                                  # it interpolates pairs among others
            assert (theta.diff() < 0).all()


@pytest.mark.parametrize("name", [name for name in METHODS if name not in STILL | {"abf"}])
def test_every_method_is_plain_rope_where_nothing_is_stretched(name):
    ones = {"short_factor": [1] * 16, "long_factor": [1] * 16} if name == "longrope" else {}
    for base, length in ((1e4, None), (5e5, 64)):
        plain, _ = inv_freq(RopeConfig(rope_theta=base), 32)
        config = config_of(name, 32, factor=1.0, rope_theta=base, **ones)
        theta, factor = inv_freq(config, 32, length)
        torch.testing.assert_close(theta, plain, rtol=1e-6, atol=0)
        assert factor == 1


def test_abf_with_the_base_that_the_model_has_is_plain():
    same = config_of("abf", new_rope_theta=3e4, rope_theta=3e4)
    torch.testing.assert_close(inv_freq(same, 32), inv_freq(RopeConfig(rope_theta=3e4), 32))


@pytest.mark.parametrize("name", ["dynamic", "dynamic_yarn", "clex", "longrope", "drope"])
def test_methods_that_depend_on_the_length_change_nothing_up_to_the_window(name):
    more = {"short_factor": [1] * 8} if name == "longrope" else {}
    config = config_of(name, factor=1.0, **more)
    plain, _ = inv_freq(DEFAULT, 16)
    for length in (None, 1, 63, 64):
        theta, factor = inv_freq(config, 16, length)
        assert factor == 1
        assert torch.equal(theta, plain * (name != "drope"))
    beyond, factor = inv_freq(config, 16, 65)
    assert not torch.equal(beyond, inv_freq(config, 16, 64)[0]) or factor > 1


@pytest.mark.parametrize("name", METHODS)
def test_which_angles_depend_on_the_length(name):
    config = config_of(name)
    before, factor_before = inv_freq(config, 16, 64)
    after, factor_after = inv_freq(config, 16, 300)
    changed = not torch.equal(before, after) or factor_before != factor_after
    assert depends_on_length(config) == changed


def test_random_positions_depend_on_the_length():
    assert depends_on_length(RopeConfig(random_positions=100))
    assert not depends_on_length(RopeConfig())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("extra", [
    {}, {"resonance": True, "partial_rotary_factor": 0.5, "random_positions": 500,
         "rope_theta": 5e5},
], ids=["", "with all"])
def test_every_config_survives_a_json_file(name, extra):
    config = config_of(name, **extra)
    again = RopeConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config)
    assert again.to_dict() == config.to_dict()
    assert config != config_of(name, **{**extra, "factor": 5.0})
    for length in (10, 1000):
        torch.testing.assert_close(inv_freq(again, 16, length), inv_freq(config, 16, length),
                                   rtol=0, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_partial_rotary_dimensions_are_a_smaller_head(name):
    """But for proportional, whose share counts among the pairs of the whole head, and for drope,
    which rotates nothing."""
    half, whole = config_of(name, 32, partial_rotary_factor=0.5), config_of(name, 16)
    if name not in ("proportional", "drope"):
        assert rotary_dimensions(half, 32) == 16
        torch.testing.assert_close(inv_freq(half, 32, 200), inv_freq(whole, 16, 200),
                                   rtol=0, atol=0)
    x = torch.randn(1, 1, 3, 32)
    theta, factor = inv_freq(half, 32, 200)
    turned = apply_rope(x, *cos_sin(theta, torch.tensor([5, 77, 199]), factor))
    assert turned.shape == x.shape
    if name != "drope":
        assert torch.equal(turned[..., 16:], x[..., 16:])
    else:  # all scores are multiplied by the same number
        torch.testing.assert_close(turned, x * math.sqrt(1 + 0.412 * math.log(200 / 64)))


@pytest.mark.parametrize("name", METHODS)
def test_resonance_rounds_the_wavelengths_of_every_method(name):
    for length in (None, 300):
        theta = inv_freq(config_of(name), 16, length)[0].double()
        resonant = inv_freq(config_of(name, resonance=True), 16, length)[0].double()
        moving = theta > 0
        rounded = 2 * math.pi / resonant[moving]
        expected = (2 * math.pi / theta[moving]).round()
        torch.testing.assert_close(rounded, expected, rtol=1e-5, atol=0)
        assert torch.equal(resonant > 0, moving)


def test_resonance_of_plain_rope():
    wavelengths = 2 * math.pi / inv_freq(RopeConfig(resonance=True), 8)[0].double()
    np.testing.assert_allclose(wavelengths, [6, 63, 628, 6283], rtol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_frequencies_are_real_under_the_meta_device_and_another_default_dtype(name):
    """As a model is made that a checkpoint will fill. Nothing may come from DPRoPE's cache here."""
    METHODS["dprope"].function.cache_clear()
    expected, _ = inv_freq(config_of(name), 16, 200)
    METHODS["dprope"].function.cache_clear()
    with torch.device("meta"):
        on_meta, _ = inv_freq(config_of(name), 16, 200)
    assert on_meta.device.type == "cpu" and torch.equal(on_meta, expected)
    METHODS["dprope"].function.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        theta, _ = inv_freq(config_of(name), 16, 200)
        cos, _ = cos_sin(theta, torch.tensor([257]))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(theta, expected)
    assert torch.equal(cos, cos_sin(expected, torch.tensor([257]))[0])


@pytest.mark.parametrize("name", METHODS)
def test_cached_frequencies_cannot_be_changed_and_can_be_trained_on(name):
    METHODS["dprope"].function.cache_clear()
    config = config_of(name)
    network = build_clex(config, 16)
    with torch.inference_mode():  # generation may come first
        expected = inv_freq(config, 16, 200, network)[0].clone()
    if network is not None:
        theta, _ = inv_freq(config, 16, 200, network)
        theta.sum().backward()
        assert network.down.weight.grad.abs().max() > 0
    inv_freq(config, 16, 200)[0].zero_()
    assert torch.equal(inv_freq(config, 16, 200, network)[0].detach(), expected)
    weight = torch.ones(8, requires_grad=True)
    (weight * inv_freq(config, 16, 200)[0]).sum().backward()


# ---- CLEX ----------------------------------------------------------------------------------------


def trained(pairs, size=0.3, seed=0):
    network, generator = CLEX(pairs), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for matrix in (network.up.weight, network.down.weight):
            noise = torch.randn(matrix.shape, generator=generator)
            matrix.copy_(size * noise / math.sqrt(pairs))
    return network


def matrices_of(network):
    """(W_up, W_down) for the oracle."""
    return [matrix.detach().double().numpy()
            for matrix in (network.up.weight, network.down.weight)]


@pytest.mark.parametrize("t, base", [(1, 10000), (2, 30527.74), (4, 72195.86), (8, 156588.32),
                                     (16, 327366.40)])
def test_untrained_clex_is_ntk(t, base):
    config = config_of("clex", **L4096)
    ntk, _ = inv_freq(RopeConfig("ntk", factor=2.0 * t - 1), 128)
    for network in (None, build_clex(config, 128)):
        theta, factor = inv_freq(config, 128, 4096 * t, network)
        assert factor == 1 and theta[1].double().item() ** -64 == pytest.approx(base, rel=1e-5)
        rounded_up, _ = inv_freq(config, 128, 4096 * (t - 1) + 1, network)
        assert torch.equal(theta, rounded_up)
        torch.testing.assert_close(theta, ntk, rtol=1e-6, atol=0)
    longest, _ = inv_freq(config, 128, 16 * 4096)             # max_factor
    assert torch.equal(longest, inv_freq(config, 128, 10**6)[0])


@pytest.mark.parametrize("head_dim", [8, 64])
def test_trained_clex_is_the_oracles(head_dim):
    network, config = trained(head_dim // 2, size=1.0), config_of("clex", head_dim)
    matrices = matrices_of(network)
    for length in (64, 65, 64 * 3, 64 * 16):
        theta, _ = inv_freq(config, head_dim, length, network)
        expected, _ = frequencies(config.to_dict(), head_dim, length, matrices)
        np.testing.assert_allclose(theta.detach(), expected, rtol=1e-4)
        untrained, _ = inv_freq(config, head_dim, length)
        matters = (theta / untrained).log().abs().max() > 0.1
        assert matters == (length > 64), "or the test above would say nothing"


def test_clex_begins_at_the_frequencies_of_the_model_and_both_matrices_learn():
    network, config = trained(8), config_of("clex")
    # y(1) = 0 whatever it learned
    assert torch.equal(inv_freq(config, 16, 64, network)[0], inv_freq(DEFAULT, 16)[0])
    theta, _ = inv_freq(config, 16, 150, network)
    theta.log().sum().backward()
    for p in network.parameters():
        assert p.grad.isfinite().all() and p.grad.abs().max() > 1e-4
    fresh = build_clex(config, 16)
    inv_freq(config, 16, 150, fresh)[0].log().sum().backward()
    assert fresh.down.weight.grad.abs().max() > 1e-4
    assert not fresh.up.weight.grad.any()                     # W_down = 0 at first: it moves first


def test_the_gradient_of_clex_is_the_oracles_difference():
    network, config = trained(8), config_of("clex")
    matrices = matrices_of(network)
    inv_freq(config, 16, 150, network)[0].log().sum().backward()
    step = np.random.default_rng(0).standard_normal((2, 8, 8))
    ends = []
    for e in (1e-4, -1e-4):
        moved = [matrix + e * s for matrix, s in zip(matrices, step)]
        ends.append(np.log(frequencies(config.to_dict(), 16, 150, moved)[0]).sum())
    gradients = [network.up.weight.grad, network.down.weight.grad]
    slope = sum((gradient.double().numpy() * s).sum() for gradient, s in zip(gradients, step))
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-3)


def test_only_clex_learns():
    learning = [name for name in METHODS if build_clex(config_of(name), 16) is not None]
    assert learning == ["clex"]
    half = build_clex(config_of("clex", partial_rotary_factor=0.5), 32)
    assert half.up.weight.shape == half.down.weight.shape == (8, 8)


# ---- transformers --------------------------------------------------------------------------------


def in_transformers(rope, head_dim, seq_len, max_position_embeddings=None):
    """(inv_freq, attention factor) that transformers computes from the dict."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    # LLaMA's own embedding does not know a partial_rotary_factor, Phi's does.
    from transformers.models.phi.modeling_phi import PhiRotaryEmbedding
    window = rope.get("original_max_position_embeddings", 64)
    longest = max_position_embeddings or int(window * rope.get("factor", 1))
    config = LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim,
                         max_position_embeddings=longest, rope_parameters=dict(rope))
    if rope["rope_type"] == "default":
        return PhiRotaryEmbedding(config).inv_freq, 1.0
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", seq_len=seq_len)


def random_rope(rng, kind):
    """(dict, head_dim, lengths) of a method that transformers has."""
    head_dim = rng.choice([16, 32, 64, 80, 96, 128])
    window = rng.choice([64, 256, 2048, 4096, 8192])
    s = rng.uniform(1.5, 32)
    rope = {"rope_type": kind, "rope_theta": 10 ** rng.uniform(4, 6)}
    if rng.random() < 0.3:
        rope["partial_rotary_factor"] = rng.choice([0.25, 0.5, 0.75])
    if kind != "default":
        rope["factor"] = s
    if kind in ("dynamic", "yarn", "llama3", "longrope"):
        rope["original_max_position_embeddings"] = window
    if kind == "llama3":
        rope["low_freq_factor"] = rng.uniform(0.5, 2)
        rope["high_freq_factor"] = rng.uniform(3, 8)
    if kind == "yarn":
        for keys in ({"beta_fast": rng.uniform(8, 64), "beta_slow": rng.uniform(0.2, 4)},
                     {"truncate": False}, {"truncate": True},
                     {"attention_factor": rng.uniform(1, 2)},
                     {"mscale": rng.choice([1.0, 0.7]), "mscale_all_dim": rng.choice([1.0, 0.5])}):
            rope |= keys if rng.random() < 0.4 else {}
    if kind == "longrope":
        pairs = int(head_dim * rope.get("partial_rotary_factor", 1)) // 2
        rope["short_factor"] = [rng.uniform(1, 2) for _ in range(pairs)]
        rope["long_factor"] = [rng.uniform(1, s) for _ in range(pairs)]
        rope |= {"attention_factor": rng.uniform(1, 2)} if rng.random() < 0.3 else {}
    return rope, head_dim, [None, window // 2, window, window + 1, 2 * window, int(s * window)]


@pytest.mark.slow
def test_every_rope_type_of_transformers_agrees_with_it_on_random_configs():
    pytest.importorskip("transformers")
    rng = random.Random(0)
    for kind in ["default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional"] * 10:
        rope, head_dim, lengths = random_rope(rng, kind)
        config = RopeConfig.from_dict(rope)
        for seq_len in lengths:
            # for dynamic, transformers takes the config's window for L, which is that of training
            longest = rope["original_max_position_embeddings"] if kind == "dynamic" else None
            expected, factor = in_transformers(rope, head_dim, seq_len, longest)
            theta, attention_factor = inv_freq(config, head_dim, seq_len)
            np.testing.assert_allclose(theta, expected, rtol=2e-5, err_msg=f"{rope} at {seq_len}")
            assert attention_factor == pytest.approx(factor, rel=1e-6), rope


# ---- RopeConfig ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", [
    {"type": "linear", "factor": 4}, {"rope_type": "linear", "factor": 4.0},
    {"type": "linear", "rope_type": "linear", "factor": 4.0},
    {"rope_type": "pi", "factor": 4.0}, {"type": "pi", "factor": 4.0, "rope_theta": 10000.0},
    {"rope_type": "linear", "factor": 4.0, "finetuned": True},
])
def test_spellings_of_position_interpolation(spelling):
    assert RopeConfig.from_dict(spelling) == RopeConfig(rope_type="linear", factor=4.0)


@pytest.mark.parametrize("spelling", [None, {}, {"rope_type": "default"}, {"type": "none"},
                                      {"rope_theta": 1e4}])
def test_spellings_of_plain_rope(spelling):
    assert RopeConfig.from_dict(spelling) == DEFAULT


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_a_config_with_settings_survives_a_json_file(config):
    config = complete(config, 16)
    again = RopeConfig.from_dict(config).to_dict()
    assert RopeConfig.from_dict(json.loads(json.dumps(again))).to_dict() == again
    # what is not given is not written: it is the default
    assert again.items() <= {"rope_theta": 10000.0, **config}.items()


def test_from_dict_leaves_the_callers_dict_alone():
    rope = {"type": "dynamic", "factor": 2.0, "max_position_embeddings": 64, "finetuned": True}
    before = dict(rope)
    RopeConfig.from_dict(rope, 99)
    assert rope == before


def test_windows_and_factors_outside_of_a_hugging_face_dict():
    """max_position_embeddings: the window of pre-training where that is not given, else a missing
    factor follows from it."""
    factors = {"short_factor": [1, 1], "long_factor": [2, 3]}
    dynamic = {"type": "dynamic", "factor": 2.0}
    read = RopeConfig.from_dict
    assert read(dynamic, 64) == RopeConfig("dynamic", 2.0, 64)
    assert read({**dynamic, "max_position_embeddings": 64}, 99) == RopeConfig("dynamic", 2.0, 64)
    assert read({**dynamic, **L64}, 256) == RopeConfig("dynamic", 2.0, 64)
    yarn = {"rope_type": "yarn", **L64}
    assert read({**yarn, "factor": None}, 256) == RopeConfig("yarn", 4.0, 64)
    assert read({**yarn, "factor": 3.0}, 256).factor == 3.0
    for name in ("su", "longrope"):
        expected = RopeConfig("longrope", 4.0, 64, options=factors)
        assert read({"type": name, **factors, **L64}, 256) == expected
    # a window smaller than that of pre-training
    assert read({"type": "su", **factors, **L64}, 32).factor == 1.0
    assert read({"rope_type": "linear", "factor": 2.0}, 256) == RopeConfig("linear", 2.0)
    empty = {"mscale": None, "attention_factor": None}
    assert read({**yarn, "factor": 2.0, **empty}) == RopeConfig("yarn", 2.0, 64)
    # JSON of another writer: 64.0
    float_window = {"rope_type": "dynamic", "factor": 2, "original_max_position_embeddings": 64.0}
    window = read(float_window).original_max_position_embeddings
    assert window == 64 and type(window) is int


def test_a_setting_is_the_given_value_or_its_default():
    config = config_of("yarn", beta_fast=20)
    assert config.setting("beta_fast") == 20 and config.setting("beta_slow") == 1.0
    assert config.options == {"beta_fast": 20}
    assert config_of("yarn", beta_fast=32, truncate=True).options == {}
    assert config_of("dprope", bins=12.0).options == {"bins": 12}
    assert config_of("clex").setting("max_factor") == 16.0
    assert (DEFAULT.base, RopeConfig(rope_theta=5e5).base) == (10000.0, 5e5)
    assert RopeConfig(random_positions=0).random_positions is None
    assert RopeConfig() == RopeConfig(rope_theta=10000.0) != RopeConfig(rope_theta=5e5)
    assert len({RopeConfig(), RopeConfig(rope_theta=10000.0), RopeConfig("linear", 2.0)}) == 2


@pytest.mark.parametrize("text, expected", [
    ("ntk", {"rope_type": "ntk"}), ("pi", {"rope_type": "linear"}),
    (' {"type": "linear", "factor": 2}', {"rope_type": "linear", "factor": 2}),
])
def test_what_the_flag_says(text, expected):
    assert parse_rope_flag(text) == expected


def test_a_flag_that_is_half_an_object_is_refused():
    with pytest.raises(UserError, match="neither a method's name nor a JSON object"):
        parse_rope_flag('{"rope_type": linear}')


# ---- What a user may write -----------------------------------------------------------------------

YARN = {"rope_type": "yarn", **L64}
DPROPE = {"rope_type": "dprope", **L64}
LONG = {"rope_type": "longrope", **L64, "short_factor": [1, 1], "long_factor": [2, 3]}
LLAMA3 = {"rope_type": "llama3", **L64, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
NAN, INFINITY = float("nan"), float("inf")


def each(rope, **values):
    """(rope with one key of another value, [the key]) for each of the values."""
    return [({**rope, key: value}, [key]) for key in values for value in values[key]]


WRONG = [
    ({"rope_type": "lineer"}, sorted(METHODS)),                # the message names every choice
    ({"rope_type": ["linear"]}, ["rope_type", "linear"]),
    ({"rope_type": {"linear": 4}}, ["rope_type"]),
    ({"rope_type": 0}, ["rope_type"]),
    ({"type": []}, ["rope_type"]),
    ({"rope_type": ""}, ["rope_type"]),
    ({"rope_type": "linear", "factr": 4.0}, ["factr", "factor"]),     # not dropped in silence
    ({"rope_type": "linear", "type": "ntk", "factor": 4.0}, ["linear", "ntk"]),
    ({"factor": 4.0}, ["factor", "rope_type"]),
    ({"rope_type": "linear", "factor": 0.5}, ["factor", "0.5"]),
    ({"rope_type": "linear", "factor": 2e6}, ["factor", "2e+06"]),
    *each({"rope_type": "linear"},
          factor=(-4.0, 0, NAN, INFINITY, 10**400, "4", None, True, [4], {})),
    *each({}, rope_theta=(0.0, 1, -1e4, "10000", NAN, [1e4]),
          partial_rotary_factor=(0, -0.5, 1.5, "half", None), resonance=(1, "yes", None, 0.0),
          random_positions=(-1, 2.5, "many", True, INFINITY)),
    *(({"rope_type": name, "factor": 2.0}, [name, "original_max_position_embeddings"])
      for name in METHODS if METHODS[name].needs_window),
    *each({"rope_type": "dynamic"},
          original_max_position_embeddings=(0, -64, 64.5, "64", True, [64], NAN)),
    ({"rope_type": "yarn", "max_position_embeddings": "64"}, ["max_position_embeddings"]),
    ({**LONG, "max_position_embeddings": [64]}, ["max_position_embeddings"]),
    ({**LONG, "max_position_embeddings": 256, "original_max_position_embeddings": "64"},
     ["original_max_position_embeddings"]),
    # settings of another method, and of none
    ({"rope_type": "ntk_by_parts", **L64, "truncate": False}, ["truncate", "ntk_by_parts"]),
    ({"rope_type": "linear", "beta_fast": 32}, ["beta_fast", "linear"]),
    ({**YARN, "bins": 3, "betafast": 3}, ["bins", "betafast", "beta_fast"]),
    # types
    *each(YARN, beta_fast=("32",), beta_slow=([1],), truncate=(1, "no"), ramp=(3, "turn"),
          attention_factor=("1", 0, 0.0, 100, 1e14), mscale=([1.0], -0.5)),
    *each({**YARN, "rope_type": "dynamic_yarn"}, ramp=("turn",), mscale=(-0.5,),
          attention_factor=(0, 1e6)),
    *each(LONG, attention_factor=("1", 0, 100.0)),
    *each(DPROPE, threshold=("0",), bins=(4.5, 0, -3, "360", 361), interpolated_dims=(-1, 7.5)),
    *each({"rope_type": "abf"}, new_rope_theta=(1.0, 0, -5e5, "5e5")),
    *each({"rope_type": "clex", **L64}, max_factor=(0.5, 2.5, -1, "16", True)),
    ({"rope_type": "clex", **L64, "factor": 20.0}, ["max_factor 16", "factor 20"]),
    *each({"rope_type": "drope", **L64}, log_scale=(-1, "x", False)),
    # lists
    ({"rope_type": "longrope", **L64, "short_factor": [1, 1]}, ["longrope", "long_factor"]),
    ({"rope_type": "longrope", **L64, "long_factor": [1, 1]}, ["longrope", "short_factor"]),
    ({**LONG, "long_factor": [1, 2, 3]}, ["longrope", "3 long", "2 short"]),
    *each(LONG, long_factor=([], 2, "23", [1, "2"], [1, 0], [1, -2], [1, NAN], [[1], [2]], None)),
    # limits that contradict each other
    ({**LLAMA3, "factor": 8.0, "low_freq_factor": 4.0}, ["low_freq_factor", "high_freq_factor"]),
    ({**LLAMA3, "low_freq_factor": 5.0}, ["low_freq_factor", "high_freq_factor"]),
    *(({**more, "beta_fast": 1.0}, ["beta_slow", "beta_fast"])
      for more in (YARN, {**YARN, "ramp": "turns"}, {"rope_type": "ntk_by_parts", **L64})),
    ({**YARN, "beta_slow": 0}, ["beta_slow"]),
    ({**YARN, "rope_type": "dynamic_yarn", "beta_slow": 40.0}, ["beta_slow"]),
    # days, not an answer
    ({"rope_type": "dprope", "original_max_position_embeddings": 10**9, "factor": 4.0},
     ["dprope", "4000000000"]),
]


@pytest.mark.parametrize("wrong, words", WRONG, ids=str)
def test_a_mistake_is_one_line_that_names_it(wrong, words):
    with pytest.raises(UserError) as error:
        RopeConfig.from_dict(wrong)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("wrong, head_dim, words", [
    (LONG, 16, ["2 short and 2 long factors for 8 pairs"]),
    ({**LONG, "partial_rotary_factor": 0.5}, 4, ["2 short and 2 long factors for 1 pairs"]),
    ({**DPROPE, "interpolated_dims": 80}, 64, ["interpolated_dims 80", "to 64"]),
    ({**DPROPE, "interpolated_dims": 64, "partial_rotary_factor": 0.5}, 64, ["64", "to 32"]),
    ({**YARN, "factor": 8.0, "mscale": 1e4, "mscale_all_dim": 1.0}, 16,
     ["yarn", "attention_factor", "multiplied"]),
], ids=str)
def test_what_does_not_fit_the_head_is_refused_with_the_head(wrong, head_dim, words):
    config = RopeConfig.from_dict(wrong)
    for length in (None, 1000):
        with pytest.raises(UserError) as error:
            inv_freq(config, head_dim, length)
        message = str(error.value)
        assert "\n" not in message and all(word in message for word in words), message


def test_what_fits_the_head_is_accepted():
    assert len(inv_freq(RopeConfig.from_dict(LONG), 4)[0]) == 2
    assert len(inv_freq(RopeConfig.from_dict({**DPROPE, "interpolated_dims": 64}), 64)[0]) == 32
    assert inv_freq(RopeConfig.from_dict({**YARN, "attention_factor": 99}), 16)[1] == 99


def test_a_drope_scale_that_grows_out_of_bounds_is_refused_at_that_length():
    config = RopeConfig.from_dict({"rope_type": "drope", **L64, "log_scale": 5000})
    assert inv_freq(config, 16, 64)[1] == 1
    with pytest.raises(UserError, match="drope: attention_factor 107.*about 1 is usual"):
        inv_freq(config, 16, 64 * 10)


@pytest.mark.parametrize("arguments", [
    {"rope_type": "lineer"}, {"rope_type": ["linear"]}, {"rope_type": None}, {"factor": 0.5},
    {"rope_type": "yarn", "factor": 2.0}, {"options": {"beta_fast": 3}},
    {"rope_type": "linear", "factor": "2"}], ids=str)
def test_a_config_made_in_python_is_checked_too(arguments):
    with pytest.raises(UserError) as error:
        RopeConfig(**arguments)
    assert "\n" not in str(error.value)


def test_a_config_made_in_python_may_have_an_alias():
    config = RopeConfig("pi", 2.0)
    assert config == RopeConfig("linear", 2.0) and config.rope_type == "linear"


@pytest.mark.parametrize("wrong", [[], 0, "", "linear", 4.0, True, ["linear"]], ids=repr)
def test_a_rope_that_is_no_object_is_refused(wrong):
    with pytest.raises(UserError, match="^rope .*give an object"):
        RopeConfig.from_dict(wrong)


def test_dprope_warns_of_too_many_bins(recwarn):
    config_of("dprope", original_max_position_embeddings=517)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="360 bins for a window of 519 .* about 47 bins"):
        config_of("dprope", bins=360, original_max_position_embeddings=519)


def test_a_share_of_the_head_that_leaves_no_pair_is_refused():
    for share in (0.01, 0.45):
        with pytest.raises(UserError, match="partial_rotary_factor"):
            inv_freq(RopeConfig(partial_rotary_factor=share), 20)
        with pytest.raises(UserError, match="partial_rotary_factor"):
            build_clex(config_of("clex", partial_rotary_factor=share), 20)
    assert len(inv_freq(RopeConfig(partial_rotary_factor=0.4), 20)[0]) == 4


@pytest.mark.parametrize("head_dim", [1, 7, 65])
def test_an_odd_head_dim_is_refused(head_dim):
    with pytest.raises(UserError, match="even"):
        inv_freq(DEFAULT, head_dim)


def random_json(rng, depth=0):
    numbers = [0, 1, -1, 2, 4.0, 0.5, 64, 64.0, 1000, 1e-300, 1e300, -1e308, 10**400, 2**63,
               NAN, INFINITY, -INFINITY]
    leaves = [*numbers, *numbers, None, True, False, "", "4", "linear", "turns", "index", *METHODS]
    kind = rng.random() if depth < 2 else 1
    if kind < 0.12:
        return [random_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind < 0.16:
        return {str(rng.choice(leaves)): random_json(rng, depth + 1)
                for _ in range(rng.randrange(3))}
    return rng.choice(leaves)


@pytest.mark.filterwarnings("ignore:dprope")
def test_whatever_json_says_the_answer_is_a_config_or_one_line():
    rng, accepted, refused = random.Random(0), 0, 0
    fields = ["factor", "original_max_position_embeddings", "rope_theta", "partial_rotary_factor",
              "resonance", "random_positions", "type", "max_position_embeddings", "rope_scaling"]
    for _ in range(4000):
        name = rng.choice([*METHODS])
        keys = rng.sample([*fields, *METHODS[name].settings], rng.randrange(5))
        rope = complete({"rope_type": name}, 16)
        rope |= {key: random_json(rng) for key in keys}
        if rng.random() < 0.1:
            rope["rope_type"] = random_json(rng)
        if rng.random() < 0.05:
            rope = random_json(rng)
        try:
            config = RopeConfig.from_dict(rope)
            accepted += 1
            assert RopeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
            for length in (None, 1, 100):
                theta, factor = inv_freq(config, 16, length)
                assert theta.isfinite().all() and (theta >= 0).all(), rope
                assert math.isfinite(factor), rope
        except UserError as error:
            refused += 1
            assert "\n" not in str(error), rope
    assert accepted > 500 and refused > 500


def test_rope_frequencies_and_the_config_agree():
    theta, factor = inv_freq(RopeConfig(rope_theta=5e5), 64)
    assert factor == 1 and torch.equal(theta, rope_frequencies(64, 5e5).float())
