"""rope.py against the float64 oracle, against golden vectors of transformers 5.23.0, and against what RoPE promises."""
import json

import numpy as np
import pytest
import torch
from reference import frequencies, rotate_all

from cli import UserError
from rope import ALIASES, METHODS, RopeConfig, apply_rope, cos_sin, depends_on_length, inv_freq

CONFIGS = [
    {"rope_type": "default"},
    {"rope_type": "default", "rope_theta": 500000.0},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "ntk", "factor": 8.0},
    {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64},
    {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 256, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
]
DEFAULT = RopeConfig()


def label(value):
    """A short name of a config for pytest's list."""
    if isinstance(value, dict) and "rope_type" in value:
        return f"{value['rope_type']}-{value.get('factor', 1):g}-{value.get('rope_theta', 10000):g}"


def rotated(x, positions, config=DEFAULT, seq_len=None):
    """apply_rope at the given positions; x [B,H,T,D]."""
    theta, factor = inv_freq(config, x.shape[-1], seq_len)
    return apply_rope(x, *cos_sin(theta, torch.as_tensor(positions), factor))


# --- the rotation ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", CONFIGS, ids=label)
@pytest.mark.parametrize("positions", [
    [0, 1, 2, 3], [7, 8, 9, 10],              # from the start; offset, as with a cache
    [0, 3, 50, 200], [9, 9, 2, 5],            # gaps; repeated and out of order
    [[0, 1, 2, 3], [100, 120, 121, 7]],       # a row of positions for each sequence
], ids=str)
def test_rotation_is_the_oracles_at_any_integer_positions(config, positions):
    x = torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(0))
    length = np.max(positions) + 1
    expected = rotate_all(x.numpy(), positions, frequencies(config, 16, length))
    np.testing.assert_allclose(rotated(x, positions, RopeConfig.from_dict(config), int(length)), expected, atol=5e-5)


def test_position_zero_is_the_identity_and_norms_are_preserved():
    x = torch.randn(2, 3, 5, 32)
    assert torch.equal(rotated(x, torch.zeros(5, dtype=torch.long)), x)
    turned = rotated(x, [1, 10, 100, 1000, 30000])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert (turned - x).abs().max() > 0.1


def relative_error(q, k, distance, position, angles):
    """How far the score at (position, position - distance) is from the one at (distance, 0), in units of |q||k|."""
    def score(m, n):
        turned = [apply_rope(x[None, None, None], *angles(torch.tensor([p]))).flatten().double() for x, p in ((q, m), (k, n))]
        return torch.dot(*turned)
    return abs(score(position, position - distance) - score(distance, 0)) / (q.double().norm() * k.double().norm())


def test_scores_depend_on_the_distance_only():
    theta, _ = inv_freq(DEFAULT, 64)
    generator = torch.Generator().manual_seed(0)
    for distance in (0, 1, 17, 300):
        q, k = torch.randn(2, 64, generator=generator)
        assert relative_error(q, k, distance, 500, lambda p: cos_sin(theta, p)) < 2e-5
        assert relative_error(q, k, distance, 30000, lambda p: cos_sin(theta, p)) < 1e-3


def test_scores_depend_on_the_distance_only_for_bfloat16_queries_and_keys():
    theta, _ = inv_freq(DEFAULT, 64)

    def bfloat16_angles(positions):  # the bug in the wild: positions and frequencies in the model's dtype
        angles = (positions.bfloat16()[:, None] * theta.bfloat16()).float()
        return angles.cos(), angles.sin()

    generator, good, bad = torch.Generator().manual_seed(0), [], []
    for distance in (1, 17, 300):
        q, k = torch.randn(2, 64, generator=generator).bfloat16()
        good.append(relative_error(q, k, distance, 30000, lambda p: cos_sin(theta, p)))
        bad.append(relative_error(q, k, distance, 30000, bfloat16_angles))
    assert max(good) < 5e-3
    assert max(bad) > 0.05  # so the bound above can tell them apart


