"""Position ids, ALiBi and xPos, and what attention is told of positions: against the float64
oracle, golden numbers, and what they promise."""
import math

import numpy as np
import pytest
import reference
import torch
from cases import IMPLEMENTATIONS, config_of

from common.errors import UserError
from methods import (METHODS, RopeConfig, inv_freq, position_ids, position_inputs,
                     training_positions)
from methods.baselines import alibi_bias, alibi_slopes, xpos_scale
from methods.training_positions import pose_positions, random_positions, stretched_positions
from model import attention
from rope import apply_rope, cos_sin

EIGHT = [.5, .25, .125, .0625, .03125, .015625, .0078125, .00390625]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- ALiBi ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_heads, slopes", [
    (1, [1 / 256]), (2, [1 / 16, 1 / 256]), (4, [.25, .0625, .015625, .00390625]), (8, EIGHT),
    (12, EIGHT + [.70710678, .35355339, .1767767, .088388348]), (3, [1 / 16, 1 / 256, .25]),
])
def test_golden_alibi_slopes(n_heads, slopes):
    torch.testing.assert_close(alibi_slopes(n_heads), torch.tensor(slopes), rtol=1e-7, atol=0)


def test_alibi_slopes_of_any_number_of_heads():
    for n in range(1, 130):
        slopes = alibi_slopes(n)
        np.testing.assert_allclose(slopes, reference.alibi_slopes(n), rtol=1e-6)
        assert slopes.shape == (n,)
        assert len(set(slopes.tolist())) == n              # no two heads look equally far


@pytest.mark.parametrize("n_heads, K", [(4, 2), (6, 3), (3, 1)])
@pytest.mark.parametrize("T, S", [(1, 9), (9, 9), (4, 9), (150, 150), (7, 300)])
@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_attention_with_the_row_of_bias_is_that_with_the_textbooks_matrix(n_heads, K, T, S, factor):
    q, k, v = draw(2, n_heads, T, 16), draw(2, K, S, 16, seed=1), draw(2, K, S, 16, seed=2)
    positions = torch.stack([torch.arange(S), torch.arange(S) * 2 + 5])   # a row for each sequence
    full = reference.alibi_bias(positions.numpy(), n_heads, factor)[:, :, S - T:]
    expected = reference.attention(q, k, v, full)
    bias = alibi_bias(positions, n_heads, factor)
    assert bias.shape == (2, n_heads, 1, S)
    for implementation in IMPLEMENTATIONS:
        np.testing.assert_allclose(attention(q, k, v, bias, implementation), expected, atol=2e-5,
                                   err_msg=implementation)
    same_for_all = attention(q, k, v, alibi_bias(torch.arange(S), n_heads, factor), "tiled")
    np.testing.assert_allclose(same_for_all[0], expected[0], atol=2e-5)


def test_alibi_in_bfloat16_at_the_end_and_at_the_beginning():
    """A key 900 tokens before the last has -slope * distance = -225, for the query beside it too.
    bfloat16 rounds that to whole numbers."""
    S = 900
    q, k, v = (draw(1, heads, S, 16, seed=n).bfloat16() for n, heads in enumerate((4, 1, 1)))
    full = reference.alibi_bias(np.arange(S)[None], 4)
    expected = reference.attention(q.float(), k.float(), v.float(), full)
    bias = alibi_bias(torch.arange(S), 4)
    for implementation in IMPLEMENTATIONS:
        for T in (S, 3):
            got = attention(q[:, :, -T:], k, v, bias, implementation)
            assert got.dtype == torch.bfloat16
            np.testing.assert_allclose(got.float(), expected[:, :, -T:], atol=0.04,
                                       err_msg=f"{implementation}, {T} queries")


def test_interpolated_alibi_is_alibi_at_squeezed_distances():
    squeezed = alibi_bias(torch.arange(0, 40, 4), 3, 4.0)
    torch.testing.assert_close(squeezed, alibi_bias(torch.arange(10), 3))
    bias = alibi_bias(torch.arange(7), 2)
    assert (bias.diff(dim=-1) > 0).all()                   # the nearest key is favoured
    assert bias[..., -1].eq(0).all()


# ---- xPos ----------------------------------------------------------------------------------------


def test_golden_xpos():
    zeta = [.28571429, .375, .46428571, .55357143, .64285714, .73214286, .82142857, .91071429]
    at_64 = [.85504997, .8846142, .9085486, .92874547, .94626834, .9617772, .97571105, .98837731]
    expected = torch.tensor([zeta, at_64, [1.0] * 8])
    got = xpos_scale(torch.tensor([512, 64, 0]), 8)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    squeezed = xpos_scale(torch.tensor([256]), 8, factor=4.0)
    torch.testing.assert_close(squeezed, xpos_scale(torch.tensor([64]), 8))
    assert xpos_scale(torch.zeros(2, 3, dtype=torch.long), 8).shape == (2, 3, 8)


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_xpos_rotates_and_scales_as_the_oracle(factor):
    config, positions = RopeConfig("xpos", factor), torch.tensor([[0, 3, 200], [7, 900, 901]])
    theta, _ = inv_freq(config, 16)
    inputs = position_inputs(config, 2, theta, 1.0, positions, positions[..., -3:])
    assert inputs.attn_bias is None
    angles = reference.frequencies({"rope_type": "xpos", "factor": factor}, 16)
    for x, turn, sign in ((draw(2, 2, 3, 16), inputs.q_rope, 1),
                          (draw(2, 1, 3, 16, seed=1), inputs.k_rope, -1)):
        expected = reference.rotate_all(x.numpy(), positions, *angles)
        expected = reference.xpos_decay(expected, positions.numpy(), 8, sign, factor)
        np.testing.assert_allclose(apply_rope(x, *turn), expected, rtol=1e-5, atol=3e-4)


