"""eval.perplexity scores every token once, with the context that the definition gives it."""
import math
from itertools import product

import numpy as np
import pytest
import torch

import reference
from common.cache import ResultCache
from common.errors import UserError
from eval import bits_per_byte, perplexity, sliding_windows, window_and_stride
from evaluation import jobs
from model import LLaMA, ModelConfig
from small_models import VOCAB, random_documents, small_model


def nll(model, documents, window, stride):
    return perplexity(model, documents, window, stride, progress=False)["nll"]


# ---- Windows -------------------------------------------------------------------------------------


def test_sliding_windows_score_every_target_once_with_the_context_of_the_definition():
    for n, window in product(range(0, 26), range(1, 28)):
        for stride in range(1, window + 1):
            scored = []
            for begin, end, skip in sliding_windows(n, window, stride):
                assert 0 <= begin < end < n
                assert end - begin <= window
                assert 0 <= skip < end - begin
                scored += [(i, begin) for i in range(begin + 1 + skip, end + 1)]
            expected = list(reference.sliding_windows(n, window, stride))
            assert scored == expected, (n, window, stride)


def test_sliding_windows_by_hand():
    assert list(sliding_windows(10, 4, 2)) == [(0, 4, 0), (2, 6, 2), (4, 8, 2), (6, 9, 2)]
    assert list(sliding_windows(9, 4, 4)) == [(0, 4, 0), (4, 8, 0)]
    assert list(sliding_windows(5, 9, 3)) == [(0, 4, 0)]
    assert list(sliding_windows(1, 4, 2)) == []


def test_defaults_are_the_models_window_and_a_quarter_of_it():
    measured = perplexity(small_model(max_seq_len=12), random_documents(30), progress=False)
    assert (measured["window"], measured["stride"]) == (12, 3)
    assert window_and_stride(small_model(max_seq_len=3), None, None) == (3, 1)


# ---- The mean ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths, window, stride", [
    ([30], 8, 8), ([30], 8, 1), ([30], 8, 3), ([30], 1, 1),  # stride = window, 1, and between
    # window > N, N = window + 1, N = window, the shortest document
    ([30], 64, 16), ([9], 8, 4), ([8], 8, 2), ([2], 8, 8),
    ([25, 3, 17, 9, 1, 2, 10], 8, 5)])