def test_angles_are_float32_under_autocast():
    theta, _ = inv_freq(DEFAULT, 64)
    positions = torch.tensor([0, 1, 257, 4095, 30000])
    cos, sin = cos_sin(theta, positions)
    x = torch.randn(1, 2, 5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cos_in, sin_in = cos_sin(theta, positions)
        turned = apply_rope(x.bfloat16(), cos_in, sin_in)
    assert cos_in.dtype == sin_in.dtype == torch.float32
    assert torch.equal(cos, cos_in) and torch.equal(sin, sin_in)
    assert turned.dtype == torch.bfloat16  # rotated in float32, rounded once at the end
    assert torch.equal(turned, apply_rope(x.bfloat16().float(), cos, sin).bfloat16())


def test_a_cache_offset_is_a_slice_of_the_whole():
    theta, _ = inv_freq(RopeConfig(rope_type="linear", factor=3.0), 16)
    whole, part = cos_sin(theta, torch.arange(40)), cos_sin(theta, torch.arange(25, 40))
    assert torch.equal(whole[0][25:], part[0]) and torch.equal(whole[1][25:], part[1])


def test_the_attention_factor_multiplies_cos_and_sin():
    theta, _ = inv_freq(DEFAULT, 16)
    plain, scaled = cos_sin(theta, torch.arange(9)), cos_sin(theta, torch.arange(9), 1.25)
    torch.testing.assert_close(scaled[0], plain[0] * 1.25)
    torch.testing.assert_close(scaled[1], plain[1] * 1.25)


# --- the frequencies -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", CONFIGS, ids=label)
@pytest.mark.parametrize("head_dim", [4, 16, 64, 128])
def test_frequencies_are_the_oracles(config, head_dim):
    for length in (None, 10, 64, 65, 500):
        theta, attention_factor = inv_freq(RopeConfig.from_dict(config), head_dim, length)
        assert theta.dtype == torch.float32 and theta.shape == (head_dim // 2,) and attention_factor == 1.0
        np.testing.assert_allclose(theta, frequencies(config, head_dim, length), rtol=1e-6, err_msg=str(length))


L32, L64, L4096 = ({"original_max_position_embeddings": n} for n in (32, 64, 4096))
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GOLDEN_FULL = [  # (config, head_dim, seq_len, the whole vector)
    ({"rope_type": "default"}, 8, None, [1.00000000e+00, 1.00000001e-01, 9.99999978e-03, 1.00000005e-03]),
    ({"rope_type": "linear", "factor": 4.0}, 8, None, [2.50000000e-01, 2.50000004e-02, 2.49999994e-03, 2.50000012e-04]),
    ({"rope_type": "dynamic", "factor": 1.0, **L32}, 8, 128, [1.00000000e+00, 6.29960522e-02, 3.96850286e-03, 2.50000012e-04]),
    ({"rope_type": "dynamic", "factor": 4.0, **L32}, 8, 128, [1.00000000e+00, 4.25290354e-02, 1.80871889e-03, 7.69230755e-05]),
    ({"rope_type": "dynamic", "factor": 4.0, **L32}, 8, 16, [1.00000000e+00, 1.00000001e-01, 9.99999978e-03, 1.00000005e-03]),
    ({**LLAMA3, "factor": 4.0, **L32}, 8, None, [1.00000000e+00, 2.50000004e-02, 2.49999994e-03, 2.50000012e-04]),
    ({**LLAMA3, "factor": 4.0, **L64}, 16, None, [1.00000000e+00, 2.54647911e-01, 2.54647899e-02, 7.90569466e-03, 2.49999994e-03,
                                                 7.90569466e-04, 2.50000012e-04, 7.90569466e-05]),
    ({"rope_type": "dynamic", "factor": 4.0, **L64}, 16, 256, [1.00000000e+00, 2.19212472e-01, 4.80541028e-02, 1.05340583e-02,
                                                              2.30919686e-03, 5.06204728e-04, 1.10966386e-04, 2.43252125e-05]),
    ({**LLAMA3, "factor": 32.0, "rope_theta": 500000.0, "original_max_position_embeddings": 8192}, 64, None, [  # Llama 3.2 1B
        1.00000000e+00, 6.63601279e-01, 4.40366626e-01, 2.92227834e-01, 1.93922758e-01, 1.28687382e-01, 8.53971019e-02, 5.66696189e-02,
        3.76060307e-02, 2.49554086e-02, 1.65604409e-02, 1.09895291e-02, 7.29266508e-03, 4.83942125e-03, 3.21144611e-03, 1.29054801e-03,
        4.29556705e-04, 9.70828623e-05, 1.94616387e-05, 1.29147675e-05, 8.57025589e-06, 5.68723226e-06, 3.77405445e-06, 2.50446715e-06,
        1.66196742e-06, 1.10288363e-06, 7.31874934e-07, 4.85673127e-07, 3.22293289e-07, 2.13874230e-07, 1.41927202e-07, 9.41830649e-08]),
]
GOLDEN_PAIRS = [  # (config, seq_len, sum, {pair: value}) for head_dim 128
    ({"rope_type": "default"}, None, 7.459954203,
     {1: 8.65964353e-01, 10: 2.37137362e-01, 25: 2.73841955e-02, 40: 3.16227786e-03, 63: 1.15478193e-04}),
    ({"rope_type": "linear", "factor": 2.0}, None, 3.729977101,
     {0: 5.00000000e-01, 1: 4.32982177e-01, 25: 1.36920977e-02, 63: 5.77390965e-05}),
    ({"rope_type": "linear", "factor": 32.0}, None, 0.233123569, {0: 3.12500000e-02, 30: 4.16725466e-04, 63: 3.60869353e-06}),
    ({"rope_type": "dynamic", "factor": 1.0, **L4096}, 8192, 6.967758152,
     {1: 8.56488883e-01, 10: 2.12430790e-01, 25: 2.07990576e-02, 40: 2.03643157e-03, 63: 5.77390965e-05}),
    ({"rope_type": "dynamic", "factor": 4.0, **L4096}, 16384, 5.931716021,
     {1: 8.31415951e-01, 10: 1.57827839e-01, 25: 9.89598408e-03, 40: 6.20489416e-04, 63: 8.88293835e-06}),
    ({"rope_type": "dynamic", "factor": 32.0, **L4096}, 131072, 4.466696074,
     {1: 7.76120901e-01, 20: 6.28908584e-03, 45: 1.11383779e-05, 63: 1.16292242e-07}),
    ({**LLAMA3, "factor": 8.0, "rope_theta": 500000.0, "original_max_position_embeddings": 8192}, None, 5.386058263,  # Llama 3.1 8B
     {1: 8.14617217e-01, 28: 3.21144611e-03, 29: 2.16657063e-03, 31: 8.56751460e-04, 34: 1.78507791e-04, 35: 9.55621217e-05,
      36: 7.78465546e-05, 63: 3.06892588e-07}),
]


@pytest.mark.parametrize("config, head_dim, seq_len, vector", GOLDEN_FULL, ids=label)
def test_golden_vectors(config, head_dim, seq_len, vector):
    theta, _ = inv_freq(RopeConfig.from_dict(config), head_dim, seq_len)
    np.testing.assert_allclose(theta, vector, rtol=1e-5 if config["rope_type"] == "dynamic" else 1e-6)


@pytest.mark.parametrize("config, seq_len, total, pairs", GOLDEN_PAIRS, ids=label)
def test_golden_pairs_of_head_dim_128(config, seq_len, total, pairs):
    theta, _ = inv_freq(RopeConfig.from_dict(config), 128, seq_len)
    rtol = 1e-5 if config["rope_type"] == "dynamic" else 1e-6
    np.testing.assert_allclose(theta.double().sum(), total, rtol=rtol)
    np.testing.assert_allclose(theta[list(pairs)], list(pairs.values()), rtol=rtol)


@pytest.mark.parametrize("head_dim, theta, factor, base", [
    (128, 1e4, 2, 20221.2617), (128, 1e4, 32, 338096.9460), (64, 1e4, 4, 41829.3659), (32, 1e4, 8, 91895.8684),
    (16, 1e4, 16, 237759.0863), (128, 5e5, 8, 4134231.1320),
])
def test_ntk_stretches_the_base(head_dim, theta, factor, base):
    scaled, _ = inv_freq(RopeConfig(rope_type="ntk", factor=factor, rope_theta=theta), head_dim)
    plain, _ = inv_freq(RopeConfig(rope_theta=theta), head_dim)
    assert scaled[0] == plain[0] == 1                                  # the fastest pair is left alone
    torch.testing.assert_close(scaled[-1], plain[-1] / factor, rtol=1e-6, atol=0)  # the slowest is interpolated as by PI
    assert scaled[1].double().item() ** (-head_dim / 2) == pytest.approx(base, rel=1e-5)
    assert (scaled <= plain).all() and (scaled >= plain / factor * (1 - 1e-6)).all()


@pytest.mark.parametrize("factor", [1.0, 3.0, 4.0])
def test_linear_is_the_default_at_squeezed_positions(factor):
    plain, _ = inv_freq(DEFAULT, 64)
    squeezed, _ = inv_freq(RopeConfig(rope_type="linear", factor=factor), 64)
    positions = torch.arange(0, 4096, 37)
    for a, b in zip(cos_sin(squeezed, positions), cos_sin(plain, positions.double() / factor)):
        torch.testing.assert_close(a, b, atol=5e-4, rtol=0)


def test_methods_are_plain_rope_where_nothing_is_stretched():
    plain, _ = inv_freq(DEFAULT, 32)
    for config, length in [(RopeConfig("linear"), None), (RopeConfig("ntk"), None), (RopeConfig("llama3", 1.0, 128), None),
                           (RopeConfig("dynamic", 4.0, 128), 128), (RopeConfig("dynamic", 4.0, 128), None)]:
        torch.testing.assert_close(inv_freq(config, 32, length)[0], plain, rtol=1e-6, atol=0)
    assert not torch.allclose(inv_freq(RopeConfig("dynamic", 4.0, 128), 32, 129)[0], plain, rtol=1e-3)


def test_which_frequencies_depend_on_the_length():
    for name in METHODS:
        config = RopeConfig(name, 4.0, 64)
        changes = not torch.equal(inv_freq(config, 16, 64)[0], inv_freq(config, 16, 200)[0])
        assert depends_on_length(config) == changes, name


def test_frequencies_are_real_under_the_meta_device_and_another_default_dtype():
    expected, _ = inv_freq(RopeConfig("ntk", 4.0), 16)
    with torch.device("meta"):
        on_meta, _ = inv_freq(RopeConfig("ntk", 4.0), 16)
    assert on_meta.device.type == "cpu" and torch.equal(on_meta, expected)
    torch.set_default_dtype(torch.bfloat16)
    try:
        theta, _ = inv_freq(RopeConfig("ntk", 4.0), 16)
        cos, _ = cos_sin(theta, torch.tensor([257]))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(theta, expected) and torch.equal(cos, cos_sin(expected, torch.tensor([257]))[0])


# --- what a user may write -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("spelling", [
    {"type": "linear", "factor": 4}, {"rope_type": "linear", "factor": 4.0}, {"type": "linear", "rope_type": "linear", "factor": 4.0},
    {"rope_type": "pi", "factor": 4.0}, {"type": "pi", "factor": 4.0, "rope_theta": 10000.0},
])
def test_spellings_of_position_interpolation(spelling):
    assert RopeConfig.from_dict(spelling) == RopeConfig(rope_type="linear", factor=4.0)


