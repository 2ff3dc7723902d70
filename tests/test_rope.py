"""rope.py against the float64 oracle, against golden vectors of transformers 5.23.0, and against
what RoPE promises."""
import math

import numpy as np
import pytest
import torch
from cases import CONFIGS, config_of, label
from reference import complete, frequencies, rotate_all

import rope
from methods import RopeConfig, inv_freq
from rope import apply_rope, cos_sin, rope_frequencies

DEFAULT = RopeConfig()


def rotated(x, positions, config=DEFAULT, seq_len=None):
    """apply_rope at the given positions; x [B,H,T,D]."""
    theta, factor = inv_freq(config, x.shape[-1], seq_len)
    return apply_rope(x, *cos_sin(theta, torch.as_tensor(positions), factor))


# ---- Rotation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=label)
@pytest.mark.parametrize("positions", [
    [0, 1, 2, 3], [7, 8, 9, 10],              # from the start; offset, as with a cache
    [0, 3, 50, 200], [9, 9, 2, 5],            # gaps; repeated and out of order
    [[0, 1, 2, 3], [100, 120, 121, 7]],       # a row of positions for each sequence
], ids=str)
def test_rotation_is_the_oracles_at_any_integer_positions(config, positions):
    x = torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(0))
    config = complete(config, 16)
    length = int(np.max(positions)) + 1
    expected = rotate_all(x.numpy(), positions, *frequencies(config, 16, length))
    got = rotated(x, positions, RopeConfig.from_dict(config), length)
    np.testing.assert_allclose(got, expected, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_code_rotates_as_eager_code_does(monkeypatch, dtype):
    """torch.compile gets the products spelled out, as it knows no complex numbers: the same values
    and gradients."""
    x = torch.randn(2, 8, 3, 16, generator=torch.Generator().manual_seed(0))
    x = x.to(dtype).transpose(1, 2).requires_grad_()
    found = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        y = rotated(x, range(8))
        gradient, = torch.autograd.grad(y.square().cos().sum(), x)
        found.append((y, gradient))
    for eager, compiled in zip(*found):
        torch.testing.assert_close(eager, compiled)


def test_position_zero_is_the_identity_and_norms_are_preserved():
    x = torch.randn(2, 3, 5, 32)
    assert torch.equal(rotated(x, torch.zeros(5, dtype=torch.long)), x)
    turned = rotated(x, [1, 10, 100, 1000, 30000])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert (turned - x).abs().max() > 0.1


def test_a_pair_turns_counterclockwise_with_its_neighbour():
    """By hand: at position 1 with theta = pi/2, (u, v) becomes (-v, u)."""
    x = torch.tensor([3.0, 4.0, 5.0, 6.0])[None, None, None]
    cos, sin = cos_sin(torch.tensor([math.pi / 2, math.pi]), torch.tensor([1]))
    expected = torch.tensor([-4.0, 3.0, -5.0, -6.0])[None, None, None]
    torch.testing.assert_close(apply_rope(x, cos, sin), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_elements_without_a_frequency_stay_as_they_are(dtype):
    x = torch.randn(2, 3, 5, 16).to(dtype)
    positions = torch.stack([torch.arange(5), torch.arange(5) + 40])
    cos, sin = cos_sin(rope_frequencies(6).float(), positions)
    turned = apply_rope(x, cos, sin)
    assert turned.dtype == dtype and turned.shape == x.shape
    assert torch.equal(turned[..., 6:], x[..., 6:])
    assert torch.equal(turned[..., :6], apply_rope(x[..., :6], cos, sin))


def relative_error(q, k, distance, position, angles):
    """How far the score at (position, position - distance) is from the one at (distance, 0), in
    units of |q||k|."""
    def turn(x, position):
        cos, sin = angles(torch.tensor([position]))
        return apply_rope(x[None, None, None], cos, sin).flatten().double()

    def score(m, n):
        return torch.dot(turn(q, m), turn(k, n))
    difference = score(position, position - distance) - score(distance, 0)
    return abs(difference) / (q.double().norm() * k.double().norm())


def test_scores_depend_on_the_distance_only():
    theta, _ = inv_freq(DEFAULT, 64)
    generator = torch.Generator().manual_seed(0)
    for distance in (0, 1, 17, 300):
        q, k = torch.randn(2, 64, generator=generator)
        assert relative_error(q, k, distance, 500, lambda p: cos_sin(theta, p)) < 2e-5
        assert relative_error(q, k, distance, 30000, lambda p: cos_sin(theta, p)) < 1e-3


def test_scores_depend_on_the_distance_only_for_bfloat16_queries_and_keys():
    theta, _ = inv_freq(DEFAULT, 64)

    def bfloat16_angles(positions):
        """The bug in the wild: positions and frequencies in the model's dtype."""
        angles = (positions.bfloat16()[:, None] * theta.bfloat16()).float()
        return angles.cos(), angles.sin()

    generator = torch.Generator().manual_seed(0)
    good, bad = [], []
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
    whole_cos, whole_sin = cos_sin(theta, torch.arange(40))
    cos, sin = cos_sin(theta, torch.arange(25, 40))
    assert torch.equal(whole_cos[25:], cos) and torch.equal(whole_sin[25:], sin)


def test_the_attention_factor_multiplies_cos_and_sin():
    theta, _ = inv_freq(DEFAULT, 16)
    cos, sin = cos_sin(theta, torch.arange(9))
    scaled_cos, scaled_sin = cos_sin(theta, torch.arange(9), 1.25)
    torch.testing.assert_close(scaled_cos, cos * 1.25)
    torch.testing.assert_close(scaled_sin, sin * 1.25)


def test_yarns_temperature_multiplies_scores_by_its_square():
    q, k = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    theta, factor = inv_freq(config_of("yarn", 64), 64)
    assert factor == pytest.approx(0.1 * math.log(4) + 1)

    def score(attention_factor):
        turned = [apply_rope(x[None, None, None], *cos_sin(theta, torch.tensor([m]),
                                                           attention_factor)).flatten()
                  for x, m in ((q, 700), (k, 400))]
        return torch.dot(*turned).item()
    assert score(factor) / score(1.0) == pytest.approx((0.1 * math.log(4) + 1) ** 2, rel=1e-5)


# ---- Each method, called directly ----------------------------------------------------------------


def test_frequencies_and_wavelengths_of_plain_rope():
    theta = rope_frequencies(8)
    assert theta.dtype == torch.float64
    np.testing.assert_allclose(theta, [1, 0.1, 0.01, 0.001], rtol=1e-14)
    np.testing.assert_allclose(rope_frequencies(4, 250000.0), [1, 1 / 500], rtol=1e-14)
    np.testing.assert_allclose(rope.wavelengths(theta), 2 * np.pi * np.array([1, 10, 100, 1000]),
                               rtol=1e-14)
    with torch.device("meta"):
        assert torch.equal(rope_frequencies(8), theta)


CALLS = [  # (name, settings, tokens so far)
    ("default", {}, None), ("linear", {"factor": 4.0}, None), ("ntk", {"factor": 4.0}, None),
    *(("dynamic", {"factor": f, "original_window": 64}, n) for f in (1.0, 4.0)
      for n in (0, 64, 65, 300)),
    ("ntk_by_parts", {"factor": 4.0, "original_window": 2048}, None),
    ("ntk_by_parts", {"factor": 4.0, "original_window": 2048, "beta_fast": 9.0, "beta_slow": 0.5},
     None),
    ("llama3", {"factor": 8.0, "original_window": 2048}, None),
    ("llama3", {"factor": 8.0, "original_window": 2048, "low_freq_factor": 2.0,
                "high_freq_factor": 7.0}, None),
    ("yarn", {"factor": 4.0, "original_window": 2048}, None),
    ("yarn", {"factor": 4.0, "original_window": 2048, "truncate": False}, None),
    ("yarn", {"factor": 4.0, "original_window": 2048, "ramp": "turns"}, None),
    ("yarn", {"factor": 4.0, "original_window": 2048, "beta_fast": 9.0, "beta_slow": 0.5}, None),
    ("yarn", {"factor": 4.0, "original_window": 4}, None),          # the ramp is a step
    ("yarn", {"factor": 4.0, "original_window": 848}, None),        # it ends at D-1 for base 10
    ("yarn", {"factor": 4.0, "original_window": 64, "mscale": 0.8, "mscale_all_dim": 0.3}, None),
    ("yarn", {"factor": 4.0, "original_window": 64, "attention_factor": 1.3}, None),
    *(("dynamic_yarn", {"factor": f, "original_window": 2048, "truncate": False}, n)
      for f in (1.0, 4.0) for n in (0, 2048, 2049, 20000)),
    ("dprope", {"factor": 4.0, "original_window": 100}, None),
    ("dprope", {"factor": 2.5, "original_window": 100, "bins": 7, "threshold": 0.1}, None),
    ("dprope", {"factor": 2.5, "original_window": 100, "interpolated_dims": 5}, None),
]


@pytest.mark.parametrize("head_dim, base", [(4, 1e4), (16, 10.0), (64, 5e5), (128, 1e4)])
@pytest.mark.parametrize("name, settings, seq_len", CALLS, ids=str)
def test_a_method_is_its_formula_in_float64(name, settings, seq_len, head_dim, base):
    arguments = settings if seq_len is None else {**settings, "seq_len": seq_len}
    theta, attention_factor = getattr(rope, name)(head_dim, base, **arguments)
    assert theta.dtype == torch.float64 and theta.shape == (head_dim // 2,)
    settings = dict(settings)
    window = settings.pop("original_window", None)
    said = {"rope_type": name, "rope_theta": base, "original_max_position_embeddings": window}
    expected, expected_factor = frequencies({**said, **settings}, head_dim, seq_len)
    np.testing.assert_allclose(theta, expected, rtol=1e-12)
    assert attention_factor == pytest.approx(expected_factor, rel=1e-14)


RAMPED = [("ntk", {}), ("ntk_by_parts", {"original_window": 2048}),
          ("llama3", {"original_window": 2048}), ("yarn", {"original_window": 2048}),
          ("yarn", {"original_window": 2048, "truncate": False}),
          ("yarn", {"original_window": 2048, "ramp": "turns"}),
          ("dynamic_yarn", {"original_window": 2048, "seq_len": 100})]


@pytest.mark.parametrize("name, settings", RAMPED, ids=str)
def test_the_first_pair_is_kept_and_the_last_interpolated(name, settings):
    """Upside down would be the bug that others have shipped."""
    plain = rope_frequencies(128)
    theta, _ = getattr(rope, name)(128, 1e4, factor=4.0, **settings)
    share = (theta / plain).numpy()
    assert share[0] == pytest.approx(1, rel=1e-12)
    assert share[-1] == pytest.approx(1 / 4, rel=1e-12)
    assert (np.diff(share) <= 1e-12).all() and np.diff(share).min() < -0.01
    identity, attention_factor = getattr(rope, name)(128, 1e4, factor=1.0, **settings)
    np.testing.assert_allclose(identity, plain, rtol=1e-14)
    assert attention_factor == 1


@pytest.mark.parametrize("factor", [1.0, 1.5, 4.0])
def test_linear_divides_every_pair_and_dynamic_grows_from_one(factor):
    plain = rope_frequencies(32, 5e5)
    assert torch.equal(rope.default(32, 5e5)[0], plain)
    np.testing.assert_allclose(rope.linear(32, 5e5, factor)[0], plain / factor, rtol=1e-15)
    before, _ = rope.dynamic(32, 5e5, factor, 100, 100)
    after, _ = rope.dynamic(32, 5e5, factor, 100, 101)
    assert torch.equal(before, plain) and after[-1] < plain[-1]
    np.testing.assert_allclose(after[-1] / plain[-1], 1 / (1 + factor / 100), rtol=1e-12)


def test_the_two_ramps_by_hand():
    turns = torch.tensor([40.0, 32.0, 16.5, 1.0, 0.3], dtype=torch.float64)
    theta = 2 * math.pi * turns / 512
    keep = rope.ramp_by_turns(theta, 512, 1.0, 32.0)
    np.testing.assert_allclose(keep, [1, 1, 0.5, 0, 0], atol=1e-12)
    # pairs that turn 32 times and once within 512 tokens
    low = rope.pair_with_turns(64, 1e4, 512, 32)
    high = rope.pair_with_turns(64, 1e4, 512, 1)
    for pair, n in ((low, 32), (high, 1)):
        assert 512 * 1e4 ** (-2 * pair / 64) / (2 * math.pi) == pytest.approx(n, rel=1e-12)
    i = np.arange(32)
    assert 3 < low < 4 and 15 < high < 16
    keep = rope.ramp_by_pair(64, 1e4, 512, 1.0, 32.0, truncate=False)
    np.testing.assert_allclose(keep, np.clip(1 - (i - low) / (high - low), 0, 1), atol=1e-12)
    keep = rope.ramp_by_pair(64, 1e4, 512, 1.0, 32.0, truncate=True)
    np.testing.assert_allclose(keep, np.clip(1 - (i - 3) / (16 - 3), 0, 1), atol=1e-12)
    blended = rope.blend(torch.tensor([8.0, 8.0, 8.0]), 4.0, torch.tensor([1.0, 0.5, 0.0]))
    assert blended.tolist() == [8, 5, 2]


def test_the_ramp_by_pair_begins_at_the_first_pair_and_ends_at_d_minus_1():
    keep = rope.ramp_by_pair(16, 1e4, 4, 1.0, 32.0, truncate=True)
    assert keep.tolist() == [1, 0, 0, 0, 0, 0, 0, 0]                # a step: low = high = 0
    # With base 10 and L = 848 a pair turns once at 17.04: the limit is D-1 = 15.
    assert math.floor(rope.pair_with_turns(16, 10.0, 848, 32.0)) == 5
    assert math.ceil(rope.pair_with_turns(16, 10.0, 848, 1.0)) == 18
    keep = rope.ramp_by_pair(16, 10.0, 848, 1.0, 32.0, truncate=True)
    np.testing.assert_allclose(keep, [1, 1, 1, 1, 1, 1, 0.9, 0.8], atol=1e-12)


def test_yarns_temperature():
    for s, expected in ((1, 1.0), (0.5, 1.0), (2, 1.0693147181), (math.e**10, 2.0)):
        assert rope.yarn_mscale(s) == pytest.approx(expected, abs=1e-9)
    assert rope.yarn_mscale(math.e**2, 0.5) == pytest.approx(1.1, abs=1e-12)
    assert rope.yarn_mscale(4.0, 0.0) == 1


def test_the_number_of_arcs_grows_with_the_window_up_to_360():
    assert [rope.angle_bins(n) for n in (1, 32, 64, 256, 512, 2048, 4096, 131072)] == [
        4, 4, 6, 22, 45, 180, 360, 360]


# ---- Golden vectors ------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_frequencies_are_the_oracles(config):
    config = {key: value for key, value in config.items() if not isinstance(value, list)}
    for head_dim, length in [(4, None), (4, 500), (16, 10), (16, 64), (16, 65), (16, 500),
                             (64, None), (64, 130), (128, 500)]:
        completed = complete(config, head_dim)
        share = config.get("partial_rotary_factor", 1.0)
        if config["rope_type"] in ("proportional", "drope"):
            share = 1.0
        theta, attention_factor = inv_freq(RopeConfig.from_dict(completed), head_dim, length)
        assert theta.dtype == torch.float32 and theta.shape == (head_dim * share // 2,)
        expected, expected_factor = frequencies(completed, head_dim, length)
        np.testing.assert_allclose(theta, expected, rtol=1e-6, err_msg=str(length))
        assert attention_factor == pytest.approx(expected_factor, rel=1e-12)
        assert type(attention_factor) is float


L32, L64, L2048, L4096, L8192 = ({"original_max_position_embeddings": n}
                                 for n in (32, 64, 2048, 4096, 8192))
L32768 = {"original_max_position_embeddings": 32768}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1, 1, 1, 1],
            "long_factor": [1, 1.5, 3, 4], **L32}
DEEPSEEK_V3 = {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0, **L4096}
GPT_OSS = {"rope_type": "yarn", "factor": 32.0, "rope_theta": 150000.0, "truncate": False, **L4096}

GOLDEN_FULL = [  # (config, head_dim, seq_len, the whole vector)
    ({"rope_type": "default"}, 8, None,
     [1.00000000e+00, 1.00000001e-01, 9.99999978e-03, 1.00000005e-03]),
    ({"rope_type": "linear", "factor": 4.0}, 8, None,
     [2.50000000e-01, 2.50000004e-02, 2.49999994e-03, 2.50000012e-04]),
    ({"rope_type": "dynamic", "factor": 1.0, **L32}, 8, 128,
     [1.00000000e+00, 6.29960522e-02, 3.96850286e-03, 2.50000012e-04]),
    ({"rope_type": "dynamic", "factor": 4.0, **L32}, 8, 128,
     [1.00000000e+00, 4.25290354e-02, 1.80871889e-03, 7.69230755e-05]),
    ({"rope_type": "dynamic", "factor": 4.0, **L32}, 8, 16,
     [1.00000000e+00, 1.00000001e-01, 9.99999978e-03, 1.00000005e-03]),
    ({**LLAMA3, "factor": 4.0, **L32}, 8, None,
     [1.00000000e+00, 2.50000004e-02, 2.49999994e-03, 2.50000012e-04]),
    ({**LLAMA3, "factor": 4.0, **L64}, 16, None,
     [1.00000000e+00, 2.54647911e-01, 2.54647899e-02, 7.90569466e-03,
      2.49999994e-03, 7.90569466e-04, 2.50000012e-04, 7.90569466e-05]),
    ({"rope_type": "dynamic", "factor": 4.0, **L64}, 16, 256,
     [1.00000000e+00, 2.19212472e-01, 4.80541028e-02, 1.05340583e-02,
      2.30919686e-03, 5.06204728e-04, 1.10966386e-04, 2.43252125e-05]),
    ({**LLAMA3, "factor": 32.0, "rope_theta": 500000.0, **L8192}, 64, None,       # Llama 3.2 1B
     [1.00000000e+00, 6.63601279e-01, 4.40366626e-01, 2.92227834e-01,
      1.93922758e-01, 1.28687382e-01, 8.53971019e-02, 5.66696189e-02,
      3.76060307e-02, 2.49554086e-02, 1.65604409e-02, 1.09895291e-02,
      7.29266508e-03, 4.83942125e-03, 3.21144611e-03, 1.29054801e-03,
      4.29556705e-04, 9.70828623e-05, 1.94616387e-05, 1.29147675e-05,
      8.57025589e-06, 5.68723226e-06, 3.77405445e-06, 2.50446715e-06,
      1.66196742e-06, 1.10288363e-06, 7.31874934e-07, 4.85673127e-07,
      3.22293289e-07, 2.13874230e-07, 1.41927202e-07, 9.41830649e-08]),
    ({"rope_type": "yarn", "factor": 4.0, **L32}, 8, None,
     [1.00000000e+00, 2.50000004e-02, 2.49999994e-03, 2.50000012e-04]),
    ({"rope_type": "yarn", "factor": 4.0, "truncate": False, **L32}, 8, None,
     [1.00000000e+00, 2.50000004e-02, 2.49999994e-03, 2.50000012e-04]),
    (LONGROPE, 8, 32, [1.00000000e+00, 1.00000001e-01, 9.99999978e-03, 1.00000005e-03]),
    (LONGROPE, 8, 33, [1.00000000e+00, 6.66666701e-02, 3.33333341e-03, 2.50000012e-04]),
    ({"rope_type": "proportional", "partial_rotary_factor": 0.5}, 8, None,
     [1.00000000e+00, 1.00000001e-01, 0, 0]),
    ({"rope_type": "yarn", "factor": 4.0, **L64}, 16, None,
     [1.00000000e+00, 2.37170815e-01, 4.99999970e-02, 7.90569466e-03,
      2.49999994e-03, 7.90569466e-04, 2.50000012e-04, 7.90569466e-05]),
    ({"rope_type": "yarn", "factor": 4.0, "truncate": False, **L64}, 16, None,
     [1.00000000e+00, 1.98583528e-01, 2.55952496e-02, 7.90569466e-03,
      2.49999994e-03, 7.90569466e-04, 2.50000012e-04, 7.90569466e-05]),
    (GPT_OSS, 64, None,
     [1.00000000e+00, 6.89044297e-01, 4.74782050e-01, 3.27145875e-01,
      2.25418001e-01, 1.55322984e-01, 1.07024424e-01, 7.37445652e-02,
      5.08132726e-02, 3.17056961e-02, 1.93349998e-02, 1.15920492e-02,
      6.79495931e-03, 3.86035908e-03, 2.09379266e-03, 1.05260219e-03,
      4.56483918e-04, 1.29318694e-04, 3.83088118e-05, 2.63964685e-05,
      1.81883370e-05, 1.25325696e-05, 8.63549576e-06, 5.95023948e-06,
      4.09997847e-06, 2.82506676e-06, 1.94659629e-06, 1.34129095e-06,
      9.24208962e-07, 6.36820914e-07, 4.38797855e-07, 3.02351140e-07]),
    (DEEPSEEK_V3, 64, None,
     [1.00000000e+00, 7.49894202e-01, 5.62341332e-01, 4.21696514e-01,
      3.16227764e-01, 2.37137362e-01, 1.77827939e-01, 1.33352146e-01,
      1.00000001e-01, 7.49894157e-02, 5.62341288e-02, 3.90069261e-02,
      2.68793609e-02, 1.83781441e-02, 1.24479560e-02, 8.33450910e-03,
      5.50000044e-03, 3.56199732e-03, 2.24936521e-03, 1.37051346e-03,
      7.90569407e-04, 4.14990413e-04, 1.77827940e-04, 3.33380340e-05,
      2.49999994e-05, 1.87473543e-05, 1.40585325e-05, 1.05424124e-05,
      7.90569447e-06, 5.92843435e-06, 4.44569832e-06, 3.33380353e-06]),
    ({"rope_type": "default", "resonance": True}, 8, None,
     [1.04719755, .0997331001, .0100050721, .00100002949]),
    ({"rope_type": "default", "resonance": True}, 16, None,
     [2 * math.pi / n for n in (6, 20, 63, 199, 628, 1987, 6283, 19869)]),
]

GOLDEN_PAIRS = [  # (config, seq_len, sum, {pair: value}) for head_dim 128
    ({"rope_type": "default"}, None, 7.459954203,
     {1: 8.65964353e-01, 10: 2.37137362e-01, 25: 2.73841955e-02, 40: 3.16227786e-03,
      63: 1.15478193e-04}),
    ({"rope_type": "linear", "factor": 2.0}, None, 3.729977101,
     {0: 5.00000000e-01, 1: 4.32982177e-01, 25: 1.36920977e-02, 63: 5.77390965e-05}),
    ({"rope_type": "linear", "factor": 32.0}, None, 0.233123569,
     {0: 3.12500000e-02, 30: 4.16725466e-04, 63: 3.60869353e-06}),
    ({"rope_type": "dynamic", "factor": 1.0, **L4096}, 8192, 6.967758152,
     {1: 8.56488883e-01, 10: 2.12430790e-01, 25: 2.07990576e-02, 40: 2.03643157e-03,
      63: 5.77390965e-05}),
    ({"rope_type": "dynamic", "factor": 4.0, **L4096}, 16384, 5.931716021,
     {1: 8.31415951e-01, 10: 1.57827839e-01, 25: 9.89598408e-03, 40: 6.20489416e-04,
      63: 8.88293835e-06}),
    ({"rope_type": "dynamic", "factor": 32.0, **L4096}, 131072, 4.466696074,
     {1: 7.76120901e-01, 20: 6.28908584e-03, 45: 1.11383779e-05, 63: 1.16292242e-07}),
    ({**LLAMA3, "factor": 8.0, "rope_theta": 500000.0, **L8192}, None, 5.386058263,  # Llama 3.1 8B
     {1: 8.14617217e-01, 28: 3.21144611e-03, 29: 2.16657063e-03, 31: 8.56751460e-04,
      34: 1.78507791e-04, 35: 9.55621217e-05, 36: 7.78465546e-05, 63: 3.06892588e-07}),
    ({"rope_type": "yarn", "factor": 2.0, **L4096}, None, 7.409437171,
     {1: 8.65964353e-01, 20: 5.62341288e-02, 21: 4.77602780e-02, 30: 1.07707502e-02,
      45: 7.99577218e-04, 46: 6.66760723e-04, 63: 5.77390965e-05}),
    ({"rope_type": "yarn", "factor": 2.0, "truncate": False, **L4096}, None, 7.412710285,
     {1: 8.65964353e-01, 20: 5.62341288e-02, 21: 4.86406200e-02, 30: 1.08280461e-02,
      45: 7.70822691e-04, 46: 6.66760723e-04, 63: 5.77390965e-05}),
    ({"rope_type": "yarn", "factor": 4.0, **L4096}, None, 7.384178651,
     {1: 8.65964353e-01, 20: 5.62341288e-02, 21: 4.72920388e-02, 30: 9.48851742e-03,
      45: 4.29402600e-04, 46: 3.33380362e-04, 63: 2.88695483e-05}),
    ({"rope_type": "yarn", "factor": 4.0, "truncate": False, **L4096}, None, 7.389088330,
     {1: 8.65964353e-01, 20: 5.62341288e-02, 21: 4.86125536e-02, 30: 9.57446080e-03,
      45: 3.86270724e-04, 46: 3.33380362e-04, 63: 2.88695483e-05}),
    ({"rope_type": "yarn", "factor": 32.0, **L4096}, None, 7.362077448,
     {1: 8.65964353e-01, 20: 5.62341288e-02, 21: 4.68823276e-02, 30: 8.36656429e-03,
      45: 1.05499814e-04, 46: 4.16725452e-05, 63: 3.60869353e-06}),
    ({"rope_type": "yarn", "factor": 32.0, "truncate": False, **L4096}, None, 7.368419113,
     {1: 8.65964353e-01, 20: 5.62341288e-02, 21: 4.85879965e-02, 30: 8.47757421e-03,
      45: 4.97877918e-05, 46: 4.16725452e-05, 63: 3.60869353e-06}),
    ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, **L32768}, None,
     5.144034828,                                                                 # Qwen 2.5 and 3
     {20: 1.33352149e-02, 21: 1.07460786e-02, 24: 5.37532149e-03, 30: 1.06436096e-03,
      35: 2.46258394e-04, 39: 6.49039430e-05, 40: 4.44569851e-05, 41: 3.58253164e-05,
      63: 3.10234441e-07}),
    # the ramp that YaRN's paper prints, where its code has 4.76e-2, 2.48e-2, ... (above)
    *(({"rope_type": name, "factor": s, **L4096, **more}, None, None,
       dict(zip((21, 25, 30, 40, 45), values)))
      for name, more in (("ntk_by_parts", {}), ("yarn", {"ramp": "turns"}))
      for s, values in (
          (2.0, [.04849674, .021135176, .0083222939, .0016352793, .00077005953]),
          (4.0, [.048396734, .018010666, .0058158337, .00087178011, .00038512604]))),
]


