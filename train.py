"""Pre-training from scratch, and fit(), the training loop that finetune.py uses too.

    python train.py                             # a tiny LLaMA with a window of 256 -> out/base
    torchrun --nproc-per-node 8 train.py        # 8 GPUs: steps of 8 times the rows

A run leaves in its folder the model (Meta's layout), metrics.jsonl, run.json (settings, command,
versions) and state.pt (optimiser, step). The same command, given again, resumes an interrupted run;
on a CPU it then ends with exactly the weights of an uninterrupted one.
"""
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from common.cli import field, parse, run_command
from common.device import choose_device, choose_dtype, keep_freed_memory
from common.distributed import (context_shard, is_sharded, join_process_group, mean_over_ranks,
                                share_rows, wait_for_all_ranks, whole)
from common.errors import UserError
from data.batches import Batches, prefetch
from data.corpus import TokenFile, corpus_for, ensure_corpus
from data.tokenizer import Tokenizer, open_tokenizer
from methods import RopeConfig, parse_rope_flag, training_positions
from methods.checks import check_attention
from model import LLaMA, ModelConfig
from training.plan import print_header, require_memory
from training.run import (TrainingRun, check_ranks, shard_for_training, trains_sharded,
                          validate_settings)
from weights.load import empty_model


@dataclass
class FitConfig:
    """The settings of fit(). TrainConfig and FinetuneConfig add their own and replace defaults."""
    out: str = field("out/run", "folder of the model and of the run's state")
    steps: int = field(1000, "optimiser steps")
    batch_size: int = field(16, "rows per micro-batch, for each GPU or group that shares rows")
    accumulate: int = field(1, "micro-batches per optimiser step")
    context_parallel: int = field(1, "GPUs that share the tokens of each row")
    lr: float = field(3e-3, "peak learning rate")
    schedule: str = field("cosine", "after warm-up", choices=["cosine", "linear", "constant"])
    min_lr: float = field(0.0, "where the schedules cosine and linear end, as a share of the peak")
    warmup: int = field(100, "steps of linear warm-up, from 10 % of the peak")
    weight_decay: float = field(0.1, "AdamW weight decay, on matrices only")
    optimizer: str = field("adamw", "adamw8bit keeps AdamW's moments in 8 bits, 6 bytes a "
                           "parameter less (torchao)", choices=["adamw", "adamw8bit"])
    beta2: float = field(0.95, "AdamW's second beta (the first is 0.9)")
    clip: float = field(1.0, "gradients of a larger norm are scaled down to it; 0 never clips")
    seed: int = field(0, "random seed of initialisation and batches")
    log_every: int = field(10, "steps between lines of metrics.jsonl")
    eval_every: int = field(500, "steps between validations")
    save_every: int = field(500, "steps between checkpoints")
    device: str = field("auto", "auto, cpu, cuda or mps")
    dtype: str = field("auto", "number type of matrix products; bfloat16 is autocast over float32 "
                       "weights", choices=["auto", "float32", "bfloat16"])
    attention: str = field("auto", "auto takes sdpa; for a distance map flex_attention on a GPU, "
                           "else tiled", choices=["auto", "naive", "tiled", "sdpa"])
    compile: bool = field(False, "torch.compile every block")
    recompute: bool = field(False, "keep only each block's input and compute the rest again in the "
                            "backward pass: slower, far less memory")
    offload: bool = field(False, "keep weights, gradients and AdamW's moments in the computer's "
                          "memory; blocks come to the GPU one by one: slower")
    fresh: bool = field(False, "start again although --out holds a run, which is then replaced")
    dry_run: bool = field(False, "only say what it would take: parameters, memory, operations")
    gpus: int | None = field(None, "plan with so many GPUs, with --dry-run only [those of "
                             "torchrun]")
    waits: bool = False  # for another process that trains in `out`, instead of refusing
    # A run may be resumed with other values of these; all other settings have to be the same.
    may_change_on_resume: ClassVar[set[str]] = {
        "out", "log_every", "eval_every", "save_every", "device", "attention", "compile",
        "recompute", "offload", "context_parallel", "fresh", "dry_run", "gpus", "waits"}


@dataclass
class TrainConfig(FitConfig):
    """The tiny LLaMA. Everything that makes it tiny is a flag."""
    out: str = field("out/base", "folder of the model and of the run's state")
    dim: int = field(128, "model width C")
    n_layers: int = field(4, "blocks")
    n_heads: int = field(2, "query heads H, of dim / H = 64 numbers: 32 RoPE pairs, as many as in "
                         "LLaMA 3.2 1B")
    n_kv_heads: int | None = field(None, "key/value heads K; fewer than n_heads is grouped-query "
                                   "attention [n_heads]")
    multiple_of: int = field(32, "the feed-forward width is rounded up to a multiple of this")
    max_seq_len: int = field(256, "window L in tokens")
    rope: str = field("default", "how the model knows positions: default (RoPE), alibi, xpos, "
                      "nope, ..., or a JSON object")
    rope_theta: float = field(10000.0, "RoPE's base")
    tokenizer: str = field("data/tiny/tokenizer.model", "SentencePiece model, tokenizer.json or "
                           "GGUF file")
    corpus: str = field("data/corpora/python", "token folder (data/prepare.py); the default one is "
                        "made if it is not there")
    corpus_mb: float = field(96.0, "megabytes of Python source in the default corpus")
    passkey_share: float = field(0.5, "share of the rows that are passkey prompts of all lengths "
                                 "up to the window")
    steps: int = field(14000, "optimiser steps")
    batch_size: int = field(8, "rows per micro-batch and device")


