"""model.py against the float64 oracle, and what has to hold of any LLaMA: cache, loss, initial
values, sizes."""
import dataclasses
import math

import numpy as np
import pytest
import reference
import torch
from cases import (DYNAMIC, IMPLEMENTATIONS, LLAMA3, ROPES, VOCAB, build, draw_tokens as draw,
                   every_rope, implementations_for)
from common.meter import Meter
from torch.utils.flop_counter import FlopCounterMode

import model as llama
from common.checks import meta_ffn_dim
from common.errors import UserError
from common.kv_cache import KVCache
from methods import RopeConfig, depends_on_length, position_ids
from model import LLaMA, ModelConfig, generate
from weights.size import flops_per_token, parameter_count


def oracle(model, tokens, positions=None, moved=None):
    """Logits of the float64 model with the same weights, moved by the arrays in `moved`."""
    weights = {name: p.detach().double().numpy() for name, p in model.state_dict().items()}
    if moved:
        weights = {name: w + moved[name] for name, w in weights.items()}
    config = {**dataclasses.asdict(model.config), "rope": model.config.rope.to_dict()}
    positions = None if positions is None else positions.numpy()
    return reference.forward(weights, config, tokens.numpy(), positions)


# ---- Logits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    {"n_kv_heads": None}, {"n_kv_heads": 2}, {"n_kv_heads": 1}, {"tied": True}, {"norm_eps": 0.3},
    {"ffn_dim_multiplier": 1.7}, {"n_layers": 3, "dim": 24, "n_heads": 2},
    {"rope": RopeConfig(rope_theta=500.0)}, {"rope": RopeConfig("linear", 4.0)},
    {"rope": RopeConfig("ntk", 4.0)}, {"rope": DYNAMIC}, {"rope": LLAMA3},
], ids=lambda c: "-".join(f"{name}={getattr(value, 'rope_type', value)}"
                          for name, value in c.items()))
def test_logits_are_the_oracles(changes):
    model, tokens = build(**changes), draw(2, 19)
    expected = oracle(model, tokens)
    for implementation in ("auto", *IMPLEMENTATIONS):
        model.attention = implementation
        logits = model(tokens)
        assert logits.shape == (2, 19, VOCAB) and logits.dtype == torch.float32
        np.testing.assert_allclose(logits.detach(), expected, atol=2e-5, err_msg=implementation)


@pytest.mark.parametrize("name", ROPES)
def test_logits_are_the_oracles_for_every_method(name):
    model, tokens = build(rope=ROPES[name]), draw(2, 19)
    expected = oracle(model, tokens, position_ids(ROPES[name], 19))
    for implementation in implementations_for(ROPES[name]):
        model.attention = implementation
        np.testing.assert_allclose(model(tokens).detach(), expected, atol=5e-5,
                                   err_msg=implementation)
    if name != "default":  # the method has to matter, or the test above would say nothing
        model.config.rope = RopeConfig()
        assert np.abs(model(tokens).detach().numpy() - expected).max() > 1e-3


def test_a_clex_model_with_another_method_set_is_that_method():
    model, tokens = build(rope=ROPES["clex"]), draw(1, 30)
    model.config.rope = RopeConfig("linear", 4.0)
    np.testing.assert_allclose(model(tokens).detach(), oracle(model, tokens), atol=2e-5)


@pytest.mark.parametrize("name", ["alibi", "xpos"])
def test_logits_with_alibi_and_xpos_at_other_positions(name):
    model, tokens = build(rope=ROPES[name]), draw(2, 11)
    positions = torch.stack([torch.arange(11), torch.arange(11) * 3 + 40])
    expected = oracle(model, tokens, positions)
    np.testing.assert_allclose(model(tokens, positions).detach(), expected, atol=2e-5)


