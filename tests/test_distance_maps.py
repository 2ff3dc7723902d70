"""Distance maps, temperatures and interleaved NoPE: against the full matrix of distances, by hand,
and token by token."""
import dataclasses
import math

import numpy as np
import pytest
import reference
import torch
from cases import build, config_of, draw_tokens

import finetune
import train
from common.errors import UserError
from common.key_range import CausalRange, KeyRange
from common.kv_cache import KVCache
from common.meter import peak_bytes
from methods import METHODS, RopeConfig, inv_freq, position_inputs
from methods.checks import largest_distance
from methods.distance_maps import Band, attention_in_bands, merge_outputs, without_idle_bands
from methods.flex import block_mask, flex_part
from model import TiledAttention, attention
from rope import cos_sin
from training.extension import complete_flags
from weights import load_config, load_model, save_model
from weights.flags import describe_attention

MAPS = [name for name, method in METHODS.items() if method.distance_map]
BLOCK = 16
SETTINGS = {  # L = 32, s = 4, unless they say otherwise: bands of width 1 and of L among them
    "rerope": [{}, {"window": 1}, {"window": 32}],
    "leaky_rerope": [{}, {"window": 1, "stretch": 5.5}, {"window": 20, "stretch": 9.0}],
    "self_extend": [{}, {"window": 1, "group": 5}, {"window": 15, "group": 8}],
    "dca": [{}, {"chunk": 32, "local": 16}, {"chunk": 11, "local": 0}],
    "streaming": [{}, {"sinks": 0, "window": 1}, {"sinks": 7, "window": 25}],
}
CASES = [(name, settings) for name in MAPS for settings in SETTINGS.get(name, [{}])]


def tiled(q, k, v, bias, keys, block_q, block_k):
    """With tiles so small that a text has many."""
    return TiledAttention.apply(q, k, v, bias, keys, BLOCK, BLOCK)


def rope_dict(name, settings):
    return {"rope_type": name, "factor": 4.0, "original_max_position_embeddings": 32, **settings}


def bands_of(name, settings, positions, T, D=8, **more):
    config = RopeConfig.from_dict(rope_dict(name, settings) | more)
    theta, factor = inv_freq(config, D)
    return (position_inputs(config, 4, theta, factor, positions, positions[..., -T:]).bands,
            theta.double().numpy())


def draw(T, S, H=4, K=2, D=8, B=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, H, T, D), (B, K, S, D), (B, K, S, D), (B, H, T, D)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def compute(implementation, q, k, v, bands, dout):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attention_in_bands(q, k, v, bands, implementation, attention, tiled)
    out.backward(dout)
    return out.detach(), q.grad, k.grad, v.grad


# ---- What the model sees, by hand ----------------------------------------------------------------

ROWS = [  # (map, settings, L, position of the query, distances at which it sees keys 0, 1, 2, ...)
    ("rerope", {"window": 3}, 8, 7, [3, 3, 3, 3, 3, 2, 1, 0]),
    ("leaky_rerope", {"window": 2, "stretch": 2.0}, 8, 6, [4, 3.5, 3, 2.5, 2, 1, 0]),
    ("self_extend", {"window": 4, "group": 2}, 8, 11, [7, 7, 6, 6, 5, 5, 4, 4, 3, 2, 1, 0]),
    ("dca", {"chunk": 8, "local": 2}, 12, 5, [5, 4, 3, 2, 1, 0]),
    ("dca", {"chunk": 8, "local": 2}, 12, 8, [7, 6, 5, 4, 3, 2, 2, 1, 0]),
    ("dca", {"chunk": 8, "local": 2}, 12, 13, [7, 6, 5, 4, 3, 2, 7, 6, 5, 4, 3, 2, 1, 0]),
    ("streaming", {"sinks": 2, "window": 3}, 8, 4, [4, 3, 2, 1, 0]),
    ("streaming", {"sinks": 2, "window": 3}, 8, 7, [4, 3, None, None, None, 2, 1, 0]),
]