@pytest.mark.parametrize("config, head_dim, seq_len, vector", GOLDEN_FULL, ids=label)
def test_golden_vectors(config, head_dim, seq_len, vector):
    theta, _ = inv_freq(RopeConfig.from_dict(config), head_dim, seq_len)
    rtol = 1e-5 if config["rope_type"] == "dynamic" else 1e-6
    np.testing.assert_allclose(theta, vector, rtol=rtol)


@pytest.mark.parametrize("config, seq_len, total, pairs", GOLDEN_PAIRS, ids=label)
def test_golden_pairs_of_head_dim_128(config, seq_len, total, pairs):
    theta, _ = inv_freq(RopeConfig.from_dict(config), 128, seq_len)
    lost_in_the_reference = {"dynamic": 1e-5, "yarn": 3e-6}          # by its float32
    rtol = lost_in_the_reference.get(config["rope_type"], 1e-6)
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
        config = RopeConfig(rope_type="ntk", factor=factor, rope_theta=theta)
        scaled, _ = inv_freq(config, head_dim)
        assert scaled[0] == plain[0] == 1               # the fastest pair is left alone
        # the slowest is interpolated as by PI
        torch.testing.assert_close(scaled[-1], plain[-1] / factor, rtol=1e-6, atol=0)
        assert scaled[1].double().item() ** (-head_dim / 2) == pytest.approx(base, rel=1e-5)