# ---- The loop ------------------------------------------------------------------------------------


def fit(model: LLaMA, config: FitConfig, batches: Batches,
        evaluate: Callable[[LLaMA], dict[str, float]] | None = None,
        tokenizer: Tokenizer | None = None, progress: bool = True) -> float:
    """Train `model` for config.steps optimiser steps, or resume the run that config.out holds.

    batches(step): the rows of a step for all ranks, batch_size * accumulate each; fit() takes
    this rank's share.
    evaluate(model): numbers to log every eval_every steps, and at the end.
    Weights are float32; with bfloat16 the matrix products run under autocast.
    Returns the seconds spent training, those before an interruption counted.
    Raises UserError for other settings than those of the run in config.out, a model there without a
    run, another process that trains there, or a loss or gradient that is not finite (noticed
    at the next logged step), and Stopped after Ctrl-C, with all steps saved.
    """
    validate_settings(config)
    if model.device.type == "cpu" or config.offload:
        keep_freed_memory()
    rank = join_process_group()[0]  # joins at the first call only; 0 without torchrun
    model.attention, model.recompute = config.attention, config.recompute
    model.context = context_shard(config.context_parallel)  # None if a row belongs to one GPU
    if trains_sharded(config) and not is_sharded(model):
        model.to(shard_for_training(model, config, model.device))
    optimizer = make_optimizer(model, config)
    run = TrainingRun(model, optimizer, config, evaluate, tokenizer, progress)
    if config.compile:
        for block in model.layers:
            block.compile()  # one graph serves all blocks
    rows = config.batch_size * config.accumulate    # of this rank in one optimiser step
    first_row = rank // config.context_parallel * rows
    with run.running():  # resumed, with its log open; Ctrl-C waits for the end of a step
        # step: run.step, ..., config.steps - 1; batch: this rank's rows of that step
        for step, batch in prefetch(batches, run.step, config.steps, first_row, rows):
            lr = learning_rate(config, step)
            set_learning_rate(optimizer, lr)
            loss = add_gradients(model, batch, config)  # forward and backward: fills p.grad
            largest_norm = config.clip or math.inf      # clip = 0: the norm is only measured
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            # Counts the step. Where it is time: raises if something is not finite, logs, validates,
            # saves, stops after Ctrl-C.
            run.after_step(loss, whole(norm), lr, tokens=batch[0].numel())
    return run.seconds


def add_gradients(model: LLaMA, batch: Sequence[Tensor], config: FitConfig) -> Tensor:
    """Forward and backward, one micro-batch after another: p.grad sums up over them, and over GPUs.
    Returns the mean loss in nats a token, over all targets of the step.

    batch: tokens, targets and, if they are not 0, 1, 2, ... (PoSE), positions: each [rows, T].
    """
    device = model.device
    dtype = choose_dtype(config.dtype, device)
    total = torch.zeros((), device=device)
    # The step's loss is the mean over all its targets. PyTorch averages the gradients of W GPUs, so
    # each divides its losses by (all targets) / W. GPUs that share a row each counted it whole.
    targets_per_gpu = mean_over_ranks(count_targets(batch[1])) / config.context_parallel
    targets_per_gpu = targets_per_gpu.clamp(min=1e-30)      # a step without targets has a loss of 0
    for start in range(0, len(batch[0]), config.batch_size):
        rows = slice(start, start + config.batch_size)
        micro_batch = [tensor[rows].to(device, non_blocking=True) for tensor in batch]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model.loss(*micro_batch)
        # A micro-batch weighs as much as its share of the targets: 1 / accumulate if all rows have
        # equally many.
        loss = loss * float(count_targets(batch[1][rows]) / targets_per_gpu)
        loss.backward()
        total += loss.detach()
    return mean_over_ranks(total) / config.context_parallel


def count_targets(targets: Tensor) -> Tensor:
    """The targets that are scored: all but those of -100."""
    return (targets != -100).sum()


