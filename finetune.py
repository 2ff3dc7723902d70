"""Extend the window of a pretrained model: Position Interpolation, then a short fine-tuning at the new length.

(Chen et al. 2023, arXiv 2306.15595)

    python finetune.py                                            # the tiny model from 256 to 512 tokens, on a laptop, in minutes
    python finetune.py --model llama-7b --factor 4 --lr 2e-5 --steps 1000 --schedule constant --batch-size 1 --accumulate 64 --recompute \\
        --passkey-share 0 --corpus data/corpora/books --out out/llama-7b-pi      # the paper's recipe, on a corpus of long documents

The recipe is the paper's: AdamW (0.9, 0.95) without weight decay, 20 warm-up steps from 10 % of the peak, text of the pre-training kind.
For the tiny model the learning rate then falls to zero, and its rows are text with one passkey prompt, of at most L tokens, in each. The
baseline, direct fine-tuning, is the same steps on the same rows in the same order with plain RoPE. At the end stands a table, before and
after, as JSON and as a figure.
"""
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from cli import UserError, choose_device, field, parse, read_json, run, write_json
from data.batches import Batches, TokenFile
from data.prepare import ensure_corpus
from eval import passkey, perplexity, result, validation_documents
from plot import plot_finetune
from rope import ALIASES
from train import FitConfig, check, describe, distributed, fit, validation
from weights import load_config, load_model, load_tokenizer, original_window


@dataclass
class FinetuneConfig(FitConfig):
    """Defaults are scaled to the tiny model. For a 7B model the paper has lr 2e-5, 1000 steps of 64 rows, constant after warm-up."""
    model: str = field("data/tiny", "pretrained model folder")
    rope: str = field("linear", "scaling method; linear is Position Interpolation, default is plain RoPE (only the direct fine-tuning)")
    factor: float = field(2.0, "s = L'/L: how many times longer the window becomes, counted from the original one")
    out: str = field("", "folder of the extended model [out/ROPE-xFACTOR]; the baseline's is the same with -direct")
    steps: int = field(400, "optimiser steps")
    batch_size: int = field(4, "rows of L' tokens per micro-batch and device")
    lr: float | None = field(None, "peak learning rate [1e-3 for a small model; to be given for a large one, the paper has 2e-5]")
    schedule: str = field("linear", "after warm-up; the paper's is constant", choices=["cosine", "linear", "constant"])
    warmup: int = field(20, "steps of linear warm-up, from 10 % of the peak")
    weight_decay: float = field(0.0, "AdamW weight decay")
    passkey_share: float = field(1.0, "share of rows of text that hold a passkey prompt, which is never longer than L")
    passkey_packed: bool = field(False, "fill those rows with prompts, as in pre-training: the model then learns to overlook keys "
                                 "farther away than L")
    corpus: str = field("data/corpora/python", "token folder (data/prepare.py); the default one is made if it is not there")
    corpus_mb: float = field(32.0, "megabytes of Python source in the default corpus, if it has to be made")
    baseline: bool = field(True, "also the baseline: direct fine-tuning with the same steps and data")
    eval_tokens: int = field(16384, "tokens of held-out documents that each perplexity is measured on")
    depths: int = field(10, "passkey: places of the key")
    trials: int = field(5, "passkey: keys at each place")
    results: str = field("results/finetune.json", "table, as JSON; a figure of the same name is drawn beside it")
    free = FitConfig.free | {"baseline", "eval_tokens", "depths", "trials", "results"}


def measure(model, tokenizer, documents, lengths, config):
    """The columns of the table: perplexity and passkey accuracy at each length, and the PI paper's k_max at the target window."""
    keys = {n: passkey(model, tokenizer, [n], config.depths, config.trials) for n in lengths}
    return {"perplexity": {n: perplexity(model, documents, window=n)["perplexity"] for n in lengths},
            "passkey": {n: k["accuracy"][n] for n, k in keys.items()}, "k_max": {n: k["k_max"] for n, k in keys.items()}}


def table(rows, lengths, L, window):
    """The rows as text: perplexity and passkey accuracy side by side."""
    titles = [f"{n}{' L' if n == L else ''}" + (" L'" if n == window else "") for n in lengths]
    lines = [" " * 20 + "perplexity at window".ljust(10 * len(lengths)) + "  passkey accuracy at length",
             " " * 20 + "".join(t.ljust(10) for t in titles) + "  " + "".join(t.ljust(10) for t in titles)]
    for row in rows:
        lines.append(row["name"].ljust(20) + "".join(f"{row['perplexity'][n]:<10.3f}" for n in lengths) + "  "
                     + "".join(f"{row['passkey'][n]:<10.2f}" for n in lengths))
    return "\n".join(lines)