def seen_by_query(name, settings, L, factor, m):
    """The distance at which the query at m sees each key, None where it does not."""
    n = torch.arange(m + 1)
    found = [None] * (m + 1)
    for band in METHODS[name].distance_map(n[-1:], n, L, factor, **settings):
        for key in range(m + 1):
            if band.first[0] <= key < band.stop[0]:
                assert found[key] is None, "no pair is in two bands"
                found[key] = float(band.q[0] - band.k[key])
    return found


@pytest.mark.parametrize("name, settings, L, m, expected", ROWS)
def test_the_distances_that_a_query_sees_by_hand(name, settings, L, m, expected):
    assert seen_by_query(name, settings, L, 2.0, m) == expected
    rope = {"rope_type": name, "factor": 2.0, "original_max_position_embeddings": L, **settings}
    assert [reference.seen_distance(rope, m, key) for key in range(m + 1)] == expected
    n = torch.arange(m + 1)
    bands = METHODS[name].distance_map(n[-1:], n, L, 2.0, **settings)
    assert largest_distance(bands, n) == max(d for d in expected if d is not None)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("L, factor", [(256, 16.0), (256, 32.0), (30, 2.5), (8192, 4.0), (64, 1.0)])
def test_by_default_a_map_folds_what_is_asked_into_the_trained_window(name, L, factor):
    """Every distance that any query of L' tokens sees is at most L."""
    n = torch.arange(round(L * factor))
    m = n[:: max(1, len(n) // 60)]
    bands = METHODS[name].distance_map(m, n, L, factor)
    assert 0 < largest_distance(bands, n) <= L


@pytest.mark.parametrize("bands", [
    lambda m, n: [Band(n[:1], m + 2, m, n)],
    lambda m, n: [Band(n[:1], m, m, n)],
    lambda m, n: [Band(n[:1], m - 2, m, n), Band(m - 3, m + 1, m, n)],
    lambda m, n: [Band(m - 3, m + 1, m, n), Band(n[:1], m - 3, m, n)]],
    ids=["it sees what comes after it", "not itself", "a key in two bands", "from near to far"])
def test_a_map_that_breaks_the_rules_is_refused(monkeypatch, bands):
    config, n = RopeConfig.from_dict(rope_dict("rerope", {})), torch.arange(20)
    theta, factor = inv_freq(config, 8)
    own = dataclasses.replace(METHODS["rerope"], distance_map=lambda m, n, L, s: bands(m, n))
    monkeypatch.setitem(METHODS, "rerope", own)
    with pytest.raises(AssertionError, match="after it|far to near"):
        position_inputs(config, 4, theta, factor, n, n)


@pytest.mark.parametrize("name", MAPS)
def test_near_tokens_keep_their_distance_and_no_far_one_comes_nearer(name):
    for i in (0, 20, 57, 127):
        seen = [d for d in seen_by_query(name, {}, 32, 4.0, i)[::-1] if d is not None]
        assert seen[:4] == [0, 1, 2, 3][:i + 1]
        assert min(seen[4:], default=9) >= 3
        if name != "dca":                     # which keeps the order within a chunk only
            assert all(a <= b for a, b in zip(seen, seen[1:]))


# ---- Against the oracle --------------------------------------------------------------------------


@pytest.mark.parametrize("name, settings", CASES)
def test_the_oracles_gradients_are_its_differences(name, settings):
    q, k, v, dout = (x.double().numpy() for x in draw(2, 40, H=1, K=1, D=4, B=1))
    rope, theta = rope_dict(name, settings), np.array([1.0, 0.01])

    def loss():
        return (reference.attention_at_distances(q, k, v, rope, theta, range(40))[0] * dout).sum()
    gradients = reference.attention_at_distances(q, k, v, rope, theta, range(40), dout)[1:]
    for array, gradient in zip((q, k, v), gradients):
        for i in list(np.ndindex(array.shape))[::17]:
            kept, values = array[i], []
            for step in (1e-5, -1e-5):
                array[i] = kept + step
                values.append(loss())
            array[i] = kept
            assert (values[0] - values[1]) / 2e-5 == pytest.approx(gradient[i], abs=1e-8)


@pytest.mark.parametrize("T, S, H, K", [(1, 1, 2, 2), (1, 90, 4, 2), (7, 7, 4, 2), (7, 47, 6, 1),
                                        (15, 15, 2, 2), (16, 64, 4, 2), (17, 17, 4, 2),
                                        (53, 53, 2, 1), (33, 77, 2, 2)])
@pytest.mark.parametrize("name, settings", CASES)
def test_values_and_gradients_are_the_oracles(name, settings, T, S, H, K):
    q, k, v, dout = draw(T, S, H, K, B=1)
    bands, theta = bands_of(name, settings, torch.arange(S), T)
    want = reference.attention_at_distances(q, k, v, rope_dict(name, settings), theta, range(S),
                                            dout.double().numpy())
    for implementation in ("naive", "tiled"):
        got = compute(implementation, q, k, v, bands, dout)
        for part, a, b in zip(("out", "dq", "dk", "dv"), got, want):
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5,
                                       err_msg=f"{implementation}: {part}")


@pytest.mark.parametrize("name, settings", CASES)
def test_positions_that_skip_and_differ_from_row_to_row(name, settings):
    """As PoSE gives them to a batch: bands are a matter of positions, not of places in the row."""
    T, S = 19, 35
    q, k, v, dout = draw(T, S)
    first = torch.cat([torch.arange(9), torch.arange(70, 96)])
    positions = torch.stack([first, torch.arange(S) + 3])
    bands, theta = bands_of(name, settings, positions, T)
    want = reference.attention_at_distances(q, k, v, rope_dict(name, settings), theta, positions,
                                            dout.double().numpy())
    for implementation in ("naive", "tiled"):
        for a, b in zip(compute(implementation, q, k, v, bands, dout), want):
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5, err_msg=implementation)


