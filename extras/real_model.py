"""The paper's argument on a real pretrained LLaMA: SmolLM2-135M from 8,192 to 16,384 tokens, on a
CPU if it has to be.

    python -m weights fetch                     # the model, 93 MB
    python extras/real_model.py                 # PI and direct fine-tuning, 25 steps
    python extras/real_model.py --untrained yarn ntk_by_parts      # and these, not fine-tuned
    python extras/real_model.py --methods default linear yarn ntk_by_parts \\
        '{"rope_type": "dprope", "interpolated_dims": 40}' --steps 10 25 50 100 --keys 3 --seeds 0 1

Every method sees the same rows in the same order. A row has only 1,024 tokens, but its positions
skip (PoSE) and so reach 16,384: that is what makes a step cheap. Each model reads the first 16,384
tokens of texts that it was not fine-tuned on as one window, and its loss is averaged by position:
inside the old window, and beyond it.

LoRA beside full fine-tuning, at equal tokens:

    python extras/real_model.py --methods linear --lora-rank 0 8

Without any training, for methods that need none:

    python extras/real_model.py --steps 0 --keys 3 --methods default yarn \\
        '{"rope_type": "self_extend", "temperature": "log_n"}'

Every training saves itself and every measurement is kept: after an interruption the same command
goes on. It goes on, too, with more --steps, --methods, --seeds, --lora-rank or --keys than before.
Rows that --out holds already are not measured again, so that the work may be done in pieces. A
training takes some 2 GB of disk for SmolLM2.
"""
import dataclasses
import functools
import itertools
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the core lies one folder up

import numpy as np
import torch

from common.cache import ResultCache
from common.cli import field, parse, run_command
from common.device import choose_device, describe_device
from common.environment import command_line, versions
from common.errors import UserError
from common.files import check_output, read_json, write_json
from data.corpus import ensure_corpus, read_documents, validation_documents
from data.tokenizer import Tokenizer
from eval import CONVENTIONS, passkey, perplexity
from extras.sweep import Run, corpus_label, is_past, load_tokenizer_once, weight_digest
from extras.sweep_tables import Table, cell, markdown
from finetune import FinetuneConfig
from methods import ALIASES, parse_rope_flag
from model import LLaMA
from plot import method_label, plot_real_model
from train import fit
from training.extension import load_extended, training_batches
from training.state import resumable_settings
from weights import load_config

PARTS = 16  # of the window L', in which the loss is averaged
# Shown in the tables, in sixteenths of L': without the first tokens, which have little context.
BANDS = [(1, 4), (4, 8), (8, 12), (12, 16)]
FIRST_COLUMNS = ["method", "steps", "tokens seen"]


@dataclass
class RealModelConfig:
    model: str = field("out/smollm2/smollm2-135m-instruct.gguf", "pretrained model")
    methods: list[str] = field(["default", "linear"], "names or JSON objects; default is direct "
                               "fine-tuning")
    untrained: list[str] = field([], "methods that are only measured, without training")
    factor: float = field(2.0, "s = L'/L")
    steps: list[int] = field([10, 25], "measured after so many optimiser steps, and untrained; 0 "
                             "trains nothing")
    seeds: list[int] = field([0], "of the order of the training rows, and of the keys")
    batch_size: int = field(4, "rows of a step")
    row_length: int = field(1024, "tokens of a row")
    lora_rank: list[int] = field([0], "train by LoRA with each of these ranks; 0 is full "
                                 "fine-tuning")
    lr: float = field(1e-4, "learning rate, constant after the warm-up")
    warmup: int = field(5, "steps of linear warm-up")
    corpus: str = field("data/corpora/python", "token folder to train on; the default one, Python "
                        "source, is made if it is not there")
    corpus_mb: float = field(32.0, "megabytes of Python source in the default corpus, if made")
    text: list[str] = field([], "UTF-8 files to measure on, each a kind of text [held-out Python "
                            "source, and the prose of Python's language reference]")
    keys: int = field(0, "passkeys at each quarter of L', evenly spaced over the prompt, for the "
                      "untrained and the last model; 0 measures none")
    device: str = field("auto", "auto, cpu, cuda or mps")
    dtype: str = field("auto", "of the training's matrix products",
                       choices=["auto", "float32", "bfloat16"])
    folder: str = field("out/real-model", "where models and measurements lie")
    out: str = field("out/real-model.json", "tables, as JSON, with a figure beside it")


