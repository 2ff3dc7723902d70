"""rope.py against the float64 oracle, against golden vectors of transformers 5.23.0, and against what RoPE promises."""
import json
import math
import random

import numpy as np
import pytest
import torch
from reference import complete, frequencies, rotate_all

from cli import UserError
from rope import ALIASES, CLEX, METHODS, RopeConfig, apply_rope, cos_sin, depends_on_length, inv_freq, learned, rope_argument

CONFIGS = [  # every method as it comes (reference.complete adds s = 4, L = 64, LongRoPE's factors), and with settings of its own
    *({"rope_type": name} for name in METHODS),
    {"rope_type": "default", "rope_theta": 500000.0},
    {"rope_type": "ntk", "factor": 8.0},
    {"rope_type": "dynamic", "factor": 1.0},
    {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 256},
    {"rope_type": "llama3", "low_freq_factor": 0.7, "high_freq_factor": 9.0},
    {"rope_type": "ntk_by_parts", "beta_fast": 8, "beta_slow": 0.5, "factor": 7.5},
    {"rope_type": "yarn", "truncate": False, "original_max_position_embeddings": 300},
    {"rope_type": "yarn", "ramp": "turns", "original_max_position_embeddings": 300},
    {"rope_type": "yarn", "beta_fast": 20.0, "beta_slow": 0.3, "factor": 11.0, "original_max_position_embeddings": 300},
    {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.7},
    {"rope_type": "yarn", "mscale": 0.5},
    {"rope_type": "yarn", "attention_factor": 1.5, "mscale": 1.0, "mscale_all_dim": 0.7},
    {"rope_type": "dynamic_yarn", "factor": 1.0, "truncate": False},
    {"rope_type": "dynamic_yarn", "ramp": "index", "beta_fast": 4, "beta_slow": 0.5},
    {"rope_type": "longrope", "attention_factor": 1.25},
    {"rope_type": "abf", "new_rope_theta": 1e6, "rope_theta": 3e4},
    {"rope_type": "dprope", "threshold": 0.3, "factor": 2.0},
    {"rope_type": "dprope", "bins": 12, "factor": 3.0, "original_max_position_embeddings": 100},
    {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    {"rope_type": "proportional", "partial_rotary_factor": 0.6},
    {"rope_type": "clex", "max_factor": 5},
    {"rope_type": "drope", "log_scale": 0.103},
    *({"rope_type": name, "partial_rotary_factor": 0.5} for name in METHODS),
    *({"rope_type": name, "resonance": True} for name in METHODS),
]
DEFAULT = RopeConfig()
STILL = {"nope", "alibi", "drope"}  # methods that turn nothing


def label(value):
    """A short name of a config for pytest's list."""
    if isinstance(value, dict) and "rope_type" in value:
        silent = ("rope_type", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        said = {k: v for k, v in value.items() if k not in silent}
        return "-".join([value["rope_type"], *(f"{k}={v}" for k, v in said.items() if not isinstance(v, list))])


def config_of(name, head_dim=16, **settings):
    """The RopeConfig of a method with s = 4, L = 64, and what it cannot do without."""
    return RopeConfig.from_dict(complete({"rope_type": name, **settings}, head_dim))


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
    x, config = torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(0)), complete(config, 16)
    length = np.max(positions) + 1
    expected = rotate_all(x.numpy(), positions, *frequencies(config, 16, length))
    np.testing.assert_allclose(rotated(x, positions, RopeConfig.from_dict(config), int(length)), expected, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_compiled_rotates_as_what_is_not(monkeypatch, dtype):
    """torch.compile gets the products spelled out, as it knows no complex numbers: the same values and gradients."""
    x, found = torch.randn(2, 8, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype).transpose(1, 2).requires_grad_(), []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        y = rotated(x, range(8))
        found += [(y, *torch.autograd.grad(y.square().cos().sum(), x))]
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


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
def test_frequencies_are_the_oracles(config):
    for head_dim, length in [(4, None), (4, 500), (16, 10), (16, 64), (16, 65), (16, 500), (64, None), (64, 130), (128, 500)]:
        config = complete({k: v for k, v in config.items() if not isinstance(v, list)}, head_dim)
        rotated = head_dim if config["rope_type"] in ("proportional", "drope") else head_dim * config.get("partial_rotary_factor", 1.0)
        theta, attention_factor = inv_freq(RopeConfig.from_dict(config), head_dim, length)
        assert theta.dtype == torch.float32 and theta.shape == (rotated // 2,)
        expected, expected_factor = frequencies(config, head_dim, length)
        np.testing.assert_allclose(theta, expected, rtol=1e-6, err_msg=str(length))
        assert attention_factor == pytest.approx(expected_factor, rel=1e-12) and type(attention_factor) is float


L32, L64, L2048, L4096, L8192 = ({"original_max_position_embeddings": n} for n in (32, 64, 2048, 4096, 8192))
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
    ({"rope_type": "yarn", "factor": 4.0, **L32}, 8, None, [1.00000000e+00, 2.50000004e-02, 2.49999994e-03, 2.50000012e-04]),
    ({"rope_type": "yarn", "factor": 4.0, "truncate": False, **L32}, 8, None,
     [1.00000000e+00, 2.50000004e-02, 2.49999994e-03, 2.50000012e-04]),
    ({"rope_type": "longrope", "factor": 4.0, "short_factor": [1, 1, 1, 1], "long_factor": [1, 1.5, 3, 4], **L32}, 8, 32,
     [1.00000000e+00, 1.00000001e-01, 9.99999978e-03, 1.00000005e-03]),
    ({"rope_type": "longrope", "factor": 4.0, "short_factor": [1, 1, 1, 1], "long_factor": [1, 1.5, 3, 4], **L32}, 8, 33,
     [1.00000000e+00, 6.66666701e-02, 3.33333341e-03, 2.50000012e-04]),
    ({"rope_type": "proportional", "partial_rotary_factor": 0.5}, 8, None, [1.00000000e+00, 1.00000001e-01, 0, 0]),
    ({"rope_type": "yarn", "factor": 4.0, **L64}, 16, None, [
        1.00000000e+00, 2.37170815e-01, 4.99999970e-02, 7.90569466e-03, 2.49999994e-03, 7.90569466e-04, 2.50000012e-04, 7.90569466e-05]),
    ({"rope_type": "yarn", "factor": 4.0, "truncate": False, **L64}, 16, None, [
        1.00000000e+00, 1.98583528e-01, 2.55952496e-02, 7.90569466e-03, 2.49999994e-03, 7.90569466e-04, 2.50000012e-04, 7.90569466e-05]),
    ({"rope_type": "yarn", "factor": 32.0, "rope_theta": 150000.0, "truncate": False, **L4096}, 64, None, [  # gpt-oss
        1.00000000e+00, 6.89044297e-01, 4.74782050e-01, 3.27145875e-01, 2.25418001e-01, 1.55322984e-01, 1.07024424e-01, 7.37445652e-02,
        5.08132726e-02, 3.17056961e-02, 1.93349998e-02, 1.15920492e-02, 6.79495931e-03, 3.86035908e-03, 2.09379266e-03, 1.05260219e-03,
        4.56483918e-04, 1.29318694e-04, 3.83088118e-05, 2.63964685e-05, 1.81883370e-05, 1.25325696e-05, 8.63549576e-06, 5.95023948e-06,
        4.09997847e-06, 2.82506676e-06, 1.94659629e-06, 1.34129095e-06, 9.24208962e-07, 6.36820914e-07, 4.38797855e-07, 3.02351140e-07]),
    ({"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0, **L4096}, 64, None, [  # DeepSeek V3
        1.00000000e+00, 7.49894202e-01, 5.62341332e-01, 4.21696514e-01, 3.16227764e-01, 2.37137362e-01, 1.77827939e-01, 1.33352146e-01,
        1.00000001e-01, 7.49894157e-02, 5.62341288e-02, 3.90069261e-02, 2.68793609e-02, 1.83781441e-02, 1.24479560e-02, 8.33450910e-03,
        5.50000044e-03, 3.56199732e-03, 2.24936521e-03, 1.37051346e-03, 7.90569407e-04, 4.14990413e-04, 1.77827940e-04, 3.33380340e-05,
        2.49999994e-05, 1.87473543e-05, 1.40585325e-05, 1.05424124e-05, 7.90569447e-06, 5.92843435e-06, 4.44569832e-06, 3.33380353e-06]),
    ({"rope_type": "default", "resonance": True}, 8, None, [1.04719755, .0997331001, .0100050721, .00100002949]),
    ({"rope_type": "default", "resonance": True}, 16, None, [2 * math.pi / n for n in (6, 20, 63, 199, 628, 1987, 6283, 19869)]),
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
    ({"rope_type": "yarn", "factor": 2.0, **L4096}, None, 7.409437171,
     {1: 8.65964353e-01, 20: 5.62341288e-02, 21: 4.77602780e-02, 30: 1.07707502e-02, 45: 7.99577218e-04, 46: 6.66760723e-04,
      63: 5.77390965e-05}),
    ({"rope_type": "yarn", "factor": 2.0, "truncate": False, **L4096}, None, 7.412710285,
     {1: 8.65964353e-01, 20: 5.62341288e-02, 21: 4.86406200e-02, 30: 1.08280461e-02, 45: 7.70822691e-04, 46: 6.66760723e-04,
      63: 5.77390965e-05}),
    ({"rope_type": "yarn", "factor": 4.0, **L4096}, None, 7.384178651,
     {1: 8.65964353e-01, 20: 5.62341288e-02, 21: 4.72920388e-02, 30: 9.48851742e-03, 45: 4.29402600e-04, 46: 3.33380362e-04,
      63: 2.88695483e-05}),
    ({"rope_type": "yarn", "factor": 4.0, "truncate": False, **L4096}, None, 7.389088330,
     {1: 8.65964353e-01, 20: 5.62341288e-02, 21: 4.86125536e-02, 30: 9.57446080e-03, 45: 3.86270724e-04, 46: 3.33380362e-04,
      63: 2.88695483e-05}),
    ({"rope_type": "yarn", "factor": 32.0, **L4096}, None, 7.362077448,
     {1: 8.65964353e-01, 20: 5.62341288e-02, 21: 4.68823276e-02, 30: 8.36656429e-03, 45: 1.05499814e-04, 46: 4.16725452e-05,
      63: 3.60869353e-06}),
    ({"rope_type": "yarn", "factor": 32.0, "truncate": False, **L4096}, None, 7.368419113,
     {1: 8.65964353e-01, 20: 5.62341288e-02, 21: 4.85879965e-02, 30: 8.47757421e-03, 45: 4.97877918e-05, 46: 4.16725452e-05,
      63: 3.60869353e-06}),
    # Qwen 2.5 and 3
    ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 32768}, None, 5.144034828,
     {20: 1.33352149e-02, 21: 1.07460786e-02, 24: 5.37532149e-03, 30: 1.06436096e-03,
      35: 2.46258394e-04, 39: 6.49039430e-05, 40: 4.44569851e-05, 41: 3.58253164e-05, 63: 3.10234441e-07}),
    # the ramp that YaRN's paper prints, where its code has 4.76e-2, 2.48e-2, ... (above)
    *(({"rope_type": name, "factor": s, **L4096, **more}, None, None, dict(zip((21, 25, 30, 40, 45), values)))
      for name, more in (("ntk_by_parts", {}), ("yarn", {"ramp": "turns"}))
      for s, values in ((2.0, [.04849674, .021135176, .0083222939, .0016352793, .00077005953]),
                        (4.0, [.048396734, .018010666, .0058158337, .00087178011, .00038512604]))),
]


