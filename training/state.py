"""state.pt, from which an interrupted training run goes on: the state dicts of model and optimizer,
the random generator, step and seconds so far; and what tells one run from another, `settings`
(resumable_settings) and `start` (common.cache.weight_sample of the weights it began with)."""
import contextlib
import dataclasses
import math
import operator
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from common.cli import is_lost_peer, is_out_of_memory
from common.distributed import (is_sharded, join_process_group, load_shards, of_all_ranks,
                                of_first_rank, save_shards, wait_for_all_ranks)
from common.errors import UserError
from common.files import read_json_object, remove
from methods.lora import lora_of
from model import LLaMA
from weights.adapter import adapter_tensors, save_adapter, trained_tensors
from weights.checks import check_archive, check_crc, file_crc32
from weights.save import (ADAPTER_CONFIG, find_file, give_shards, save_model, save_tensors,
                          weight_files)


RUN_REMEDY = "choose another --out, or replace it with --fresh"


def save_run(model: LLaMA, optimizer: torch.optim.Optimizer, out: Path, state: dict[str, Any],
             tokenizer: Any = None) -> None:
    """Write the model's folder, then its training state with `state` in it, each whole or not at
    all.

    In this order the model is never older than the state. A run that dies between the two repeats
    some steps, and a run whose state says that it is finished has its model. With LoRA both hold
    what is trained, and nothing of the frozen base.
    """
    if is_sharded(model):
        save_sharded_run(model, optimizer, out, state, tokenizer)
        return
    save_weights(model, out, tokenizer)
    weights = model.state_dict() if lora_of(model) is None else trained_tensors(model)
    state = {**state, "model": weights, "optimizer": optimizer.state_dict(),
             "rng": torch.get_rng_state()}
    save_tensors(out / "state.pt", state)
    for older in saved_states(out).values():
        shutil.rmtree(older)


def save_weights(model: LLaMA, out: Path, tokenizer: Any) -> None:
    """Write the model's folder, or with LoRA the adapter's."""
    save = save_model if lora_of(model) is None else save_adapter
    save(model, out, tokenizer)


def tensors_in_folder(model: LLaMA) -> list[torch.Tensor]:
    """What is in the file of its weights, in order."""
    if lora_of(model) is None:
        return list(model.state_dict().values())
    return [tensor for _, tensor in adapter_tensors(model)]


def save_sharded_run(model: LLaMA, optimizer: torch.optim.Optimizer, out: Path,
                     state: dict[str, Any], tokenizer: Any) -> None:
    """The same by all ranks. The state is a folder, state.N, with a state.pt that lacks weights and
    optimiser, and in PyTorch's files what each rank holds of these."""
    rank, _ = join_process_group()
    if rank == 0:
        save_weights(model, out, tokenizer)
    else:
        give_shards(tensors_in_folder(model))
    before = saved_states(out)
    number = of_first_rank(1 + max(before, default=0))
    saving, folder = out / f".state.{number}.tmp", out / f"state.{number}"
    save_shards(saving, model, optimizer)
    own = {file.name: file_crc32(file) for file in saving.glob(f"__{rank}_*")}
    state = {**state, "rng": torch.get_rng_state(), "checksums": of_all_ranks(own)}
    if rank == 0:
        save_tensors(saving / "state.pt", state)
        os.replace(saving, folder)
        for older in [*before.values(), out / "state.pt"]:
            if older.exists():
                remove(older)
    wait_for_all_ranks()


def saved_states(out: Path) -> dict[int, Path]:
    """{N: folder} of the states of sharded runs in a folder. A save that was killed before it
    removed the one before leaves two."""
    return {int(folder.suffix[1:]): folder for folder in out.glob("state.*")
            if folder.suffix[1:].isdecimal()}


def newest_state(out: Path) -> Path | None:
    """The newest state.pt: of one process, or in the folder of a sharded state."""
    found = [out / "state.pt", *(folder / "state.pt" for folder in saved_states(out).values())]
    return max((path for path in found if path.exists()),
               key=lambda path: path.stat().st_mtime_ns, default=None)


