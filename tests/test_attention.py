"""The three attentions against the float64 oracle (values and all gradients), and the bytes and products that they cost."""
import math

import numpy as np
import pytest
import reference
import torch
from meter import Meter, peak_bytes

from cli import UserError
from model import attention

BLOCK = 16
LENGTHS = [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5]
IMPLEMENTATIONS = ["naive", "tiled", "sdpa"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(T, S, H=4, K=2, D=8, B=2, seed=0):
    """q, k, v and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, heads, n, D, generator=generator) for heads, n in ((H, T), (K, S), (K, S), (H, T))]


def compute(implementation, q, k, v, dout, bias=None, blocks=(BLOCK, BLOCK)):
    """(out, dq, dk, dv) of one implementation."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    blocks = dict(zip(("block_q", "block_k"), blocks)) if implementation == "tiled" else {}
    out = attention(q, k, v, bias, implementation=implementation, **blocks)
    out.backward(dout)
    return out.detach(), q.grad, k.grad, v.grad


def oracle(q, k, v, dout, bias=None):
    """The same by the oracle, as float64 arrays."""
    q, k, v, dout = (x.double().numpy() for x in (q, k, v, dout))
    bias = None if bias is None else bias.double().numpy()
    return reference.attention(q, k, v, bias), *reference.attention_gradients(q, k, v, dout, bias)


def expect(q, k, v, dout, bias=None, blocks=(BLOCK, BLOCK), implementations=IMPLEMENTATIONS):
    """Forward and all three gradients equal the oracle's to 1e-5."""
    want = oracle(q, k, v, dout, bias)
    for implementation in implementations:
        got = compute(implementation, q, k, v, dout, bias, blocks)
        for name, a, b in zip(("out", "dq", "dk", "dv"), got, want):
            assert a.shape == b.shape, (implementation, name)
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5, err_msg=f"{implementation}: {name}")


# --- the oracle itself -----------------------------------------------------------------------------------------------

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
    q, k = np.array([[[[2.0], [0.0]]]]), np.array([[[[0.0], [math.log(3.0)], [5.0]]]])  # T = 2, S = 3, D = 1
    v = np.array([[[[1.0], [2.0], [4.0]]]])
    out = reference.attention(q, k, v)[0, 0, :, 0]  # query 0 sees keys 0 and 1, scores 0 and ln 9; query 1 sees all three alike
    np.testing.assert_allclose(out, [(1 * 1 + 9 * 2) / 10, (1 + 2 + 4) / 3])


# --- values and gradients --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("H, K", [(2, 2), (4, 2), (6, 1)])
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("past", [0, 5, BLOCK])
def test_values_and_gradients_are_the_oracles(T, past, H, K):
    expect(*draw(T, T + past, H, K))


BIASES = {  # shape of the bias for B = 2, H = 4
    "scalar": lambda T, S: (), "S": lambda T, S: (S,), "TS": lambda T, S: (T, S), "H1S": lambda T, S: (4, 1, S),
    "1HTS": lambda T, S: (1, 4, T, S), "B1TS": lambda T, S: (2, 1, T, S), "BHTS": lambda T, S: (2, 4, T, S),
    "B111": lambda T, S: (2, 1, 1, 1),
}


@pytest.mark.parametrize("shape", BIASES)
@pytest.mark.parametrize("T, S", [(3 * BLOCK + 5, 3 * BLOCK + 5), (BLOCK + 1, 2 * BLOCK + 4), (1, 40)])
def test_an_additive_bias_of_any_shape(shape, T, S):
    bias = 2 * torch.randn(BIASES[shape](T, S), generator=torch.Generator().manual_seed(1))
    expect(*draw(T, S), bias)


@pytest.mark.parametrize("blocks", [(8, 32), (32, 8), (1, 7), (5, 1), (1000, 3), (3, 1000), (1000, 1000)], ids=str)
@pytest.mark.parametrize("T, S", [(37, 37), (20, 50)])
def test_tiles_of_any_size(blocks, T, S):
    expect(*draw(T, S), torch.randn(4, 1, S, generator=torch.Generator().manual_seed(1)), blocks, ["tiled"])


def padding(T, hidden, value):
    """A bias [2,1,T,T] that hides the first `hidden` keys from every query but those at these positions."""
    bias = torch.zeros(2, 1, T, T)
    bias[1, :, hidden:, :hidden] = value
    return bias


@pytest.mark.parametrize("value", [-math.inf, -1e9, torch.finfo(torch.float32).min])
def test_rows_whose_first_tiles_are_fully_masked(value):
    T, hidden = 3 * BLOCK + 5, 2 * BLOCK + 1  # the running maximum of such a row is still "nothing seen" after two tiles
    expect(*draw(T, T), padding(T, hidden, value))


def test_the_saved_logsumexp_is_finite_and_right():
    T, hidden = 3 * BLOCK + 5, 2 * BLOCK + 1
    q, k, v, _ = draw(T, T, H=2, K=2)
    bias = padding(T, hidden, -math.inf)
    out = attention(q.requires_grad_(), k, v, bias, implementation="tiled", block_q=BLOCK, block_k=BLOCK)
    lse, = (x for x in out.grad_fn.saved_tensors if x is not None and x.shape == (2, 2, T))
    scores = (q.detach().double() @ k.double().mT / math.sqrt(8) + bias).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scores_do_not_overflow(implementation):
    generator = torch.Generator().manual_seed(0)  # small integers times 64: scores of +-10^4, and exact in float32
    q, k = (64.0 * torch.randint(-2, 3, (1, 2, 40, 4), generator=generator) for _ in range(2))
    _, _, v, dout = draw(40, 40, H=2, K=2, D=4, B=1)
    assert (q @ k.mT).max() / 2 > 5000  # exp of this is infinite
    got, want = compute(implementation, q, k, v, dout), oracle(q, k, v, dout)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    for a, b in zip(got[1:], want[1:]):
        # a backward pass that starts from the logsumexp has it to half a float32 step, 5e-4 at 10^4, and p = exp(s - lse) no better
        np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(b).max())


