"""Measurements of a long command, kept as soon as they are made.

An interruption then costs only the measurement in hand: the same command finds the others in
OUT.partial and goes on. A key names everything that its value depends on, so that a value is
never taken for another model, text or precision.
"""
import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from common.device import describe_device
from common.distributed import is_sharded, of_first_rank, own_rows
from common.environment import versions
from common.files import check_output, is_stream, write_json
from common.results import matmul_mode


class ResultCache:
    """A dict on the disk, a JSON line for each value. Without `out` nothing is written.

    out: the result file that is being made; its cache lies beside it as OUT.partial. beside: as
    check_output takes it.
    """

    def __init__(self, out: str | Path = "", quiet: bool = False, beside: Sequence[str] = ()):
        if out:
            check_output(out, beside=beside)
        self.out = out
        self.path = Path(f"{out}.partial") if out and not is_stream(out) else None
        self.values: dict[str, Any] = {}
        self.conditions: list = []
        self.lock = threading.Lock()  # several threads may measure
        if self.path and self.path.exists():
            self.read(quiet)

    def read(self, quiet: bool) -> None:
        """Take in what an interrupted run measured."""
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):  # a cut line
                entry = json.loads(line)
                self.values[entry["key"]] = entry["value"]
        if not quiet:
            print(f"{self.path} holds {len(self.values)} measurements of an interrupted run: those "
                  "that fit are not made again (to make them again, delete it)")

    def scoped(self, *conditions: Any) -> "ResultCache":
        """The same cache for measurements that also depend on `conditions`."""
        inner = copy.copy(self)
        inner.conditions = [*self.conditions, *conditions]
        return inner

    def for_model(self, model: torch.nn.Module, *conditions: Any) -> "ResultCache":
        """The same cache for measurements of this model: its weights (four numbers of each
        tensor), shape, positions and arithmetic are conditions."""
        if self.path is None and not is_sharded(model):
            return ResultCache()  # nothing is kept beyond this measurement
        sample = weight_sample(model)   # of a sharded model: all ranks have to come here
        if self.path is None:
            return ResultCache()
        weights = hashlib.sha256(sample.numpy().tobytes()).hexdigest()
        shape = dataclasses.asdict(model.config) | {"rope": model.config.rope.to_dict()}
        return self.scoped(weights, shape, str(model.tok_embeddings.weight.dtype),
                           matmul_mode(model), model.attention, describe_device(model.device),
                           versions(), *conditions)

    def hashed(self, key: Any) -> str:
        """The conditions and the key as 32 hexadecimal digits."""
        text = json.dumps([*self.conditions, key], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def __contains__(self, key: Any) -> bool:
        return self.hashed(key) in self.values

    def get(self, key: Any, compute: Callable[[], Any]) -> Any:
        """The value under `key`; if there is none, compute() is called and kept.

        Either way the value is as JSON gives it back: tuples are lists, keys are text.
        """
        name = self.hashed(key)
        if name not in self.values:
            line = json.dumps({"key": name, "value": compute()})
            with self.lock:
                self.append(line)
                self.values[name] = json.loads(line)["value"]
        return self.values[name]

    def append(self, line: str) -> None:
        """Write a line to the file, on a line of its own even after one that a kill cut."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size > 0:
                file.seek(-1, os.SEEK_END)
                last = file.read(1)
                if last != b"\n":
                    file.write(b"\n")
            file.write(line.encode() + b"\n")

    def write_result(self, result: dict[str, Any]) -> None:
        """Write the result file, where one is asked for, and delete its parts."""
        if self.out:
            write_json(self.out, result)
            self.delete()
            print(f"wrote {self.out}")

    def delete(self) -> None:
        """The result is written: its parts are no longer needed."""
        if self.path:
            self.path.unlink(missing_ok=True)


def weight_sample(model: torch.nn.Module) -> torch.Tensor:
    """The first four numbers of every tensor: enough to tell one training from another, and quick
    for a model of any size."""
    parameters = [own_rows(p).detach() for p in model.parameters()]
    sample = torch.cat([p.flatten()[:4].float().cpu() for p in parameters])
    return of_first_rank(sample) if is_sharded(model) else sample