@pytest.mark.parametrize("spelling", [None, {}, {"rope_type": "default"}, {"type": "none"}, {"rope_theta": 1e4}])
def test_spellings_of_plain_rope(spelling):
    assert RopeConfig.from_dict(spelling) == DEFAULT


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_a_config_survives_a_json_file(config):
    config = RopeConfig.from_dict(config)
    assert RopeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert "rope_type" in config.to_dict()


@pytest.mark.parametrize("wrong, words", [
    ({"rope_type": "lineer"}, sorted([*METHODS])),                       # the message names every choice
    ({"rope_type": "linear", "factr": 4.0}, ["factr", "factor"]),         # a misspelt key is not dropped in silence
    ({"rope_type": "linear", "type": "ntk", "factor": 4.0}, ["linear", "ntk"]),
    ({"rope_type": "linear", "factor": 0.5}, ["factor", "0.5"]),
    ({"rope_type": "linear", "factor": -4.0}, ["factor"]),
    ({"rope_type": "linear", "factor": float("nan")}, ["factor"]),
    ({"rope_type": "linear", "factor": float("inf")}, ["factor"]),
    ({"rope_type": "linear", "factor": "4"}, ["factor"]),
    ({"rope_type": "linear", "factor": None}, ["factor"]),
    ({"rope_type": "linear", "factor": True}, ["factor"]),
    ({"rope_theta": 0.0}, ["rope_theta"]),
    ({"rope_type": "dynamic", "factor": 2.0}, ["original_max_position_embeddings"]),
    ({"rope_type": "llama3", "factor": 8.0}, ["original_max_position_embeddings"]),
    ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 0}, ["original_max_position_embeddings"]),
    ({**LLAMA3, **L64, "factor": 8.0, "low_freq_factor": 4.0}, ["low_freq_factor", "high_freq_factor"]),
], ids=str)
def test_a_mistake_is_one_line_that_names_it(wrong, words):
    with pytest.raises(UserError) as error:
        RopeConfig.from_dict(wrong)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("head_dim", [1, 7, 65])
def test_an_odd_head_dim_is_refused(head_dim):
    with pytest.raises(UserError, match="even"):
        inv_freq(DEFAULT, head_dim)


def test_aliases_point_at_methods():
    assert set(ALIASES.values()) <= set(METHODS)
