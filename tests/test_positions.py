"""positions.py: position ids, ALiBi and xPos, against the float64 oracle, golden numbers, and what they promise."""
import math

import numpy as np
import pytest
import reference
import torch

from cli import UserError
from model import attention
from positions import (alibi_bias, alibi_slopes, pose_positions, position_ids, random_positions, stretched_positions, training_positions,
                       where, xpos_scale)
from rope import METHODS, RopeConfig, apply_rope, cos_sin, inv_freq

IMPLEMENTATIONS = ["naive", "tiled", "sdpa"]
EIGHT = [.5, .25, .125, .0625, .03125, .015625, .0078125, .00390625]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- ALiBi -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n_heads, slopes", [
    (1, [1 / 256]), (2, [1 / 16, 1 / 256]), (4, [.25, .0625, .015625, .00390625]), (8, EIGHT),
    (12, EIGHT + [.70710678, .35355339, .1767767, .088388348]), (3, [1 / 16, 1 / 256, .25]),
])
def test_golden_alibi_slopes(n_heads, slopes):
    torch.testing.assert_close(alibi_slopes(n_heads), torch.tensor(slopes), rtol=1e-7, atol=0)


def test_alibi_slopes_of_any_number_of_heads():
    for n in range(1, 130):
        np.testing.assert_allclose(alibi_slopes(n), reference.alibi_slopes(n), rtol=1e-6)
        assert alibi_slopes(n).shape == (n,) and len(set(alibi_slopes(n).tolist())) == n   # no two heads look equally far


@pytest.mark.parametrize("n_heads, K", [(4, 2), (6, 3), (3, 1)])
@pytest.mark.parametrize("T, S", [(1, 9), (9, 9), (4, 9), (150, 150), (7, 300)])
@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_attention_with_the_row_of_bias_is_attention_with_the_textbooks_matrix(n_heads, K, T, S, factor):
    q, k, v = draw(2, n_heads, T, 16), draw(2, K, S, 16, seed=1), draw(2, K, S, 16, seed=2)
    positions = torch.stack([torch.arange(S), torch.arange(S) * 2 + 5])                    # a row for each sequence
    full = reference.alibi_bias(positions.numpy(), n_heads, factor)[:, :, S - T:]
    expected = reference.attention(q, k, v, full)
    bias = alibi_bias(positions, n_heads, factor)
    assert bias.shape == (2, n_heads, 1, S)
    for implementation in IMPLEMENTATIONS:
        np.testing.assert_allclose(attention(q, k, v, bias, implementation), expected, atol=2e-5, err_msg=implementation)
    same_for_all = attention(q, k, v, alibi_bias(torch.arange(S), n_heads, factor), "tiled")
    np.testing.assert_allclose(same_for_all[0], expected[0], atol=2e-5)


def test_alibi_in_bfloat16_at_the_end_and_at_the_beginning():
    """A key 900 tokens before the last has -slope * distance = -225, for the query beside it too. bfloat16 rounds that to whole numbers."""
    S = 900
    q, k, v = draw(1, 4, S, 16), draw(1, 1, S, 16, seed=1), draw(1, 1, S, 16, seed=2)
    expected = reference.attention(*(x.bfloat16().float() for x in (q, k, v)), reference.alibi_bias(np.arange(S)[None], 4))
    for implementation in IMPLEMENTATIONS:
        for T in (S, 3):
            got = attention(q[:, :, -T:].bfloat16(), k.bfloat16(), v.bfloat16(), alibi_bias(torch.arange(S), 4), implementation)
            assert got.dtype == torch.bfloat16
            np.testing.assert_allclose(got.float(), expected[:, :, -T:], atol=0.04, err_msg=f"{implementation}, {T} queries")


def test_interpolated_alibi_is_alibi_at_squeezed_distances():
    torch.testing.assert_close(alibi_bias(torch.arange(0, 40, 4), 3, 4.0), alibi_bias(torch.arange(10), 3))
    bias = alibi_bias(torch.arange(7), 2)
    assert (bias.diff(dim=-1) > 0).all() and bias[..., -1].eq(0).all()                     # the nearest key is favoured


# --- xPos ------------------------------------------------------------------------------------------------------------