def test_xpos_scores_depend_on_the_distance_only_and_decay_with_it():
    config = RopeConfig("xpos")
    theta, _ = inv_freq(config, 32)
    q, k = draw(2, 1, 1, 1, 32)

    def at(position):
        return position_inputs(config, 1, theta, 1.0, *[torch.tensor([position])] * 2)

    def score(m, n):
        turned_q = apply_rope(q, *at(m).q_rope).double()
        turned_k = apply_rope(k, *at(n).k_rope).double()
        return (turned_q * turned_k).sum().item()
    size = (q.norm() * k.norm()).item()
    for distance in (0, 1, 17, 500):
        for m in (distance, 600, 3000, 8000):
            assert abs(score(m, m - distance) - score(distance, 0)) < 2e-4 * size

    # without the angles only the decay is left
    same = torch.ones(1, 1, 1, 32)
    positions = torch.arange(0, 5000, 50)
    still = position_inputs(config, 1, torch.zeros(16), 1.0, positions, positions)
    key_cos, key_sin = still.k_rope
    queries = apply_rope(same.expand(1, 1, 100, 32), *still.q_rope)
    decay = (queries * apply_rope(same, key_cos[:1], key_sin[:1])).sum(-1)[0, 0]
    assert (decay.diff() < 0).all() and decay[-1] < 0.3 * decay[0]


def test_xpos_says_where_its_powers_end():
    def at(config, *positions):
        theta, _ = inv_freq(config, 64)
        return position_inputs(config, 1, theta, 1.0, *[torch.tensor(positions)] * 2)
    config = RopeConfig("xpos")
    for position in (10_000, 30_000):
        inputs = at(config, position)
        for x in (*inputs.q_rope, *inputs.k_rope):
            assert x.isfinite().all() and x.abs().max() > 0
    with pytest.raises(UserError, match="xpos: position 40000 is too far.*greater factor"):
        at(config, 3, 40_000)
    at(RopeConfig("xpos", 2.0), 40_000)


# ---- What attention is told ----------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_queries_and_keys_turn_alike_but_for_xpos_and_only_alibi_adds_a_bias(name):
    config = config_of(name)
    theta, factor = inv_freq(config, 16, 200)
    positions = torch.arange(180, 200)
    inputs = position_inputs(config, 4, theta, factor, torch.arange(200), positions)
    assert (inputs.attn_bias is not None) == (name == "alibi")
    same_cos = torch.equal(inputs.q_rope[0], inputs.k_rope[0])
    same_sin = torch.equal(inputs.q_rope[1], inputs.k_rope[1])
    assert same_cos == same_sin == (name != "xpos")
    if name != "xpos":
        torch.testing.assert_close(inputs.q_rope, cos_sin(theta, positions, factor))
    if name == "alibi":  # one for every key of the text, not of the piece
        assert inputs.attn_bias.shape == (4, 1, 200)


@pytest.mark.parametrize("name", ["default", "yarn", "alibi", "xpos"])
@pytest.mark.parametrize("tokens", [1, 3, 12])
def test_the_last_tokens_of_a_text_have_the_last_positions(name, tokens):
    """With a cache: those of the new tokens are a slice of those of the whole."""
    config = config_of(name)
    theta, factor = inv_freq(config, 16)
    text = torch.stack([torch.arange(12), torch.arange(12) * 3 + 40])
    for positions in (text[0], text):
        whole = position_inputs(config, 4, theta, factor, positions, positions)
        part = position_inputs(config, 4, theta, factor, positions, positions[..., -tokens:])
        for side, part_side in ((whole.q_rope, part.q_rope), (whole.k_rope, part.k_rope)):
            for x, part_x in zip(side, part_side):
                assert part_x.shape == (*positions.shape[:-1], tokens, 8)
                assert torch.equal(part_x, x[..., -tokens:, :])
        if name == "alibi":
            assert torch.equal(part.attn_bias, whole.attn_bias)


# ---- Position ids --------------------------------------------------------------------------------


def test_position_ids_count_from_0():
    assert position_ids(RopeConfig(), 5).tolist() == [0, 1, 2, 3, 4]


