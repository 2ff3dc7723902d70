"""Long evaluations: measurements outlive an interruption, and passes share the cores."""
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import eval as evaluation
from common.cache import ResultCache, weight_sample
from common.device import matmul_precision
from eval import passkey, perplexity, window_nll
from evaluation import grid, jobs
from evaluation.jobs import Window, map_windows, parallel_map, row_bytes, rows_per_pass
from small_models import Countdown, random_documents, small_model

# ---- ResultCache ---------------------------------------------------------------------------------


def test_a_cache_tells_conditions_apart(tmp_path):
    computed = []
    for condition, is_new in (("a", True), ("b", True), ("a", False)):
        computed.clear()

        def compute(condition=condition):
            computed.append(condition)
            return [condition, (1, 2.5)]
        cache = ResultCache(tmp_path / "out.json").scoped(condition)
        value = cache.get("key", compute)
        assert value == [condition, [1, 2.5]], "as JSON gives it back, cached or not"
        assert bool(computed) is is_new


def test_conditions_add_up(tmp_path):
    cache = ResultCache(tmp_path / "out.json")
    cache.scoped("a").scoped("b").get("key", lambda: 1)
    assert "key" in cache.scoped("a", "b")
    assert "key" not in cache.scoped("b", "a")
    assert "key" not in cache.scoped("a")
    assert "key" not in cache


def test_lines_that_are_no_measurement_cost_nothing(tmp_path):
    cache = ResultCache(tmp_path / "out.json")
    cache.get("one", lambda: 1)
    with open(cache.path, "ab") as file:
        file.write(b"[" * 100_000 + b"\nnull\n7\n{}\n\xff\n")
    assert ResultCache(tmp_path / "out.json", quiet=True).values == cache.values


def test_a_line_that_a_kill_cut_costs_nothing_but_itself(tmp_path, capsys):
    out = tmp_path / "out.json"
    cache = ResultCache(out)
    cache.get("one", lambda: 1)
    with open(cache.path, "ab") as file:
        file.write(b'{"key": "cut by a ki')
    ResultCache(out).get("two", lambda: 2)
    assert capsys.readouterr().out.startswith(f"{cache.path} holds 1 measurements of an "
                                              "interrupted run: those that fit")
    cache = ResultCache(out, quiet=True)
    assert "one" in cache
    assert "two" in cache
    assert capsys.readouterr().out == ""
    for line in cache.path.read_text(encoding="utf-8").splitlines():
        assert line.startswith('{"key"')


def test_a_deleted_cache_leaves_no_file(tmp_path):
    cache = ResultCache(tmp_path / "new" / "out.json")
    cache.delete()
    cache.get("key", lambda: 1)
    assert cache.path == tmp_path / "new" / "out.json.partial"
    assert cache.path.exists()
    cache.delete()
    assert list((tmp_path / "new").iterdir()) == []


def test_without_a_file_nothing_is_kept_beyond_a_measurement():
    cache = ResultCache()
    cache.get("key", lambda: 1)
    assert "key" in cache
    assert "key" not in cache.for_model(small_model(), "key")
    cache.delete()


def test_a_sample_of_the_weights_has_four_numbers_of_every_tensor():
    model = small_model()
    sample = weight_sample(model)
    assert len(sample) == 4 * len(list(model.parameters()))
    for n, parameter in enumerate(model.parameters()):
        assert torch.equal(sample[4 * n:4 * n + 4], parameter.detach().flatten()[:4])


# ---- Interruptions -------------------------------------------------------------------------------


def measure_perplexity(model, tokenizer, cache):
    return perplexity(model, random_documents(90, 41), 16, 8, progress=False, bins=2, cache=cache)


def measure_passkey(model, tokenizer, cache):
    return passkey(model, tokenizer, [90, 100], 3, 4, progress=False, cache=cache)


def without_seconds(measured):
    return {name: value for name, value in measured.items() if name != "seconds"}


@pytest.mark.parametrize("name, measure", [("window_nll", measure_perplexity),
                                           ("retrieve_passkeys", measure_passkey)])
