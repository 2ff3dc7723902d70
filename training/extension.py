"""Behind finetune.py: its flags completed and checked, what it will take, its corpus and batches,
and a model loaded with other positions."""
import dataclasses
import functools
import gc
import json
import math
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from common.device import choose_device, memory_per_rank
from common.distributed import join_process_group, on_any_rank, shard_weights, wait_for_all_ranks
from common.errors import UserError
from common.files import check_output
from data.batches import Batches
from data.corpus import TokenFile, corpus_for, corpus_of_text, ensure_corpus
from data.tokenizer import Tokenizer
from methods import METHODS, parse_rope_flag, training_positions
from methods.checks import check_attention
from methods.lora import MATRICES, freeze, init_lora, lora_of_flags
from model import LLaMA, ModelConfig
from training.plan import planned_gpus, require_memory
from training.run import (check_ranks, prepare_offload, shard_for_training, trains_sharded,
                          validate_settings)
from weights.flags import warn_if_shorter
from weights.load import load_config, load_model, with_rope
from weights.size import evaluation_flops, flops_per_token, parameter_count

DEFAULT_CORPUS = "data/corpora/python"
LARGE = 5e7  # parameters, from which on a learning rate has to be chosen by a person


def complete_flags(config: Any, base: ModelConfig) -> tuple[Any, dict[str, Any], str]:
    """A finetune.FinetuneConfig with nothing left open, the rope dict that --rope asks for, and the
    folder of the baseline. Without --out that is the same for all methods: it is trained once."""
    if not abs(config.factor) < 1e6:
        raise UserError(f"--factor {config.factor}: give a number above 1, and below a million")
    config = dataclasses.replace(config, out=config.out.rstrip("/"))
    rope = {"factor": config.factor} | parse_rope_flag(config.rope)
    if rope["factor"] != config.factor and not METHODS[rope["rope_type"]].length_dependent:
        raise UserError(f"--factor {config.factor:g} and factor {rope['factor']} in --rope: "
                        "give it as --factor")
    label = file_label(rope["rope_type"])
    if config.positions != "own":
        label += f"-{config.positions}"
    rows = f"-rows{config.row_length}" if config.row_length else ""
    rows += f"-lora{config.lora_rank}" if config.lora_rank else ""
    label += rows
    results = "out/finetune.json" if label == "pi" else f"out/finetune-{label}.json"
    short = "-contiguous" if config.row_length and config.positions == "contiguous" else ""
    direct_out = f"out/direct{rows}{short}-x{config.factor:g}"
    if config.out:
        direct_out = f"{config.out}-direct"
    config = dataclasses.replace(
        config, out=config.out or f"out/{label}-x{config.factor:g}",
        results=config.results or results, lr=learning_rate_of(config, base))
    written = [Path(folder).resolve() for folder in (config.out, direct_out)]
    if Path(config.model).resolve() in written:
        raise UserError(f"--out {config.out}: the pretrained model would be written over: choose "
                        "another folder")
    validate_settings(config)
    check_lora(config, rope["rope_type"])
    check_attention(config.attention, rope["rope_type"], choose_device(config.device))
    window = round(base.original_window * config.factor)
    if window <= base.original_window:
        raise UserError(f"--factor {config.factor:g}: the target window {window} is not longer "
                        f"than the original window {base.original_window}; give a factor above 1")
    if config.row_length is not None:
        if not 1 <= config.row_length <= window:
            raise UserError(f"--row-length {config.row_length}: has to be from 1 to L' = {window}")
        own_way = METHODS[rope["rope_type"]].trained_on
        if own_way == "random" and config.row_length > base.original_window:
            raise UserError(f"--row-length {config.row_length}: this method trains on rows of at "
                            f"most L = {base.original_window}")
        if config.positions == "own" and own_way == "target" and config.row_length < window:
            config = dataclasses.replace(config, positions="pose")
    if config.positions == "pose" and rope.get("random_positions"):
        raise UserError("--positions pose and random_positions: both say how positions skip: give "
                        "one of them")
    check_ranks(config, row_length(config, rope, base.original_window, window))
    check_evaluation(config)
    warn_if_shorter(base, window)
    if base.rope.rope_type != baseline_rope(base)["rope_type"]:
        warnings.warn(f"{config.model} has {base.rope.rope_type}; the rows \"no change\" and "
                      "\"fine-tuned directly\" are without it, with plain RoPE", stacklevel=1)
    return config, rope, direct_out


