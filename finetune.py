"""Extend the window of a pretrained model: Position Interpolation, then a short fine-tuning at the new length.

(Chen et al. 2023, arXiv 2306.15595)

    python finetune.py                                            # the tiny model from 256 to 512 tokens, on a laptop, in minutes
    python finetune.py --rope yarn --factor 4                     # any method of rope.py
    python finetune.py --positions pose                           # PoSE: at the cost of the old window
    python finetune.py --model llama-7b --factor 4 --lr 2e-5 --steps 1000 --schedule constant --batch-size 1 --accumulate 64 --recompute \\
        --passkey-share 0 --corpus data/corpora/books --out out/llama-7b-pi      # the paper's recipe, on a corpus of long documents

The recipe is the paper's: AdamW (0.9, 0.95) without weight decay, 20 warm-up steps from 10 % of the peak, text of the pre-training kind.
For the tiny model the learning rate then falls to zero, and its rows are text with one passkey prompt, of at most L tokens, in each. The
baseline, direct fine-tuning, is the same steps on the same rows in the same order with plain RoPE. At the end stands a table, before and
after, as JSON and as a figure.
"""
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from cli import Kept, UserError, choose_device, field, parse, read_json, run, write_json
from data.batches import Batches, TokenFile
from data.prepare import corpus_for, ensure_corpus
from eval import CONVENTIONS, measure, table, validation_documents
from passes import result
from plot import plot_finetune
from positions import training_positions
from rope import METHODS, RopeConfig, rope_argument
from train import FitConfig, check, describe, distributed, fit, validation
from weights import load_config, load_model, load_tokenizer, original_window, with_rope


@dataclass
class FinetuneConfig(FitConfig):
    """Defaults are scaled to the tiny model. For a 7B model the paper has lr 2e-5, 1000 steps of 64 rows, constant after warm-up."""
    model: str = field("data/tiny", "pretrained model folder")
    rope: str = field("linear", "scaling method: linear (Position Interpolation), ntk, yarn, ..., or a JSON object with its settings; "
                      "default is plain RoPE (only the direct fine-tuning)")
    factor: float = field(2.0, "s = L'/L: how many times longer the window becomes, counted from the original one")
    out: str = field("", "folder of the extended model; the baseline's is the same with -direct [out/ROPE-xFACTOR and out/direct-xFACTOR]")
    steps: int = field(400, "optimiser steps")
    batch_size: int = field(4, "rows of L' tokens per micro-batch and device")
    lr: float | None = field(None, "peak learning rate [1e-3 for a small model; to be given for a large one, the paper has 2e-5]")
    schedule: str = field("linear", "after warm-up; the paper's is constant", choices=["cosine", "linear", "constant"])
    warmup: int = field(20, "steps of linear warm-up, from 10 % of the peak")
    weight_decay: float = field(0.0, "AdamW weight decay")
    passkey_share: float = field(1.0, "share of rows of text that hold a passkey prompt, which is never longer than L")
    passkey_packed: bool = field(False, "fill those rows with prompts, as in pre-training: the model then learns to overlook keys "
                                 "farther away than L")
    positions: str = field("own", "of the rows: pose (rows of L tokens, whose positions skip so that they cover L': the memory and time of "
                           "the old window), contiguous (rows of L'), or the method's own way, which is contiguous for nearly all",
                           choices=["own", "contiguous", "pose"])
    corpus: str = field("data/corpora/python", "token folder (data/prepare.py); the default one is made if it is not there")
    corpus_mb: float = field(32.0, "megabytes of Python source in the default corpus, if it has to be made")
    baseline: bool | None = field(None, "also the baseline: direct fine-tuning with the same steps, on rows of L' tokens [unless the "
                                  "method's own rows are of L: it would take more memory]")
    eval_tokens: int = field(16384, "tokens of held-out documents that each perplexity is measured on")
    depths: int = field(10, "passkey: places of the key")
    trials: int = field(5, "passkey: keys at each place; 0 measures no passkey")
    results: str = field("", "table, as JSON; a figure of the same name is drawn beside it [results/finetune.json, for other methods than "
                         "linear results/finetune-ROPE.json]")
    free = FitConfig.free | {"baseline", "eval_tokens", "depths", "trials", "results"}


