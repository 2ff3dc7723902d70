"""A training before it begins: the size, memory and hours that its header and --dry-run print."""
import dataclasses
from typing import Any

import torch

from common.device import choose_dtype, describe_device, dtype_name, memory_per_rank
from common.distributed import join_process_group, on_any_rank
from common.errors import UserError
from methods.lora import LoRA, lora_of_flags, trainable_and_frozen
from model import ModelConfig
from training.memory import GIB, Plan, describe_fit, memory_table, training_memory
from weights.flags import describe_attention
from weights.size import flops_per_token, parameter_count

ASSUMED_THROUGHPUT = 4e14  # operations a second of a GPU, to plan with: see print_costs


def planned_gpus(config: Any) -> int:
    """Those of --gpus, or of torchrun."""
    return config.gpus or join_process_group()[1]


def plan_of(shape: ModelConfig, config: Any, dtype: torch.dtype, row: int) -> Plan:
    """The Plan of a train.FitConfig, for the GPUs of torchrun or of --gpus. row: its tokens."""
    plan = Plan(config.batch_size, row, dtype, config.attention, config.accumulate,
                planned_gpus(config), config.context_parallel, config.recompute, config.offload,
                moment_bytes=2 if config.optimizer == "adamw8bit" else 8)
    lora = lora_of_flags(config)
    if lora is None:
        return plan
    trained, frozen = trainable_and_frozen(shape, lora)
    outside = 0
    if not lora.full:
        outside = frozen - trainable_and_frozen(shape, dataclasses.replace(lora, full=True))[1]
    frozen_bytes = {"int8": 1, "bfloat16": 2, "float32": 4}[lora.base_dtype]
    return dataclasses.replace(plan, trainable=trained, frozen=frozen - outside,
                               frozen_bytes=frozen_bytes, frozen_outside=outside)


def print_header(shape: ModelConfig, config: Any, device: torch.device, row: int | None = None
                 ) -> None:
    """What a training will be and take. row: tokens of a row, if not the window. With --gpus it is
    planned for GPUs, where "auto" is bfloat16."""
    dtype = torch.bfloat16 if config.gpus and config.dtype == "auto" else choose_dtype(
        config.dtype, device)
    row = row or shape.max_seq_len
    plan = plan_of(shape, config, dtype, row)
    rows = config.batch_size * config.accumulate * (plan.gpus // plan.context_shards)
    attention = describe_attention(config.attention, shape.rope, device)
    compiled = ", compiled" if config.compile else ""
    memory = training_memory(shape, plan)
    lora = lora_of_flags(config)
    print(f"device     {describe_device(device)}, {dtype_name(dtype)}, attention {attention}"
          f"{compiled}")
    print(f"model      {parameter_count(shape):,} parameters, window {shape.original_window} -> "
          f"{shape.max_seq_len}, rope {shape.rope.to_dict()}")
    if lora:
        print(f"lora       {describe_lora(shape, lora)}")
    print(f"step       {rows} rows x {row} = {rows * row:,} tokens, {config.steps} steps, "
          f"{config.steps * rows * row / 1e6:.1f}M tokens, "
          f"{flops_per_token(shape, row) / 1e6:.1f} MFLOP a token")
    print(f"memory     about {memory.peak / 2**20:,.0f} MiB a process")
    if config.offload:
        print(f"computer   {memory.computer / 2**20:,.0f} MiB of RAM a process: weights, "
              "gradients, AdamW")
    if config.dry_run:
        print(memory_table(memory))
        print(describe_fit(shape, plan))
        print_costs(shape, plan, config.steps * rows)


def require_memory(shape: ModelConfig, config: Any, device: torch.device, row: int) -> None:
    """A UserError, before memory is filled, for a training that takes far more than there is. The
    arithmetic of activations may be a fifth too high."""
    memory = training_memory(shape, plan_of(shape, config, choose_dtype(config.dtype, device), row))
    needed, there = memory.peak, memory_per_rank(device)
    if on_any_rank(needed > 1.25 * there):
        raise UserError(f"{needed / GIB:,.0f} GiB are needed, and there are {there / GIB:,.0f}: "
                        "give a smaller --batch-size or model, or --recompute; --dry-run shows "
                        "what it is for")
    needed, there = memory.computer, memory_per_rank(torch.device("cpu"))
    if on_any_rank(needed > there):
        raise UserError(f"--offload needs {needed / GIB:,.0f} GiB of RAM for each GPU, and there "
                        f"are {there / GIB:,.0f}: give a smaller model, --lora-rank, or more "
                        "computers")


def describe_lora(shape: ModelConfig, lora: LoRA) -> str:
    trained, frozen = trainable_and_frozen(shape, lora)
    beside = ", embedding, output and norms in full" if lora.full else ""
    return (f"rank {lora.rank}, alpha {lora.alpha:g} on {' '.join(lora.matrices)}{beside}: "
            f"{trained:,} parameters trained, {frozen:,} frozen in {lora.base_dtype}")


def print_costs(shape: ModelConfig, plan: Plan, rows: int) -> None:
    """--dry-run: the work of the whole training, and what it then takes to read L' tokens.

        hours = operations / (GPUs * 4e14) / 3600

    4e14 operations a second are 40 % of the 989e12 that an H100 does at most (bfloat16, dense). The
    share is an assumption. With recomputed operations counted it is called HFU, without them MFU =
    tokens a second * flops_per_token / peak. (Chowdhery et al. 2022, arXiv 2204.02311, appendix B)
    """
    flops = rows * plan.seq_len * flops_per_token(shape, plan.seq_len)
    if plan.recompute:
        flops *= 4 / 3
    hours = flops / (plan.gpus * ASSUMED_THROUGHPUT) / 3600
    window = shape.max_seq_len
    weights = 2 * parameter_count(shape)
    cache = 2 * 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * window
    reading = flops_per_token(shape, window, training=False) * window
    print(f"training   {flops:.2e} floating-point operations, {hours:,.3g} hours on {plan.gpus} "
          f"GPU{'s' if plan.gpus > 1 else ''} at {ASSUMED_THROUGHPUT / 1e12:.0f} TFLOP/s each "
          "(assumed: 40 % of an H100's 989)" + (", copying not counted" if plan.offload else ""))
    print(f"then       to read {window} tokens in bfloat16: weights {weights / 2**20:,.0f} MiB, "
          f"keys and values {cache / 2**20:,.0f} MiB, {reading:.2e} operations")