def main(argv: Sequence[str] | None = None) -> None:
    c = parse(RealModelConfig, __doc__, argv)
    c.methods = list(dict.fromkeys(ALIASES.get(method, method) for method in c.methods))
    c.untrained = list(dict.fromkeys(ALIASES.get(method, method) for method in c.untrained))
    c.steps, c.seeds = sorted(set(c.steps)), list(dict.fromkeys(c.seeds))
    c.lora_rank = list(dict.fromkeys(c.lora_rank))
    check_request(c)
    device, base = choose_device(c.device), load_config(c.model)
    L, window = base.original_window, round(base.original_window * c.factor)
    tokenizer = load_tokenizer_once(c.model)
    c.corpus = str(ensure_corpus(c.corpus, tokenizer.path, c.corpus_mb))
    trained = [steps for steps in c.steps if steps > 0]
    for run in itertools.product(c.methods, c.seeds, c.lora_rank) if trained else []:
        # Another training in a folder is refused now, not after hours.
        is_past(settings_of_run(c, *run, trained[-1]), trained[-1])
    documents = documents_to_measure(c, tokenizer, window)
    tokens = c.batch_size * c.row_length
    print(f"device     {describe_device(device)}\n"
          f"model      {c.model}, window {L} -> {window}")
    if trained:
        print(f"step       {c.batch_size} rows x {c.row_length} = {tokens:,} tokens, at positions "
              f"up to {window - 1}")
    print(f"measured   on {', '.join(documents)}: untrained"
          + (f" and after {', '.join(map(str, trained))} steps" if trained else ""), flush=True)

    report = {
        "model": c.model, "rope": base.rope.to_dict(), "original_window": L, "window": window,
        **CONVENTIONS, "documents": {kind: len(ids) for kind, ids in documents.items()},
        "corpus": read_json(Path(c.corpus) / "meta.json")["splits"]["train"],
        "bands": BANDS, "settings": dataclasses.asdict(c), "seed": c.seeds[0],
        "device": describe_device(device), "versions": versions(), "command": command_line()}
    started = time.perf_counter()
    known = known_rows(c)
    rows: list[dict[str, Any]] = []
    runs = [(method, c.seeds[0], 0, [0]) for method in c.untrained if method not in c.methods]
    for seed, rank, method in itertools.product(c.seeds, c.lora_rank, c.methods):
        is_first = (seed, rank) == (c.seeds[0], c.lora_rank[0])
        runs.append((method, seed, rank, [0, *trained] if is_first else trained))
    for method, seed, rank, steps in runs:
        rows += run_method(c, method, seed, rank, steps, documents, tokenizer, device, known)
        seconds = time.perf_counter() - started
        made = [identity(row) for row in rows]
        others = [row for row in known.values() if identity(row) not in made]
        save_report(c, report | {"rows": rows + others, "seconds": seconds})
    for table in tables(read_json(c.out)):
        print(markdown(*table))
    print(f"\n(each text read once, as one window of {window:,} tokens; seeds "
          f"{' '.join(map(str, c.seeds))}, ± half the range)\nwrote {c.out} and "
          f"{Path(c.out).with_suffix('.png')}")