@pytest.mark.parametrize("positions", [
    torch.arange(7, 18), torch.arange(11) * 5,
    torch.stack([torch.arange(11), torch.arange(11) * 3 + 40]),
], ids=["offset", "gaps", "by row"])
def test_logits_at_other_positions(positions):
    model, tokens = build(rope=RopeConfig("linear", 2.0)), draw(2, 11)
    expected = oracle(model, tokens, positions)
    np.testing.assert_allclose(model(tokens, positions).detach(), expected, atol=2e-5)


def test_the_rope_of_a_model_can_be_changed_at_any_time():
    model, tokens = build(), draw(1, 19)
    before = model(tokens)
    model.config.rope = RopeConfig("linear", 4.0)
    np.testing.assert_allclose(model(tokens).detach(), oracle(model, tokens), atol=2e-5)
    assert (model(tokens) - before).abs().max() > 0.01


@pytest.mark.parametrize("name", ROPES)
def test_a_long_input_leaves_nothing_behind_for_a_short_one(name):
    model, tokens = build(rope=ROPES[name]), draw(1, 40)
    short = tokens[:, :10]
    fresh = build(rope=ROPES[name])(short)
    long = model(tokens)
    assert torch.equal(model(short), fresh)
    continued = generate(build(rope=ROPES[name]), short, 5)
    assert torch.equal(generate(model, short, 5), continued)
    assert torch.equal(model(tokens), long)