def test_compiled_models_run_the_bands_as_they_are(monkeypatch):
    """The backend "eager" needs no compiler."""
    compiling = []

    def merge(outputs, lses):
        compiling.append(torch.compiler.is_compiling())
        return merge_outputs(outputs, lses)

    model, tokens = build(attention="tiled", rope=RopeConfig("dca", 4.0, 32)), draw_tokens(2, 90)
    expected = model(tokens)
    monkeypatch.setattr("methods.distance_maps.merge_outputs", merge)
    torch._dynamo.reset()
    for block in model.layers:
        block.compile(backend="eager")
    torch.testing.assert_close(model(tokens), expected)
    assert compiling == [False] * len(model.layers)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name, settings", CASES)
def test_the_path_of_gpus_gives_the_same(name, settings):
    """flex_attention, not compiled; on a CPU it has no gradients."""
    q, k, v, _ = draw(9, 50)
    positions = torch.stack([torch.arange(50), torch.arange(50) * 2])    # a mask for each row
    bands, _ = bands_of(name, settings, positions, 9)

    def flex(q, k, v, bias, keys, block_q, block_k):
        return flex_part(q, k, v, keys)
    expected = attention_in_bands(q, k, v, bands, "naive", attention, tiled)
    got = attention_in_bands(q, k, v, bands, "tiled", attention, flex)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("T, S", [(1, 1), (5, 300), (128, 128), (300, 300), (257, 700)])
