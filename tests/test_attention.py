"""The three attentions against the float64 oracle (values and all gradients), and the bytes and
products that they cost."""
import math

import numpy as np
import pytest
import reference
import torch
from cases import IMPLEMENTATIONS

from common.errors import UserError
from common.key_range import CausalRange, KeyRange
from common.meter import Meter, peak_bytes
from model import ATTENTION, attention, causal_bias, group_heads, ungroup_heads

BLOCK = 16
LENGTHS = [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(T, S, H=4, K=2, D=8, B=2, seed=0):
    """q, k, v and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, H, T, D), (B, K, S, D), (B, K, S, D), (B, H, T, D)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def compute(implementation, q, k, v, dout, bias=None, blocks=(BLOCK, BLOCK)):
    """(out, dq, dk, dv) of one implementation."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    sizes = {"block_q": blocks[0], "block_k": blocks[1]} if implementation == "tiled" else {}
    out = attention(q, k, v, bias, implementation=implementation, **sizes)
    out.backward(dout)
    return out.detach(), q.grad, k.grad, v.grad


def oracle(q, k, v, dout, bias=None):
    """The same by the oracle, as float64 arrays."""
    q, k, v, dout = (x.double().numpy() for x in (q, k, v, dout))
    bias = None if bias is None else bias.double().numpy()
    gradients = reference.attention_gradients(q, k, v, dout, bias)
    return reference.attention(q, k, v, bias), *gradients


def expect(q, k, v, dout, bias=None, blocks=(BLOCK, BLOCK), implementations=IMPLEMENTATIONS):
    """Forward and all three gradients equal the oracle's to 1e-5."""
    want = oracle(q, k, v, dout, bias)
    for implementation in implementations:
        got = compute(implementation, q, k, v, dout, bias, blocks)
        for name, a, b in zip(("out", "dq", "dk", "dv"), got, want):
            assert a.shape == b.shape, (implementation, name)
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5,
                                       err_msg=f"{implementation}: {name}")


# ---- The oracle itself ---------------------------------------------------------------------------


def test_the_oracles_gradients_are_its_differences():
    q, k, v, dout = (x.double().numpy() for x in draw(3, 5, H=2, K=1, D=4, B=1))
    bias = np.random.default_rng(0).normal(size=(2, 3, 5))
    gradients = reference.attention_gradients(q, k, v, dout, bias)
    for array, gradient in zip((q, k, v), gradients):
        for i in np.ndindex(array.shape):
            kept, values = array[i], []
            for step in (1e-5, -1e-5):
                array[i] = kept + step
                values.append((reference.attention(q, k, v, bias) * dout).sum())
            array[i] = kept
            assert (values[0] - values[1]) / 2e-5 == pytest.approx(gradient[i], abs=1e-8)


def test_the_oracle_on_a_case_done_by_hand():
    q = np.array([[[[2.0], [0.0]]]])                              # T = 2, S = 3, D = 1
    k = np.array([[[[0.0], [math.log(3.0)], [5.0]]]])
    v = np.array([[[[1.0], [2.0], [4.0]]]])
    out = reference.attention(q, k, v)[0, 0, :, 0]
    # query 0 sees keys 0 and 1, scores 0 and ln 9; query 1 sees all three alike
    np.testing.assert_allclose(out, [(1 * 1 + 9 * 2) / 10, (1 + 2 + 4) / 3])


# ---- The parts -----------------------------------------------------------------------------------


