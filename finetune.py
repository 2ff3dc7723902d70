"""Extend the window of a pretrained model: Position Interpolation, then a short fine-tuning at the
new length. (Chen et al. 2023, arXiv 2306.15595)

    python finetune.py                              # the tiny model from 256 to 512 tokens, minutes
    python finetune.py --rope yarn --factor 4       # any other method
    python finetune.py --positions pose             # PoSE: rows of L tokens only, less memory

From the paper: AdamW (0.9, 0.95) without weight decay, 20 warm-up steps from 10 % of the peak, text
of the pre-training kind. Ours, for the tiny model: the learning rate then falls linearly towards
zero, and each row of text holds one passkey prompt of at most L tokens. docs/recipes.md has the
paper's command for a 7B model.
"""
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from common.cache import ResultCache
from common.cli import field, parse, run_command
from common.device import choose_device
from common.distributed import join_process_group
from common.files import read_json, write_json
from common.progress import Progress
from common.results import result
from common.tables import format_table
from data.batches import Batches
from data.corpus import TokenFile, evaluation_documents
from eval import CONVENTIONS, four_lengths, measure_lengths
from methods.lora import ATTENTION_MATRICES, BASE_DTYPES
from model import ModelConfig
from plot import plot_finetune
from train import FitConfig, fit, validation
from training.extension import (baseline_rope, changes_positions, complete_flags, file_label,
                                has_short_rows, load_extended, load_saved, phases, prepare_corpus,
                                print_phases, rope_flag, row_length, training_batches)
from training.plan import planned_gpus, print_header
from weights import load_config, load_tokenizer, with_rope
from weights.size import parameter_count


@dataclass
class FinetuneConfig(FitConfig):
    """Defaults are those of the tiny model. For a 7B model the paper has lr 2e-5, 1000 steps of 64
    rows, constant after warm-up."""
    model: str = field("data/tiny", "pretrained model folder")
    rope: str = field("linear", "scaling method: linear (Position Interpolation), ntk, yarn, ..., "
                      "or a JSON object; default (plain RoPE) makes the direct fine-tuning alone")
    factor: float = field(2.0, "s = L'/L; L is always the window of pre-training")
    out: str = field("", "folder of the extended model [out/pi-xFACTOR for linear, else "
                     "out/METHOD-xFACTOR]; the baseline goes to OUT-direct [out/direct-xFACTOR]")
    steps: int = field(400, "optimiser steps")
    batch_size: int = field(4, "rows of L' tokens per micro-batch and device")
    lr: float | None = field(None, "peak learning rate [1e-3 for a small model; to be given for a "
                             "large one, the paper has 2e-5]")
    schedule: str = field("linear", "the paper: constant", choices=["cosine", "linear", "constant"])
    warmup: int = field(20, "steps of linear warm-up, from 10 % of the peak")
    weight_decay: float = field(0.0, "AdamW weight decay")
    passkey_share: float = field(1.0, "share of rows with passkey prompts, none longer than L")
    passkey_packed: bool = field(False, "fill these rows with prompts instead of one each (which "
                                 "seems to teach the model to overlook passkeys beyond L)")
    positions: str = field("own", "positions in training rows. contiguous: 0 .. L'-1; pose: L "
                           "tokens that skip and so reach L'; own: the method's own way",
                           choices=["own", "contiguous", "pose"])
    row_length: int | None = field(None, "a row's tokens [L'; L with pose]; below L' implies pose")
    lora_rank: int = field(0, "train A and B of LoRA with this rank r; 0 trains everything "
                           "(LongLoRA has 8)")
    lora_alpha: float = field(16.0, "W x + (alpha / r) B A x")
    lora_matrices: list[str] = field([*ATTENTION_MATRICES], "matrices of every block that get A "
                                     "and B; w1 w2 w3 are possible, too")
    lora_full: bool = field(True, "with LoRA, train embedding, output and norms in full")
    base_dtype: str = field("bfloat16", "of the frozen matrices, with LoRA", choices=[*BASE_DTYPES])
    text: list[str] = field([], "files and folders to train on; the end of the longest is held out")
    corpus: str = field("data/corpora/python", "token folder; the default one is made if missing")
    corpus_mb: float = field(32.0, "megabytes of Python source in the default corpus")
    baseline: bool | None = field(None, "also fine-tune directly [not if rows have L by default]")
    eval: bool = field(True, "measure perplexity and passkeys before and after")
    lengths: list[int] = field([], "to measure at [half, one, two and four times L, and L']")
    max_tokens: int | None = field(None, "held-out tokens to score [16384, or 2 longest lengths]")
    depths: int = field(10, "passkey: places of the key")
    trials: int = field(5, "passkey: keys at each place; 0 measures no passkey")
    results: str = field("", "table, as JSON, with its figure beside it [out/finetune-METHOD.json]")
    may_change_on_resume: ClassVar[set[str]] = FitConfig.may_change_on_resume | {
        "text", "baseline", "eval", "lengths", "max_tokens", "depths", "trials", "results"}