def check_lora(config: Any, rope_type: str) -> None:
    """A UserError for settings of LoRA that cannot work, or that do nothing."""
    rank, matrices = config.lora_rank, config.lora_matrices
    if rank == 0:
        for name, default in vars(type(config)()).items():
            of_lora = name.startswith("lora_") or name == "base_dtype"
            if of_lora and getattr(config, name) != default:
                raise UserError(f"--{name.replace('_', '-')} is for LoRA: give --lora-rank, too "
                                "(LongLoRA has 8)")
        return
    if rank < 0:
        raise UserError(f"--lora-rank {rank}: has to be at least 1; 0 is no LoRA")
    if not (config.lora_alpha > 0 and math.isfinite(config.lora_alpha)):
        raise UserError(f"--lora-alpha {config.lora_alpha}: has to be a positive number")
    if not set(matrices) <= set(MATRICES) or len(set(matrices)) < len(matrices):
        raise UserError(f"--lora-matrices {' '.join(matrices)}: give some of {' '.join(MATRICES)}, "
                        "each once")
    if config.base_dtype == "int8" and (planned_gpus(config) > 1 or config.offload):
        raise UserError("--base-dtype int8: several GPUs, and --offload, gather the weights in the "
                        "dtype of the products; give bfloat16")
    if METHODS[rope_type].mechanism == "network":
        raise UserError(f"--lora-rank with --rope {rope_type}: an adapter has no place for the "
                        "network that this method trains: choose another method, or no LoRA")


def check_evaluation(config: Any) -> None:
    """A UserError for settings of the measurements that cannot work."""
    if config.eval and not config.dry_run:
        check_output(config.results, "--results", beside=[".png"])
        if config.lora_rank and find_spec("safetensors") is None:
            raise UserError("--lora-rank: pip install safetensors to measure it, or give --no-eval")
    if config.max_tokens is not None and config.max_tokens < 1:
        raise UserError(f"--max-tokens {config.max_tokens}: give at least 1")
    if config.lengths and min(config.lengths) < 1:
        raise UserError(f"--lengths {min(config.lengths)}: give numbers of tokens, 1 and more")
    if config.text and config.corpus != DEFAULT_CORPUS:
        raise UserError("--text and --corpus: give one of them")


def learning_rate_of(config: Any, base: ModelConfig) -> float:
    """--lr, or the one of small models. A large one would be damaged by it."""
    if config.lr is not None:
        return config.lr
    if parameter_count(base) > LARGE and not config.dry_run:
        raise UserError("--lr is needed for a model of this size: the PI paper has 2e-5 for 7B and "
                        "13B, 1e-5 for 33B and 65B")
    return 1e-3


def file_label(rope_type: str) -> str:
    """The name of a method in file names and tables."""
    return "pi" if rope_type == "linear" else rope_type


def rope_flag(rope: dict[str, Any]) -> str:
    """A rope dict as it is written after --rope, without the factor."""
    settings = {name: value for name, value in rope.items() if name != "factor"}
    return settings["rope_type"] if len(settings) == 1 else json.dumps(settings)


def baseline_rope(base: ModelConfig) -> dict[str, Any]:
    """Plain RoPE, or for a model that was trained with something else (ALiBi, say) that."""
    own = base.rope.rope_type
    return {"rope_type": "default" if METHODS[own].extends_rope else own, "factor": 1.0}


def changes_positions(rope: dict[str, Any], base: ModelConfig) -> bool:
    """Whether `rope` differs from the baseline's. ALiBi and the like are stretched by the factor
    alone, so they always differ."""
    name = rope["rope_type"]
    has_settings = len(rope) > 2  # besides rope_type and factor
    return (has_settings or name != baseline_rope(base)["rope_type"]
            or not METHODS[name].extends_rope)


def load_extended(path: str, rope: dict[str, Any], L: int, window: int, device: torch.device,
                  attention: str, training: Any = None, offload: bool = False) -> LLaMA:
    """A pretrained model with other positions and the window that it is to have. training: the
    FinetuneConfig, if it is to be trained: by LoRA if that asks for it. Several GPUs share the
    weights of a model to be trained, and of a large one, as they are read. offload: they stay in
    the computer's memory."""
    forget_sharded_models()
    lora = lora_of_flags(training)
    if training:
        shape = dataclasses.replace(load_config(path), max_seq_len=window)
        require_memory(shape, training, device, row_length(training, rope, L, window))
    shard = (shard_to_train(training, device) if training
             else shard_to_measure(path, device, offload))
    # LoRA freezes in a dtype of its own: each matrix goes there from the one that it is stored in.
    model = load_model(path, rope={"original_max_position_embeddings": L} | rope, device=device,
                       dtype=None if lora else torch.float32, attention=attention, shard=shard)
    if lora and shard is None:
        freeze(model, lora)
    if lora:
        init_lora(model, training.seed)
    if offload and not training:
        prepare_inference(model)
    model.config.max_seq_len = window
    # Also where nothing is scaled: the folder of a direct fine-tuning has to know L.
    model.config.rope = dataclasses.replace(model.config.rope, original_max_position_embeddings=L)
    return model


def shard_to_train(training: Any, device: torch.device) -> Callable[[LLaMA], torch.device] | None:
    """How the GPUs share the weights of a model to be trained; None for one GPU that has them."""
    def shard(model: LLaMA) -> torch.device:
        lora = lora_of_flags(training)
        if lora:
            freeze(model, lora)
        return shard_for_training(model, training, device)
    return shard if trains_sharded(training) else None


