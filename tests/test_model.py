"""model.py against the float64 oracle, and what has to hold of any LLaMA: cache, loss, generation, initial values, sizes."""
import dataclasses
import math

import model as llama
import numpy as np
import pytest
import reference
import torch
from meter import Meter
from torch.utils.flop_counter import FlopCounterMode

from cli import UserError
from model import KVCache, LLaMA, ModelConfig, generate
from positions import position_ids
from rope import METHODS, RopeConfig, depends_on_length

IMPLEMENTATIONS = ["naive", "tiled", "sdpa"]
VOCAB = 61
LLAMA3 = RopeConfig("llama3", 8.0, 32)
DYNAMIC = RopeConfig("dynamic", 2.0, 16)


def every_rope(window, head_dim=8):
    """Every method with L = window, and what may be combined with any: {name: RopeConfig}."""
    def config(name, **settings):
        rope = {"rope_type": name, "original_max_position_embeddings": window, **settings}
        return RopeConfig.from_dict(reference.complete(rope, head_dim))
    half = {"partial_rotary_factor": 0.5}
    return {**{name: config(name) for name in METHODS}, "yarn, the paper's ramp": config("yarn", ramp="turns"),
            "dynamic by length alone": config("dynamic", factor=1.0), "dynamic_yarn by length alone": config("dynamic_yarn", factor=1.0),
            "half the pairs": config("proportional", **half), "half the head": config("dynamic", **half),
            "half the head, drope": config("drope", **half), "half the head, clex": config("clex", **half),
            "half the head, xpos": config("xpos", **half),
            "resonance": config("yarn", resonance=True), "resonance, dynamic": config("dynamic", resonance=True),
            "random positions": config("linear", random_positions=100), "random positions, alibi": config("alibi", random_positions=100)}


ROPES = every_rope(12)


def build(seed=0, attention="auto", **changes):
    """A small LLaMA with weights large enough that every part matters to the logits, which are about 1."""
    config = ModelConfig(**{"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": VOCAB, "multiple_of": 16,
                            "max_seq_len": 64, **changes})
    model, generator = LLaMA(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            embedding = name == "tok_embeddings.weight" and not config.tied
            size = 0.5 if name.startswith("clex") else 1.5
            p.copy_(1 + 0.3 * noise if p.dim() == 1 else noise if embedding else size * noise / math.sqrt(p.shape[1]))
    model.attention = attention
    return model


def draw(*shape, seed=0):
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def oracle(model, tokens, positions=None, moved=None):
    """Logits of the float64 model with the same weights, moved by the arrays in `moved`."""
    weights = {name: p.detach().double().numpy() for name, p in model.state_dict().items()}
    weights = {name: w + moved[name] if moved else w for name, w in weights.items()}
    config = {**dataclasses.asdict(model.config), "rope": model.config.rope.to_dict()}
    return reference.forward(weights, config, tokens.numpy(), None if positions is None else positions.numpy())


# --- logits ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [
    {"n_kv_heads": None}, {"n_kv_heads": 2}, {"n_kv_heads": 1}, {"tied": True}, {"norm_eps": 0.3}, {"ffn_dim_multiplier": 1.7},
    {"n_layers": 3, "dim": 24, "n_heads": 2}, {"rope": RopeConfig(rope_theta=500.0)}, {"rope": RopeConfig("linear", 4.0)},
    {"rope": RopeConfig("ntk", 4.0)}, {"rope": DYNAMIC}, {"rope": LLAMA3},
], ids=lambda c: "-".join(f"{name}={getattr(value, 'rope_type', value)}" for name, value in c.items()))
def test_logits_are_the_oracles(changes):
    model, tokens = build(**changes), draw(2, 19)
    expected = oracle(model, tokens)
    for model.attention in ("auto", *IMPLEMENTATIONS):
        logits = model(tokens)
        assert logits.shape == (2, 19, VOCAB) and logits.dtype == torch.float32
        np.testing.assert_allclose(logits.detach(), expected, atol=2e-5, err_msg=model.attention)