@dataclass
class Experiment:
    """A row of the table: the pretrained model with the positions of `rope`, measured as it is, or
    after fine-tuning with the settings `training` on `batches`."""
    name: str
    rope: dict[str, Any]
    training: FinetuneConfig | None = None
    batches: Batches | None = None


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(FinetuneConfig, __doc__, argv)
    rank = join_process_group()[0]      # of several GPUs
    device, base = choose_device(config.device), load_config(config.model)
    config, rope, direct_out = complete_flags(config, base)     # rope: the dict that --rope means
    L, target_window = base.original_window, round(base.original_window * config.factor)
    target = dataclasses.replace(with_rope(base, rope), max_seq_len=target_window)
    lengths = sorted(set(config.lengths or [*four_lengths(base), target_window]))
    experiments = [e for e in list_experiments(config, rope, direct_out, base)
                   if e.training or config.eval]
    ranks = planned_gpus(config) // config.context_parallel    # that read different rows
    work = phases(config, experiments, target, lengths, ranks)
    if rank == 0:
        print_header(target, config, device, row_length(config, rope, L, target_window))
        print_phases(work)
    if config.dry_run:
        return
    tokenizer = load_tokenizer(config.model, base.vocab_size)
    config.corpus = prepare_corpus(
        config, tokenizer, held_out=2 * max(*four_lengths(base), target_window), rank=rank)
    val = TokenFile(config.corpus, "val")
    for e in experiments:
        if e.training:  # made before any training: a bad flag shows before hours of work
            e.training.corpus = config.corpus
            e.batches = training_batches(e.training, e.rope, base, tokenizer, ranks)
    if config.eval:
        texts, lengths = evaluation_documents(val, lengths, config.max_tokens, tokenizer,
                                              quiet=rank > 0)

    cache = ResultCache(config.results if rank == 0 and config.eval else "")
    progress = Progress([(phase.name, phase.flops) for phase in work], quiet=rank > 0)
    rows = []
    for e in experiments:
        model = None  # one at a time: the next may need the memory
        # The extension: the same weights, other positions. PI: {"rope_type": "linear", "factor": s}
        model = load_extended(config.model, e.rope, L, target_window, device, config.attention,
                              e.training, config.offload)
        seconds = 0.0
        if e.training:
            progress.next()
            evaluate = validation(val, tokenizer, config.batch_size, e.batches.seq_len,
                                  positions=e.batches.positions)
            seconds = fit(model, e.training, e.batches, evaluate, tokenizer)
            if rank == 0:
                print(f"{config.steps} steps in {seconds:.0f} s -> {e.training.out}")
        if config.eval:
            if e.training:  # what is measured is what was saved
                model = None
                model = load_saved(e.training.out, device, config.attention, config.offload)
            progress.next()
            measured = measure_lengths(model, tokenizer, texts, lengths, config.depths,
                                       config.trials, cache=cache)
            rows.append({"name": e.name, "model": model.path, "rope": model.config.rope.to_dict(),
                         "steps": config.steps if e.training else 0, "training_seconds": seconds,
                         **measured})
    if rank == 0 and config.eval:  # model is the last experiment's: it gives the conditions
        report = result(model, config.seed, rows=rows, window=target_window, lengths=lengths,
                        parameters=parameter_count(target), documents=len(texts),
                        tokens_scored=sum(len(d) - 1 for d in texts))
        write_report(config, cache, report | {"rope": target.rope.to_dict()})


def list_experiments(config: FinetuneConfig, rope: dict[str, Any], direct_out: str,
                     base: ModelConfig) -> list[Experiment]:
    """The rows of the table. The paper has four: the base model beyond its window, the extended
    model untrained and fine-tuned, and as a baseline the base model fine-tuned directly. If --rope
    changes nothing (default) there are two: the base model, as it is and fine-tuned."""
    plain, label = baseline_rope(base), file_label(rope["rope_type"])
    as_it_is = Experiment("extrapolation", plain)
    direct = dataclasses.replace(config, rope=rope_flag(plain))
    if not changes_positions(rope, base):  # then direct is the run itself: it goes to config.out
        return [as_it_is, Experiment("direct_finetuned", plain, direct)]
    extended = dataclasses.replace(config, rope=rope_flag(rope))
    experiments = [as_it_is,
                   Experiment(f"{label}_zero_shot", rope),
                   Experiment(f"{label}_finetuned", rope, extended)]
    wants_baseline = config.baseline
    if wants_baseline is None:
        wants_baseline = config.row_length is not None or not has_short_rows(config, rope)
    if wants_baseline:
        whole_rows = config.row_length in (None, round(base.original_window * config.factor))
        # Rows of L' tokens reach all positions. Shorter ones have to skip, as those of --rope do.
        positions = "contiguous" if whole_rows or config.positions == "contiguous" else "pose"
        direct = dataclasses.replace(direct, out=direct_out, positions=positions, waits=True)
        experiments.append(Experiment("direct_finetuned", plain, direct))
    return experiments


def write_report(config: FinetuneConfig, cache: ResultCache, report: dict[str, Any]) -> None:
    """The table on the screen, as JSON and as a figure."""
    print(format_table(report["rows"], report["lengths"],
                       {"L": report["original_window"], "L'": report["window"]}))
    report |= {"model": config.model, "settings": dataclasses.asdict(config),
               "stride": "window / 4", **CONVENTIONS}
    write_json(config.results, report)
    cache.delete()
    figure = plot_finetune(read_json(config.results), Path(config.results).with_suffix(".png"))
    keys = f"{config.depths} depths x {config.trials} keys" if config.trials else "not measured"
    print(f"({report['documents']} held-out documents, stride window / 4; passkey: {keys})\n"
          f"wrote {config.results} and {figure}")


if __name__ == "__main__":
    run_command(main)