def test_blocks_of_flex_attention_are_those_in_which_keys_are_seen(T, S):
    """Beside PyTorch's own way, which looks at every place. For causal ranges, windows, ranges
    without a key, and two rows of a batch."""
    from torch.nn.attention.flex_attention import create_block_mask
    m = torch.arange(S - T, S)
    ranges = [(torch.zeros_like(m), m + 1), ((m - 99).clamp(min=0), m + 1),
              (torch.zeros_like(m), (m - 150).clamp(min=0))]
    ranges.append(tuple(torch.stack(ends) for ends in zip(*ranges[:2])))
    for first, stop in ranges:
        got = block_mask(KeyRange(first, stop), 2, S)
        low, high = first.expand(2, -1), stop.expand(2, -1)
        want = create_block_mask(lambda b, h, t, s: (low[b, t] <= s) & (s < high[b, t]),
                                 len(torch.atleast_2d(first)), None, T, S, device="cpu")
        assert torch.equal(got.to_dense(), want.to_dense())
        assert torch.equal(got.full_kv_num_blocks.int(), want.full_kv_num_blocks.int())
        for row, count in enumerate(want.full_kv_num_blocks[0, 0].tolist()):
            assert torch.equal(got.full_kv_indices[0, 0, row, :count],
                               want.full_kv_indices[0, 0, row, :count].int())
        assert got.shape == want.shape


def test_sdpa_is_refused_where_it_gives_no_lse(tmp_path):
    """Where a model is loaded or a training begins, before any work; and inside."""
    save_model(build(max_seq_len=64), tmp_path)
    rerope = {"rope_type": "rerope", "factor": 2}
    with pytest.raises(UserError, match="attention sdpa: .* choose auto or tiled"):
        load_model(tmp_path, rope=rerope, attention="sdpa")
    flags = finetune.FinetuneConfig(rope="rerope", factor=2.0, attention="sdpa", device="cpu")
    with pytest.raises(UserError, match="attention sdpa: .* choose auto or tiled"):
        complete_flags(flags, load_config("data/tiny"))
    with pytest.raises(UserError, match="attention sdpa: .* choose auto or tiled"):
        train.main(["--rope", "dca", "--attention", "sdpa", "--device", "cpu", "--dry-run"])
    q, k, v, _ = draw(50, 50)
    bands, _ = bands_of("rerope", {}, torch.arange(50), 50)
    with pytest.raises(AssertionError, match="sdpa merges no bands on a CPU"):
        attention_in_bands(q, k, v, bands, "sdpa", attention, tiled)


def test_a_band_holds_no_keys_that_nobody_sees():
    """A new token rotates the near keys of the near band only, and the far keys of the far one."""
    bands, _ = bands_of("rerope", {"window": 8}, torch.arange(100), 1)
    assert [band.held for band in bands] == [slice(0, 92), slice(92, 100)]
    assert [len(band.k_rope[0]) for band in bands] == [92, 8]
    bands, _ = bands_of("streaming", {"sinks": 4, "window": 8}, torch.arange(100), 1)
    assert [band.held for band in bands] == [slice(0, 4), slice(92, 100)]


def test_parts_of_which_one_is_empty_are_merged_with_their_gradients():
    """A query that sees no key of a band takes nothing from it, and gives it nothing."""
    q, k, v, dout = draw(5, 5, B=1)
    empty = KeyRange(torch.zeros(5, dtype=torch.long), torch.tensor([0, 0, 0, 1, 1]))
    rest = KeyRange(empty.stop, torch.arange(1, 6))
    results = []
    for seen in ([CausalRange(5, 5, torch.device("cpu"))], [empty, rest]):
        x = [t.clone().requires_grad_() for t in (q, k, v)]
        parts = [TiledAttention.apply(*x, None, keys, 2, 2) for keys in seen]
        merge_outputs(*zip(*parts)).backward(dout)
        results.append([t.grad for t in x])
    for whole, merged in zip(*results):
        torch.testing.assert_close(merged, whole, atol=1e-6, rtol=1e-5)