@pytest.mark.parametrize("s, temperature, long_4096, long_2048", [
    (2, 1.0693147181, 1.0408329997, 1.0444659357),
    (4, 1.1386294361, 1.0801234497, 1.0871146130),
    (8, 1.2079441542, 1.1180339887, 1.1281521496),
    (16, 1.2772588722, 1.1547005384, 1.1677484162),
    (32, 1.3465735903, 1.1902380714, 1.2060453783),
    (40, 1.3688879454, 1.2014549546, 1.2181180751),
])
def test_golden_attention_factors(s, temperature, long_4096, long_2048):
    def factor(name, seq_len=None, **settings):
        return inv_freq(config_of(name, 16, factor=s, **settings), 16, seq_len)[1]

    def close(value):
        return pytest.approx(value, abs=1e-9)
    # mscale counts beside mscale_all_dim only
    for more in ({}, {"ramp": "turns"}, {"truncate": False}, {"mscale": 0.707}):
        assert factor("yarn", **L4096, **more) == close(temperature)
    assert factor("dynamic_yarn", 64, **L64) == factor("dynamic_yarn", 64 * s, **L64)
    assert factor("dynamic_yarn", 64, **L64) == close(temperature)
    assert factor("yarn", mscale=1.0, mscale_all_dim=1.0) == 1.0
    assert factor("yarn", attention_factor=1.7) == 1.7
    deepseek = temperature / (0.0707 * math.log(s) + 1)
    assert factor("yarn", mscale=1.0, mscale_all_dim=0.707) == close(deepseek)
    for seq_len in (None, 10, 5000):                    # in both modes
        assert factor("longrope", seq_len, **L4096) == close(long_4096)
        assert factor("longrope", seq_len, **L2048) == close(long_2048)