def test_measurements_of_an_interrupted_run_are_not_made_again(name, measure, tokenizer, tmp_path,
                                                               monkeypatch):
    for module in (jobs, grid):
        monkeypatch.setattr(module, "rows_per_pass", lambda model, length, generating=False: 2)
    model, out = small_model(vocab_size=tokenizer.vocab_size), tmp_path / "out.json"
    function = getattr(evaluation, name)

    def counting(calls=10**6):
        counted = Countdown(function, calls)
        monkeypatch.setattr(evaluation, name, counted)
        return counted
    expected = measure(model, tokenizer, None)
    everything = counting()
    measure(model, tokenizer, None)
    assert everything.made > 5

    broken = counting(calls=4)
    with pytest.raises(KeyboardInterrupt):
        measure(model, tokenizer, ResultCache(out))
    with open(f"{out}.partial", "ab") as file:
        file.write(b'{"key": "cut by a ki')
    rest = counting()
    cache = ResultCache(out)
    resumed = measure(model, tokenizer, cache)
    assert broken.made == 4
    assert rest.made == everything.made - 4
    assert without_seconds(resumed) == without_seconds(expected)

    with torch.no_grad():
        model.norm.weight[0] = 2.0  # another model: no cached number is its
    other = counting()
    measure(model, tokenizer, ResultCache(out))
    assert other.made == everything.made
    cache.delete()
    assert list(tmp_path.iterdir()) == []


def test_another_shape_of_the_model_is_measured_anew(tmp_path):
    model, documents = small_model(), random_documents(30)

    def measured():
        cache = ResultCache(tmp_path / "out.json")
        return perplexity(model, documents, 8, 4, progress=False, cache=cache)["nll"]
    first = measured()
    assert measured() == first
    model.config.norm_eps = 0.1
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 0.1  # the same weights, another model
    assert measured() != first


def test_documents_cut_elsewhere_are_measured_anew(tmp_path):
    model, (text,) = small_model(), random_documents(30)

    def measured(cut):
        cache = ResultCache(tmp_path / "out.json")
        return perplexity(model, [text[:cut], text[cut:]], 8, 4, progress=False, cache=cache)["nll"]
    first = measured(15)
    assert measured(16) != first
    assert measured(15) == first


def test_another_precision_is_measured_anew(tmp_path, monkeypatch):
    model, documents = small_model(), random_documents(15, 15)
    counted = Countdown(window_nll)
    monkeypatch.setattr(evaluation, "window_nll", counted)
    for precision, is_new in (("highest", True), ("medium", True), ("highest", False),
                              ("medium", False)):
        counted.made = 0
        with matmul_precision(precision):
            cache = ResultCache(tmp_path / "out.json")
            perplexity(model, documents, 8, 4, progress=False, cache=cache)
        assert (counted.made > 0) == is_new


def test_conditions_of_a_measurement(tmp_path):
    """Measurements of an interrupted run are found by a hash of these. Where a name comes or goes,
    all of them are made again."""
    model = small_model()
    cache = ResultCache(tmp_path / "out.json").for_model(model, "perplexity", 16)
    weights, shape, *arithmetic = cache.conditions
    assert len(weights) == 64
    assert shape["rope"] == model.config.rope.to_dict()
    assert set(shape) == {
        "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of",
        "ffn_dim_multiplier", "norm_eps", "max_seq_len", "rope", "head_dim", "ffn_dim", "tied"}
    dtype, matmul, attention, device, versions, *conditions = arithmetic
    assert (dtype, matmul, attention) == ("torch.float32", "highest", "auto")
    assert device == f"cpu ({torch.get_num_threads()} threads)"
    assert set(versions) == {"python", "torch", "numpy"}
    assert conditions == ["perplexity", 16]
    json.dumps(cache.conditions)  # which is what is hashed


# ---- Passes side by side -------------------------------------------------------------------------


