"""Text generation: model.py's from a prompt, extras/generation.py's from prompts of different
lengths, and the sampling of common/sampling.py."""
import math

import pytest
import torch
from cases import DYNAMIC, IMPLEMENTATIONS, ROPES, VOCAB, build, draw_tokens as draw

from common.errors import UserError
from common.sampling import check_sampling, sample
from extras.generation import generate_ragged, stream_ragged
from methods import RopeConfig
from model import generate, stream


@torch.no_grad()
def greedy(model, tokens, new):
    """The definition: the whole text anew for every token."""
    for _ in range(new):
        likeliest = model(tokens)[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, likeliest], dim=1)
    return tokens


# ---- Prompts of one length -----------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rope", [
    RopeConfig(), DYNAMIC,
    *(ROPES[name] for name in ("longrope", "clex", "alibi", "xpos", "random positions")),
], ids=lambda r: r.rope_type)
def test_greedy_generation_is_the_argmax_of_the_whole(implementation, rope):
    model, prompt = build(attention=implementation, rope=rope), draw(3, 7)
    assert torch.equal(generate(model, prompt, 13), greedy(model, prompt, 13))


def test_a_stream_yields_the_new_tokens_one_by_one():
    model, prompt = build(), draw(3, 7)
    tokens = list(stream(model, prompt, 5))
    assert [token.shape for token in tokens] == [(3,)] * 5
    assert torch.equal(torch.stack(tokens, dim=1), generate(model, prompt, 5)[:, 7:])


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


PROBABILITIES = torch.tensor([0.5, 0.1, 0.25, 0.15])
SHAPED = [  # (sampling, the distribution that it draws from)
    ({"temperature": 1.0}, PROBABILITIES),
    ({"temperature": 0.5}, PROBABILITIES**2 / (PROBABILITIES**2).sum()),
    # the smallest set that reaches 0.7 is {0, 2} (0.75); 0.76 needs token 3 as well; 1 keeps all
    ({"temperature": 1.0, "top_p": 0.7}, torch.tensor([2 / 3, 0, 1 / 3, 0])),
    ({"temperature": 1.0, "top_p": 0.76}, torch.tensor([0.5, 0, 0.25, 0.15]) / 0.9),
]


class Constant(torch.nn.Module):
    """A model whose next-token distribution is known."""
    config, tok_embeddings = build().config, torch.nn.Embedding(1, 1)

    def forward(self, tokens, positions=None, cache=None, last=None):
        return PROBABILITIES.log().expand(len(tokens), 1, 4)


@pytest.mark.parametrize("sampling, expected", SHAPED, ids=str)
def test_temperature_and_top_p_shape_the_distribution(sampling, expected):
    prompt = torch.zeros(400, 1, dtype=torch.long)
    new = generate(Constant(), prompt, 10, **sampling)[:, 1:]
    shares = torch.bincount(new.flatten(), minlength=4) / new.numel()
    torch.testing.assert_close(shares, expected, atol=0.03, rtol=0)
    assert (shares[expected == 0] == 0).all()
    ragged = generate_ragged(Constant(), prompt, [1] * 400, 10, **sampling)
    assert torch.equal(ragged[:, 1:], new)


def test_stop_tokens_end_rows():
    model, prompt = build(), draw(2, 5)
    free = generate(model, prompt, 12)
    row, other_row = free[0, 5:].tolist(), free[1, 5:].tolist()
    # a token of the first row that neither row has had before
    at = next(i for i, token in enumerate(row)
              if i >= 2 and token not in row[:i] and token not in other_row)
    stopped = generate(model, prompt, 12, stop=(row[at],))
    assert torch.equal(stopped[1], free[1])
    assert torch.equal(stopped[0, :5 + at + 1], free[0, :5 + at + 1])
    assert (stopped[0, 5 + at:] == row[at]).all()              # a row that is done repeats its stop
    both = generate(model, prompt, 12, stop=(row[at], other_row[0]))  # the second stops at once
    end = min(i for i, token in enumerate(row) if token in (row[at], other_row[0]))
    assert both.shape[1] == 5 + end + 1                        # when all rows are done, it ends
    assert generate(model, prompt, 0).shape == (2, 5)


def test_an_empty_prompt_is_refused():
    with pytest.raises(UserError, match="prompt"):
        generate(build(), draw(1, 0), 3)


# ---- Prompts of different lengths ----------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["default", "dynamic", "dynamic_yarn", "clex", "alibi", "xpos",
                                  "random positions"])
def test_prompts_of_different_lengths_continue_as_each_alone(implementation, name):
    """L is 12: the rows end before, at and after it. Behind its prompt a row holds another token
    each time, which nobody may read."""
    model = build(attention=implementation, rope=ROPES[name])
    prompt, lengths = draw(4, 17), [5, 12, 17, 9]
    alone = [generate(model, prompt[b:b + 1, :n], 8)[0] for b, n in enumerate(lengths)]
    for filling in (0, VOCAB - 1):
        padded = prompt.clone()
        for row, n in zip(padded, lengths):
            row[n:] = filling
        together = generate_ragged(model, padded, torch.tensor(lengths), 8)
        assert together.shape == (4, 17 + 8)
        for row, n, expected in zip(together, lengths, alone):
            assert torch.equal(row[:n + 8], expected) and (row[n + 8:] == expected[-1]).all()
    continuations = {tuple(row[-8:].tolist()) for row in alone}
    assert len(continuations) == 4, "the rows have to differ, or the test says nothing"
    whole = generate(model, prompt, 8)
    assert torch.equal(generate_ragged(model, prompt, [17] * 4, 8), whole)