@pytest.mark.parametrize("config, head_dim, seq_len, vector", GOLDEN_FULL, ids=label)
def test_golden_vectors(config, head_dim, seq_len, vector):
    theta, _ = inv_freq(RopeConfig.from_dict(config), head_dim, seq_len)
    np.testing.assert_allclose(theta, vector, rtol=1e-5 if config["rope_type"] == "dynamic" else 1e-6)


@pytest.mark.parametrize("config, seq_len, total, pairs", GOLDEN_PAIRS, ids=label)
def test_golden_pairs_of_head_dim_128(config, seq_len, total, pairs):
    theta, _ = inv_freq(RopeConfig.from_dict(config), 128, seq_len)
    rtol = {"dynamic": 1e-5, "yarn": 3e-6}.get(config["rope_type"], 1e-6)                  # what float32 lost in the reference
    if total is not None:
        np.testing.assert_allclose(theta.double().sum(), total, rtol=rtol)
    np.testing.assert_allclose(theta[list(pairs)], list(pairs.values()), rtol=rtol)


@pytest.mark.parametrize("head_dim, theta, bases", [  # base * s^(D/(D-2)) for s = 2, 4, 8, 16, 32
    (128, 1e4, [20221.2617, 40889.9424, 82684.6226, 167198.7392, 338096.9460]),
    (64, 1e4, [20452.2287, 41829.3659, 85550.3759, 174969.5854, 357851.7978]),
    (32, 1e4, [20945.8825, 43872.9992, 91895.8684, 192484.0058, 403174.7360]),
    (16, 1e4, [22081.7903, 48760.5462, 107672.0154, 237759.0863, 525014.6278]),
    (128, 5e5, [1011063.0845, 2044497.1216, 4134231.1320, 8359936.9607, 16904847.2991]),
])
def test_ntk_stretches_the_base(head_dim, theta, bases):
    plain, _ = inv_freq(RopeConfig(rope_theta=theta), head_dim)
    for factor, base in zip((2, 4, 8, 16, 32), bases):
        scaled, _ = inv_freq(RopeConfig(rope_type="ntk", factor=factor, rope_theta=theta), head_dim)
        assert scaled[0] == plain[0] == 1                              # the fastest pair is left alone
        torch.testing.assert_close(scaled[-1], plain[-1] / factor, rtol=1e-6, atol=0)  # the slowest is interpolated as by PI
        assert scaled[1].double().item() ** (-head_dim / 2) == pytest.approx(base, rel=1e-5)