def test_in_bfloat16():
    q, k, v, _ = (x.bfloat16() for x in draw(40, 100))
    for name in MAPS:
        bands, theta = bands_of(name, {}, torch.arange(100), 40)
        want = reference.attention_at_distances(q.float(), k.float(), v.float(),
                                                rope_dict(name, {}), theta, range(100))[0]
        for implementation in ("naive", "tiled"):
            got = attention_in_bands(q, k, v, bands, implementation, attention, tiled)
            assert got.dtype == torch.bfloat16
            np.testing.assert_allclose(got.float(), want, atol=0.05)


def test_memory_of_tiled_is_linear_in_the_length():
    def peak(S):
        q, k, v, dout = draw(S, S, H=1, K=1, B=1)
        bands, _ = bands_of("self_extend", {"window": 8}, torch.arange(S), S, factor=100.0)
        return peak_bytes(lambda: compute("tiled", q, k, v, bands, dout))
    assert peak(512) < 2.5 * peak(256)


# ---- A map that folds nothing is plain RoPE ------------------------------------------------------

NOTHING_FOLDED = [("rerope", {"window": 64}), ("leaky_rerope", {"window": 5, "stretch": 1.0}),
                  ("leaky_rerope", {"window": 64}), ("self_extend", {"window": 5, "group": 1}),
                  ("self_extend", {"window": 64, "group": 3}), ("dca", {"chunk": 64, "local": 3}),
                  ("streaming", {"sinks": 4, "window": 60})]


@pytest.mark.parametrize("name, settings", NOTHING_FOLDED)
@pytest.mark.parametrize("implementation", ["naive", "tiled", "sdpa", "auto"])
def test_a_map_that_folds_nothing_is_plain_rope_bit_for_bit(name, settings, implementation):
    tokens = draw_tokens(2, 60)
    plain = build(attention=implementation)(tokens)
    rope = RopeConfig(name, 1.0, 64, options=settings)
    assert torch.equal(build(attention=implementation, rope=rope)(tokens), plain)


def test_bands_with_a_gap_between_them_are_not_joined_and_a_short_one_is_not_causal():
    """A map of one's own: two stretches at the same places, and what lies between is not seen."""
    n = torch.arange(20)
    far, near = Band(n * 0, (n - 4).clamp(max=2), n, n), Band(n - 1, n + 1, n, n)
    assert len(without_idle_bands([far, near], n)) == 2
    assert len(without_idle_bands([Band(n * 0, n - 1, n, n), near], n)) == 1
    assert KeyRange(n * 0, n + 1).is_causal(20)
    assert not KeyRange(n * 0, n).is_causal(20)
    assert not KeyRange((n - 1).clamp(min=0), n + 1).is_causal(20)


# ---- Token by token ------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["naive", "tiled"])
@pytest.mark.parametrize("name, settings", CASES)
def test_token_by_token_equals_the_whole_across_the_window_and_all_edges(name, settings,
                                                                        implementation):
    rope = RopeConfig.from_dict(rope_dict(name, settings) | {"temperature": "log_n"})
    model = build(attention=implementation, rope=rope)
    tokens = draw_tokens(2, 80)
    with torch.no_grad():
        whole = model(tokens)
        cache = KVCache(model.config, 2, 80)
        pieces = [model(tokens[:, :5], cache=cache), model(tokens[:, 5:24], cache=cache)]
        pieces += [model(tokens[:, t:t + 1], cache=cache) for t in range(24, 80)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=2e-4, rtol=1e-4)


# ---- Temperatures --------------------------------------------------------------------------------


def config_with(name="default", **settings):
    return config_of(name, original_max_position_embeddings=64, **settings)