@pytest.mark.parametrize("name", ROPES)
def test_logits_are_the_oracles_for_every_method(name):
    model = build(rope=ROPES[name], n_heads=4, n_layers=2)
    tokens = draw(2, 19)
    positions = position_ids(ROPES[name], 19)
    expected = oracle(model, tokens, positions)
    for model.attention in IMPLEMENTATIONS:
        np.testing.assert_allclose(model(tokens).detach(), expected, atol=5e-5, err_msg=model.attention)
    if not name.startswith("default"):
        model.config.rope = RopeConfig()
        assert np.abs(model(tokens).detach().numpy() - expected).max() > 1e-3, "this method has to matter for this test to mean something"


def test_a_clex_model_with_another_method_set_is_that_method():
    model, tokens = build(rope=ROPES["clex"]), draw(1, 30)
    model.config.rope = RopeConfig("linear", 4.0)
    np.testing.assert_allclose(model(tokens).detach(), oracle(model, tokens), atol=2e-5)


def test_logits_with_alibi_and_xpos_at_other_positions():
    for rope in (ROPES["alibi"], ROPES["xpos"]):
        model, tokens = build(rope=rope), draw(2, 11)
        positions = torch.stack([torch.arange(11), torch.arange(11) * 3 + 40])
        np.testing.assert_allclose(model(tokens, positions).detach(), oracle(model, tokens, positions), atol=2e-5)


@pytest.mark.parametrize("positions", [
    torch.arange(7, 18), torch.arange(11) * 5, torch.stack([torch.arange(11), torch.arange(11) * 3 + 40]),
], ids=["offset", "gaps", "by row"])
def test_logits_at_other_positions(positions):
    model, tokens = build(rope=RopeConfig("linear", 2.0)), draw(2, 11)
    np.testing.assert_allclose(model(tokens, positions).detach(), oracle(model, tokens, positions), atol=2e-5)


def test_the_rope_of_a_model_can_be_changed_at_any_time():
    model, tokens = build(), draw(1, 19)
    before = model(tokens)
    model.config.rope = RopeConfig("linear", 4.0)
    np.testing.assert_allclose(model(tokens).detach(), oracle(model, tokens), atol=2e-5)
    assert (model(tokens) - before).abs().max() > 0.01


@pytest.mark.parametrize("name", ROPES)
def test_a_long_input_leaves_nothing_behind_for_a_short_one(name):
    model, tokens = build(rope=ROPES[name]), draw(1, 40)
    fresh = build(rope=ROPES[name])(tokens[:, :10])
    long = model(tokens)
    assert torch.equal(model(tokens[:, :10]), fresh)
    assert torch.equal(generate(model, tokens[:, :10], 5), generate(build(rope=ROPES[name]), tokens[:, :10], 5))
    assert torch.equal(model(tokens), long)