def test_random_position_ids_are_sorted_distinct_and_a_function_of_the_length():
    config = RopeConfig(random_positions=50)
    for length in (1, 2, 30, 50):
        positions = position_ids(config, length)
        assert positions.shape == (length,) and positions.dtype == torch.long
        assert torch.equal(positions, position_ids(config, length))
        assert (positions.diff() > 0).all() and positions[0] >= 0 and positions[-1] < 50
    assert position_ids(config, 50).tolist() == [*range(50)]
    # drawn anew for a longer text
    assert position_ids(config, 30).tolist()[:29] != position_ids(config, 29).tolist()
    with pytest.raises(UserError, match="random_positions 50: a text of 51 tokens"):
        position_ids(config, 51)


def drawn_rows(function, length, longest, n=400):
    rng = np.random.default_rng(0)
    return np.stack([function(rng, length, longest) for _ in range(n)])


@pytest.mark.parametrize("function", [random_positions, stretched_positions, pose_positions])
@pytest.mark.parametrize("length, longest", [
    (1, 1), (1, 9), (2, 2), (2, 9), (3, 3), (3, 40), (16, 16), (16, 17), (16, 64), (33, 1000)])
def test_drawn_positions_ascend_in_the_longer_text_and_follow_the_generator(function, length,
                                                                            longest):
    drawn = drawn_rows(function, length, longest)
    assert drawn.shape == (400, length) and np.issubdtype(drawn.dtype, np.integer)
    assert (np.diff(drawn) > 0).all() and drawn.min() >= 0 and drawn.max() < longest
    # the same generator, the same positions
    assert (drawn == drawn_rows(function, length, longest)).all()
    if longest > length > 2:
        assert len(np.unique(drawn, axis=0)) > 20 or longest == length + 1


def test_random_positions_are_everywhere():
    counts = np.bincount(drawn_rows(random_positions, 10, 40).ravel(), minlength=40)
    assert (abs(counts - 100) < 50).all()                  # 400 draws of a quarter of all, +- 9


def test_stretched_positions_keep_both_ends():
    for length, longest in ((2, 9), (3, 40), (16, 64)):
        drawn = drawn_rows(stretched_positions, length, longest)
        assert (drawn[:, 0] == 0).all() and (drawn[:, -1] == longest - 1).all()
    between = drawn_rows(stretched_positions, 12, 42)[:, 1:-1]
    counts = np.bincount(between.ravel(), minlength=42)
    assert counts[0] == counts[41] == 0 and (abs(counts[1:41] - 100) < 50).all()


def test_pose_positions_are_two_runs_with_one_skip():
    length, longest = 16, 64
    firsts, skips = set(), []
    for positions in drawn_rows(pose_positions, length, longest, 3000):
        jumps = np.flatnonzero(np.diff(positions) != 1)
        assert positions[0] == 0 and len(jumps) <= 1
        skips.append(positions[-1] - (length - 1))
        firsts |= {int(j) + 1 for j in jumps}
    assert firsts == set(range(1, (length + 1) // 2 + 1))  # the first run: 1 .. half of the row
    assert set(skips) == set(range(longest - length + 1))  # the skip: 0 .. all that there is
    assert abs(np.mean(skips) - (longest - length) / 2) < 3 * 14.2 / math.sqrt(3000)
    whole = pose_positions(np.random.default_rng(0), length, length)
    assert (whole == np.arange(length)).all()


# ---- Positions of training -----------------------------------------------------------------------


def first_row(config, way="own", step=0, row=0):
    """The positions of a row of 16 tokens, for L = 16 and L' = 64."""
    function = training_positions(config, 16, 64, way)
    if function is None:
        return None
    return function(np.random.default_rng(step), np.random.default_rng(row), 16).tolist()


def test_which_positions_training_draws():
    clex = config_of("clex", original_max_position_embeddings=16, max_factor=5)
    yarn = RopeConfig("yarn", 4.0, 16)
    assert first_row(RopeConfig()) is None and first_row(yarn) is None
    assert first_row(clex, "contiguous") is None
    pose = pose_positions(np.random.default_rng(0), 16, 64).tolist()
    assert first_row(clex, "pose") == first_row(yarn, "pose") == pose
    randomly = random_positions(np.random.default_rng(0), 16, 500).tolist()
    assert first_row(RopeConfig(random_positions=500)) == randomly
    assert first_row(RopeConfig(random_positions=500), "pose") == randomly


def test_clex_trains_at_one_t_for_all_rows_of_a_step():
    clex = config_of("clex", original_max_position_embeddings=16, max_factor=5)
    ends = [{first_row(clex, step=step, row=row)[-1] for row in range(3)} for step in range(60)]
    assert all(len(end) == 1 for end in ends)
    assert set().union(*ends) == {16 * t - 1 for t in range(1, 6)}        # t = 1 .. max_factor
    assert first_row(clex, row=0) != first_row(clex, row=1)
    assert first_row(clex, row=0)[0] == 0


def test_fewer_random_positions_than_tokens_of_a_row_are_refused():
    with pytest.raises(UserError, match="random_positions 63: fewer than the 64 tokens of a row"):
        training_positions(RopeConfig(random_positions=63), 16, 64)
    assert training_positions(RopeConfig(random_positions=64), 16, 64) is not None