@pytest.mark.parametrize("s, temperature, long_4096, long_2048", [
    (2, 1.0693147181, 1.0408329997, 1.0444659357), (4, 1.1386294361, 1.0801234497, 1.0871146130),
    (8, 1.2079441542, 1.1180339887, 1.1281521496), (16, 1.2772588722, 1.1547005384, 1.1677484162),
    (32, 1.3465735903, 1.1902380714, 1.2060453783), (40, 1.3688879454, 1.2014549546, 1.2181180751),
])
def test_golden_attention_factors(s, temperature, long_4096, long_2048):
    def factor(name, seq_len=None, **settings):
        return inv_freq(config_of(name, 16, factor=s, **settings), 16, seq_len)[1]
    for more in ({}, {"ramp": "turns"}, {"truncate": False}, {"mscale": 0.707}):           # mscale counts beside mscale_all_dim only
        assert factor("yarn", **L4096, **more) == pytest.approx(temperature, abs=1e-9)
    assert factor("dynamic_yarn", 64, **L64) == factor("dynamic_yarn", 64 * s, **L64) == pytest.approx(temperature, abs=1e-9)
    assert factor("yarn", mscale=1.0, mscale_all_dim=1.0) == 1.0 and factor("yarn", attention_factor=1.7) == 1.7
    assert factor("yarn", mscale=1.0, mscale_all_dim=0.707) == pytest.approx(temperature / (0.0707 * math.log(s) + 1), abs=1e-9)
    for seq_len in (None, 10, 5000):                                                       # in both modes
        assert factor("longrope", seq_len, **L4096) == pytest.approx(long_4096, abs=1e-9)
        assert factor("longrope", seq_len, **L2048) == pytest.approx(long_2048, abs=1e-9)