@pytest.mark.parametrize("name", ["default", "alibi", "xpos", "nope"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_last_logits_are_those_of_the_whole(implementation, name):
    """... although the last layer computes no others."""
    model = build(rope=RopeConfig(rope_type=name), attention=implementation)
    tokens = draw(2, 9)
    whole = model(tokens)
    for last in (1, 4, 9):
        torch.testing.assert_close(model(tokens, last=last), whole[:, -last:])
    cache = KVCache(model.config, 2, 9)
    begin = model(tokens[:, :6], cache=cache, last=2)
    end = model(tokens[:, 6:], cache=cache, last=2)
    torch.testing.assert_close(torch.cat([begin, end], dim=1), whole[:, [4, 5, 7, 8]])


@pytest.mark.parametrize("last", [0, -2, 10])
def test_no_token_and_more_than_there_are_cannot_be_the_last(last):
    with pytest.raises(AssertionError, match="last"):
        build()(draw(2, 9), last=last)


def test_the_last_layer_computes_only_what_is_wanted():
    model, widths = build(n_layers=3), []
    for layer in model.layers:
        layer.feed_forward.register_forward_hook(
            lambda module, inputs, out: widths.append(out.shape[1]))
    model(draw(2, 9), last=2)
    assert widths == [9, 9, 2]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_causality(implementation):
    model, tokens = build(attention=implementation), draw(1, 20)
    changed = tokens.clone()
    changed[0, 12] = (tokens[0, 12] + 1) % VOCAB
    difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert difference[:12].max() == 0 and difference[12:].min() > 1e-4


def test_a_bfloat16_model_has_float32_positions():
    """All that a shift may change is how q and k are rounded to bfloat16; positions in bfloat16
    would be 128 apart at 30,000."""
    model, tokens = build(rope=RopeConfig(rope_theta=1e4)).bfloat16(), draw(1, 24)
    with torch.no_grad():
        here, far = model(tokens), model(tokens, torch.arange(24) + 30000)
    assert (here - far).square().mean().sqrt() < 0.03 * here.std()


@pytest.mark.parametrize("rope, assign", [
    (RopeConfig("linear", 4.0), False), (ROPES["clex"], False),
    *((rope, True) for rope in ROPES.values())],
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
    per_layer = ["attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1",
                 "feed_forward.w2", "feed_forward.w3", "attention_norm", "ffn_norm"]
    names = {f"layers.{n}.{name}.weight" for n in range(2) for name in per_layer}
    names |= {"tok_embeddings.weight", "norm.weight"}
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
    for p in model.parameters():
        assert p.grad.dtype == torch.float32 and p.grad.isfinite().all()
    rounded = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    exact_loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    exact_loss.backward()
    exact = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert 0 < abs(loss - exact_loss) < 0.03 * exact_loss
    assert torch.cosine_similarity(rounded, exact, dim=0) > 0.99


# ---- Cache ---------------------------------------------------------------------------------------

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def cached(model, tokens, sizes, positions=None, dtype=torch.float32, cache_class=KVCache):
    """Logits of tokens [B,T] fed in pieces of the given sizes."""
    cache = cache_class(model.config, len(tokens), tokens.shape[1] + 3, "cpu", dtype)
    out, start = [], 0
    for size in sizes:
        piece = slice(start, start + size)
        places = None if positions is None else positions[..., piece]
        out.append(model(tokens[:, piece], places, cache=cache))
        start += size
    assert start == tokens.shape[1]
    return torch.cat(out, dim=1)


def expect_each_piece_to_end_as_the_whole(model, tokens, got, ends):
    """What a piece answers last is what the model answers to the whole text up to there."""
    for end in ends:
        torch.testing.assert_close(got[:, end - 1], model(tokens[:, :end])[:, -1], **CLOSE,
                                   msg=lambda m, end=end: f"at {end}: {m}")


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rope", [RopeConfig(), LLAMA3], ids=lambda r: r.rope_type)
@pytest.mark.parametrize("sizes", [
    [12] + [1] * 8, [1] * 20, [5, 5, 5, 5], [1, 7, 2, 10], [20]],
    ids=["12 then one by one", "one by one", "chunks", "uneven", "at once"])
def test_prefill_and_decode_are_the_whole(implementation, rope, sizes):
    model, tokens = build(attention=implementation, rope=rope), draw(2, 20)
    torch.testing.assert_close(cached(model, tokens, sizes), model(tokens), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("rope", [RopeConfig(), DYNAMIC], ids=lambda r: r.rope_type)
@pytest.mark.parametrize("positions", [
    torch.arange(20) * 3 + 5, torch.stack([torch.arange(20), torch.arange(20) + 100]),
], ids=["gaps", "by row"])
def test_a_cache_at_other_positions(rope, positions):
    model, tokens = build(rope=rope), draw(2, 20)
    got, whole = cached(model, tokens, [11, 4, 5], positions), model(tokens, positions)
    torch.testing.assert_close(got[:, -5:], whole[:, -5:], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("n_layers", [1, 3])
@pytest.mark.parametrize("sizes", [[12] + [1] * 20, [5, 5, 5, 5, 5, 7], [20, 1, 1, 10]],
                         ids=["12 then one by one", "chunks", "across at once"])
def test_a_cache_across_the_window_where_angles_change_with_the_length(implementation, n_layers,
                                                                       sizes):
    """Dynamic NTK, L = 16."""
    model = build(attention=implementation, rope=DYNAMIC, n_layers=n_layers)
    tokens = draw(2, 32)
    got = cached(model, tokens, sizes)
    expect_each_piece_to_end_as_the_whole(model, tokens, got, np.cumsum(sizes))


@torch.no_grad()
@pytest.mark.parametrize("name, implementation", [
    (name, implementation) for name, rope in ROPES.items()
    for implementation in implementations_for(rope)])
def test_a_cache_across_the_window_is_the_whole_for_every_method(name, implementation):
    """L = 12, 22 tokens: token by token, in chunks, a prefill and then tokens. Where nothing
    depends on the length, all answers are those of the whole."""
    model, tokens = build(attention=implementation, rope=ROPES[name]), draw(2, 22)
    whole = model(tokens)
    for sizes in ([1] * 22, [7, 4, 9, 2], [10, *[1] * 5, 7]):
        got = cached(model, tokens, sizes)
        torch.testing.assert_close(got[:, -1], whole[:, -1], **CLOSE)
        if not depends_on_length(ROPES[name]):
            torch.testing.assert_close(got, whole, **CLOSE)
        elif len(sizes) < 22:
            expect_each_piece_to_end_as_the_whole(model, tokens, got, np.cumsum(sizes)[::3])


def test_methods_that_depend_on_the_length_are_in_that_test():
    dependent = {name for name, rope in ROPES.items() if depends_on_length(rope)}
    assert {"dynamic", "dynamic_yarn", "longrope", "clex", "drope"} <= dependent
    longrope = ROPES["longrope"].options
    assert longrope["short_factor"] != longrope["long_factor"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["dynamic", "longrope", "drope", "random positions"])
def test_the_last_answers_of_a_cache_that_is_read_anew(name):
    """The caller asks for the last of its new tokens, not of the text that is read again."""
    model, tokens = build(rope=ROPES[name]), draw(2, 22)
    cache = KVCache(model.config, 2, 22)
    model(tokens[:, :12], cache=cache)
    got = model(tokens[:, 12:], cache=cache, last=3)
    torch.testing.assert_close(got, model(tokens)[:, -3:], **CLOSE)
    assert cache.length == 22


class StaleCache(KVCache):
    """What most code has: keys are rotated once, by the angles of the moment, and kept."""

    def is_stale(self, positions, frequencies, attention_factor):
        return False

    def add_tokens(self, tokens, positions, frequencies, attention_factor):
        self.frequencies = frequencies  # past the assertion that notices it
        super().add_tokens(tokens, positions, frequencies, attention_factor)


@torch.no_grad()
@pytest.mark.parametrize("name, harmed", [
    ("dynamic", True), ("dynamic_yarn by length alone", True), ("longrope", True), ("clex", True),
    ("drope", True), ("linear", False), ("yarn", False), ("dprope", False)])
def test_a_cache_of_keys_rotated_once_gives_other_answers(name, harmed):
    model, tokens = build(rope=ROPES[name]), draw(2, 30)
    whole = model(tokens)[:, -1]

    def error(sizes, cache_class):
        got = cached(model, tokens, sizes, cache_class=cache_class)
        return (got[:, -1] - whole).abs().max()
    assert error([1] * 30, KVCache) < 1e-5
    stale = error([1] * 30, StaleCache)
    assert stale > 0.01 if harmed else stale < 1e-5
    # In one piece beyond the window nothing is stale, which is why a prompt is answered well and
    # its continuation is not.
    assert error([30], StaleCache) < 1e-5


@torch.no_grad()
def test_hidden_states_are_not_taken_from_a_stale_cache():
    """Only forward() reads the text anew; hidden() alone says so instead of computing wrongly."""
    model, tokens = build(rope=DYNAMIC), draw(1, 30)
    cache = KVCache(model.config, 1, 30)
    model.hidden(tokens[:, :10], cache=cache)
    with pytest.raises(AssertionError, match="call forward"):
        model.hidden(tokens[:, 10:], cache=cache)


@torch.no_grad()
def test_a_full_cache_is_kept_although_its_angles_would_change():
    model, tokens = build(rope=DYNAMIC), draw(1, 40)
    cache = KVCache(model.config, 1, 20)
    model(tokens[:, :10], cache=cache)
    with pytest.raises(UserError, match="20 tokens and 40 are needed"):
        model(tokens[:, 10:], cache=cache)
    assert cache.length == 10


@torch.no_grad()
def test_stale_is_whatever_has_other_positions_or_angles():
    cache = KVCache(build().config, 2, 8)
    positions, frequencies = torch.arange(5), torch.tensor([1.0, 0.5])
    cache.add_tokens(draw(2, 5), positions, frequencies, 1.0)
    longer = torch.arange(7)
    by_row = torch.stack([longer, longer])
    for text, other, factor, stale in (
            (longer, frequencies.clone(), 1.0, False),
            (by_row, frequencies, 1.0, False),
            (longer + 1, frequencies, 1.0, True),
            (torch.stack([longer, longer * 2]), frequencies, 1.0, True),
            (torch.tensor([0, 1, 2, 3, 5, 6, 7]), frequencies, 1.0, True),
            (torch.tensor([0, 1, 2, 3, 4, 9, 11]), frequencies, 1.0, False),
            (longer, torch.tensor([1.0, 0.25]), 1.0, True),
            (longer, frequencies, 1.1, True)):
        assert cache.is_stale(text, other, factor) is stale
        # a question changes nothing
        assert cache.is_stale(longer, frequencies, 1.0) is False and cache.length == 5


@torch.no_grad()
def test_a_method_that_does_not_depend_on_the_length_never_asks(monkeypatch):
    """The comparison would wait for the device at every token."""
    def asked(*arguments):
        raise AssertionError("asked whether the cache is stale")
    monkeypatch.setattr(KVCache, "is_stale", asked)
    tokens = draw(2, 22)
    model = build(rope=ROPES["yarn"])
    torch.testing.assert_close(cached(model, tokens, [12] + [1] * 10), model(tokens), **CLOSE)
    with pytest.raises(AssertionError, match="asked"):
        cached(build(rope=ROPES["dynamic"]), tokens, [12] + [1] * 10)


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
    assert cache.length == 6


def test_a_cache_keeps_no_graph():
    """Outside no_grad too: a graph that grows with every token is a leak."""
    model, tokens = build(), draw(1, 8)
    cache = KVCache(model.config, 1, 8, "cpu", torch.float32)
    for piece in tokens.split(4, dim=1):
        model(piece, cache=cache)
    assert not cache.k.requires_grad and not cache.v.requires_grad


# ---- Loss ----------------------------------------------------------------------------------------


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
    assert loss == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def gradients(model, tokens, targets):
    """(loss, the gradient of every parameter)."""
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
    torch.testing.assert_close(gradients(model, tokens, targets), whole, **CLOSE)


def test_a_loss_in_chunks_never_holds_all_logits(monkeypatch):
    V, T = 4096, 512
    model = build(vocab_size=V, dim=8, n_heads=1, n_kv_heads=1, n_layers=1)
    tokens, measured = draw(1, T), []
    for chunk in (T * V, 32 * V):
        monkeypatch.setattr(llama, "LOSS_CHUNK", chunk)
        with Meter() as meter:
            model.loss(tokens, tokens).backward()
        measured.append(meter)
    whole, chunked = measured
    assert whole.largest >= 4 * T * V  # the meter sees them when they are there
    assert chunked.largest <= 4 * 32 * V + 4 * T * T
    assert chunked.peak < 4 * T * V / 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_recomputing_blocks_changes_memory_but_not_gradients(implementation):
    model = build(attention=implementation, n_layers=4)
    tokens, targets = draw(2, 64), targets_with_gaps(2, 64)
    loss, whole = gradients(model, tokens, targets)
    model.recompute = True
    again, recomputed = gradients(model, tokens, targets)
    assert loss == again and all(torch.equal(a, b) for a, b in zip(whole, recomputed))
    peaks = []
    for recompute in (False, True):
        model.recompute = recompute
        with Meter() as meter:
            gradients(model, tokens, targets)
        peaks.append(meter.peak)
    assert peaks[1] < 0.6 * peaks[0]


@pytest.mark.parametrize("name", [
    "nope", "alibi", "xpos", "clex", "drope", "random positions", "random positions, alibi",
    "half the head, clex"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_baseline_trains_with_recompute(name, implementation):
    """From fresh weights, as train.py has them: all parameters get the gradients that they get
    without recompute."""
    model = build(attention=implementation, rope=ROPES[name])
    tokens, targets = draw(2, 24), targets_with_gaps(2, 24)      # twice the window
    loss, whole = gradients(model, tokens, targets)
    model.recompute = True
    again, recomputed = gradients(model, tokens, targets)
    assert loss.isfinite() and loss == again
    assert all(torch.equal(a, b) for a, b in zip(whole, recomputed, strict=True))
    for (parameter, _), gradient in zip(model.named_parameters(), whole, strict=True):
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), parameter
    optimizer, start = torch.optim.SGD(model.parameters(), lr=1e-3), loss
    for _ in range(3):
        gradients(model, tokens, targets)
        optimizer.step()
    assert model.loss(tokens, targets) < start


@pytest.mark.parametrize("tied, name", [(False, None), (True, None), (False, "clex"),
                                        (False, "alibi"), (True, "xpos")])
def test_the_gradient_of_the_loss_is_the_oracles_difference(tied, name):
    """A derivative along a random direction in all weights, against the float64 model on both
    sides."""
    if name is None:
        rope = RopeConfig()
    elif name == "clex":
        rope = every_rope(4)["clex"]                             # beyond the window, where it acts
    else:
        rope = ROPES[name]
    model = build(tied=tied, rope=rope)
    tokens, targets = draw(2, 9), targets_with_gaps(2, 9)
    _, gradient = gradients(model, tokens, targets)
    generator = torch.Generator().manual_seed(3)
    direction = {name: torch.randn(p.shape, generator=generator).double().numpy()
                 for name, p in model.named_parameters()}
    losses = []
    for step in (1e-5, -1e-5):
        moved = {name: step * d for name, d in direction.items()}
        losses.append(reference.cross_entropy(oracle(model, tokens, moved=moved),
                                              targets.numpy()))
    slope = sum((g.double().numpy() * d).sum() for g, d in zip(gradient, direction.values()))
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-4)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_training_step_compiles_as_one_graph(implementation):
    """fullgraph=True refuses graph breaks; the backend "eager" needs no compiler."""
    model = build(attention=implementation, rope=RopeConfig("ntk", 4.0), n_layers=1)
    tokens, targets = draw(2, 9), targets_with_gaps(2, 9)
    torch._dynamo.reset()
    compiled = torch.compile(model.loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, targets), model.loss(tokens, targets))


# ---- Initial values and sizes --------------------------------------------------------------------


def test_initial_values():
    torch.manual_seed(0)
    n_layers = 8
    model = LLaMA(ModelConfig(dim=128, n_layers=n_layers, n_heads=4, vocab_size=256,
                              multiple_of=32))

    def expect_std(module, std):
        assert module.weight.std().item() == pytest.approx(std, rel=0.03)
    for layer in model.layers:
        a, f = layer.attention, layer.feed_forward
        for module in (a.wq, a.wk, a.wv, f.w1, f.w3):
            expect_std(module, 0.02)
        for module in (a.wo, f.w2):  # these write into the residual stream
            expect_std(module, 0.02 / math.sqrt(2 * n_layers))
        assert (layer.attention_norm.weight == 1).all() and (layer.ffn_norm.weight == 1).all()
    expect_std(model.tok_embeddings, 0.02)
    expect_std(model.output, 0.02)
    loss = model.loss(draw(2, 30), draw(2, 30, seed=1)).item()
    assert loss == pytest.approx(math.log(256), abs=0.1)         # it knows nothing yet


KNOWN = {  # parameters (the sum over the published checkpoint's tensors), feed-forward width
    "LLaMA 7B": (dict(dim=4096, n_layers=32, n_heads=32), 6_738_415_616, 11008),
    "LLaMA-2 70B": (dict(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096,
                         ffn_dim_multiplier=1.3), 68_976_648_192, 28672),
    "Llama-3 8B": (dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, multiple_of=1024,
                        ffn_dim_multiplier=1.3, vocab_size=128256), 8_030_261_248, 14336),
    "Llama-3.2 1B": (dict(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, ffn_dim_multiplier=1.5,
                          vocab_size=128256, tied=True), 1_235_814_400, 8192),
}


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_of_known_models(name):
    changes, parameters, ffn_dim = KNOWN[name]
    config = ModelConfig(**changes)
    with torch.device("meta"):
        model = LLaMA(config)
    assert parameter_count(config) == sum(p.numel() for p in model.parameters()) == parameters
    assert config.ffn_dim == model.layers[0].feed_forward.w1.out_features == ffn_dim


@pytest.mark.parametrize("changes", [
    {"tied": True}, {"n_kv_heads": 1}, {"head_dim": 12, "ffn_dim": 50}, {"rope": ROPES["clex"]},
    {"rope": ROPES["half the head, clex"]}], ids=str)
def test_parameters_of_any_model(changes):
    model = build(**changes)
    assert parameter_count(model.config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dim, multiple_of, multiplier", [
    (5120, 256, None), (6656, 256, None), (8192, 256, None), (128, 32, None), (96, 32, 1.3),
    (6, 1, 0.7),
])
def test_the_width_rule(dim, multiple_of, multiplier):
    config = ModelConfig(dim=dim, n_heads=1, multiple_of=multiple_of,
                         ffn_dim_multiplier=multiplier)
    assert config.ffn_dim == meta_ffn_dim(config)
    assert config.ffn_dim == reference.ffn_width(dim, multiple_of, multiplier)


def test_the_oracles_width_rule_on_known_models():
    widths = [reference.ffn_width(dim, 256) for dim in (4096, 5120, 6656, 8192)]
    assert widths == [11008, 13824, 17920, 22016]
    assert reference.ffn_width(8192, 4096, 1.3) == 28672
    assert reference.ffn_width(4096, 1024, 1.3) == 14336


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"n_kv_heads": 1, "n_layers": 3}])
def test_flops_are_what_a_counter_counts(changes):
    B, T = 2, 24
    model = build(attention="naive", **changes)
    config, tokens = model.config, draw(B, T)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    forward = flops_per_token(config, T, training=False)
    # naive attention also multiplies what the mask throws away
    thrown_away = 4 * config.n_layers * config.dim * (T - 1) / 2
    assert counter.get_total_flops() == B * T * (forward + thrown_away)
    assert flops_per_token(config, T) == pytest.approx(3 * forward, abs=3)