def test_a_falling_and_a_rising_maximum():
    T = 3 * BLOCK + 5
    q, k, v, dout = draw(T, T)
    for slope in (torch.linspace(0, 60, T), torch.linspace(60, 0, T)):  # the maximum moves in every tile, or in the first only
        expect(q, k, v, dout, slope)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("T, S", [(53, 53), (17, 50)])
def test_bfloat16_inputs(implementation, T, S):
    q, k, v, dout = (x.bfloat16() for x in draw(T, S))
    got = compute(implementation, q, k, v, dout)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, oracle(q, k, v, dout)):
        assert a.dtype == torch.bfloat16 and a.isfinite().all(), name
        np.testing.assert_allclose(a.double().numpy(), b, atol=0.02 * np.abs(b).max(), rtol=0.02, err_msg=name)


def test_non_contiguous_inputs():
    T, S = 21, 40
    q, k, v, dout = draw(T, S)
    store = torch.full((2, 2, S + 9, 8), math.nan)  # keys and values as slices of a larger cache, queries as a transpose
    store[:, :, :S] = k
    q, k, v = q.transpose(1, 2).contiguous().transpose(1, 2), store[:, :, :S], v.mT.contiguous().mT
    assert not (q.is_contiguous() or k.is_contiguous() or v.is_contiguous())
    expect(q, k, v, dout)
    expect(q, k, v, torch.ones(()).expand(2, 4, T, 8))  # the gradient that sum() sends


def test_auto_is_sdpa_and_an_unknown_name_is_refused():
    q, k, v, _ = draw(9, 9)
    assert torch.equal(attention(q, k, v), attention(q, k, v, implementation="sdpa"))
    with pytest.raises(UserError, match="auto.*naive.*tiled.*sdpa"):
        attention(q, k, v, implementation="flash")


def test_a_second_derivative_is_refused_where_it_would_be_wrong():
    """tiled's backward reads the logsumexp as a constant, so a gradient of its gradient would be silently off."""
    q, k, v, _ = draw(5, 5)
    gradient, = torch.autograd.grad(attention(q.requires_grad_(), k, v, implementation="tiled").square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# --- bytes and products ----------------------------------------------------------------------------------------------

def training_peak(implementation, T, **blocks):
    q, k, v = (torch.randn(1, 1, T, 8, device=DEVICE, requires_grad=True) for _ in range(3))
    return peak_bytes(lambda: attention(q, k, v, implementation=implementation, **blocks).sum().backward(), DEVICE)


def test_tiled_memory_is_linear_in_the_length_and_naive_memory_is_not():
    small, middle, large = (training_peak("tiled", T, block_q=1024, block_k=1024) for T in (4096, 8192, 16384))
    assert (large - middle) / (middle - small) == pytest.approx(2, rel=0.1)  # a T^2 term would make it 4
    assert large < 16384**2 * 4 / 20                                         # far from one row of scores for every query
    small, middle, large = (training_peak("naive", T) for T in (512, 1024, 2048))
    assert (large - middle) / (middle - small) == pytest.approx(4, rel=0.1)  # the same meter sees what naive attention costs
    assert large > 2048**2 * 4


@pytest.mark.parametrize("H, K", [(1, 1), (4, 2)])
def test_training_with_sdpa_makes_no_mask_and_no_scores(H, K):
    T = 1024
    q, k, v = (torch.randn(1, heads, T, 8, requires_grad=True) for heads in (H, K, K))
    with Meter() as meter:
        attention(q, k, v, implementation="sdpa").sum().backward()
    assert meter.largest < T * T  # bytes: not even one bool for every pair


def test_tiled_does_not_repeat_keys():
    T, H = 256, 16
    q = torch.randn(1, H, T, 8)
    k, v = (torch.randn(1, 1, T, 8) for _ in range(2))
    with Meter() as meter, torch.no_grad():
        attention(q, k, v, implementation="tiled", block_q=8, block_k=16)
    assert meter.largest <= q.nbytes          # the output; keys for every head would be as large again,
    assert meter.peak < 1.5 * q.nbytes        # and so would values


@pytest.mark.parametrize("T, S", [(64, 64), (32, 96)])
def test_fully_masked_tiles_are_not_computed(T, S):
    D, block = 8, 8
    q, k, v, dout = draw(T, S, H=4, K=2, D=D, B=1)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    visible = sum((S - T) // block + i + 1 for i in range(T // block)) * block * block * 4  # positions of visible tiles, 4 heads
    every = T * S * 4
    with Meter() as meter:
        out = attention(q, k, v, implementation="tiled", block_q=block, block_k=block)
    assert meter.products == 2 * visible * D < 2 * every * D  # q k^T and p v
    with Meter() as meter:
        out.backward(dout)
    assert meter.products == 5 * visible * D                  # q k^T again, p^T dout, dout v^T, ds k, ds^T q