def test_golden_temperatures():
    positions = torch.tensor([0, 62, 63, 64, 127, 128, 4095])
    theta, _ = inv_freq(config_with(), 16)

    def scale(name):
        inputs = position_inputs(config_with(), 1, theta, 1.0, positions, positions[-7:], name)
        assert torch.equal(inputs.k_rope[0], cos_sin(theta, positions)[0])
        q_length = (inputs.q_rope[0] ** 2 + inputs.q_rope[1] ** 2).sqrt()[:, 0]
        return (q_length / (inputs.k_rope[0] ** 2 + inputs.k_rope[1] ** 2).sqrt()[:, 0]).tolist()
    log_n = [1, 1, 1, math.log(65) / math.log(64), 7 / 6, math.log(129) / math.log(64), 2]
    assert scale("log_n") == pytest.approx(log_n, rel=1e-6)
    llama4 = [1, 1, 1, 1 + .1 * math.log(2), 1 + .1 * math.log(2), 1 + .1 * math.log(3),
              1 + .1 * math.log(64)]
    assert scale("llama4") == pytest.approx(llama4, rel=1e-6)
    assert scale("none") == pytest.approx([1] * 7)


@pytest.mark.parametrize("sigma, restored", [(1.0, 0.41), (2.0, 0.2)])
def test_log_n_gives_back_what_more_keys_take(sigma, restored):
    """docs/maths.md, section 12: a key that had half of the attention among L keys, among n = 16 L
    others whose scores are drawn at random."""
    L, n = 256, 4096
    rng, z = np.random.default_rng(0), math.log(L) + sigma**2 / 2

    def share(keys, scale):
        others = np.exp(scale * sigma * rng.standard_normal((2000, keys))).sum(axis=1)
        return np.mean(1 / (1 + others * np.exp(-scale * z)))
    assert share(L, 1.0) == pytest.approx(0.5, abs=0.02)
    assert share(n, 1.0) == pytest.approx(0.06, abs=0.005)
    assert share(n, math.log(n) / math.log(L)) == pytest.approx(restored, abs=0.02)


def test_a_temperature_takes_the_place_of_the_methods_own():
    assert inv_freq(config_with("yarn"), 16)[1] == pytest.approx(1 + 0.1 * math.log(4))
    for name in ("none", "log_n", "llama4"):
        assert inv_freq(config_with("yarn", temperature=name), 16)[1] == 1


@pytest.mark.parametrize("temperature", ["log_n", "llama4", "none"])
@pytest.mark.parametrize("name", METHODS)
def test_a_temperature_goes_with_every_method(name, temperature):
    rope = config_of(name, 8, original_max_position_embeddings=12, temperature=temperature)
    model, tokens = build(rope=rope), draw_tokens(2, 40)
    weights = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    config = dataclasses.asdict(model.config) | {"rope": rope.to_dict()}
    expected = reference.forward(weights, config, tokens.numpy())
    np.testing.assert_allclose(model(tokens).detach(), expected, atol=2e-4, rtol=1e-4)


# ---- Interleaved NoPE ----------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("name, temperature", [("default", None), ("yarn", None), ("xpos", None),
                                               ("rerope", "log_n"), ("yarn", "llama4"),
                                               ("yarn", "none")])
def test_every_nth_layer_is_unrotated(name, temperature, every):
    more = {} if temperature is None else {"temperature": temperature}
    rope = config_of(name, 8, original_max_position_embeddings=12, no_rope_layer_interval=every,
                     **more)
    model, tokens = build(rope=rope, n_layers=3), draw_tokens(2, 30)
    weights = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    config = dataclasses.asdict(model.config) | {"rope": rope.to_dict()}
    expected = reference.forward(weights, config, tokens.numpy())
    np.testing.assert_allclose(model(tokens).detach(), expected, atol=2e-4, rtol=1e-4)
    with torch.no_grad():
        cache = KVCache(model.config, 2, 30)
        pieces = [model(part, cache=cache) for part in tokens.split(7, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), atol=2e-4, rtol=1e-4)


def test_no_layer_rotated_is_nope():
    tokens = draw_tokens(1, 20)
    every = build(rope=RopeConfig(no_rope_layer_interval=1))(tokens)
    torch.testing.assert_close(every, build(rope=RopeConfig("nope"))(tokens))