@pytest.mark.parametrize("head_dim, settings, low, high", [
    (128, L2048, 16, 41), (128, L4096, 20, 46), (128, {**L8192, "rope_theta": 5e5}, 18, 35),
    (64, {"original_max_position_embeddings": 512}, 3, 16),
    (128, {**L32768, "rope_theta": 1e6}, 23, 40),
    (32, {"original_max_position_embeddings": 256}, 0, 7),
    (16, {"original_max_position_embeddings": 128}, 0, 3),
])
def test_yarn_keeps_fast_pairs_interpolates_slow_ones_and_blends(head_dim, settings, low, high):
    plain, _ = inv_freq(RopeConfig(rope_theta=settings.get("rope_theta")), head_dim)
    yarn = inv_freq(config_of("yarn", **settings), head_dim)[0].double()
    share = (yarn / plain).double()
    torch.testing.assert_close(share[:low + 1], torch.ones(low + 1).double(), rtol=1e-6, atol=0)
    quarter = torch.full_like(share[high:], 1 / 4)
    torch.testing.assert_close(share[high:], quarter, rtol=1e-6, atol=0)
    assert (share.diff()[low:high] < -1e-3).all()       # strictly between, and not upside down
    printed = inv_freq(config_of("yarn", ramp="turns", **settings), head_dim)[0].double()
    different = (printed / yarn - 1).abs().max()
    assert different > 0.1, "the paper's ramp is another one than its code's"