@pytest.mark.parametrize("rope, max_seq_len, window", [
    (RopeConfig(), 64, 64), (RopeConfig("linear", 4.0), 64, 16),
    (RopeConfig("yarn", 4.0, 10), 64, 10), (RopeConfig("linear", 3.0), 100, 33)], ids=str)
def test_the_original_window_of_a_model(rope, max_seq_len, window):
    assert ModelConfig(rope=rope, max_seq_len=max_seq_len).original_window == window


# ---- What a user may write -----------------------------------------------------------------------


@pytest.mark.parametrize("wrong, words", [
    ({"n_heads": 5}, ["dim", "n_heads"]), ({"n_heads": 32}, ["head_dim"]),
    ({"n_kv_heads": 3}, ["n_kv_heads"]), ({"vocab_size": -1}, ["vocab_size"]),
    ({"n_layers": 0}, ["n_layers"]), ({"max_seq_len": 2.5}, ["max_seq_len"]),
    ({"dim": "32"}, ["dim"]), ({"n_layers": True}, ["n_layers"]), ({"head_dim": 7}, ["head_dim"]),
    ({"ffn_dim": 0}, ["ffn_dim"]),
], ids=str)
def test_a_model_that_cannot_be_is_one_line(wrong, words):
    with pytest.raises(UserError) as error:
        ModelConfig(**{"dim": 32, "n_heads": 4, "n_layers": 1, "vocab_size": VOCAB, **wrong})
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words)


def test_an_unknown_attention_names_the_choices():
    with pytest.raises(UserError, match="auto.*naive.*tiled.*sdpa"):
        build(attention="flash")(draw(1, 3))