def learning_rate(config: FitConfig, step: int) -> float:
    """The learning rate of step 0, 1, 2, ...: lr * (0.1 + 0.9 step / warmup) during warm-up, then
    the schedule down to min_lr * lr."""
    if step < config.warmup:
        return config.lr * (0.1 + 0.9 * step / config.warmup)
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    if config.schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        share = 1 - progress
    return config.lr * (config.min_lr + (1 - config.min_lr) * share)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao compiles a step that reads it
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def make_optimizer(model: LLaMA, config: FitConfig) -> torch.optim.Optimizer:
    """AdamW (0.9, beta2) for what is trained. Matrices are decayed, norm gains are not.

    adamw8bit: both moments of a tensor of 4,096 numbers or more in 8 bits, with a scale for each
    256 (Dettmers et al. 2021, arXiv 2110.02861). Its first step takes a minute: it is compiled.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    gains = [p for p in trained if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": gains, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]  # LoRA alone trains no gains
    settings = {"lr": config.lr, "betas": (0.9, config.beta2)}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **settings, fused=True)
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise UserError("--optimizer adamw8bit needs a package: pip install torchao") from None
    return AdamW8bit(groups, **settings)


def validation(corpus: TokenFile, tokenizer: Tokenizer, rows: int, seq_len: int, steps: int = 8,
               positions: Callable | None = None) -> Callable[[LLaMA], dict[str, float]]:
    """Make the evaluate() of fit(): loss and perplexity on `steps` batches of random rows, the same
    ones at each call. A quick check of a run, on rows cut anywhere and scored from their first
    token; the perplexity to report is eval.perplexity's. positions: as Batches takes them."""
    seq_len = min(seq_len, len(corpus) - 1)
    batches = Batches(corpus, tokenizer, rows, seq_len, seed=1, positions=positions)

    @torch.no_grad()
    def evaluate(model: LLaMA) -> dict[str, float]:
        # GPUs that share a row cut it into equal chunks: what is left over is not read.
        chunks = 1 if model.context is None else 2 * model.context.size
        length = seq_len - seq_len % chunks
        total = 0.0
        for step in range(steps):
            batch = [tensor[:, :length].to(model.device) for tensor in batches(step)]
            total += model.loss(*batch).item()
        loss = total / steps
        return {"val_loss": loss, "val_perplexity": math.exp(loss) if loss < 700 else math.inf}
    return evaluate


# ---- Pre-training --------------------------------------------------------------------------------


def rope_of_training(config: TrainConfig) -> RopeConfig:
    """The RoPE that --rope and --rope-theta ask for. L is the window of this training. Two flags
    may not say the same thing differently."""
    given = parse_rope_flag(config.rope)
    if "rope_theta" in given and given["rope_theta"] != config.rope_theta:
        raise UserError(f"--rope-theta {config.rope_theta:g} and rope_theta {given['rope_theta']} "
                        "in --rope: give it as --rope-theta")
    if given.get("original_max_position_embeddings", config.max_seq_len) != config.max_seq_len:
        raise UserError("--rope original_max_position_embeddings: it is the window of this "
                        "training, --max-seq-len")
    rope: dict[str, Any] = {"rope_theta": config.rope_theta}
    if given != {"rope_type": "default"}:  # plain RoPE needs no L beside the model's max_seq_len
        rope["original_max_position_embeddings"] = config.max_seq_len
    return RopeConfig.from_dict(rope | given)


def new_model(shape: ModelConfig, config: TrainConfig, device: torch.device) -> LLaMA:
    """A model with random weights. Several GPUs share those that the first one drew."""
    torch.manual_seed(config.seed)
    if not trains_sharded(config):
        return LLaMA(shape).to(device)
    drawn = LLaMA(shape).state_dict() if join_process_group()[0] == 0 else {}
    model = empty_model(shape)
    kept_on = shard_for_training(model, config, device)
    share_rows(model.to_empty(device=kept_on), drawn)
    return model


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(TrainConfig, __doc__, argv)
    validate_settings(config)
    rank, world = join_process_group()
    device = choose_device(config.device)
    tokenizer = open_tokenizer(config.tokenizer)
    corpus = corpus_for(config.corpus, tokenizer, config.corpus_mb)  # its folder; made below
    config = dataclasses.replace(config, corpus=str(corpus))
    rope = rope_of_training(config)
    L = config.max_seq_len
    shape = ModelConfig(
        dim=config.dim, n_layers=config.n_layers, n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads, vocab_size=tokenizer.vocab_size,
        multiple_of=config.multiple_of, max_seq_len=L, rope=rope)
    check_attention(config.attention, rope.rope_type, device)
    check_ranks(config, row=L)
    if rank == 0:
        print_header(shape, config, device)
    if config.dry_run:
        return
    if rank == 0:
        ensure_corpus(config.corpus, config.tokenizer, config.corpus_mb)
    wait_for_all_ranks()

    rows_of_step = config.batch_size * config.accumulate * world // config.context_parallel
    batches = Batches(TokenFile(corpus, "train"), tokenizer, rows_of_step, L, config.passkey_share,
                      seed=config.seed, positions=training_positions(rope, L, L))  # here L' = L
    evaluate = validation(TokenFile(corpus, "val"), tokenizer, config.batch_size, L)
    require_memory(shape, config, device, row=L)
    model = new_model(shape, config, device)
    seconds = fit(model, config, batches, evaluate, tokenizer)
    if rank == 0:
        print(f"wrote {config.out} in {seconds:.0f} s; next: python finetune.py --model "
              f"{config.out}")


if __name__ == "__main__":
    run_command(main)