def main(argv=None):
    config = parse(FinetuneConfig, __doc__, argv)
    rank, world = distributed()
    say = print if rank == 0 else lambda *_: None
    device, method = choose_device(config.device), ALIASES.get(config.rope, config.rope)
    name = "pi" if method == "linear" else method
    config = dataclasses.replace(config, rope=method, out=config.out or f"out/{name}-x{config.factor:g}")
    if not math.isfinite(config.factor):
        raise UserError(f"--factor {config.factor}: give a number above 1")
    if Path(config.model).resolve() in (Path(config.out).resolve(), Path(f"{config.out}-direct").resolve()):
        raise UserError(f"--out {config.out}: the pretrained model would be written over: choose another folder")
    base = load_config(config.model)
    if config.lr is None:
        if base.parameters() > 5e7:
            raise UserError("--lr is needed for a model of this size: the PI paper has 2e-5 for 7B and 13B, 1e-5 for 33B and 65B")
        config = dataclasses.replace(config, lr=1e-3)
    check(config)
    tokenizer = load_tokenizer(config.model, base.vocab_size)
    L = original_window(base)
    window = round(L * config.factor)
    if window <= L:
        raise UserError(f"--factor {config.factor:g}: the target window {window} is not longer than the original window {L}; "
                        "give a factor above 1")

    def load(rope_type):
        factor = 1.0 if rope_type == "default" else config.factor
        model = load_model(config.model, rope={"rope_type": rope_type, "factor": factor, "original_max_position_embeddings": L},
                           device=device, attention=config.attention)
        model.config.max_seq_len = window
        model.config.rope = dataclasses.replace(model.config.rope, original_max_position_embeddings=L)  # also where nothing is scaled
        return model

    model = load(method)
    target = model.config
    if rank == 0:
        describe(target, config, device)
        ensure_corpus(config.corpus, tokenizer.path, config.corpus_mb)
    if world > 1:
        torch.distributed.barrier()
    lengths = sorted({max(L // 2, 1), L, 2 * L, 4 * L, window})
    # Documents twice as long as the longest window: were they no longer than it, most of their tokens would have little context in it.
    documents = validation_documents(config.corpus, 2 * lengths[-1], config.eval_tokens, tokenizer)
    rows = config.batch_size * config.accumulate * world
    corpus = TokenFile(config.corpus, "train")
    batches = Batches(corpus, tokenizer, rows, window, config.passkey_share, L, config.passkey_packed, config.seed)
    check_validation = validation(TokenFile(config.corpus, "val"), tokenizer, config.batch_size, window)

    plan = [("extrapolation", "default", False)]
    if method != "default":
        plan += [(f"{name}_zero_shot", method, False), (f"{name}_finetuned", method, True)]
    if config.baseline or method == "default":
        plan += [("direct_finetuned", "default", True)]
    report = []
    for row, rope_type, tuned in plan:
        del model  # one at a time: the next may need the memory
        model, steps, seconds = load(rope_type), 0, 0.0
        if tuned:
            steps, out = config.steps, config.out if rope_type == method else f"{config.out}-direct"
            seconds = fit(model, dataclasses.replace(config, out=out, rope=rope_type), batches, check_validation, tokenizer)
            say(f"{row}: {steps} steps in {seconds:.0f} s -> {out}")
            del model
            model = load_model(out, device=device, attention=config.attention)  # what is measured is what the folder gives
        report.append({"name": row, "model": model.path, "rope": model.config.rope.to_dict(), "steps": steps, "training_seconds": seconds,
                       **measure(model, tokenizer, documents, lengths, config)})
        say(table(report, lengths, L, window) if row == plan[-1][0] else f"{row}: measured")
    if rank == 0:
        measured = result(model, config.seed, rows=report, original_window=L, window=window, lengths=lengths,
                          settings=dataclasses.asdict(config), documents=len(documents),
                          tokens_scored=sum(len(d) - 1 for d in documents), stride="window / 4", parameters=target.parameters())
        measured |= {"model": config.model, "rope": target.rope.to_dict()}
        write_json(config.results, measured)
        figure = Path(config.results).with_suffix(".png")
        plot_finetune(read_json(config.results), figure)
        print(f"({len(documents)} held-out documents, stride window / 4; passkey: {config.depths} depths x {config.trials} keys)\n"
              f"wrote {config.results} and {figure}; the extended model is in {config.out}")


if __name__ == "__main__":
    run(main)