def check_request(c: RealModelConfig) -> None:
    """A UserError for settings that cannot work, before any work."""
    check_output(c.out, beside=[".png"])
    if not (1 < c.factor and math.isfinite(c.factor)):
        raise UserError(f"--factor {c.factor}: give a number above 1")
    window = round(load_config(c.model).original_window * c.factor)
    if min(c.keys, c.warmup, *c.steps, *c.seeds, *c.lora_rank) < 0:
        raise UserError("--steps, --warmup, --keys, --seeds and --lora-rank have to be at least 0")
    if c.steps == [0] and (len(c.seeds) > 1 or c.lora_rank != [0]):
        raise UserError("--steps 0: untrained there is one row a method: give one of --seeds, and "
                        "no --lora-rank")
    if c.batch_size < 1 or not (c.lr > 0 and math.isfinite(c.lr)):
        raise UserError("--batch-size has to be at least 1, --lr above 0")
    if not 1 <= c.row_length <= window:
        raise UserError(f"--row-length {c.row_length}: has to be from 1 to L' = {window}")
    for method in [*c.methods, *c.untrained]:
        if parse_rope_flag(method).get("factor", c.factor) != c.factor:
            raise UserError(f"{method}: its own factor contradicts --factor {c.factor:g}: give one "
                            "of them")
    if len({Path(path).stem for path in c.text}) < len(c.text):
        raise UserError("--text: two files have the same name, which is that of their table: "
                        "rename one of them")


# ---- The texts -----------------------------------------------------------------------------------


def documents_to_measure(c: RealModelConfig, tokenizer: Tokenizer, window: int
                         ) -> dict[str, np.ndarray]:
    """{kind of text: its first L' + 1 tokens}. By default none of it is in the training text; for
    --text the user has to see to that."""
    length = window + 1
    if c.text:
        return {Path(path).stem: read_documents([path], tokenizer, length, window)[0]
                for path in c.text}
    code = validation_documents(c.corpus, length, length, tokenizer)[0]
    prose = np.array(tokenizer.encode(language_reference(), bos=True))
    if len(prose) < length:
        raise UserError(f"the prose of Python's language reference has {len(prose)} tokens, "
                        f"{length} are needed: name texts with --text")
    return {f"held-out {corpus_label(c.corpus)}": code, "language reference": prose[:length]}


def language_reference() -> str:
    """The help texts that come with every Python, excerpts of its language reference."""
    from pydoc_data.topics import topics
    return "\n\n".join(topics[name] for name in sorted(topics))


# ---- One method ----------------------------------------------------------------------------------


MAY_GROW = {"methods", "untrained", "steps", "seeds", "lora_rank", "keys", "folder", "out"}


def known_rows(c: RealModelConfig) -> dict[str, dict[str, Any]]:
    """The rows of --out, if that is an earlier piece of this work: by a hash of all that they
    depend on. They stay in it."""
    if not Path(c.out).is_file():
        return {}
    report, settings = read_json(c.out), dataclasses.asdict(c)
    there = report.get("settings", {})
    if any(there.get(name) != settings[name] for name in settings.keys() - MAY_GROW):
        return {}
    return {row["conditions"]: row for row in report["rows"] if "conditions" in row}


def identity(row: dict[str, Any]) -> tuple:
    """What a row is a measurement of, whatever it was made with."""
    return row["method"], row["seed"], row["steps"], row.get("lora_rank")