def load_saved(folder: str, device: torch.device, attention: str, offload: bool = False) -> LLaMA:
    """A model as it was saved, shared among the GPUs if it is too large for one."""
    forget_sharded_models()
    model = load_model(folder, device=device, attention=attention,
                       shard=shard_to_measure(folder, device, offload))
    if offload:
        prepare_inference(model)
    return model


def prepare_inference(model: LLaMA) -> None:
    """Gather all weights once. On one GPU, FSDP keeps the tensors that it gathers into, and those
    made in inference mode could not be written again."""
    for part in [*model.layers, model]:
        part.unshard()
        part.reshard()


def forget_sharded_models() -> None:
    """Free those that nobody uses any more: FSDP's models are in cycles, and may still fill the
    memory that the next one needs."""
    if dist.is_initialized():
        gc.collect()


def shard_to_measure(path: str, device: torch.device, offload: bool = False
                     ) -> Callable[[LLaMA], torch.device] | None:
    """How the GPUs share the weights of a model to be measured that would take more than half of
    one GPU's memory, or is offloaded: all then compute each pass together. None where each has a
    model of its own, and takes its share of the passes."""
    shard = functools.partial(shard_weights, device=device, dtype=torch.float32, called="hidden",
                              offload=offload)
    if offload:
        prepare_offload(device)
        return shard
    if join_process_group()[1] == 1:
        return None
    size = 4 * parameter_count(load_config(path))       # bytes, in float32
    if not on_any_rank(size > memory_per_rank(device) / 2):     # they may have different GPUs
        return None
    return shard


def prepare_corpus(config: Any, tokenizer: Tokenizer, held_out: int, rank: int) -> str:
    """The token folder of --text or --corpus, made by rank 0 where it is not there."""
    if rank == 0 and config.text:
        corpus_of_text(config.text, tokenizer, held_out)
    elif rank == 0:
        ensure_corpus(config.corpus, tokenizer.path, config.corpus_mb)
    wait_for_all_ranks()
    if config.text:
        return str(corpus_of_text(config.text, tokenizer, held_out))  # it is there
    return str(corpus_for(config.corpus, tokenizer, config.corpus_mb))


class Phase(NamedTuple):
    """A part of finetune.py's work, in floating-point operations."""
    name: str
    flops: float
    is_training: bool


def phases(config: Any, experiments: Sequence[Any], shape: ModelConfig, lengths: Sequence[int],
           ranks: int) -> list[Phase]:
    """Everything that finetune.py will do, in order. ranks: that read different rows."""
    found = []
    rows = config.steps * config.batch_size * config.accumulate * ranks
    longest = max(lengths)
    length = min(2 * longest, config.max_tokens or 2 * longest)
    documents = max(1, (config.max_tokens or 16384) // length)
    for e in experiments:
        if e.training:
            row = row_length(e.training, e.rope, shape.original_window, shape.max_seq_len)
            flops = rows * row * flops_per_token(shape, row)
            if config.recompute:
                flops *= 4 / 3
            found.append(Phase(f"{e.name}: training, {config.steps} steps", flops, True))
        if config.eval:
            flops = evaluation_flops(shape, lengths, documents, length,
                                     config.depths * config.trials)
            found.append(Phase(f"{e.name}: measuring", flops, False))
    return found


def print_phases(work: Sequence[Phase]) -> None:
    """How the whole work is shared between training and measuring."""
    whole = sum(phase.flops for phase in work)
    training = sum(phase.flops for phase in work if phase.is_training)
    print(f"in all     {len(work)} phases, {whole:.2e} floating-point operations: "
          f"{training / whole:.0%} training, {1 - training / whole:.0%} measuring")


def has_short_rows(config: Any, rope: dict[str, Any]) -> bool:
    """Whether training rows have L tokens and not L': positions skip (PoSE), or the method's own
    way is such."""
    own_way = METHODS[rope["rope_type"]].trained_on
    return config.positions == "pose" or config.positions == "own" and own_way != "target"


def row_length(config: Any, rope: dict[str, Any], L: int, window: int) -> int:
    """Tokens of a training row: --row-length, or L' where its positions are contiguous."""
    if config.row_length is not None:
        return config.row_length
    return L if has_short_rows(config, rope) else window


def training_batches(config: Any, rope: dict[str, Any], base: ModelConfig, tokenizer: Tokenizer,
                     ranks: int) -> Batches:
    """The rows of a fine-tuning. All methods with rows of one length see the same text in the same
    order."""
    L, window = base.original_window, round(base.original_window * config.factor)
    return Batches(TokenFile(config.corpus, "train"), tokenizer,
                   rows=config.batch_size * config.accumulate * ranks,
                   seq_len=row_length(config, rope, L, window),
                   passkey_share=config.passkey_share, passkey_longest=L,
                   packed=config.passkey_packed, seed=config.seed,
                   positions=training_positions(with_rope(base, rope).rope, L, window,
                                                config.positions))