def test_query_heads_that_share_a_key_head_become_rows_of_one_matrix():
    x = torch.arange(2 * 6 * 3 * 4).view(2, 6, 3, 4)              # [B, H, T, D], K = 2, G = 3
    grouped = group_heads(x, 2)
    assert grouped.shape == (2, 2, 9, 4)
    for h in range(6):
        first = (h % 3) * 3
        assert torch.equal(grouped[:, h // 3, first:first + 3], x[:, h])
    assert torch.equal(ungroup_heads(grouped, 6), x)


def test_the_causal_bias_by_hand():
    future = -math.inf
    mask = causal_bias(None, 2, 4, torch.device("cpu"))
    assert mask.tolist() == [[0, 0, 0, future], [0, 0, 0, 0]]
    bias = torch.tensor([1.0, 2.0, 4.0, 8.0])                     # less that of the query's own key
    centered = causal_bias(bias, 2, 4, torch.device("cpu"))
    assert centered.tolist() == [[-3, -2, 0, future], [-7, -6, -4, 0]]


@pytest.mark.parametrize("seen", [
    CausalRange(5, 7, torch.device("cpu")),
    KeyRange(torch.zeros(5, dtype=torch.long), torch.arange(3, 8))], ids=["causal", "any"])
def test_the_tiles_by_hand(seen):
    tiles = [(rows, list(keys)) for rows, keys in seen.tiles(2, 3)]
    assert tiles == [(slice(0, 2), [slice(0, 3), slice(3, 4)]),
                     (slice(2, 4), [slice(0, 3), slice(3, 6)]),
                     (slice(4, 5), [slice(0, 3), slice(3, 6), slice(6, 7)])]
    assert seen.masked(slice(0, 2), slice(0, 3)) is None
    assert seen.masked(slice(0, 2), slice(2, 4)).tolist() == [[[False, True], [False, False]]]


def test_tiles_of_keys_that_begin_late_and_differ_from_row_to_row():
    seen = KeyRange(torch.tensor([[0, 0, 2], [3, 4, 5]]), torch.tensor([[0, 1, 3], [4, 5, 6]]))
    assert list(seen.tiles(2, 4)) == [(slice(0, 2), [slice(0, 4), slice(4, 5)]),
                                      (slice(2, 3), [slice(2, 6)])]
    assert seen.masked(slice(0, 2), slice(3, 5))[1].tolist() == [[[False, True], [True, False]]]
    assert seen.masked(slice(0, 2), slice(3, 5))[0].all()
    assert seen.last(1).first.tolist() == [[2], [5]]


def test_the_names_of_the_three():
    assert list(ATTENTION) == IMPLEMENTATIONS


# ---- Values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("H, K", [(2, 2), (4, 2), (6, 1)])
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("past", [0, 5, BLOCK])
def test_values_and_gradients_are_the_oracles(T, past, H, K):
    expect(*draw(T, T + past, H, K))


BIASES = {  # shape of the bias for B = 2, H = 4
    "scalar": lambda T, S: (),
    "S": lambda T, S: (S,),
    "TS": lambda T, S: (T, S),
    "H1S": lambda T, S: (4, 1, S),
    "1HTS": lambda T, S: (1, 4, T, S),
    "B1TS": lambda T, S: (2, 1, T, S),
    "BHTS": lambda T, S: (2, 4, T, S),
    "B111": lambda T, S: (2, 1, 1, 1),
}


@pytest.mark.parametrize("shape", BIASES)
@pytest.mark.parametrize("T, S", [(3 * BLOCK + 5, 3 * BLOCK + 5), (BLOCK + 1, 2 * BLOCK + 4),
                                  (1, 40)])
def test_an_additive_bias_of_any_shape(shape, T, S):
    generator = torch.Generator().manual_seed(1)
    expect(*draw(T, S), 2 * torch.randn(BIASES[shape](T, S), generator=generator))


@pytest.mark.parametrize("blocks", [(8, 32), (32, 8), (1, 7), (5, 1), (1000, 3), (3, 1000),
                                    (1000, 1000)], ids=str)
@pytest.mark.parametrize("T, S", [(37, 37), (20, 50)])
def test_tiles_of_any_size(blocks, T, S):
    bias = torch.randn(4, 1, S, generator=torch.Generator().manual_seed(1))
    expect(*draw(T, S), bias, blocks, ["tiled"])


def padding(T, hidden, value):
    """A bias [2,1,T,T] that hides the first `hidden` keys from every query but those at these
    positions."""
    bias = torch.zeros(2, 1, T, T)
    bias[1, :, hidden:, :hidden] = value
    return bias


@pytest.mark.parametrize("value", [-math.inf, -1e9, torch.finfo(torch.float32).min])
def test_rows_whose_first_tiles_are_fully_masked(value):
    """The running maximum of such a row is still "nothing seen" after two tiles."""
    T, hidden = 3 * BLOCK + 5, 2 * BLOCK + 1
    expect(*draw(T, T), padding(T, hidden, value))


def test_the_saved_logsumexp_is_finite_and_right():
    T, hidden = 3 * BLOCK + 5, 2 * BLOCK + 1
    q, k, v, _ = draw(T, T, H=2, K=2)
    bias = padding(T, hidden, -math.inf)
    out = attention(q.requires_grad_(), k, v, bias, implementation="tiled",
                    block_q=BLOCK, block_k=BLOCK)
    lse, = (x for x in out.grad_fn.saved_tensors if x is not None and x.shape == (2, 2, T))
    future = torch.ones(T, T).triu(1).bool()
    scores = q.detach().double() @ k.double().mT / math.sqrt(8) + bias
    expected = scores.masked_fill(future, -math.inf).logsumexp(-1)
    torch.testing.assert_close(lse.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scores_do_not_overflow(implementation):
    # small integers times 64: scores of +-10^4, and exact in float32
    generator = torch.Generator().manual_seed(0)
    q, k = (64.0 * torch.randint(-2, 3, (1, 2, 40, 4), generator=generator) for _ in range(2))
    _, _, v, dout = draw(40, 40, H=2, K=2, D=4, B=1)
    assert (q @ k.mT).max() / 2 > 5000  # exp of this is infinite
    got, want = compute(implementation, q, k, v, dout), oracle(q, k, v, dout)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    for a, b in zip(got[1:], want[1:]):
        # A backward pass that starts from the logsumexp has it to half a float32 step, 5e-4 at
        # 10^4, and p = exp(s - lse) no better.
        np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(b).max())


def test_a_falling_and_a_rising_maximum():
    T = 3 * BLOCK + 5
    q, k, v, dout = draw(T, T)
    # the maximum moves in every tile, or in the first only
    for slope in (torch.linspace(0, 60, T), torch.linspace(60, 0, T)):
        expect(q, k, v, dout, slope)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("T, S", [(53, 53), (17, 50)])
def test_bfloat16_inputs(implementation, T, S):
    q, k, v, dout = (x.bfloat16() for x in draw(T, S))
    got = compute(implementation, q, k, v, dout)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, oracle(q, k, v, dout)):
        assert a.dtype == torch.bfloat16 and a.isfinite().all(), name
        np.testing.assert_allclose(a.double().numpy(), b, atol=0.02 * np.abs(b).max(), rtol=0.02,
                                   err_msg=name)


def test_non_contiguous_inputs():
    T, S = 21, 40
    q, k, v, dout = draw(T, S)
    # keys and values as slices of a larger cache, queries as a transpose
    store = torch.full((2, 2, S + 9, 8), math.nan)
    store[:, :, :S] = k
    q, k = q.transpose(1, 2).contiguous().transpose(1, 2), store[:, :, :S]
    v = v.mT.contiguous().mT
    assert not (q.is_contiguous() or k.is_contiguous() or v.is_contiguous())
    expect(q, k, v, dout)
    expect(q, k, v, torch.ones(()).expand(2, 4, T, 8))  # the gradient that sum() sends


def test_auto_is_sdpa_and_an_unknown_name_is_refused():
    q, k, v, _ = draw(9, 9)
    assert torch.equal(attention(q, k, v), attention(q, k, v, implementation="sdpa"))
    with pytest.raises(UserError, match="auto.*naive.*tiled.*sdpa"):
        attention(q, k, v, implementation="flash")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_more_queries_than_keys_are_a_mistake_of_the_caller(implementation):
    q, k, v, _ = draw(6, 5)
    with pytest.raises(AssertionError, match="more queries than keys"):
        attention(q, k, v, implementation=implementation)


def test_a_second_derivative_is_refused_where_it_would_be_wrong():
    """tiled's backward reads the logsumexp as a constant, so a gradient of its gradient would be
    silently off."""
    q, k, v, _ = draw(5, 5)
    out = attention(q.requires_grad_(), k, v, implementation="tiled")
    gradient, = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# ---- Bytes and products --------------------------------------------------------------------------


def training_peak(implementation, T, **blocks):
    q, k, v = (torch.randn(1, 1, T, 8, device=DEVICE, requires_grad=True) for _ in range(3))

    def step():
        attention(q, k, v, implementation=implementation, **blocks).sum().backward()
    return peak_bytes(step, DEVICE)


@pytest.mark.slow
def test_tiled_memory_is_linear_in_the_length_and_naive_memory_is_not():
    small, middle, large = (training_peak("tiled", T, block_q=256, block_k=256)
                            for T in (1024, 2048, 4096))
    # a T^2 term would make it 4
    assert (large - middle) / (middle - small) == pytest.approx(2, rel=0.1)
    assert large < 4096**2 * 4 / 20               # far from one row of scores for every query
    small, middle, large = (training_peak("naive", T) for T in (512, 1024, 2048))
    # the same meter sees what naive attention costs
    assert (large - middle) / (middle - small) == pytest.approx(4, rel=0.1)
    assert large > 2048**2 * 4


@pytest.mark.parametrize("H, K", [(1, 1), (4, 2)])
def test_training_with_sdpa_makes_no_mask_and_no_scores(H, K):
    T = 1024
    q, k, v = (torch.randn(1, heads, T, 8, requires_grad=True) for heads in (H, K, K))
    with Meter() as meter:
        attention(q, k, v, implementation="sdpa").sum().backward()
    assert meter.largest < T * T                  # bytes: not even one bool for every pair


def test_tiled_does_not_repeat_keys():
    T, H = 256, 16
    q = torch.randn(1, H, T, 8)
    k, v = (torch.randn(1, 1, T, 8) for _ in range(2))
    with Meter() as meter, torch.no_grad():
        attention(q, k, v, implementation="tiled", block_q=8, block_k=16)
    assert meter.largest <= q.nbytes              # the output; keys for every head would be as
    assert meter.peak < 1.5 * q.nbytes            # large again, and so would values


@pytest.mark.parametrize("T, S", [(64, 64), (32, 96)])
def test_fully_masked_tiles_are_not_computed(T, S):
    D, block = 8, 8
    q, k, v, dout = draw(T, S, H=4, K=2, D=D, B=1)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    tiles = sum((S - T) // block + i + 1 for i in range(T // block))
    visible = tiles * block * block * 4           # positions of visible tiles, 4 heads
    every = T * S * 4
    with Meter() as meter:
        out = attention(q, k, v, implementation="tiled", block_q=block, block_k=block)
    assert meter.products == 2 * visible * D < 2 * every * D  # q k^T and p v
    with Meter() as meter:
        out.backward(dout)
    assert meter.products == 5 * visible * D      # q k^T again, p^T dout, dout v^T, ds k, ds^T q