@pytest.mark.parametrize("name", ["default", "alibi", "xpos", "nope"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_last_logits_are_those_of_the_whole(implementation, name):
    """... although the last layer computes no others."""
    model, tokens = build(rope=RopeConfig(rope_type=name), attention=implementation), draw(2, 9)
    for last in (1, 4, 9):
        torch.testing.assert_close(model(tokens, last=last), model(tokens)[:, -last:])
    cache = KVCache(model.config, 2, 9)
    both = torch.cat([model(tokens[:, :6], cache=cache, last=2), model(tokens[:, 6:], cache=cache, last=2)], dim=1)
    torch.testing.assert_close(both, model(tokens)[:, [4, 5, 7, 8]])


@pytest.mark.parametrize("last", [0, -2, 10])
def test_no_token_and_more_than_there_are_cannot_be_the_last(last):
    with pytest.raises(AssertionError, match="last"):
        build()(draw(2, 9), last=last)


def test_the_last_layer_computes_only_what_is_wanted():
    model, widths = build(), []
    for layer in model.layers:
        layer.feed_forward.register_forward_hook(lambda module, inputs, out: widths.append(out.shape[1]))
    model(draw(2, 9), last=2)
    assert widths == [9] * (len(model.layers) - 1) + [2]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_causality(implementation):
    model, tokens = build(attention=implementation), draw(1, 20)
    changed = tokens.clone()
    changed[0, 12] = (tokens[0, 12] + 1) % VOCAB
    difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert difference[:12].max() == 0 and difference[12:].min() > 1e-4


def test_a_bfloat16_model_has_float32_positions():
    model, tokens = build(rope=RopeConfig(rope_theta=1e4)).bfloat16(), draw(1, 24)
    with torch.no_grad():
        here, far = model(tokens), model(tokens, torch.arange(24) + 30000)
    # all that a shift may change is how q and k are rounded to bfloat16; positions in bfloat16 would be 128 apart at 30,000
    assert (here - far).square().mean().sqrt() < 0.03 * here.std()


@pytest.mark.parametrize("rope, assign", [(RopeConfig("linear", 4.0), False), (ROPES["clex"], False), *((r, True) for r in ROPES.values())],
                         ids=lambda value: value.rope_type if isinstance(value, RopeConfig) else str(value))
def test_a_model_made_on_the_meta_device_has_the_right_frequencies(rope, assign):
    source = build(rope=rope, n_layers=1)
    with torch.device("meta"):
        model = LLaMA(source.config)
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(model(draw(1, 9)), source(draw(1, 9)))


def test_tensor_names_are_metas():
    per_layer = ["attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
                 "attention_norm", "ffn_norm"]
    names = {f"layers.{n}.{name}.weight" for n in range(2) for name in per_layer} | {"tok_embeddings.weight", "norm.weight"}
    assert set(build(tied=True).state_dict()) == names
    assert set(build().state_dict()) == names | {"output.weight"}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_to_bfloat16(implementation):
    model, tokens = build(attention=implementation), draw(2, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        logits = model(tokens)
    loss.backward()
    assert loss.dtype == logits.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    exact = model.loss(tokens[:, :-1], tokens[:, 1:])
    exact.backward()
    assert 0 < abs(loss - exact) < 0.03 * exact
    assert torch.cosine_similarity(gradients, torch.cat([p.grad.flatten() for p in model.parameters()]), dim=0) > 0.99


# --- cache -----------------------------------------------------------------------------------------------------------

def cached(model, tokens, sizes, positions=None, dtype=torch.float32):
    """Logits of tokens [B,T] fed in pieces of the given sizes."""
    cache, out, start = KVCache(model.config, len(tokens), tokens.shape[1] + 3, "cpu", dtype), [], 0
    for size in sizes:
        piece = slice(start, start + size)
        out.append(model(tokens[:, piece], None if positions is None else positions[..., piece], cache=cache))
        start += size
    assert start == tokens.shape[1]
    return torch.cat(out, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rope", [RopeConfig(), LLAMA3], ids=lambda r: r.rope_type)
@pytest.mark.parametrize("sizes", [[12] + [1] * 8, [1] * 20, [5, 5, 5, 5], [1, 7, 2, 10], [20]],
                         ids=["12 then one by one", "one by one", "chunks", "uneven", "at once"])
def test_prefill_and_decode_are_the_whole(implementation, rope, sizes):
    model, tokens = build(attention=implementation, rope=rope), draw(2, 20)
    torch.testing.assert_close(cached(model, tokens, sizes), model(tokens), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("rope", [RopeConfig(), DYNAMIC], ids=lambda r: r.rope_type)
@pytest.mark.parametrize("positions", [
    torch.arange(20) * 3 + 5, torch.stack([torch.arange(20), torch.arange(20) + 100]),
], ids=["gaps", "by row"])
def test_a_cache_at_other_positions(rope, positions):
    model, tokens = build(rope=rope), draw(2, 20)
    got, whole = cached(model, tokens, [11, 4, 5], positions), model(tokens, positions)
    torch.testing.assert_close(got[:, -5:], whole[:, -5:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("n_layers", [1, 3])
@pytest.mark.parametrize("sizes", [[12] + [1] * 20, [5, 5, 5, 5, 5, 7], [20, 1, 1, 10]],
                         ids=["12 then one by one", "chunks", "across at once"])
def test_a_cache_across_the_window_where_frequencies_grow_with_the_length(implementation, n_layers, sizes):
    """Dynamic NTK, L = 16: what each piece answers last is what the model answers to the whole text up to there."""
    model, tokens = build(attention=implementation, rope=DYNAMIC, n_layers=n_layers), draw(2, 32)
    got = cached(model, tokens, sizes)
    for end in np.cumsum(sizes):
        torch.testing.assert_close(got[:, end - 1], model(tokens[:, :end])[:, -1], atol=1e-5, rtol=1e-5, msg=lambda m: f"at {end}: {m}")


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ROPES)
def test_a_cache_across_the_window_is_the_whole_for_every_method(name, implementation):
    """L = 12, 22 tokens: token by token, in chunks, a prefill and then tokens. What each piece answers last is what the model answers to
    the whole text up to there; where nothing depends on the length, all that it answers is."""
    model, tokens = build(attention=implementation, rope=ROPES[name]), draw(2, 22)
    grows, close = depends_on_length(ROPES[name]), {"atol": 1e-5, "rtol": 1e-5}
    whole = model(tokens)
    for sizes in ([1] * 22, [7, 4, 9, 2], [10, *[1] * 5, 7]):
        got = cached(model, tokens, sizes)
        torch.testing.assert_close(got[:, -1], whole[:, -1], **close)
        if not grows:
            torch.testing.assert_close(got, whole, **close)
        elif len(sizes) < 22:
            for end in np.cumsum(sizes)[::3]:
                torch.testing.assert_close(got[:, end - 1], model(tokens[:, :end])[:, -1], **close, msg=lambda m: f"at {end}: {m}")


def test_methods_that_grow_are_in_that_test():
    assert {"dynamic", "dynamic_yarn", "longrope", "clex", "drope"} <= {name for name, rope in ROPES.items() if depends_on_length(rope)}
    longrope = ROPES["longrope"].options
    assert longrope["short_factor"] != longrope["long_factor"]


class StaleCache(KVCache):
    """What most code has: keys are rotated once, by the angles of the moment, and kept."""

    def outdated(self, *args):
        super().outdated(*args)
        return False


@torch.no_grad()
@pytest.mark.parametrize("name, harmed", [
    ("dynamic", True), ("dynamic_yarn by length alone", True), ("longrope", True), ("clex", True), ("drope", True),
    ("linear", False), ("yarn", False), ("dprope", False)])
def test_a_cache_of_keys_rotated_once_gives_other_answers(monkeypatch, name, harmed):
    model, tokens = build(rope=ROPES[name]), draw(2, 30)
    whole = model(tokens)[:, -1]
    assert (cached(model, tokens, [1] * 30)[:, -1] - whole).abs().max() < 1e-5
    monkeypatch.setitem(globals(), "KVCache", StaleCache)
    stale = (cached(model, tokens, [1] * 30)[:, -1] - whole).abs().max()
    assert stale > 0.01 if harmed else stale < 1e-5
    # in one piece beyond the window nothing is stale, which is why a prompt is answered well and its continuation is not
    assert (cached(model, tokens, [30])[:, -1] - whole).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["dynamic", "clex", "alibi", "random positions"])
def test_a_cache_in_bfloat16_across_the_window(name):
    model, tokens = build(rope=ROPES[name]).bfloat16(), draw(2, 30)
    got, whole = cached(model, tokens, [10] + [1] * 20, dtype=torch.bfloat16), model(tokens)
    assert (got[:, -1] - whole[:, -1]).abs().max() < 0.1 * whole.std()


@torch.no_grad()
def test_a_full_cache_says_so():
    model = build()
    cache = KVCache(model.config, 1, 8, "cpu", torch.float32)
    model(draw(1, 6), cache=cache)
    with pytest.raises(UserError, match="8 tokens"):
        model(draw(1, 3), cache=cache)


def test_a_cache_keeps_no_graph():
    """Outside no_grad too: a graph that grows with every token is a leak."""
    model, tokens = build(), draw(1, 8)
    cache = KVCache(model.config, 1, 8, "cpu", torch.float32)
    for piece in tokens.split(4, dim=1):
        model(piece, cache=cache)
    assert not cache.k.requires_grad and not cache.v.requires_grad


# --- loss ------------------------------------------------------------------------------------------------------------

def targets_with_gaps(B, T):
    targets = draw(B, T, seed=1)
    targets[0, 3:7] = -100
    targets[-1, -2] = -100
    return targets


@pytest.mark.parametrize("tied", [False, True])
def test_loss_is_the_oracles_cross_entropy(tied):
    model, tokens, targets = build(tied=tied), draw(2, 13), targets_with_gaps(2, 13)
    expected = reference.cross_entropy(oracle(model, tokens), targets.numpy())
    assert model.loss(tokens, targets).item() == pytest.approx(expected, abs=1e-5)
    positions = torch.arange(13) * 2 + 3
    expected = reference.cross_entropy(oracle(model, tokens, positions), targets.numpy())
    assert model.loss(tokens, targets, positions).item() == pytest.approx(expected, abs=1e-5)


def test_a_row_without_targets_costs_nothing():
    model, tokens = build(), draw(1, 5)
    loss = model.loss(tokens, torch.full((1, 5), -100))
    loss.backward()
    assert loss == 0 and all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def gradients(model, tokens, targets):
    model.zero_grad(set_to_none=True)
    loss = model.loss(tokens, targets)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens_a_chunk", [1, 5, 26, 27])
def test_a_loss_in_chunks_is_the_same_loss(monkeypatch, tokens_a_chunk, tied):
    model, tokens, targets = build(tied=tied), draw(2, 13), targets_with_gaps(2, 13)
    whole = gradients(model, tokens, targets)
    monkeypatch.setattr(llama, "LOSS_CHUNK", tokens_a_chunk * VOCAB)
    torch.testing.assert_close(gradients(model, tokens, targets), whole, atol=1e-5, rtol=1e-5)


def test_a_loss_in_chunks_never_holds_all_logits(monkeypatch):
    V, T = 4096, 512
    model, tokens = build(vocab_size=V, dim=8, n_heads=1, n_kv_heads=1, n_layers=1), draw(1, T)
    measured = []
    for chunk in (T * V, 32 * V):
        monkeypatch.setattr(llama, "LOSS_CHUNK", chunk)
        with Meter() as meter:
            model.loss(tokens, tokens).backward()
        measured.append(meter)
    whole, chunked = measured
    assert whole.largest >= 4 * T * V  # the meter sees them when they are there
    assert chunked.largest <= 4 * 32 * V + 4 * T * T and chunked.peak < 4 * T * V / 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_recomputing_blocks_changes_memory_but_not_gradients(implementation):
    model, tokens, targets = build(attention=implementation, n_layers=4), draw(2, 64), targets_with_gaps(2, 64)
    loss, whole = gradients(model, tokens, targets)
    model.recompute = True
    again, recomputed = gradients(model, tokens, targets)
    assert loss == again and all(torch.equal(a, b) for a, b in zip(whole, recomputed))
    peaks = []
    for model.recompute in (False, True):
        with Meter() as meter:
            gradients(model, tokens, targets)
        peaks.append(meter.peak)
    assert peaks[1] < 0.6 * peaks[0]


@pytest.mark.parametrize("name", [
    "nope", "alibi", "xpos", "clex", "drope", "random positions", "random positions, alibi", "half the head, clex"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_baseline_trains_with_recompute(name, implementation):
    """From fresh weights, as train.py has them: all parameters get the gradients that they get without recompute."""
    model = build(attention=implementation, rope=ROPES[name])
    tokens, targets = draw(2, 24), targets_with_gaps(2, 24)                                # twice the window
    loss, whole = gradients(model, tokens, targets)
    model.recompute = True
    again, recomputed = gradients(model, tokens, targets)
    assert loss.isfinite() and loss == again and all(torch.equal(a, b) for a, b in zip(whole, recomputed, strict=True))
    for parameter, gradient in zip(model.named_parameters(), whole, strict=True):
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), parameter[0]
    optimizer, start = torch.optim.SGD(model.parameters(), lr=1e-3), loss
    for _ in range(3):
        loss, _ = gradients(model, tokens, targets)
        optimizer.step()
    assert model.loss(tokens, targets) < start


@pytest.mark.parametrize("tied, rope", [(False, None), (True, None), (False, "clex"), (False, "alibi"), (True, "xpos")])
def test_the_gradient_of_the_loss_is_the_oracles_difference(tied, rope):
    """A derivative along a random direction in all weights, against the float64 model on both sides."""
    model = build(tied=tied, rope=ROPES[rope] if rope != "clex" else every_rope(4)["clex"]) if rope else build(tied=tied)
    tokens, targets = draw(2, 9), targets_with_gaps(2, 9)
    _, gradient = gradients(model, tokens, targets)
    generator = torch.Generator().manual_seed(3)
    direction = {name: torch.randn(p.shape, generator=generator).double().numpy() for name, p in model.named_parameters()}
    losses = [reference.cross_entropy(oracle(model, tokens, moved={name: step * d for name, d in direction.items()}), targets.numpy())
              for step in (1e-5, -1e-5)]
    slope = sum((g.double().numpy() * d).sum() for g, d in zip(gradient, direction.values()))
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_training_step_compiles_as_one_graph(implementation):
    """fullgraph=True refuses graph breaks; the backend "eager" needs no compiler."""
    model = build(attention=implementation, rope=RopeConfig("ntk", 4.0), n_layers=1)
    tokens, targets = draw(2, 9), targets_with_gaps(2, 9)
    torch._dynamo.reset()
    compiled = torch.compile(model.loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, targets), model.loss(tokens, targets))


# --- generation ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def greedy(model, tokens, new):
    """The definition: the whole text anew for every token."""
    for _ in range(new):
        tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tokens


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rope", [
    RopeConfig(), DYNAMIC, *(ROPES[name] for name in ("longrope", "clex", "alibi", "xpos", "random positions")),
], ids=lambda r: r.rope_type)
def test_greedy_generation_is_the_argmax_of_the_whole(implementation, rope):
    model, prompt = build(attention=implementation, rope=rope), draw(3, 7)
    assert torch.equal(generate(model, prompt, 13), greedy(model, prompt, 13))


def test_generation_is_a_function_of_the_seed_and_leaves_the_global_one_alone():
    model, prompt = build(), draw(2, 5)
    state = torch.get_rng_state()
    first = generate(model, prompt, 20, temperature=1.0, seed=1)
    torch.manual_seed(123)
    assert torch.equal(generate(model, prompt, 20, temperature=1.0, seed=1), first)
    assert not torch.equal(generate(model, prompt, 20, temperature=1.0, seed=2), first)
    torch.set_rng_state(state)
    generate(model, prompt, 3, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (2, 25) and torch.equal(first[:, :5], prompt)


@pytest.mark.parametrize("sampling", [
    {"temperature": 1e-4}, {"temperature": 1.0, "top_p": 1e-6}, {"temperature": 5.0, "top_p": 0.0},
], ids=str)
def test_limits_of_sampling_are_greedy(sampling):
    model, prompt = build(), draw(3, 5)
    assert torch.equal(generate(model, prompt, 15, **sampling), greedy(model, prompt, 15))


def test_temperature_and_top_p_shape_the_distribution():
    probabilities = torch.tensor([0.5, 0.1, 0.25, 0.15])
    class Constant(torch.nn.Module):  # a model whose next-token distribution is known
        config, tok_embeddings = build().config, torch.nn.Embedding(1, 1)
        def forward(self, tokens, positions=None, cache=None, last=None):
            return probabilities.log().expand(len(tokens), 1, 4)

    def frequencies(**sampling):
        new = generate(Constant(), torch.zeros(400, 1, dtype=torch.long), 10, **sampling)[:, 1:]
        return torch.bincount(new.flatten(), minlength=4) / new.numel()

    close = {"atol": 0.03, "rtol": 0}
    torch.testing.assert_close(frequencies(temperature=1.0), probabilities, **close)
    torch.testing.assert_close(frequencies(temperature=0.5), probabilities**2 / (probabilities**2).sum(), **close)
    # the smallest set that reaches 0.7 is {0, 2} (0.75); 0.76 needs token 3 as well; 1 keeps all
    torch.testing.assert_close(frequencies(temperature=1.0, top_p=0.7), torch.tensor([2 / 3, 0, 1 / 3, 0]), **close)
    torch.testing.assert_close(frequencies(temperature=1.0, top_p=0.76), torch.tensor([0.5, 0, 0.25, 0.15]) / 0.9, **close)
    assert frequencies(temperature=1.0, top_p=0.7)[[1, 3]].sum() == 0


def test_stop_tokens_end_rows():
    model, prompt = build(), draw(2, 5)
    free = generate(model, prompt, 12)
    row = free[0, 5:].tolist()
    at = next(i for i, token in enumerate(row) if i >= 2 and token not in row[:i] and token not in free[1, 5:].tolist())
    stopped = generate(model, prompt, 12, stop=(row[at],))
    assert torch.equal(stopped[1], free[1]) and torch.equal(stopped[0, :5 + at + 1], free[0, :5 + at + 1])
    assert (stopped[0, 5 + at:] == row[at]).all()                       # the row that is done repeats its stop token
    other = free[1, 5].item()                                           # the other row stops at once
    both = generate(model, prompt, 12, stop=(row[at], other))
    end = min(i for i, token in enumerate(row) if token in (row[at], other))
    assert both.shape[1] == 5 + end + 1                                 # when all rows are done, generation ends
    assert generate(model, prompt, 0).shape == (2, 5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["default", "dynamic", "dynamic_yarn", "clex", "alibi", "xpos", "random positions"])
def test_prompts_of_different_lengths_continue_as_each_alone(implementation, name):
    """L is 12: the rows end before, at and after it. Behind its prompt a row holds another token each time, which nobody may read."""
    model, prompt, lengths = build(attention=implementation, rope=ROPES[name]), draw(4, 17), [5, 12, 17, 9]
    alone = [generate(model, prompt[b:b + 1, :n], 8)[0] for b, n in enumerate(lengths)]
    for filling in (0, VOCAB - 1):
        padded = torch.stack([torch.where(torch.arange(17) < n, row, filling) for row, n in zip(prompt, lengths)])
        together = generate(model, padded, 8, lengths=torch.tensor(lengths))
        assert together.shape == (4, 17 + 8)
        for row, n, expected in zip(together, lengths, alone):
            assert torch.equal(row[:n + 8], expected) and (row[n + 8:] == expected[-1]).all()
    assert len({tuple(row[-8:].tolist()) for row in alone}) == 4, "the rows have to differ, or the test says nothing"
    assert torch.equal(generate(model, prompt, 8, lengths=[17] * 4), generate(model, prompt, 8))


def test_stop_tokens_end_rows_of_different_lengths():
    model, prompt, lengths = build(), draw(3, 11), [4, 11, 7]
    alone = [generate(model, prompt[b:b + 1, :n], 10)[0] for b, n in enumerate(lengths)]
    stop = (alone[0][4 + 2].item(), alone[1][11 + 3].item(), alone[2][7].item())
    prompt[1, 6] = stop[0]                                              # a stop token within a prompt stops nothing
    alone = [generate(model, prompt[b:b + 1, :n], 10, stop=stop)[0] for b, n in enumerate(lengths)]
    together = generate(model, prompt, 10, lengths=lengths, stop=stop)
    assert any(len(a) < n + 10 for a, n in zip(alone, lengths))
    for row, expected in zip(together, alone):
        assert torch.equal(row[:len(expected)], expected) and (row[len(expected):] == expected[-1]).all()
    assert together.shape[1] == max(map(len, alone)), "when all rows are done, generation ends"


@pytest.mark.parametrize("lengths, words", [([3, 0], "empty"), ([3, 6], "rows of 5")])
def test_lengths_that_no_row_has_are_refused(lengths, words):
    with pytest.raises(UserError, match=words):
        generate(build(), draw(2, 5), 3, lengths=lengths)


def test_no_new_tokens_are_none_for_any_length():
    prompt = draw(2, 5)
    text = generate(build(), prompt, 0, lengths=[5, 3])
    assert torch.equal(text[0], prompt[0]) and torch.equal(text[1, :3], prompt[1, :3]) and (text[1, 3:] == prompt[1, 2]).all()


def test_an_empty_prompt_is_refused():
    with pytest.raises(UserError, match="prompt"):
        generate(build(), draw(1, 0), 3)


# --- initial values and sizes ----------------------------------------------------------------------------------------

def test_initial_values():
    torch.manual_seed(0)
    n_layers = 8
    model = LLaMA(ModelConfig(dim=128, n_layers=n_layers, n_heads=4, vocab_size=256, multiple_of=32))
    for layer in model.layers:
        a, f = layer.attention, layer.feed_forward
        for module in (a.wq, a.wk, a.wv, f.w1, f.w3):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.03)
        for module in (a.wo, f.w2):  # what writes into the residual stream
            assert module.weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * n_layers), rel=0.03)
        assert (layer.attention_norm.weight == 1).all() and (layer.ffn_norm.weight == 1).all()
    assert model.tok_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert model.output.weight.std().item() == pytest.approx(0.02, rel=0.03)
    tokens = draw(2, 30)
    assert model.loss(tokens, draw(2, 30, seed=1)).item() == pytest.approx(math.log(256), abs=0.1)  # knows nothing yet


KNOWN = {  # parameters (the sum over the published checkpoint's tensors), feed-forward width
    "LLaMA 7B": (dict(dim=4096, n_layers=32, n_heads=32), 6_738_415_616, 11008),
    "LLaMA-2 70B": (dict(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3),
                    68_976_648_192, 28672),
    "Llama-3 8B": (dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, multiple_of=1024, ffn_dim_multiplier=1.3, vocab_size=128256),
                   8_030_261_248, 14336),
    "Llama-3.2 1B": (dict(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, ffn_dim_multiplier=1.5, vocab_size=128256, tied=True),
                     1_235_814_400, 8192),
}


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_of_known_models(name):
    changes, parameters, ffn_dim = KNOWN[name]
    config = ModelConfig(**changes)
    with torch.device("meta"):
        model = LLaMA(config)
    assert config.parameters() == sum(p.numel() for p in model.parameters()) == parameters
    assert config.ffn_dim == model.layers[0].feed_forward.w1.out_features == ffn_dim