def main(argv=None):
    config = parse(FinetuneConfig, __doc__, argv)
    rank, world = distributed()
    say = print if rank == 0 else lambda *_: None
    device, given = choose_device(config.device), rope_argument(config.rope)
    known = RopeConfig.from_dict({"original_max_position_embeddings": 4096} | given)  # any window: the folder knows its own
    method = known.rope_type
    if "factor" in given and given["factor"] != config.factor and not METHODS[method].grows:  # where it may be another than L'/L
        raise UserError(f"--factor {config.factor:g} and factor {given['factor']:g} in --rope: give it as --factor")
    name = "pi" if method == "linear" else method
    # Where no folder is named, all methods share the baseline's: it is trained once.
    direct_out = f"{config.out}-direct" if config.out else f"out/direct-x{config.factor:g}"
    run = name + ("" if config.positions == "own" else f"-{config.positions}")
    config = dataclasses.replace(config, out=config.out or f"out/{run}-x{config.factor:g}",
                                 results=config.results or f"results/finetune{'' if run == 'pi' else '-' + run}.json")
    if not math.isfinite(config.factor):
        raise UserError(f"--factor {config.factor}: give a number above 1")
    if Path(config.model).resolve() in (Path(config.out).resolve(), Path(direct_out).resolve()):
        raise UserError(f"--out {config.out}: the pretrained model would be written over: choose another folder")
    base = load_config(config.model)
    if config.lr is None:
        if base.parameters() > 5e7 and not config.dry_run:
            raise UserError("--lr is needed for a model of this size: the PI paper has 2e-5 for 7B and 13B, 1e-5 for 33B and 65B")
        config = dataclasses.replace(config, lr=1e-3)
    check(config)
    L = original_window(base)
    window = round(L * config.factor)
    if window <= L:
        raise UserError(f"--factor {config.factor:g}: the target window {window} is not longer than the original window {L}; "
                        "give a factor above 1")

    # The baseline is plain RoPE, or what else the model was trained with (ALiBi, say), as it was.
    plain = {"rope_type": "default" if METHODS[base.rope.rope_type].rotary else base.rope.rope_type, "factor": 1.0}
    ours = {"factor": config.factor} | given | {"rope_type": method}
    scaled = len(ours) > 2 or method != plain["rope_type"] or not METHODS[method].rotary  # else it is the baseline itself

    def load(rope):
        model = load_model(config.model, rope={"original_max_position_embeddings": L} | rope, device=device, attention=config.attention)
        model.config.max_seq_len = window
        model.config.rope = dataclasses.replace(model.config.rope, original_max_position_embeddings=L)  # also where nothing is scaled
        return model

    def recipe(rope):
        """The batches of a row, and its settings, which tell its run from others."""
        own = rope == ours or not scaled
        way, said = config.positions if own else "contiguous", {k: v for k, v in rope.items() if k != "factor"}
        batches = Batches(corpus, tokenizer, rows, L if own and short else window, config.passkey_share, L, config.passkey_packed,
                          config.seed, training_positions(with_rope(base, rope).rope, L, window, way))
        said = rope["rope_type"] if len(said) == 1 else json.dumps(said)
        return batches, dataclasses.replace(config, out=config.out if own else direct_out, rope=said, positions=way)

    target = dataclasses.replace(with_rope(base, ours), max_seq_len=window)
    short = config.positions == "pose" or config.positions == "own" and METHODS[method].train_on != "target"  # rows of L tokens
    if rank == 0:
        describe(target, config, device, L if short else window)
    if config.dry_run:
        return
    tokenizer, model = load_tokenizer(config.model, base.vocab_size), load(ours)
    config = dataclasses.replace(config, corpus=str(corpus_for(config.corpus, tokenizer)))
    if rank == 0:
        ensure_corpus(config.corpus, tokenizer.path, config.corpus_mb)
    if world > 1:
        torch.distributed.barrier()
    lengths = sorted({max(L // 2, 1), L, 2 * L, 4 * L, window})
    # Documents twice as long as the longest window: were they no longer than it, most of their tokens would have little context in it.
    documents = validation_documents(config.corpus, 2 * lengths[-1], config.eval_tokens, tokenizer)
    rows = config.batch_size * config.accumulate * world
    corpus = TokenFile(config.corpus, "train")

    check_validation = validation(TokenFile(config.corpus, "val"), tokenizer, config.batch_size, window)

    plan = [("extrapolation", plain, False)]
    if scaled:
        plan += [(f"{name}_zero_shot", ours, False), (f"{name}_finetuned", ours, True)]
    if config.baseline or config.baseline is None and not short or not scaled:
        plan += [("direct_finetuned", plain, True)]
    recipes, report = {row: recipe(rope) for row, rope, tuned in plan if tuned}, []
    keep = Kept(config.results if rank == 0 else "")
    for row, rope, tuned in plan:
        del model  # one at a time: the next may need the memory
        model, steps, seconds = load(rope), 0, 0.0
        if tuned:
            (batches, settings), steps = recipes[row], config.steps
            seconds, out = fit(model, settings, batches, check_validation, tokenizer), settings.out
            say(f"{row}: {steps} steps in {seconds:.0f} s -> {out}")
            del model
            model = load_model(out, device=device, attention=config.attention)  # what is measured is what the folder gives
        report.append({"name": row, "model": model.path, "rope": model.config.rope.to_dict(), "steps": steps, "training_seconds": seconds,
                       **measure(model, tokenizer, documents, lengths, config.depths, config.trials, keep=keep)})
        say(table(report, lengths, {"L": L, "L'": window}) if row == plan[-1][0] else f"{row}: measured")
    if rank == 0:
        measured = result(model, config.seed, rows=report, original_window=L, window=window, lengths=lengths,
                          settings=dataclasses.asdict(config), documents=len(documents),
                          tokens_scored=sum(len(d) - 1 for d in documents), stride="window / 4", **CONVENTIONS, parameters=target.parameters())
        measured |= {"model": config.model, "rope": target.rope.to_dict()}
        write_json(config.results, measured)
        keep.done()
        figure = Path(config.results).with_suffix(".png")
        plot_finetune(read_json(config.results), figure)
        print(f"({len(documents)} held-out documents, stride window / 4; passkey: {config.depths} depths x {config.trials} keys)\n"
              f"wrote {config.results} and {figure}; the extended model is in {config.out}")


if __name__ == "__main__":
    run(main)