def resume_run(model: LLaMA, optimizer: torch.optim.Optimizer, config: Any,
               origin: dict[str, Any]) -> tuple[int, float]:
    """Load the training state in config.out into model and optimizer.

    config: a train.FitConfig. origin: `settings` and `start` of the run that is asked for; a run
    with others is a UserError. Returns the step to go on from and the seconds so far, zeros if
    there is no run or config.fresh replaces it.
    """
    path = newest_state(Path(config.out))
    if join_process_group()[1] > 1:
        path = of_first_rank(path)
    if path is None:
        refuse_other_model(config)
    if path is None or config.fresh:
        return 0, 0.0
    with readable(path):
        state = open_state(path)
        # operator.index: a TypeError for what is no whole number.
        step, seconds = operator.index(state["step"]), float(state["seconds"])
        here, there = origin["settings"], state["settings"]
        if "ranks" in here | there:
            here, there = rows_together(here), rows_together(there)
        differences = [f"{name} {there.get(name)} there, {here.get(name)} here"
                       for name in sorted(here | there) if here.get(name) != there.get(name)]
        same_start = torch.equal(state["start"], origin["start"])
    if differences:
        raise UserError(f"{config.out} holds a run with other settings ({'; '.join(differences)}): "
                        f"give the same ones to go on, {RUN_REMEDY}")
    if step > config.steps:
        raise UserError(f"{config.out} holds a run of {step} steps, more than the {config.steps} "
                        f"asked for: {RUN_REMEDY}")
    if not same_start:
        raise UserError(f"{config.out} holds a run that began with other weights, a model that is "
                        f"no longer there: {RUN_REMEDY}")
    of_one_process = path.parent == Path(config.out)
    if of_one_process and is_sharded(model):
        raise UserError(f"{config.out} holds a run of one process: go on without torchrun and "
                        f"--offload, or {RUN_REMEDY}")
    with readable(path):
        if of_one_process:
            model.load_state_dict(state["model"], strict=lora_of(model) is None)
            optimizer.load_state_dict(state["optimizer"])
        else:
            check_shards(path.parent, state.get("checksums", []))
            load_shards(path.parent, model, optimizer)
        torch.set_rng_state(state["rng"])
    return step, seconds


def open_state(path: Path) -> dict[str, Any]:
    """A state.pt, memory-mapped. Damaged bytes raise anything."""
    check_archive(path)
    check_crc(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def check_shards(folder: Path, checksums: list[dict[str, int]]) -> None:
    """A ValueError if a file that save_shards wrote is damaged. PyTorch's format has no checksums:
    they are in state.pt, {file: CRC-32} for each rank that saved. Runs of before have none."""
    rank, world = join_process_group()
    for part in checksums[rank::world]:
        for name, checksum in part.items():
            if file_crc32(folder / name) != checksum:
                raise ValueError(f"{name} is damaged")


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """A UserError for whatever damaged bytes raise, which may be anything."""
    try:
        yield
    except Exception as error:
        if is_lost_peer(error) or is_out_of_memory(error):
            raise
        raise UserError(f"{path}: the state of this run cannot be read ({type(error).__name__}): "
                        f"{RUN_REMEDY}") from None


def refuse_other_model(config: Any) -> None:
    """A UserError if config.out, which has no state, holds a model: it would be written over.

    Two may be: that of a run with the same settings, killed between its first model and its state,
    and with --fresh that of any run. Both have left their settings in run.json.
    """
    out = Path(config.out)
    configs = [find_file(out, name) for name in ("params.json", "config.json", ADAPTER_CONFIG)]
    if not weight_files(out) and not any(file.is_file() for file in configs):
        return
    begun = read_json_object(out / "run.json").get("settings", {})
    same_run = all(begun.get(name) == value for name, value in resumable_settings(config).items())
    may_be_replaced = begun and config.fresh    # a training made it, and --fresh gives it up
    if not (same_run or may_be_replaced):
        raise UserError(f"{out}: holds a model, and no state of a training that could go on: "
                        "choose another --out")


def rows_together(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with the rows of a step in place of how the GPUs share them, which may change."""
    settings = {"ranks": 1} | settings
    shares = [settings.pop(name) for name in ("ranks", "batch_size", "accumulate")]
    return settings | {"rows of a step": math.prod(shares)}


def resumable_settings(config: Any) -> dict[str, Any]:
    """The settings of a train.FitConfig that decide the weights, which all parts of a run share.

    The others (where, how fast, how often it is looked at) may change. At a constant learning rate
    so may the number of steps, as no step depends on it: a finished run is then taken further.
    """
    settings = dataclasses.asdict(config)
    may_change = set(config.may_change_on_resume) | settings_that_are_off(settings)
    if config.schedule == "constant":
        may_change.add("steps")
    return {name: value for name, value in settings.items() if name not in may_change}


def settings_that_are_off(settings: dict[str, Any]) -> set[str]:
    """Settings that decide nothing as the others are: those of LoRA in a training without it. So
    runs from before there were such settings are still taken up."""
    off = set()
    if settings.get("optimizer") == "adamw":
        off.add("optimizer")
    if not settings.get("lora_rank"):
        off |= {name for name in settings if name.startswith("lora_")} | {"base_dtype"}
    return off