@pytest.mark.parametrize("dim, multiple_of, multiplier", [
    (5120, 256, None), (6656, 256, None), (8192, 256, None), (128, 32, None), (96, 32, 1.3), (6, 1, 0.7),
])
def test_the_width_rule(dim, multiple_of, multiplier):
    config = ModelConfig(dim=dim, n_heads=1, multiple_of=multiple_of, ffn_dim_multiplier=multiplier)
    assert config.ffn_dim == reference.ffn_width(dim, multiple_of, multiplier)


def test_the_oracles_width_rule_on_known_models():
    assert [reference.ffn_width(dim, 256) for dim in (4096, 5120, 6656, 8192)] == [11008, 13824, 17920, 22016]
    assert reference.ffn_width(8192, 4096, 1.3) == 28672 and reference.ffn_width(4096, 1024, 1.3) == 14336


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"n_kv_heads": 1, "n_layers": 3}])
def test_flops_are_what_a_counter_counts(changes):
    B, T = 2, 24
    model = build(attention="naive", **changes)
    c, tokens = model.config, draw(B, T)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    above = 4 * c.n_layers * c.dim * (T - 1) / 2  # naive attention also multiplies what the mask throws away
    assert counter.get_total_flops() == B * T * (c.flops_per_token(T, training=False) + above)
    assert c.flops_per_token(T) == pytest.approx(3 * c.flops_per_token(T, training=False), abs=3)