def test_perplexity_is_the_brute_force_over_single_tokens(lengths, window, stride):
    model, documents = small_model(), random_documents(*lengths)

    @torch.no_grad()
    def logprob(context, token):
        logits = model(torch.tensor([context]))[0, -1].double()
        return logits.log_softmax(dim=-1)[token].item()

    expected, count = reference.sliding_window_perplexity([d.tolist() for d in documents], window,
                                                          stride, logprob)
    measured = perplexity(model, documents, window, stride, progress=False)
    assert measured["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert measured["tokens"] == count == sum(n - 1 for n in lengths)
    assert measured["documents"] == len(lengths)
    assert (measured["window"], measured["stride"]) == (window, stride)


def test_stride_equal_to_the_window_is_the_plain_loss():
    model, (document,) = small_model(), random_documents(8 * 6 + 1)
    ids = torch.from_numpy(document)
    loss = model.loss(ids[:-1].view(6, 8), ids[1:].view(6, 8)).item()
    assert nll(model, [document], 8, 8) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("window, stride", [(8, 8), (8, 3), (64, 1)])
def test_a_uniform_model_gives_the_size_of_its_vocabulary(window, stride):
    model = small_model()
    torch.nn.init.zeros_(model.output.weight)
    measured = perplexity(model, random_documents(30, 5), window, stride, progress=False)
    assert measured["perplexity"] == pytest.approx(VOCAB, rel=1e-6)


class Local(LLaMA):
    """Its predictions depend on the last k tokens and on nothing else. It counts the rows that meet
    the vocabulary."""
    k, rows = 3, 0

    def hidden(self, tokens, positions=None, cache=None, last=None):
        x = self.tok_embeddings(tokens)
        T = x.shape[1]
        past = [torch.nn.functional.pad(x, (0, 0, j, 0))[:, :T] * (j + 1) for j in range(self.k)]
        return torch.stack(past).sum(dim=0).tanh()[:, -(last or T):]

    def nll(self, hidden, targets):
        self.rows += len(hidden)
        return super().nll(hidden, targets)


def local_model(k):
    model = Local(ModelConfig(dim=16, n_layers=1, n_heads=2, vocab_size=VOCAB, multiple_of=8))
    torch.manual_seed(0)
    torch.nn.init.normal_(model.tok_embeddings.weight)
    torch.nn.init.normal_(model.output.weight)
    model.k = k
    return model


def test_a_k_local_model_does_not_feel_the_stride():
    """Every token but those of the first window has at least window - stride + 1 tokens of context:
    one fewer would be felt."""
    documents, window = random_documents(40, 23), 8
    for k in (1, 3, 5):
        exact = nll(local_model(k), documents, window, 1)
        for stride in range(1, window + 1):
            value = nll(local_model(k), documents, window, stride)
            if window - stride + 1 >= k:
                assert value == pytest.approx(exact, rel=1e-6)
            else:
                assert abs(value - exact) > 1e-3


def test_only_scored_positions_meet_the_vocabulary():
    model = local_model(3)
    measured = perplexity(model, random_documents(40, 23, 7), 8, 2, progress=False)
    assert model.rows == measured["tokens"] == 39 + 22 + 6


def test_documents_weigh_by_their_tokens_and_windows_do_not_count():
    model = small_model()
    long, short = random_documents(60, 6)
    one = nll(model, [long], 8, 8)
    two = nll(model, [short], 8, 8)
    both = nll(model, [long, short], 8, 8)
    assert both == pytest.approx((59 * one + 5 * two) / 64, rel=1e-6)
    assert abs(both - (one + two) / 2) > 1e-2  # otherwise the test could not tell


def test_batches_do_not_change_the_result(monkeypatch):
    model, documents, values = small_model(), random_documents(60, 6, 33, 1, 18), []
    for tokens in (1, 20, 64, 10**6):
        def rows(model, length, tokens=tokens):
            return max(1, tokens // length)
        monkeypatch.setattr(jobs, "rows_per_pass", rows)
        values.append(nll(model, documents, 8, 3))
    assert values == pytest.approx([values[0]] * 4, rel=1e-6)


def test_attention_does_not_change_the_result():
    model, documents, values = small_model(), random_documents(60, 6), []
    for model.attention in ("naive", "tiled", "sdpa"):
        values.append(nll(model, documents, 16, 3))
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


def test_token_files_may_be_unsigned():
    model, (document,) = small_model(), random_documents(30)
    assert nll(model, [document], 8, 8) == nll(model, [document.astype(np.uint16)], 8, 8)


def test_a_hopeless_model_is_infinite_and_a_broken_one_is_no_result():
    model = small_model()
    torch.nn.init.normal_(model.output.weight, std=1e4)
    measured = perplexity(model, random_documents(30), 8, 8, progress=False)
    assert measured["perplexity"] == math.inf
    assert math.isfinite(measured["nll"])
    torch.nn.init.constant_(model.output.weight, math.nan)
    with pytest.raises(UserError, match="the loss is not a number: the weights are damaged"):
        perplexity(model, random_documents(30), 8, 8, progress=False)


def test_what_a_broken_model_computed_is_not_kept(tmp_path):
    """The same command works once the weights are whole again."""
    model, cache = small_model(), ResultCache(tmp_path / "r.json")
    whole = model.output.weight[3, 3].item()
    for value in (math.nan, whole):
        torch.nn.init.constant_(model.output.weight[3, 3], value)
        if math.isnan(value):
            with pytest.raises(UserError, match="not a number"):
                perplexity(model, random_documents(30), 8, 8, progress=False, cache=cache)
    kept = perplexity(model, random_documents(30), 8, 8, progress=False, cache=cache)
    assert kept["nll"] == nll(model, random_documents(30), 8, 8)


@pytest.mark.parametrize("window, stride, lengths, words", [
    (0, 1, [30], "at least 1"), (8, 0, [30], "at least 1"), (-3, 1, [30], "at least 1"),
    (8, 9, [30], "greater than window"),
    (8, 8, [1, 0], "nothing to predict"), (8, 8, [], "nothing to predict")])
def test_perplexity_refuses(window, stride, lengths, words):
    with pytest.raises(UserError, match=words):
        perplexity(small_model(), random_documents(*lengths), window, stride, progress=False)


# ---- By context, and by byte ---------------------------------------------------------------------


def loss_after(model, document, begin, end):
    """-ln p of document[end] after document[begin:end], in a pass of its own."""
    logits = model(torch.from_numpy(document[None, begin:end]))[0, -1]
    return -logits.log_softmax(-1)[document[end]].item()


def test_loss_by_context_splits_the_mean_by_tokens_read():
    model, documents = small_model(), random_documents(41, 12)
    whole = perplexity(model, documents, 8, 8, progress=False)
    parts = perplexity(model, documents, 8, 8, progress=False, bins=4)
    assert "context" not in whole
    assert parts["nll"] == pytest.approx(whole["nll"], rel=1e-12)
    assert parts["context"] == [1, 3, 5, 7]
    # Seven windows, of which the last has three predictions.
    assert parts["tokens_by_context"] == [2 * 7, 2 * 6 + 1, 2 * 6, 2 * 6]
    for part in range(4):
        losses = []
        for document in documents:
            for begin in range(0, len(document) - 1, 8):
                for end in (begin + 2 * part + 1, begin + 2 * part + 2):
                    if end < len(document):
                        losses.append(loss_after(model, document, begin, end))
        assert parts["nll_by_context"][part] == pytest.approx(np.mean(losses), rel=1e-5)
    with pytest.raises(UserError, match="9 bins"):
        perplexity(model, documents, 8, 8, progress=False, bins=9)


def test_parts_of_a_window_that_do_not_divide_it_begin_at_whole_tokens():
    """Prediction i of a window of 8 is in part i * 3 // 8: 0 0 0 1 1 1 2 2."""
    parts = perplexity(small_model(), random_documents(9), 8, 8, progress=False, bins=3)
    assert parts["context"] == [1, 4, 7]
    assert parts["tokens_by_context"] == [3, 3, 2]


def test_bits_per_byte_is_a_sum_over_bytes(tokenizer):
    text = "def f(x):\n    return 'naïve'\n"
    ids = np.array(tokenizer.encode(text, bos=True))
    measured = bits_per_byte(2.0, [ids, ids[:1]], tokenizer)
    size = len(text.encode())
    assert measured["bytes"] == size
    expected = 2.0 * (len(ids) - 1) / math.log(2) / size
    assert measured["bits_per_byte"] == pytest.approx(expected)