def test_golden_xpos():
    zeta = [.28571429, .375, .46428571, .55357143, .64285714, .73214286, .82142857, .91071429]
    at_64 = [.85504997, .8846142, .9085486, .92874547, .94626834, .9617772, .97571105, .98837731]
    torch.testing.assert_close(xpos_scale(torch.tensor([512, 64, 0]), 8), torch.tensor([zeta, at_64, [1.0] * 8]), rtol=1e-6, atol=0)
    torch.testing.assert_close(xpos_scale(torch.tensor([256]), 8, factor=4.0), xpos_scale(torch.tensor([64]), 8))
    assert xpos_scale(torch.zeros(2, 3, dtype=torch.long), 8).shape == (2, 3, 8)


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_xpos_rotates_and_scales_as_the_oracle(factor):
    config, positions = RopeConfig("xpos", factor), torch.tensor([[0, 3, 200], [7, 900, 901]])
    theta, _ = inv_freq(config, 16)
    place = where(config, 2, theta, 1.0, positions, positions)
    assert place.bias is None
    for x, turn, sign in ((draw(2, 2, 3, 16), place.q, 1), (draw(2, 1, 3, 16, seed=1), place.k, -1)):
        expected = reference.rotate_all(x.numpy(), positions, *reference.frequencies({"rope_type": "xpos", "factor": factor}, 16))
        expected = reference.xpos_decay(expected, positions.numpy(), 8, sign, factor)
        np.testing.assert_allclose(apply_rope(x, *turn), expected, rtol=1e-5, atol=3e-4)


def test_xpos_scores_depend_on_the_distance_only_and_decay_with_it():
    config = RopeConfig("xpos")
    theta, _ = inv_freq(config, 32)
    q, k = draw(2, 1, 1, 1, 32)

    def at(position):
        return where(config, 1, theta, 1.0, torch.tensor([position]), torch.tensor([position]))

    def score(m, n):
        return (apply_rope(q, *at(m).q).double() * apply_rope(k, *at(n).k).double()).sum().item()
    size = (q.norm() * k.norm()).item()
    for distance in (0, 1, 17, 500):
        for m in (distance, 600, 3000, 8000):
            assert abs(score(m, m - distance) - score(distance, 0)) < 2e-4 * size
    same = torch.ones(1, 1, 1, 32)                                                         # without the angles only the decay is left
    still = where(config, 1, torch.zeros(16), 1.0, torch.arange(0, 5000, 50), torch.arange(0, 5000, 50))
    decay = (apply_rope(same.expand(1, 1, 100, 32), *still.q) * apply_rope(same, still.k[0][:1], still.k[1][:1])).sum(-1)[0, 0]
    assert (decay.diff() < 0).all() and decay[-1] < 0.3 * decay[0]


def test_xpos_says_where_its_powers_end():
    config = RopeConfig("xpos")
    theta, _ = inv_freq(config, 64)
    for position in (10_000, 30_000):
        place = where(config, 1, theta, 1.0, torch.tensor([position]), torch.tensor([position]))
        assert all(x.isfinite().all() and x.abs().max() > 0 for side in (place.q, place.k) for x in side)
    with pytest.raises(UserError, match="xpos: position 40000 is too far.*greater factor"):
        where(config, 1, theta, 1.0, torch.tensor([3, 40_000]), torch.tensor([3, 40_000]))
    where(RopeConfig("xpos", 2.0), 1, theta, 1.0, torch.tensor([40_000]), torch.tensor([40_000]))


@pytest.mark.parametrize("name", METHODS)
def test_queries_and_keys_are_turned_alike_but_for_xpos_and_nothing_is_added_but_by_alibi(name):
    config = RopeConfig.from_dict(reference.complete({"rope_type": name}, 16))
    theta, factor = inv_freq(config, 16, 200)
    positions = torch.arange(180, 200)
    place = where(config, 4, theta, factor, positions, torch.arange(200))
    assert (place.bias is not None) == (name == "alibi")
    assert torch.equal(place.q[0], place.k[0]) == torch.equal(place.q[1], place.k[1]) == (name != "xpos")
    if name != "xpos":
        torch.testing.assert_close(place.q, cos_sin(theta, positions, factor))
    if name == "alibi":
        assert place.bias.shape == (4, 1, 200)                                             # one for every key of the text, not of the piece


# --- position ids ----------------------------------------------------------------------------------------------------

def test_position_ids_count_from_0():
    assert position_ids(RopeConfig(), 5).tolist() == [0, 1, 2, 3, 4]