@pytest.mark.parametrize("name, rope_type, device, words", [
    ("auto", "yarn", "cuda", "auto (sdpa, the fused kernels)"), ("naive", "dca", "cpu", "naive"),
    ("auto", "dca", "cpu", "auto (tiled, which can merge bands)"),
    ("auto", "dca", "cuda", "auto (flex_attention, band by band)")])
def test_the_header_says_what_auto_takes(name, rope_type, device, words):
    assert describe_attention(name, config_with(rope_type), torch.device(device)) == words


# ---- What a user may write wrong -----------------------------------------------------------------


@pytest.mark.parametrize("given, message", [
    ({"rope_type": "self_extend", "factor": 16, "window": 64, "group": 16},
     "self_extend reaches less than 4096 tokens: .* at a distance of 315, and the model knows 256; "
     r"give other settings \(window, group\)"),
    ({"rope_type": "leaky_rerope", "factor": 16, "stretch": 3}, "reaches less than 4096"),
    ({"rope_type": "rerope", "factor": 4, "window": 300}, "reaches less .* distance of 300"),
    ({"rope_type": "rerope", "factor": 4, "window": 0}, "rerope window 0: has to be at least 1"),
    ({"rope_type": "self_extend", "factor": 4, "group": 0}, "group 0: has to be at least 1"),
    ({"rope_type": "leaky_rerope", "factor": 4, "stretch": 0.5}, "stretch 0.5: .* at least 1"),
    ({"rope_type": "dca", "factor": 4, "chunk": 300, "local": 10}, "distance of 299"),
    ({"rope_type": "dca", "factor": 4, "chunk": 30, "local": 16}, "local 16: .* half of the chunk"),
    ({"rope_type": "dca", "factor": 4, "chunk": 30}, "local 64: .* half of the chunk"),
    ({"rope_type": "streaming", "factor": 4, "sinks": 200, "window": 200}, "distance of 399"),
    ({"rope_type": "streaming", "factor": 4, "sinks": 300}, "distance of 300"),
    ({"rope_type": "rerope", "factor": 4, "group": 3}, "unknown key 'group'"),
    ({"rope_type": "rerope", "factor": 1e6}, "too many: give a smaller factor"),
    ({"rope_type": "streaming", "factor": 4, "sinks": -1}, "sinks = -1: give a whole number"),
    ({"rope_type": "dca", "factor": 4, "local": -1}, "local = -1: give a whole number"),
    ({"rope_type": "rerope", "factor": 4, "original_max_position_embeddings": 3},
     "rerope: a window of 3 tokens is too short to fold"),
    ({"rope_type": "yarn", "factor": 4, "temperature": "hot"},
     "temperature 'hot' is unknown: choose one of none, log_n, llama4"),
    ({"rope_type": "default", "temperature": "log_n", "partial_rotary_factor": 0.5},
     "scales whole queries"),
])
def test_settings_that_cannot_work_are_one_line(given, message):
    given = {"original_max_position_embeddings": 256, **given}
    with pytest.raises(UserError, match=message):
        RopeConfig.from_dict(given)


def test_zero_or_none_end_what_the_weights_were_trained_with():
    assert RopeConfig(no_rope_layer_interval=0) == RopeConfig()
    assert RopeConfig(temperature="none", partial_rotary_factor=0.5).temperature == "none"


def test_positions_that_do_not_ascend_are_no_text():
    with pytest.raises(AssertionError, match="needs ascending positions"):
        bands_of("rerope", {}, torch.tensor([0, 1, 2, 2, 3]), 5)


def test_a_temperature_needs_the_window():
    with pytest.raises(UserError, match="temperature log_n needs original_max_position_embeddings"):
        RopeConfig(temperature="log_n")
    filled = RopeConfig.from_dict({"rope_type": "default", "temperature": "log_n"}, 64)
    assert filled.original_max_position_embeddings == 64