def threads_here_and_in_a_new_thread():
    """PyTorch has a number for each thread, and one for threads that come."""
    with ThreadPoolExecutor(1) as pool:
        return torch.get_num_threads(), pool.submit(torch.get_num_threads).result()


def test_jobs_come_back_in_order_and_the_threads_stay_as_they_were():
    torch.set_num_threads(2)
    waits = {i: (0.03 if i % 2 else 0.0, i) for i in range(8)}

    def slow_identity(wait, i):
        time.sleep(wait)
        return i
    given = parallel_map(slow_identity, waits, small_model(), ResultCache(), 1)
    assert list(given) == list(range(8))
    assert threads_here_and_in_a_new_thread() == (2, 2)
    with pytest.raises(ZeroDivisionError):
        list(parallel_map(lambda wait, i: 1 // (i - 3), waits, small_model(), ResultCache(), 1))
    assert threads_here_and_in_a_new_thread() == (2, 2)


def test_finished_jobs_are_kept_although_an_earlier_one_is_not(tmp_path):
    torch.set_num_threads(2)
    others_are_done = threading.Event()

    def job(i):
        if i == 0:  # broken off after all others
            others_are_done.wait(10)
            raise KeyboardInterrupt
        if i == 7:
            others_are_done.set()
        return i
    cache = ResultCache(tmp_path / "out.json")
    with pytest.raises(KeyboardInterrupt):
        list(parallel_map(job, {i: (i,) for i in range(8)}, small_model(), cache, 1))
    cache = ResultCache(tmp_path / "out.json")
    assert 0 not in cache
    assert all(i in cache for i in range(1, 8))


@pytest.mark.parametrize("job_bytes, expected", [(2**20, 2), (2**31, 1)])
def test_large_passes_are_not_made_side_by_side(job_bytes, expected):
    torch.set_num_threads(2)
    running, most, lock = [], [], threading.Lock()

    def job(i):
        with lock:
            running.append(i)
            most.append(len(running))
        time.sleep(0.02)
        with lock:
            running.remove(i)
    list(parallel_map(job, {i: (i,) for i in range(6)}, small_model(), ResultCache(), job_bytes))
    assert max(most) == expected


def test_windows_of_one_length_go_together(monkeypatch):
    """In an order that depends on nothing else: by length, by skip, then as they come."""
    monkeypatch.setattr(jobs, "rows_per_pass", lambda model, length: 2)
    windows = [Window(0, 0, 8, 0), Window(0, 4, 12, 4), Window(0, 8, 11, 4), Window(1, 0, 8, 0),
               Window(1, 4, 12, 4), Window(2, 0, 8, 0)]
    batches = list(map_windows(lambda batch: batch, windows, small_model(), ResultCache(), "",
                               progress=False))
    batches = [[Window(*window) for window in batch] for batch in batches]
    assert batches == [[windows[2]], [windows[0], windows[3]], [windows[5], windows[1]],
                       [windows[4]]]
    assert [window.length for window in windows] == [8, 8, 3, 8, 8, 8]


def test_a_forward_pass_has_a_row_at_least_and_more_of_shorter_ones():
    model = small_model()
    assert rows_per_pass(model, 10**9) == 1
    assert rows_per_pass(model, 64) > rows_per_pass(model, 4096) > 1
    roomy = rows_per_pass(model, 1024)
    assert roomy > rows_per_pass(model, 1024, generating=True)
    model.attention = "naive"
    assert roomy > rows_per_pass(model, 1024)


def test_a_row_takes_its_activations_and_the_cached_keys_and_values():
    """F = 48, C = 16, two layers of two heads of 8, in float32."""
    model = small_model()
    assert model.config.ffn_dim == 48
    activations = 4 * (3 * 48 + 8 * 16)
    assert row_bytes(model, 100) == 100 * activations
    cached = 4 * 2 * 2 * 2 * 8
    assert row_bytes(model, 100, generating=True) == 100 * (activations + cached)
    model.attention = "naive"
    assert row_bytes(model, 100) == 100 * activations + 12 * 2 * 100**2