def test_random_position_ids_are_sorted_distinct_and_a_function_of_the_length():
    config = RopeConfig(random_positions=50)
    for length in (1, 2, 30, 50):
        positions = position_ids(config, length)
        assert positions.shape == (length,) and positions.dtype == torch.long and torch.equal(positions, position_ids(config, length))
        assert (positions.diff() > 0).all() and positions[0] >= 0 and positions[-1] < 50
    assert position_ids(config, 50).tolist() == [*range(50)]
    assert position_ids(config, 30).tolist()[:29] != position_ids(config, 29).tolist()     # drawn anew for a longer text
    with pytest.raises(UserError, match="random_positions 50: a text of 51 tokens"):
        position_ids(config, 51)


def sample(function, length, longest, n=400):
    rng = np.random.default_rng(0)
    return np.stack([function(rng, length, longest) for _ in range(n)])


@pytest.mark.parametrize("function", [random_positions, stretched_positions, pose_positions])
@pytest.mark.parametrize("length, longest", [(1, 1), (1, 9), (2, 2), (2, 9), (3, 3), (3, 40), (16, 16), (16, 17), (16, 64), (33, 1000)])
def test_drawn_positions_ascend_within_the_longer_text_and_follow_the_generator(function, length, longest):
    drawn = sample(function, length, longest)
    assert drawn.shape == (400, length) and np.issubdtype(drawn.dtype, np.integer)
    assert (np.diff(drawn) > 0).all() and drawn.min() >= 0 and drawn.max() < longest
    assert (drawn == sample(function, length, longest)).all()                              # the same generator, the same positions
    if longest > length > 2:
        assert len(np.unique(drawn, axis=0)) > 20 or longest == length + 1


def test_random_positions_are_everywhere():
    counts = np.bincount(sample(random_positions, 10, 40).ravel(), minlength=40)
    assert (abs(counts - 100) < 50).all()                                                  # 400 draws of a quarter of the places, +- 9


def test_stretched_positions_keep_both_ends():
    for length, longest in ((2, 9), (3, 40), (16, 64)):
        drawn = sample(stretched_positions, length, longest)
        assert (drawn[:, 0] == 0).all() and (drawn[:, -1] == longest - 1).all()
    inner = np.bincount(sample(stretched_positions, 12, 42)[:, 1:-1].ravel(), minlength=42)
    assert inner[0] == inner[41] == 0 and (abs(inner[1:41] - 100) < 50).all()


def test_pose_positions_are_two_runs_with_one_skip():
    length, longest = 16, 64
    drawn, firsts, skips = sample(pose_positions, length, longest, 3000), set(), []
    for positions in drawn:
        jumps = np.flatnonzero(np.diff(positions) != 1)
        assert positions[0] == 0 and len(jumps) <= 1
        skips.append(positions[-1] - (length - 1))
        firsts |= {int(j) + 1 for j in jumps}
    assert firsts == set(range(1, (length + 1) // 2 + 1))                                  # the first run: 1 .. half of the row
    assert set(skips) == set(range(longest - length + 1))                                  # the skip: 0 .. all that there is
    assert abs(np.mean(skips) - (longest - length) / 2) < 3 * 14.2 / math.sqrt(3000)
    assert (pose_positions(np.random.default_rng(0), length, length) == np.arange(length)).all()


def test_which_positions_training_draws():
    def drawn(config, way="own", step=0, row=0):
        draw = training_positions(config, 16, 64, way)
        return draw and draw(np.random.default_rng(step), np.random.default_rng(row), 16).tolist()
    clex = RopeConfig.from_dict(reference.complete({"rope_type": "clex", "original_max_position_embeddings": 16, "max_factor": 5.5}, 16))
    assert drawn(RopeConfig()) is None and drawn(RopeConfig("yarn", 4.0, 16)) is None
    assert drawn(clex, "contiguous") is None
    assert drawn(clex, "pose") == drawn(RopeConfig("yarn", 4.0, 16), "pose") == pose_positions(np.random.default_rng(0), 16, 64).tolist()
    assert drawn(RopeConfig(random_positions=500)) == random_positions(np.random.default_rng(0), 16, 500).tolist()
    ends = [{drawn(clex, step=step, row=row)[-1] for row in range(3)} for step in range(60)]
    assert all(len(end) == 1 for end in ends)                                              # one t for all rows of a step
    assert set().union(*ends) == {16 * t - 1 for t in range(1, 6)}                         # t = 1 .. max_factor
    assert drawn(clex, row=0) != drawn(clex, row=1) and drawn(clex, row=0)[0] == 0