def test_stop_tokens_end_rows_of_different_lengths():
    model, prompt, lengths = build(), draw(3, 11), [4, 11, 7]

    def continue_alone(**stop):
        return [generate(model, prompt[b:b + 1, :n], 10, **stop)[0]
                for b, n in enumerate(lengths)]
    free = continue_alone()
    stop = (free[0][4 + 2].item(), free[1][11 + 3].item(), free[2][7].item())
    prompt[1, 6] = stop[0]                      # a stop token within a prompt stops nothing
    alone = continue_alone(stop=stop)
    together = generate_ragged(model, prompt, lengths, 10, stop=stop)
    assert any(len(row) < n + 10 for row, n in zip(alone, lengths))
    for row, expected in zip(together, alone):
        assert torch.equal(row[:len(expected)], expected)
        assert (row[len(expected):] == expected[-1]).all()
    longest = max(map(len, alone))
    assert together.shape[1] == longest, "when all rows are done, generation ends"


def test_a_ragged_stream_yields_longer_prompts_first():
    prompts, lengths = draw(2, 6), [3, 6]
    tokens = torch.stack(list(stream_ragged(build(), prompts, lengths, 4)), dim=1)
    assert tokens.shape == (2, 3 + 4)
    assert torch.equal(tokens[1, :3], prompts[1, 3:])


@pytest.mark.parametrize("lengths, words", [([3, 0], "empty"), ([3, -1], "empty"),
                                            ([3, 6], "rows of 5")])
def test_lengths_that_no_row_has_are_refused(lengths, words):
    with pytest.raises(UserError, match=words):
        generate_ragged(build(), draw(2, 5), lengths, 3)


def test_no_new_tokens_are_none_for_any_length():
    prompt = draw(2, 5)
    text = generate_ragged(build(), prompt, [5, 3], 0)
    assert torch.equal(text[0], prompt[0]) and torch.equal(text[1, :3], prompt[1, :3])
    assert (text[1, 3:] == prompt[1, 2]).all()


# ---- Sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_no_token_is_chosen_among_numbers_that_are_none(temperature, number):
    logits = torch.full((2, 5), -math.inf)
    logits[:, 0] = 1
    assert sample(logits, temperature, 1.0, torch.Generator()).tolist() == [0, 0]
    logits[1, 3] = number
    with pytest.raises(UserError, match="an answer's probability is not a number"):
        sample(logits, temperature, 1.0, torch.Generator())


def test_a_greedy_sample_draws_nothing():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 0.5]])
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert sample(logits, 0.0, 0.3, generator).tolist() == [1, 0]
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("sampling, expected", SHAPED, ids=str)
def test_a_sample_is_drawn_from_the_likeliest_tokens(sampling, expected):
    """Rows of different order, so that a token of the sorted row would be a wrong one."""
    logits = PROBABILITIES.log().repeat(4000, 1)
    logits[2000:] = logits[2000:].flip(-1)
    generator = torch.Generator().manual_seed(0)
    token = sample(logits, sampling["temperature"], sampling.get("top_p", 1.0), generator)
    assert token.shape == (4000,)
    for half, distribution in ((token[:2000], expected), (token[2000:], expected.flip(0))):
        shares = torch.bincount(half, minlength=4) / 2000
        torch.testing.assert_close(shares, distribution, atol=0.04, rtol=0)
        assert (shares[distribution == 0] == 0).all()


def test_no_token_is_drawn_beyond_a_set_that_reaches_top_p_exactly():
    halves = torch.zeros(200, 2)
    generator = torch.Generator().manual_seed(0)
    assert len(set(sample(halves, 1.0, 0.5, generator).tolist())) == 1
    assert len(set(sample(halves, 1.0, 0.51, generator).tolist())) == 2


@pytest.mark.parametrize("temperature, top_p", [
    (-0.1, 1.0), (math.inf, 1.0), (math.nan, 1.0), (1.0, -0.1), (1.0, 1.1), (1.0, math.nan)])
def test_impossible_sampling_is_refused(temperature, top_p):
    prompt = draw(1, 3)
    with pytest.raises(UserError, match="give a temperature of 0 .greedy. or at least 1e-6"):
        check_sampling(prompt, temperature, top_p)
    for function, lengths in ((generate, ()), (generate_ragged, ([3],))):
        with pytest.raises(UserError, match="temperature"):
            function(build(), prompt, *lengths, 2, temperature=temperature, top_p=top_p)
    check_sampling(prompt, 0.0, 0.0)
    check_sampling(prompt, 100.0, 1.0)