@pytest.mark.parametrize("factor", [1.0, 3.0, 4.0])
def test_linear_is_the_default_at_squeezed_positions(factor):
    plain, _ = inv_freq(DEFAULT, 64)
    squeezed, _ = inv_freq(RopeConfig(rope_type="linear", factor=factor), 64)
    positions = torch.arange(0, 4096, 37)
    got, expected = cos_sin(squeezed, positions), cos_sin(plain, positions.double() / factor)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, atol=5e-4, rtol=0)


# ---- DPRoPE --------------------------------------------------------------------------------------


def interpolated(head_dim, **settings):
    """Which pairs dprope interpolates."""
    config = config_of("dprope", **settings)
    plain, _ = inv_freq(RopeConfig(rope_theta=config.rope_theta), head_dim)
    share = inv_freq(config, head_dim)[0] / plain
    kept = (share - 1).abs() < 1e-6
    squeezed = (share * config.factor - 1).abs() < 1e-6
    assert (kept ^ squeezed).all()
    return squeezed.nonzero().flatten().tolist()


def test_dprope_interpolates_the_pairs_of_the_paper():
    # LLaMA 2 from 4k to 8k: 46 pairs
    eight = [2, 4, 5, 6, 8, 9, 10, *range(15, 20), 28, *range(30, 45), *range(46, 64)]
    sixteen = [1, 2, 4, 8, 10, 21, 25, 28, *range(30, 64)]           # and to 16k: 42
    assert interpolated(128, factor=2.0, **L4096) == eight
    assert interpolated(128, factor=4.0, **L4096) == sixteen
    assert interpolated(128, factor=2.0, bins=360, **L4096) == eight
    window = {"original_max_position_embeddings": 512}              # bins in proportion: 45
    small = interpolated(32, factor=2.0, **window)
    assert small == interpolated(32, factor=2.0, bins=45, **window) == list(range(4, 16))


