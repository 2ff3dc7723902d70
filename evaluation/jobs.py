"""Forward passes of an evaluation, made fast: how many rows at a time, and on which cores."""
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from common.cache import ResultCache
from common.distributed import is_sharded, join_process_group, of_all_ranks, of_first_rank

CPU_BYTES_PER_PASS = 2**26       # enough rows to keep a core busy
CPU_BYTES_OF_ALL_PASSES = 2**31  # of the passes that run side by side
MOST_ROWS = 2**15


def row_bytes(model: torch.nn.Module, length: int, generating: bool = False) -> int:
    """About the memory of one row of a forward pass: its widest activations, and with `generating`
    the cached keys and values."""
    c = model.config
    numbers = 3 * c.ffn_dim + 8 * c.dim
    if generating:
        numbers += 2 * c.n_layers * c.n_kv_heads * c.head_dim
    size = length * numbers * model.tok_embeddings.weight.element_size()
    if model.attention == "naive":
        size += 3 * 4 * c.n_heads * length**2  # float32 scores, their mask and softmax
    return size


def rows_per_pass(model: torch.nn.Module, length: int, generating: bool = False) -> int:
    """How many rows of `length` tokens to compute together: an eighth of a GPU's memory, or 64 MiB
    on a CPU. The same on every run, as rows computed together differ in the last digits from rows
    computed apart."""
    budget = CPU_BYTES_PER_PASS
    if model.device.type == "cuda":
        budget = torch.cuda.get_device_properties(model.device).total_memory // 8
    return max(1, min(budget // row_bytes(model, length, generating), MOST_ROWS))


def parallel_map(function: Callable, jobs: Mapping[Any, tuple], model: torch.nn.Module,
                 cache: ResultCache, job_bytes: int) -> Iterator[Any]:
    """Yield function(*arguments) for every {key: arguments} of `jobs`, in order. What the cache
    holds is not computed again.

    On a CPU each core takes a job of its own, as many as 2 GiB hold (job_bytes: the largest job).
    One job on all cores would be slower: after every operation they wait for the slowest. On a GPU
    a second thread queues the next pass while the first one fetches its result. Several ranks share
    the jobs. FSDP gathers weights for one pass at a time.
    """
    if join_process_group()[1] > 1 or is_sharded(model):
        yield from shared_map(function, jobs, model, cache)
        return
    threads = torch.get_num_threads()
    workers = 2
    if model.device.type == "cpu":
        workers = max(1, min(threads, len(jobs), CPU_BYTES_OF_ALL_PASSES // max(job_bytes, 1)))
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads,
                              initargs=(max(1, threads // workers),))
    try:
        futures = {}
        for key, arguments in jobs.items():
            if key not in cache:
                futures[key] = pool.submit(cache.get, key, functools.partial(function, *arguments))
        for key in jobs:
            if key in futures:
                yield futures.pop(key).result()  # popped: a result is not kept twice
            else:
                yield cache.get(key, lambda: None)  # it is held: nothing is computed
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def shared_map(function: Callable, jobs: Mapping[Any, tuple], model: torch.nn.Module,
               cache: ResultCache) -> Iterator[Any]:
    """The same by all ranks together, each its share, one job after another. If the ranks share the
    weights as well, each pass needs them all, and every rank computes every job.

    Every rank has to come here, and gets all values; what is known already is in rank 0's cache.
    """
    rank, world = (0, 1) if is_sharded(model) else join_process_group()
    known = of_first_rank({key: cache.get(key, lambda: None) for key in jobs if key in cache})
    missing = [key for key in jobs if key not in known]
    for start in range(0, len(missing), world):  # a job each, so that little is lost by a kill
        own = missing[start + rank:start + rank + 1]
        for of_rank in of_all_ranks({key: function(*jobs[key]) for key in own}):
            for key, value in of_rank.items():
                known[key] = cache.get(key, lambda value=value: value)
    for key in jobs:
        yield known[key]


class Window(NamedTuple):
    """A piece of a document that the model reads at a time, tokens[begin:end]. Of its predictions
    the first `skip` were scored by the window before."""
    document: int
    begin: int
    end: int
    skip: int

    @property
    def length(self) -> int:
        return self.end - self.begin


def map_windows(function: Callable[[list[Window]], Any], windows: Sequence[Window],
                model: torch.nn.Module, cache: ResultCache, title: str, progress: bool = True
                ) -> Iterator[Any]:
    """Yield function(batch) for batches of `windows` of equal length, as many rows as memory
    allows. The order is fixed, so that sums are reproducible: by length, then by skip, as a batch
    computes states from its smallest skip on."""
    ordered = sorted(windows, key=lambda w: (w.length, w.skip))
    jobs = {}
    for length, equal in groupby(ordered, key=lambda w: w.length):
        equal = list(equal)
        rows = rows_per_pass(model, length)
        for i in range(0, len(equal), rows):
            batch = equal[i:i + rows]
            key = tuple((w.document, w.begin) for w in batch)
            jobs[key] = (batch,)  # the arguments of function
    longest = ordered[-1].length
    job_bytes = rows_per_pass(model, longest) * row_bytes(model, longest)
    with tqdm(total=len(jobs), desc=title, unit="pass", leave=False,
              disable=None if progress else True) as bar:  # None: a bar only on a terminal
        for value in parallel_map(function, jobs, model, cache, job_bytes):
            yield value
            bar.update()