def run_method(c: RealModelConfig, method: str, seed: int, rank: int, numbers_of_steps: list[int],
               documents: dict[str, np.ndarray], tokenizer: Tokenizer, device: torch.device,
               known: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Measure a method after every number of steps, 0 among them for the first seed and rank:
    untrained it is the same for all. A row each; with LoRA it says the rank."""
    cache = ResultCache(f"{training_folder(c, method, seed, rank)}.json", quiet=True)
    rows = []
    for steps in numbers_of_steps:
        keys = c.keys if steps in (0, c.steps[-1]) else 0
        settings = settings_of_run(c, method, seed, rank if steps else 0, max(steps, 1))
        conditions = ["row", weight_digest(c.model), resumable_settings(settings), steps,
                      read_json(Path(c.corpus) / "meta.json")["splits"], device.type,
                      {kind: ids.tolist() for kind, ids in documents.items()}, versions()]

        measure = functools.partial(train_and_measure, settings, steps, documents, tokenizer,
                                    device, cache)
        find = functools.partial(train_and_find_keys, settings, steps, keys, tokenizer, device,
                                 cache)
        row = {"method": method, "seed": seed, "steps": steps,
               **({"lora_rank": rank} if rank and steps else {}),
               "tokens_seen": steps * c.batch_size * c.row_length,
               "conditions": cache.hashed(conditions)}
        row = (known.get(row["conditions"]) or cache.get(conditions, measure)) | row
        if keys and row.get("keys") != keys:
            row |= cache.get([*conditions, keys], find)
        print(row_summary(row), flush=True)
        rows.append(row)
    return rows


def train_and_measure(settings: FinetuneConfig, steps: int, documents: dict[str, np.ndarray],
                      tokenizer: Tokenizer, device: torch.device, cache: ResultCache
                      ) -> dict[str, Any]:
    """What a row says beside its name: the model after `steps` steps, measured."""
    model, seconds = model_after(settings, steps, tokenizer, device)
    row = {"rope": model.config.rope.to_dict(), "training_seconds": seconds}
    return row | losses(model, documents, cache)


def train_and_find_keys(settings: FinetuneConfig, steps: int, keys: int, tokenizer: Tokenizer,
                        device: torch.device, cache: ResultCache) -> dict[str, Any]:
    """What a row says of passkeys: how many were found after `steps` steps, by length."""
    model, _ = model_after(settings, steps, tokenizer, device)
    return {"keys": keys,
            "passkeys_found": passkeys_found(model, tokenizer, keys, settings.seed, cache)}


def training_folder(c: RealModelConfig, method: str, seed: int, rank: int) -> Path:
    name = Run(method, c.factor, seed, steps=()).name
    return Path(c.folder) / (f"{name}-lora{rank}" if rank else name)


def settings_of_run(c: RealModelConfig, method: str, seed: int, rank: int, steps: int
                    ) -> FinetuneConfig:
    return FinetuneConfig(
        model=c.model, rope=method, factor=c.factor, lora_rank=rank,
        out=str(training_folder(c, method, seed, rank)), steps=steps, batch_size=c.batch_size,
        row_length=c.row_length, positions="pose", lr=c.lr, schedule="constant", warmup=c.warmup,
        passkey_share=0.0, seed=seed, corpus=c.corpus, device=c.device, dtype=c.dtype,
        save_every=5, eval_every=10**6, log_every=1)


def model_after(settings: FinetuneConfig, steps: int, tokenizer: Tokenizer, device: torch.device
                ) -> tuple[LLaMA, float]:
    """The pretrained model with a method's positions after `steps` steps, and the seconds of its
    training so far."""
    base = load_config(settings.model)
    L, window = base.original_window, round(base.original_window * settings.factor)
    rope = {"factor": settings.factor} | parse_rope_flag(settings.rope)
    if rope["rope_type"] == "default":
        rope["factor"] = 1.0
    training = settings if steps else None
    model = load_extended(settings.model, rope, L, window, device, "auto", training)
    if steps == 0:
        return model, 0.0
    if is_past(settings, steps):
        raise UserError(f"{settings.out} holds a training of more than {steps} steps: to measure "
                        "it there, give another --folder")
    batches = training_batches(settings, rope, base, tokenizer, ranks=1)
    return model, fit(model, settings, batches, None, tokenizer)


def losses(model: LLaMA, documents: dict[str, np.ndarray], cache: ResultCache
           ) -> dict[str, dict[str, Any]]:
    """The loss by position in each document, read as one window."""
    window = model.config.max_seq_len
    measured = {kind: perplexity(model, [document], window, window, bins=PARTS, cache=cache)
                for kind, document in documents.items()}
    return {"nll_by_position": {kind: found["nll_by_context"] for kind, found in measured.items()},
            "perplexity": {kind: found["perplexity"] for kind, found in measured.items()}}


def passkeys_found(model: LLaMA, tokenizer: Tokenizer, keys: int, seed: int, cache: ResultCache
                   ) -> dict[int, int]:
    """{length of the prompt: how many of `keys` passkeys were found} at each quarter of L'."""
    lengths = [quarter * model.config.max_seq_len // 4 for quarter in range(1, 5)]
    found = {n: passkey(model, tokenizer, [n], keys, 1, seed, cache=cache) for n in lengths}
    return {n: round(found[n]["accuracy"][n] * keys) for n in lengths}


# ---- The report ----------------------------------------------------------------------------------


def by_band(row: dict[str, Any], kind: str) -> list[float]:
    """Perplexity in each of BANDS: exp of the mean loss of its parts, which are equally long."""
    nll = row["nll_by_position"][kind]
    return [math.exp(sum(nll[first:last]) / (last - first)) for first, last in BANDS]


def row_summary(row: dict[str, Any]) -> str:
    """A row as a line: perplexity in each band, for each kind of text."""
    texts = [f"{kind} " + " ".join(f"{value:.1f}" for value in by_band(row, kind))
             for kind in row["perplexity"]]
    found = " ".join(f"{n}: {count}" for n, count in row.get("passkeys_found", {}).items())
    return (f"{row_label(row)}, seed {row['seed']}, {row['steps']} steps: "
            f"{'; '.join(texts)}" + (f"; passkeys found {found}" if found else ""))


def tables(report: dict[str, Any]) -> list[Table]:
    """For every kind of text a table of perplexity by position, and one of the passkeys found."""
    groups: dict[tuple[str, int], list[dict]] = {}  # rows that differ in the seed
    for row in report["rows"]:
        groups.setdefault((row_label(row), row["steps"]), []).append(row)
    kinds = report["rows"][0]["perplexity"]
    found = [perplexity_table(groups, kind, report["window"]) for kind in kinds]
    if any("keys" in row for row in report["rows"]):
        found.append(passkey_table(groups, report["window"]))
    return found


def row_label(row: dict[str, Any]) -> str:
    rank = row.get("lora_rank")
    return method_label(row["method"]) + (f", LoRA r = {rank}" if rank else "")


def first_cells(group: list[dict]) -> list[str]:
    row = group[0]
    return [row_label(row), str(row["steps"]), f"{row['tokens_seen']:,}"]


def perplexity_table(groups: dict[tuple, list[dict]], kind: str, window: int) -> Table:
    bands = [f"{first * window // PARTS:,} to {last * window // PARTS:,}" for first, last in BANDS]
    body = []
    for group in groups.values():
        by_seed = [by_band(row, kind) for row in group]
        body.append(first_cells(group) + [cell(seeds, 1) for seeds in zip(*by_seed)])
    return f"Perplexity by position: {kind}", [*FIRST_COLUMNS, *bands], body


def passkey_table(groups: dict[tuple, list[dict]], window: int) -> Table:
    """Of the models for which keys were asked. Each seed has other keys: their counts add up."""
    lengths = [f"{quarter * window // 4:,}" for quarter in range(1, 5)]
    body = []
    for group in groups.values():
        asked = sum(row.get("keys", 0) for row in group)
        if asked:
            by_seed = [row["passkeys_found"].values() for row in group if "keys" in row]
            counts = [sum(seeds) for seeds in zip(*by_seed)]
            body.append(first_cells(group) + [f"{count} of {asked}" for count in counts])
    return "Passkeys found, by length of the prompt", [*FIRST_COLUMNS, *lengths], body


def save_report(c: RealModelConfig, report: dict[str, Any]) -> None:
    """The rows so far as JSON and as a figure."""
    write_json(c.out, report)
    plot_real_model(read_json(c.out), Path(c.out).with_suffix(".png"))


if __name__ == "__main__":
    run_command(main)