@pytest.mark.parametrize("head_dim, settings, low, high", [
    (128, L2048, 16, 41), (128, L4096, 20, 46), (128, {**L8192, "rope_theta": 5e5}, 18, 35),
    (64, {"original_max_position_embeddings": 512}, 3, 16),
    (128, {"original_max_position_embeddings": 32768, "rope_theta": 1e6}, 23, 40), (32, {"original_max_position_embeddings": 256}, 0, 7),
    (16, {"original_max_position_embeddings": 128}, 0, 3),
])
def test_yarn_keeps_the_fast_pairs_interpolates_the_slow_ones_and_blends_between(head_dim, settings, low, high):
    yarn = inv_freq(config_of("yarn", **settings), head_dim)[0].double()
    share = (yarn / inv_freq(RopeConfig(rope_theta=settings.get("rope_theta")), head_dim)[0]).double()
    torch.testing.assert_close(share[:low + 1], torch.ones(low + 1).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(share[high:], torch.full_like(share[high:], 1 / 4), rtol=1e-6, atol=0)
    assert (share.diff()[low:high] < -1e-3).all()                                          # strictly between, and not upside down
    printed = inv_freq(config_of("yarn", ramp="turns", **settings), head_dim)[0].double()
    assert (printed / yarn - 1).abs().max() > 0.1, "the paper's ramp is another one than its code's"


@pytest.mark.parametrize("factor", [1.0, 3.0, 4.0])
def test_linear_is_the_default_at_squeezed_positions(factor):
    plain, _ = inv_freq(DEFAULT, 64)
    squeezed, _ = inv_freq(RopeConfig(rope_type="linear", factor=factor), 64)
    positions = torch.arange(0, 4096, 37)
    for a, b in zip(cos_sin(squeezed, positions), cos_sin(plain, positions.double() / factor)):
        torch.testing.assert_close(a, b, atol=5e-4, rtol=0)


# --- what holds for every method: a new one is tested by being in METHODS --------------------------------------------

def stretch(config, length):
    """The s that bounds a method's frequencies at a length l: theta / s <= f <= theta."""
    l, L, f = length or 0, config.original_max_position_embeddings, config.factor
    grown = {"dynamic": f * l / L - (f - 1) if l > L else 1, "dynamic_yarn": max(f, l / L),
             "clex": 2 * min(16, max(1, math.ceil(l / L))) - 1}
    return grown.get(config.rope_type, f)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("head_dim, base", [(16, 1e4), (64, 5e5)])
def test_every_method_stays_between_extrapolation_and_interpolation(name, head_dim, base):
    plain, _ = inv_freq(RopeConfig(rope_theta=base), head_dim)
    for length in (None, 1, 1024, 1025, 2100, 50000):
        config = config_of(name, head_dim, rope_theta=base, original_max_position_embeddings=1024)
        theta, factor = inv_freq(config, head_dim, length)
        assert theta.shape == (head_dim // 2,) and theta.dtype == torch.float32 and theta.device.type == "cpu" and theta.isfinite().all()
        assert 1 <= factor < 2 and type(factor) is float
        if name in STILL:
            assert not theta.any()
            continue
        assert (theta <= plain * (1 + 1e-6)).all() or name == "abf"                        # whose base may be the smaller one
        assert (theta >= plain / stretch(config, length) * (1 - 1e-6)).all() or name == "abf"
        if name not in ("linear", "xpos", "proportional", "dprope"):                       # all others leave the fastest pair alone
            assert theta[0] == 1 or name == "longrope" and length > 1024
        if name != "dprope":                                                               # which interpolates some pairs among others
            assert (theta.diff() < 0).all()


@pytest.mark.parametrize("name", [name for name in METHODS if name not in STILL | {"abf"}])
def test_every_method_is_plain_rope_where_nothing_is_stretched(name):
    ones = {"short_factor": [1] * 16, "long_factor": [1] * 16} if name == "longrope" else {}
    for base, length in ((1e4, None), (5e5, 64)):
        plain, _ = inv_freq(RopeConfig(rope_theta=base), 32)
        theta, factor = inv_freq(config_of(name, 32, factor=1.0, rope_theta=base, **ones), 32, length)
        torch.testing.assert_close(theta, plain, rtol=1e-6, atol=0)
        assert factor == 1


def test_abf_with_the_base_that_the_model_has_is_plain():
    torch.testing.assert_close(inv_freq(config_of("abf", new_rope_theta=3e4, rope_theta=3e4), 32), inv_freq(RopeConfig(rope_theta=3e4), 32))


@pytest.mark.parametrize("name", ["dynamic", "dynamic_yarn", "clex", "longrope", "drope"])
def test_methods_that_grow_are_as_ever_up_to_the_window(name):
    config = config_of(name, factor=1.0, **({"short_factor": [1] * 8} if name == "longrope" else {}))
    for length in (None, 1, 63, 64):
        assert inv_freq(config, 16, length)[1] == 1
        assert torch.equal(inv_freq(config, 16, length)[0], inv_freq(DEFAULT, 16)[0] * (name != "drope"))
    beyond = inv_freq(config, 16, 65)
    assert not torch.equal(beyond[0], inv_freq(config, 16, 64)[0]) or beyond[1] > 1


@pytest.mark.parametrize("name", METHODS)
def test_which_angles_depend_on_the_length(name):
    config = config_of(name)
    (before, factor), (after, factor_after) = (inv_freq(config, 16, length) for length in (64, 300))
    assert depends_on_length(config) == (not torch.equal(before, after) or factor != factor_after)


def test_random_positions_depend_on_the_length():
    assert depends_on_length(RopeConfig(random_positions=100)) and not depends_on_length(RopeConfig())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("extra", [
    {}, {"resonance": True, "partial_rotary_factor": 0.5, "random_positions": 500, "rope_theta": 5e5},
], ids=["", "with all"])
def test_every_config_survives_a_json_file(name, extra):
    config = config_of(name, **extra)
    again = RopeConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config) and again.to_dict() == config.to_dict()
    assert config != config_of(name, **{**extra, "factor": 5.0})
    for length in (10, 1000):
        torch.testing.assert_close(inv_freq(again, 16, length), inv_freq(config, 16, length), rtol=0, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_partial_rotary_dimensions_are_a_smaller_head(name):
    """But for proportional, whose share counts among the pairs of the whole head, and for drope, which rotates nothing."""
    half, whole = config_of(name, 32, partial_rotary_factor=0.5), config_of(name, 16)
    if name not in ("proportional", "drope"):
        torch.testing.assert_close(inv_freq(half, 32, 200), inv_freq(whole, 16, 200), rtol=0, atol=0)
    x = torch.randn(1, 1, 3, 32)
    turned = rotated(x, [5, 77, 199], half, 200)
    assert turned.shape == x.shape
    if name != "drope":
        assert torch.equal(turned[..., 16:], x[..., 16:])
    else:  # all scores are multiplied by the same number
        torch.testing.assert_close(turned, x * math.sqrt(1 + 0.412 * math.log(200 / 64)))


def test_share_of_the_head_that_leaves_no_pair_is_refused():
    for share in (0.01, 0.45):
        with pytest.raises(UserError, match="partial_rotary_factor"):
            inv_freq(RopeConfig(partial_rotary_factor=share), 20)
    assert len(inv_freq(RopeConfig(partial_rotary_factor=0.4), 20)[0]) == 4


@pytest.mark.parametrize("name", METHODS)
def test_resonance_rounds_the_wavelengths_of_every_method(name):
    for length in (None, 300):
        theta, wavelengths = (inv_freq(config_of(name, resonance=r), 16, length)[0].double() for r in (False, True))
        moving = theta > 0
        rounded = 2 * math.pi / wavelengths[moving]
        torch.testing.assert_close(rounded, (2 * math.pi / theta[moving]).round(), rtol=1e-5, atol=0)
        assert torch.equal(wavelengths > 0, moving)
    torch.testing.assert_close(2 * math.pi / inv_freq(RopeConfig(resonance=True), 8)[0].double(),
                               torch.tensor([6, 63, 628, 6283]).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_frequencies_are_real_under_the_meta_device_and_another_default_dtype(name):
    config = config_of(name)
    expected, _ = inv_freq(config, 16, 200)
    with torch.device("meta"):
        on_meta, _ = inv_freq(config, 16, 200)
        config_of(name)
    assert on_meta.device.type == "cpu" and torch.equal(on_meta, expected)
    torch.set_default_dtype(torch.bfloat16)
    try:
        theta, _ = inv_freq(config_of(name), 16, 200)
        cos, _ = cos_sin(theta, torch.tensor([257]))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(theta, expected) and torch.equal(cos, cos_sin(expected, torch.tensor([257]))[0])


# --- DPRoPE ----------------------------------------------------------------------------------------------------------

def interpolated(head_dim, **settings):
    """Which pairs dprope interpolates."""
    config = config_of("dprope", **settings)
    share = inv_freq(config, head_dim)[0] / inv_freq(RopeConfig(rope_theta=config.rope_theta), head_dim)[0]
    kept, squeezed = (share - 1).abs() < 1e-6, (share * config.factor - 1).abs() < 1e-6
    assert (kept ^ squeezed).all()
    return squeezed.nonzero().flatten().tolist()


def test_dprope_interpolates_the_pairs_of_the_paper():
    eight = [2, 4, 5, 6, 8, 9, 10, *range(15, 20), 28, *range(30, 45), *range(46, 64)]     # LLaMA 2 from 4k to 8k: 46 pairs
    sixteen = [1, 2, 4, 8, 10, 21, 25, 28, *range(30, 64)]                                 # and to 16k: 42
    assert interpolated(128, factor=2.0, **L4096) == eight and interpolated(128, factor=4.0, **L4096) == sixteen
    assert interpolated(128, factor=2.0, bins=360, **L4096) == eight
    small = interpolated(32, factor=2.0, original_max_position_embeddings=512)             # bins in proportion: 45
    assert small == interpolated(32, factor=2.0, original_max_position_embeddings=512, bins=45) == list(range(4, 16))


def test_dprope_interpolates_as_many_dimensions_as_it_is_told():
    for factor, dims in ((2.0, 80), (4.0, 64)):                                            # the paper's n-hat for 8k and 16k
        chosen = interpolated(128, factor=factor, interpolated_dims=dims, **L4096)
        assert len(chosen) == dims // 2 and set(chosen) < set(interpolated(128, factor=factor, **L4096))
    assert set(interpolated(128, factor=2.0, interpolated_dims=8, **L4096)) == {50, 51, 52, 54}
    assert interpolated(128, factor=2.0, interpolated_dims=0, **L4096) == []
    assert len(interpolated(128, factor=2.0, interpolated_dims=128, **L4096)) == 64
    assert len(interpolated(64, interpolated_dims=9)) == 4                                 # half a pair is none
    with pytest.raises(UserError, match="interpolated_dims 80: .* 64"):
        inv_freq(config_of("dprope", interpolated_dims=80), 64)


def test_dprope_interpolates_fewer_for_a_greater_threshold():
    for threshold, dims in ((5.5e-4, 80), (2e-3, 64), (5e-3, 56)):                         # the paper's numbers of dimensions, 4k to 8k
        chosen = interpolated(128, factor=2.0, threshold=threshold, **L4096)
        assert chosen == interpolated(128, factor=2.0, interpolated_dims=dims, **L4096)
    assert len(interpolated(128, factor=2.0, threshold=-1.0, **L4096)) == 64


def test_dprope_warns_of_too_many_bins(recwarn):
    interpolated(16, original_max_position_embeddings=517)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="360 bins for a window of 519 .* about 47 bins"):
        config_of("dprope", bins=360, original_max_position_embeddings=519)


# --- CLEX ------------------------------------------------------------------------------------------------------------

def trained(pairs, size=0.3, seed=0):
    network, generator = CLEX(pairs), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for matrix in (network.up.weight, network.down.weight):
            matrix.copy_(size * torch.randn(matrix.shape, generator=generator) / math.sqrt(pairs))
    return network


@pytest.mark.parametrize("t, base", [(1, 10000), (2, 30527.74), (4, 72195.86), (8, 156588.32), (16, 327366.40)])
def test_untrained_clex_is_ntk(t, base):
    config = config_of("clex", **L4096)
    for network in (None, learned(config, 128)):
        theta, factor = inv_freq(config, 128, 4096 * t, network)
        assert factor == 1 and theta[1].double().item() ** -64 == pytest.approx(base, rel=1e-5)
        assert torch.equal(theta, inv_freq(config, 128, 4096 * (t - 1) + 1, network)[0])   # t is rounded up
        torch.testing.assert_close(theta, inv_freq(RopeConfig("ntk", factor=2.0 * t - 1), 128)[0], rtol=1e-6, atol=0)
    assert torch.equal(inv_freq(config, 128, 16 * 4096)[0], inv_freq(config, 128, 10**6)[0])  # and at most max_factor


@pytest.mark.parametrize("head_dim", [8, 64])
def test_trained_clex_is_the_oracles(head_dim):
    network, config = trained(head_dim // 2, size=1.0), config_of("clex", head_dim)
    matrices = [matrix.detach().double().numpy() for matrix in (network.up.weight, network.down.weight)]
    for length in (64, 65, 64 * 3, 64 * 16):
        theta, _ = inv_freq(config, head_dim, length, network)
        expected, _ = frequencies(config.to_dict(), head_dim, length, matrices)
        np.testing.assert_allclose(theta.detach(), expected, rtol=1e-4)
        untrained, _ = inv_freq(config, head_dim, length)
        assert ((theta / untrained).log().abs().max() > 0.1) == (length > 64), "the network has to matter for this test to mean something"


def test_clex_begins_at_the_frequencies_of_the_model_and_both_matrices_learn():
    network, config = trained(8), config_of("clex")
    assert torch.equal(inv_freq(config, 16, 64, network)[0], inv_freq(DEFAULT, 16)[0])     # y(1) = 0 whatever it learned
    theta, _ = inv_freq(config, 16, 150, network)
    theta.log().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 1e-4 for p in network.parameters())
    fresh = learned(config, 16)
    inv_freq(config, 16, 150, fresh)[0].log().sum().backward()
    assert fresh.down.weight.grad.abs().max() > 1e-4 and not fresh.up.weight.grad.any()    # W_down = 0 at first: it moves first


def test_the_gradient_of_clex_is_the_oracles_difference():
    network, config = trained(8), config_of("clex")
    matrices = [matrix.detach().double().numpy() for matrix in (network.up.weight, network.down.weight)]
    inv_freq(config, 16, 150, network)[0].log().sum().backward()
    step = np.random.default_rng(0).standard_normal((2, 8, 8))
    ends = [np.log(frequencies(config.to_dict(), 16, 150, [m + e * s for m, s in zip(matrices, step)])[0]).sum() for e in (1e-4, -1e-4)]
    slope = sum((m.grad.double().numpy() * s).sum() for m, s in zip((network.up.weight, network.down.weight), step))
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-3)


def test_only_clex_learns():
    assert [name for name in METHODS if learned(config_of(name), 16) is not None] == ["clex"]
    assert learned(config_of("clex", partial_rotary_factor=0.5), 32).up.weight.shape == (8, 8)


# --- transformers ----------------------------------------------------------------------------------------------------

def in_transformers(rope, head_dim, seq_len, max_position_embeddings=None):
    """(inv_freq, attention factor) that transformers computes from the dict."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.phi.modeling_phi import PhiRotaryEmbedding  # LLaMA's does not know a partial_rotary_factor
    longest = max_position_embeddings or int(rope.get("original_max_position_embeddings", 64) * rope.get("factor", 1))
    config = LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, max_position_embeddings=longest,
                         rope_parameters=dict(rope))
    if rope["rope_type"] == "default":
        return PhiRotaryEmbedding(config).inv_freq, 1.0
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", seq_len=seq_len)


def random_rope(rng, kind):
    """(dict, head_dim, lengths) of a method that transformers has."""
    head_dim, window, s = rng.choice([16, 32, 64, 80, 96, 128]), rng.choice([64, 256, 2048, 4096, 8192]), rng.uniform(1.5, 32)
    rope = {"rope_type": kind, "rope_theta": 10 ** rng.uniform(4, 6)}
    if rng.random() < 0.3:
        rope["partial_rotary_factor"] = rng.choice([0.25, 0.5, 0.75])
    if kind != "default":
        rope["factor"] = s
    if kind in ("dynamic", "yarn", "llama3", "longrope"):
        rope["original_max_position_embeddings"] = window
    if kind == "llama3":
        rope |= {"low_freq_factor": rng.uniform(0.5, 2), "high_freq_factor": rng.uniform(3, 8)}
    if kind == "yarn":
        for keys in ({"beta_fast": rng.uniform(8, 64), "beta_slow": rng.uniform(0.2, 4)}, {"truncate": False}, {"truncate": True},
                     {"attention_factor": rng.uniform(1, 2)}, {"mscale": rng.choice([1.0, 0.7]), "mscale_all_dim": rng.choice([1.0, 0.5])}):
            rope |= keys if rng.random() < 0.4 else {}
    if kind == "longrope":
        pairs = int(head_dim * rope.get("partial_rotary_factor", 1)) // 2
        rope |= {key: [rng.uniform(1, most) for _ in range(pairs)] for key, most in (("short_factor", 2), ("long_factor", s))}
        rope |= {"attention_factor": rng.uniform(1, 2)} if rng.random() < 0.3 else {}
    return rope, head_dim, [None, window // 2, window, window + 1, 2 * window, int(s * window)]


def test_every_rope_type_of_transformers_agrees_with_it_on_random_configs():
    pytest.importorskip("transformers")
    rng = random.Random(0)
    for kind in ["default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional"] * 10:
        rope, head_dim, lengths = random_rope(rng, kind)
        config = RopeConfig.from_dict(rope)
        for seq_len in lengths:
            # for dynamic, transformers takes the config's window for L, which is that of pre-training
            longest = rope["original_max_position_embeddings"] if kind == "dynamic" else None
            expected, factor = in_transformers(rope, head_dim, seq_len, longest)
            theta, attention_factor = inv_freq(config, head_dim, seq_len)
            np.testing.assert_allclose(theta, expected, rtol=2e-5, err_msg=f"{rope} at {seq_len}")
            assert attention_factor == pytest.approx(factor, rel=1e-6), rope


NATIVE = {"default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional"}
EXPORTS = [*((name, {}) for name in METHODS), *((name, {"partial_rotary_factor": 0.5}) for name in METHODS),
           *((name, {"resonance": True}) for name in METHODS),
           ("yarn", {"ramp": "turns"}), ("yarn", {"ramp": "turns", "mscale": 1.0, "mscale_all_dim": 0.5}),
           ("yarn", {"truncate": False, "attention_factor": 1.3}), ("dprope", {"interpolated_dims": 14}), ("ntk", {"rope_theta": 5e5})]


def said(value):
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value


def exported(name, settings):
    """(config, its Hugging Face dict), or None where transformers has no words for it. Which that are is a property of the method."""
    config = config_of(name, 32, **settings)
    fixed = METHODS[name].rotary and not METHODS[name].grows and not (inv_freq(config, 32)[0] == 0).any()
    if fixed or METHODS[name].hugging_face and not config.resonance:
        return config, config.to_hugging_face(32)
    with pytest.raises(UserError, match=f"^rope_type {name}: "):
        config.to_hugging_face(32)


@pytest.mark.parametrize("name, settings", EXPORTS, ids=said)
def test_what_is_exported_to_hugging_face_comes_back_as_the_same_angles(name, settings):
    if pair := exported(name, settings):
        config, rope = pair
        same = {"ntk": "default", "abf": "default", "ntk_by_parts": "llama3"}  # other words for the same frequencies
        known = {**{n: n for n in NATIVE}, **same} if not {"ramp", "resonance"} & set(settings) else {}
        assert rope["rope_type"] == known.get(name, "longrope")
        again = RopeConfig.from_dict(json.loads(json.dumps(rope)))
        for length in (None, 10, 64, 65, 500):
            theta, factor = inv_freq(config, 32, length)
            back, factor_back = inv_freq(again, 32, length)
            torch.testing.assert_close(back, theta, rtol=2e-7, atol=0)
            assert factor_back == pytest.approx(factor, rel=1e-12)


def test_what_is_exported_is_the_same_in_transformers():
    pytest.importorskip("transformers")
    count = 0
    for name, settings in EXPORTS:
        if pair := exported(name, settings):
            config, rope = pair
            for length in (None, 10, 64, 65, 500):
                expected, factor = in_transformers(rope, 32, length, 64 if name == "dynamic" else None)
                theta, attention_factor = inv_freq(config, 32, length)
                np.testing.assert_allclose(theta, expected, rtol=2e-5, err_msg=f"{name} {settings} at {length}")
                assert attention_factor == pytest.approx(factor, rel=1e-6), name
                count += 1
    assert count > 100


def test_what_transformers_has_no_words_for_is_refused_by_name():
    for name in ("dynamic_yarn", "clex", "nope", "drope", "alibi", "xpos"):
        assert exported(name, {}) is None
    assert exported("proportional", {"resonance": True, "partial_rotary_factor": 0.5}) is None
    with pytest.raises(UserError, match="random_positions"):
        RopeConfig(random_positions=100).to_hugging_face(16)
    with pytest.raises(UserError, match="rope_type linear .*original_max_position_embeddings"):
        RopeConfig("linear", 2.0, resonance=True).to_hugging_face(16)


def test_a_hugging_face_dict_says_all_that_it_has_to():
    assert config_of("linear").to_hugging_face(16) == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    assert RopeConfig(rope_theta=5e5).to_hugging_face(16) == {"rope_type": "default", "rope_theta": 5e5}
    assert config_of("llama3").to_hugging_face(16) == {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
                                                      "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    assert RopeConfig("ntk", 4.0).to_hugging_face(128) == {"rope_type": "default", "rope_theta": pytest.approx(40889.9424, rel=1e-7)}


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
def test_a_config_with_settings_survives_a_json_file(config):
    config = complete(config, 16)
    again = RopeConfig.from_dict(config).to_dict()
    assert RopeConfig.from_dict(json.loads(json.dumps(again))).to_dict() == again
    assert again.items() <= {"rope_theta": 10000.0, **config}.items()                      # what is not said is not written: defaults


def test_what_a_hugging_face_config_says_outside_of_the_dict():
    """max_position_embeddings: the window of pre-training where that is not said, else what a missing factor follows from."""
    factors = {"short_factor": [1, 1], "long_factor": [2, 3]}
    assert RopeConfig.from_dict({"type": "dynamic", "factor": 2.0}, 64) == RopeConfig("dynamic", 2.0, 64)
    assert RopeConfig.from_dict({"type": "dynamic", "factor": 2.0, "max_position_embeddings": 64}, 99) == RopeConfig("dynamic", 2.0, 64)
    assert RopeConfig.from_dict({"type": "dynamic", "factor": 2.0, **L64}, 256) == RopeConfig("dynamic", 2.0, 64)
    assert RopeConfig.from_dict({"rope_type": "yarn", "factor": None, **L64}, 256) == RopeConfig("yarn", 4.0, 64)
    assert RopeConfig.from_dict({"rope_type": "yarn", "factor": 3.0, **L64}, 256).factor == 3.0
    for name in ("su", "longrope"):
        assert RopeConfig.from_dict({"type": name, **factors, **L64}, 256) == RopeConfig("longrope", 4.0, 64, options=factors)
    assert RopeConfig.from_dict({"type": "su", **factors, **L64}, 32).factor == 1.0         # a window smaller than that of pre-training
    assert RopeConfig.from_dict({"rope_type": "linear", "factor": 2.0}, 256) == RopeConfig("linear", 2.0)
    unsaid = {"mscale": None, "attention_factor": None}
    assert RopeConfig.from_dict({"rope_type": "yarn", "factor": 2.0, **unsaid, **L64}) == RopeConfig("yarn", 2.0, 64)
    dynamic = {"rope_type": "dynamic", "factor": 2, "original_max_position_embeddings": 64.0}
    window = RopeConfig.from_dict(dynamic).original_max_position_embeddings
    assert window == 64 and type(window) is int                                            # JSON of another writer: 64.0


YARN, LONG = {"rope_type": "yarn", **L64}, {"rope_type": "longrope", **L64, "short_factor": [1, 1], "long_factor": [2, 3]}
DPROPE = {"rope_type": "dprope", **L64}


@pytest.mark.parametrize("wrong, words", [
    ({"rope_type": "lineer"}, sorted([*METHODS])),                       # the message names every choice
    ({"rope_type": ["linear"]}, ["rope_type", "linear"]),
    ({"rope_type": {"linear": 4}}, ["rope_type"]),
    ({"rope_type": 0}, ["rope_type"]),
    ({"type": []}, ["rope_type"]),
    ({"rope_type": ""}, ["rope_type"]),
    ({"rope_type": "linear", "factr": 4.0}, ["factr", "factor"]),         # a misspelt key is not dropped in silence
    ({"rope_type": "linear", "type": "ntk", "factor": 4.0}, ["linear", "ntk"]),
    ({"factor": 4.0}, ["factor", "rope_type"]),
    ({"rope_type": "linear", "factor": 0.5}, ["factor", "0.5"]),
    ({"rope_type": "linear", "factor": 2e6}, ["factor", "2e+06"]),
    *(({"rope_type": "linear", "factor": value}, ["factor"]) for value in (
        -4.0, 0, float("nan"), float("inf"), 10**400, "4", None, True, [4], {})),
    *(({"rope_theta": value}, ["rope_theta"]) for value in (0.0, 1, -1e4, "10000", float("nan"), [1e4])),
    *(({"partial_rotary_factor": value}, ["partial_rotary_factor"]) for value in (0, -0.5, 1.5, "half", None)),
    *(({"resonance": value}, ["resonance"]) for value in (1, "yes", None, 0.0)),
    *(({"random_positions": value}, ["random_positions"]) for value in (-1, 2.5, "many", True, float("inf"))),
    *(({"rope_type": name, "factor": 2.0}, [name, "original_max_position_embeddings"]) for name in METHODS if METHODS[name].needs_window),
    *(({"rope_type": "dynamic", "original_max_position_embeddings": value}, ["original_max_position_embeddings"])
      for value in (0, -64, 64.5, "64", True, [64], float("nan"))),
    ({"rope_type": "yarn", "max_position_embeddings": "64"}, ["max_position_embeddings"]),
    ({**LONG, "max_position_embeddings": [64]}, ["max_position_embeddings"]),
    ({**LONG, "max_position_embeddings": 256, "original_max_position_embeddings": "64"}, ["original_max_position_embeddings"]),
    # settings of another method, and of none
    ({"rope_type": "ntk_by_parts", **L64, "truncate": False}, ["truncate", "ntk_by_parts"]),
    ({"rope_type": "linear", "beta_fast": 32}, ["beta_fast", "linear"]),
    ({**YARN, "bins": 3, "betafast": 3}, ["bins", "betafast", "beta_fast"]),
    # types
    *(({**YARN, key: value}, [key]) for key, value in (("beta_fast", "32"), ("beta_slow", [1]), ("truncate", 1), ("truncate", "no"),
                                                      ("ramp", 3), ("ramp", "turn"), ("attention_factor", "1"), ("mscale", [1.0]),
                                                      ("mscale", -0.5))),
    *(({**DPROPE, key: value}, [key]) for key, value in (("threshold", "0"), ("bins", 4.5), ("bins", 0), ("bins", -3), ("bins", "360"),
                                                        ("interpolated_dims", -1), ("interpolated_dims", 7.5))),
    *(({"rope_type": "abf", "new_rope_theta": value}, ["new_rope_theta"]) for value in (1.0, 0, -5e5, "5e5")),
    *(({"rope_type": "clex", **L64, "max_factor": value}, ["max_factor"]) for value in (0.5, -1, "16", True)),
    *(({"rope_type": "drope", **L64, "log_scale": value}, ["log_scale"]) for value in (-1, "x", False)),
    # lists
    ({"rope_type": "longrope", **L64, "short_factor": [1, 1]}, ["longrope", "long_factor"]),
    ({"rope_type": "longrope", **L64, "long_factor": [1, 1]}, ["longrope", "short_factor"]),
    ({**LONG, "long_factor": [1, 2, 3]}, ["longrope", "3 long", "2 short"]),
    *(({**LONG, "long_factor": value}, ["long_factor"])
      for value in ([], 2, "23", [1, "2"], [1, 0], [1, -2], [1, float("nan")], [[1], [2]], None)),
    # limits that contradict each other
    ({**LLAMA3, **L64, "factor": 8.0, "low_freq_factor": 4.0}, ["low_freq_factor", "high_freq_factor"]),
    ({**LLAMA3, **L64, "low_freq_factor": 5.0}, ["low_freq_factor", "high_freq_factor"]),
    *(({**more, "beta_fast": 1.0}, ["beta_slow", "beta_fast"])
      for more in (YARN, {**YARN, "ramp": "turns"}, {"rope_type": "ntk_by_parts", **L64})),
    ({**YARN, "beta_slow": 0}, ["beta_slow"]),
    ({**YARN, "rope_type": "dynamic_yarn", "beta_slow": 40.0}, ["beta_slow"]),
    ({"rope_type": "dprope", "original_max_position_embeddings": 10**9, "factor": 4.0}, ["dprope", "4000000000"]),  # days, not an answer
], ids=str)
def test_a_mistake_is_one_line_that_names_it(wrong, words):
    with pytest.raises(UserError) as error:
        RopeConfig.from_dict(wrong)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("wrong", [[], 0, "", "linear", 4.0, True, ["linear"]], ids=repr)
def test_what_is_no_object_is_refused(wrong):
    with pytest.raises(UserError, match="^rope .*give an object"):
        RopeConfig.from_dict(wrong)


def test_the_wrong_number_of_factors_is_refused_with_the_model():
    config = RopeConfig.from_dict(LONG)
    assert len(inv_freq(config, 4)[0]) == 2
    with pytest.raises(UserError, match="2 short and 2 long factors for 8 pairs"):
        inv_freq(config, 16)


def random_json(rng, depth=0):
    numbers = [0, 1, -1, 2, 4.0, 0.5, 64, 64.0, 1000, 1e-300, 1e300, -1e308, 10**400, 2**63, float("nan"), float("inf"), -float("inf")]
    leaves = [*numbers, *numbers, None, True, False, "", "4", "linear", "turns", "index", *METHODS]
    kind = rng.random() if depth < 2 else 1
    if kind < 0.12:
        return [random_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind < 0.16:
        return {str(rng.choice(leaves)): random_json(rng, depth + 1) for _ in range(rng.randrange(3))}
    return rng.choice(leaves)


@pytest.mark.filterwarnings("ignore:dprope")
def test_whatever_json_says_the_answer_is_a_config_or_one_line():
    rng, accepted, refused = random.Random(0), 0, 0
    fields = ["factor", "original_max_position_embeddings", "rope_theta", "partial_rotary_factor", "resonance", "random_positions", "type",
              "max_position_embeddings", "rope_scaling"]
    for n in range(4000):
        name = rng.choice([*METHODS])
        keys = rng.sample([*fields, *METHODS[name].options], rng.randrange(5))
        rope = {**complete({"rope_type": name}, 16), **{key: random_json(rng) for key in keys}}
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
                assert theta.isfinite().all() and (theta >= 0).all() and math.isfinite(factor), rope
        except UserError as error:
            refused += 1
            assert "\n" not in str(error), rope
    assert accepted > 500 and refused > 500


@pytest.mark.parametrize("text, expected", [
    ("ntk", {"rope_type": "ntk"}), ("pi", {"rope_type": "pi"}), (' {"type": "linear", "factor": 2}', {"type": "linear", "factor": 2}),
])
def test_what_the_flag_says(text, expected):
    assert rope_argument(text) == expected


def test_a_flag_that_is_half_an_object_is_refused():
    with pytest.raises(UserError, match="neither a method's name nor a JSON object"):
        rope_argument('{"rope_type": linear}')


@pytest.mark.parametrize("head_dim", [1, 7, 65])
def test_an_odd_head_dim_is_refused(head_dim):
    with pytest.raises(UserError, match="even"):
        inv_freq(DEFAULT, head_dim)


def test_aliases_point_at_methods():
    assert set(ALIASES.values()) <= set(METHODS)