@pytest.mark.parametrize("attention, recompute", [("tiled", False), ("sdpa", False), ("naive", False), ("tiled", True)])
def test_the_estimate_of_memory_is_near_the_measured_peak(attention, recompute):
    rows, T = 1, 512
    model = build(attention=attention, dim=64, n_layers=6, n_kv_heads=4, multiple_of=32, vocab_size=128)
    model.recompute, tokens = recompute, draw(rows, T)
    with Meter() as meter:  # sees activations and gradients; weights and moments are the other 12 bytes a parameter
        model.loss(tokens, tokens).backward()
    measured = meter.peak + 12 * model.config.parameters()
    estimate = model.config.training_bytes(rows, T, recompute=recompute, attention=attention)
    assert 1 / 1.3 < estimate / measured < 1.3


# --- what a user may write -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, words", [
    ({"n_heads": 5}, ["dim", "n_heads"]), ({"n_heads": 32}, ["head_dim"]), ({"n_kv_heads": 3}, ["n_kv_heads"]),
    ({"vocab_size": -1}, ["vocab_size"]),
    ({"n_layers": 0}, ["n_layers"]), ({"max_seq_len": 2.5}, ["max_seq_len"]), ({"dim": "32"}, ["dim"]),
], ids=str)
def test_a_model_that_cannot_be_is_one_line(wrong, words):
    with pytest.raises(UserError) as error:
        ModelConfig(**{"dim": 32, "n_heads": 4, "n_layers": 1, "vocab_size": VOCAB, **wrong})
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)


def test_an_unknown_attention_names_the_choices():
    with pytest.raises(UserError, match="auto.*naive.*tiled.*sdpa"):
        build(attention="flash")(draw(1, 3))