def test_dprope_interpolates_as_many_dimensions_as_it_is_told():
    for factor, dims in ((2.0, 80), (4.0, 64)):                     # the paper's n-hat, 8k and 16k
        chosen = interpolated(128, factor=factor, interpolated_dims=dims, **L4096)
        assert len(chosen) == dims // 2
        assert set(chosen) < set(interpolated(128, factor=factor, **L4096))
    four = interpolated(128, factor=2.0, interpolated_dims=8, **L4096)
    assert set(four) == {50, 51, 52, 54}
    assert interpolated(128, factor=2.0, interpolated_dims=0, **L4096) == []
    assert len(interpolated(128, factor=2.0, interpolated_dims=128, **L4096)) == 64
    assert len(interpolated(64, interpolated_dims=9)) == 4          # half a pair is none


def test_dprope_interpolates_fewer_for_a_greater_threshold():
    for threshold, dims in ((5.5e-4, 80), (2e-3, 64), (5e-3, 56)):  # the paper's, 4k to 8k
        chosen = interpolated(128, factor=2.0, threshold=threshold, **L4096)
        assert chosen == interpolated(128, factor=2.0, interpolated_dims=dims, **L4096)
    assert len(interpolated(128, factor=2.0, threshold=-1.0, **L4096)) == 64
