"""Forward passes of an evaluation: how many rows at a time, on which cores, what of it is kept, and what every result says."""
import dataclasses
import functools
import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch

from cli import Kept, command_line, describe_device, versions
from weights import original_window, some_weights


def result(model, seed, **measured):
    """What every result says: which model with which positions, measured where and by what; then what came out."""
    return {"model": str(getattr(model, "path", "")), "rope": model.config.rope.to_dict(),
            "original_window": original_window(model.config), **measured,
            "seed": seed, "dtype": str(model.tok_embeddings.weight.dtype).removeprefix("torch."),
            "matmul": matmul(model), "attention": model.attention,
            "device": describe_device(model.device), "versions": versions(), "command": command_line()}


def matmul(model):
    """How the matrices of a float32 model are multiplied: PyTorch's highest, high or medium. None for other weights."""
    if model.tok_embeddings.weight.dtype != torch.float32:
        return None
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # PyTorch does not tell where its newer switches, one for each backend, were used
        return "by backend"


def row_bytes(model, length, generating=False):
    """Memory of one row of a forward pass, about: its widest activations, and the keys and values that generating keeps."""
    c = model.config
    numbers = 3 * c.ffn_dim + 8 * c.dim + (2 * c.n_layers * c.n_kv_heads * c.head_dim if generating else 0)
    scores = 12 * c.n_heads * length**2 if model.attention == "naive" else 0
    return length * numbers * model.tok_embeddings.weight.element_size() + scores


def rows_at_once(model, length, generating=False):
    """Rows of `length` tokens in a forward pass, so that they fill an eighth of a GPU's memory, or 64 MiB on a CPU: enough to keep a core
    busy. The same on every run, as rows computed together differ in the last digits from rows computed apart."""
    budget = 2**26
    if model.device.type == "cuda":
        budget = torch.cuda.get_device_properties(model.device).total_memory // 8
    return max(1, min(budget // row_bytes(model, length, generating), 2**15))


def in_turn(function, jobs, model, keep, size):
    """Yields function(*job) for every job of {key: job}, in order, while the following ones are at work; what is kept is not computed again.

    On a CPU each core takes a job of its own, as far as 2 GiB allow (size: bytes of the largest): shared among the cores, every single
    operation would have them wait for one another at its end. On a GPU a second thread queues the next pass while the first one fetches.
    """
    before = torch.get_num_threads()
    workers = max(1, min(before, len(jobs), 2**31 // max(size, 1))) if model.device.type == "cpu" else 2
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(max(1, before // workers),))
    try:
        futures = {key: pool.submit(keep, key, functools.partial(function, *jobs[key])) for key in jobs if key not in keep}
        for key in jobs:
            yield futures.pop(key).result() if key in futures else keep(key, None)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def store(keep, model, *conditions):
    """The cli.Kept of a measurement: what it depends on stands in front of its keys, weights (four numbers of each tensor), shape, positions
    and arithmetic first."""
    if keep is None or keep.path is None:
        return Kept()
    weights = hashlib.sha256(some_weights(model).numpy().tobytes()).hexdigest()
    shape = dataclasses.asdict(model.config) | {"rope": model.config.rope.to_dict()}
    return keep.within(weights, shape, str(model.tok_embeddings.weight.dtype), matmul(model), model.attention,
                       describe_device(model.device), versions(), *conditions)
