"""What a GPU holds during a training step, before there is a model or a GPU.

    V vocabulary   C width   F feed-forward width   D head_dim   H, K query and key/value heads
    T tokens of a row   S GPUs that share a row, T / S tokens each   N GPUs

FSDP shares weights, gradients and AdamW's moments between all N GPUs. A block's weights are
gathered whole only while it works. (Zhao et al. 2023, arXiv 2304.11277; Rajbhandari et al. 2020,
arXiv 1910.02054, stage 3.) The GPUs that share a row gather its keys and values in each layer.
"""
import dataclasses
import itertools
import math
from collections.abc import Collection
from dataclasses import dataclass

import torch

from methods.lora import matrix_shapes
from model import LOSS_CHUNK, ModelConfig
from weights.size import block_parameters, matrix_parameters, parameter_count

GIB = 2**30
GPU_SIZES = (24, 48, 80, 141)   # as GPUs are named: an "80 GB" H100 has 79.6 GiB
USABLE = 0.9  # of a GPU: the allocator's fragments, CUDA's context and NCCL's buffers need the rest


@dataclass(frozen=True)
class Plan:
    """How a training step is spread over GPUs."""
    rows: int                                 # of a micro-batch, for the GPUs that share its rows
    seq_len: int                              # T, tokens of a row
    dtype: torch.dtype = torch.float32        # of the matrix products
    attention: str = "sdpa"
    accumulate: int = 1                       # micro-batches of a step
    gpus: int = 1                             # N
    context_shards: int = 1                   # S
    recompute: bool = False
    offload: bool = False                     # what is sharded waits in the computer's memory
    trainable: int | None = None              # parameters that learn, in float32 [all of them]
    frozen: int = 0                           # those of the blocks that do not (LoRA)
    frozen_bytes: int = 2                     # of each of these: bfloat16
    frozen_outside: int = 0                   # those outside that do not, in float32
    moment_bytes: int = 8                     # AdamW's two moments of a parameter; 2 in 8 bits

    @property
    def gathers(self) -> bool:
        """Whether a GPU puts weights together that lie elsewhere."""
        return self.gpus > 1 or self.offload


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""
    weights: int
    gradients: int
    optimiser: int
    gathered: int
    activations: int
    keys: int
    logits: int
    block: int                  # while a block works in the backward pass
    accumulated: bool = False   # gradients of earlier micro-batches lie beside the activations
    computer: int = 0           # not on the GPU but in the computer's memory

    @property
    def peak(self) -> int:
        """The most that is there at once. Logits are gone before the first block works. In the only
        micro-batch of a step gradients come as activations go, block by block, so that the larger
        of the two counts; if gradients are accumulated, both do."""
        kept = self.weights + self.optimiser + self.gathered + max(self.logits, self.block)
        of_the_pass = self.activations + self.keys
        if self.accumulated:
            return kept + self.gradients + of_the_pass
        return kept + max(self.gradients, of_the_pass)


def training_memory(config: ModelConfig, plan: Plan) -> Memory:
    """Memory of a training step on each GPU, in bytes. b: of a number of `dtype`.

        weights       4 / N for each parameter (float32); LoRA's frozen matrices 2 / N (bfloat16)
        gradients     4 / N for each that learns
        optimiser     8 / N for each that learns: AdamW's two moments
        gathered      0 on one GPU, see gathered_bytes
        activations   see activation_bytes
        keys          b for 2 K D numbers of each of a row's T tokens in every layer, or in one
                      with recompute; b + 4 for their gradients, in one. 0 if no row is shared
        logits        three float32 copies of a chunk
        block         see block_bytes
        computer      with offload, see computer_bytes; the GPU then has none of these
    """
    learning = parameter_count(config) if plan.trainable is None else plan.trainable
    float32 = learning + plan.frozen_outside
    weights = (4 * float32 + plan.frozen_bytes * plan.frozen) // plan.gpus
    gradients = 4 * learning // plan.gpus
    optimiser = plan.moment_bytes * learning // plan.gpus
    keys = 0
    if plan.context_shards > 1:
        layers = 1 if plan.recompute else config.n_layers
        numbers = 2 * config.n_kv_heads * config.head_dim   # of each token
        b = plan.dtype.itemsize
        keys = plan.rows * plan.seq_len * numbers * (layers * b + b + 4)
    tokens = plan.rows * plan.seq_len // plan.context_shards
    logits = 3 * 4 * min(LOSS_CHUNK, tokens * config.vocab_size)
    computer = 0
    if plan.offload:
        computer = computer_bytes(config, plan, optimiser)
        weights = gradients = optimiser = 0
    return Memory(weights, gradients, optimiser, gathered_bytes(config, plan),
                  activation_bytes(config, plan), keys, logits, block_bytes(config, plan),
                  plan.accumulate > 1, computer)


def computer_bytes(config: ModelConfig, plan: Plan, optimiser: int) -> int:
    """What --offload keeps in the computer's memory for each GPU, in bytes: the moments, and its
    rows of weights and gradients. These are pinned, and PyTorch hands out pinned memory in powers
    of two, tensor by tensor. Without norms and LoRA's small matrices."""
    in_block = matrix_shapes(config).values()
    outside = [(config.vocab_size, config.dim)] * (1 if config.tied else 2)

    def pinned(shapes: Collection[tuple[int, int]], size: int) -> int:
        parts = [math.ceil(rows / plan.gpus) * columns * size for rows, columns in shapes]
        return sum(1 << (part - 1).bit_length() for part in parts)
    block = pinned(in_block, plan.frozen_bytes) if plan.frozen else 2 * pinned(in_block, 4)
    rest = pinned(outside, 4) * (1 if plan.frozen_outside else 2)
    return optimiser + config.n_layers * block + rest


def gathered_bytes(config: ModelConfig, plan: Plan) -> int:
    """What FSDP gathers whole, on each GPU, in bytes. b: of a number of `dtype`. 0 on a GPU that
    keeps all there is.

        embedding, output, last norm   4 a parameter from forward to backward; 4 for the gradient of
                                       the output, which is reduced last, with the embedding's; b
                                       for the output's copy, if it is in bfloat16
        blocks                         b a parameter, of two: one works, the next is on its way
    """
    if not plan.gathers:
        return 0
    b = plan.dtype.itemsize
    block = block_parameters(config)
    root = parameter_count(config) - config.n_layers * block
    output = config.vocab_size * config.dim
    copy = b * output if b < 4 else 0
    gradient = 0 if plan.frozen_outside else 4 * output
    return 4 * root + gradient + copy + 2 * b * block


def activation_bytes(config: ModelConfig, plan: Plan) -> int:
    """What a GPU keeps for the backward pass, in bytes, for its T / S tokens of each row: all of
    each layer (layer_bytes), with recompute only its input, C float32. On one GPU in bfloat16 also
    autocast's copies of the matrices."""
    tokens = plan.rows * plan.seq_len // plan.context_shards
    kept = 4 * config.dim if plan.recompute else layer_bytes(config, plan)
    return tokens * config.n_layers * kept + copied_bytes(config, plan)


def layer_bytes(config: ModelConfig, plan: Plan) -> int:
    """Activations of one layer for the backward pass, in bytes a token.

    LoRA keeps less than that: a frozen matrix needs no input for a gradient of its own.

        4 C float32                               the inputs of norms, before and after scaling
        5 C + 2 K D + 4 F numbers of `dtype`      the inputs of matrices and products; 8 C in
                                                  bfloat16: autocast makes a copy for each matrix
        H T scores                                naive attention, in float32 and in `dtype`
    """
    b = plan.dtype.itemsize
    widths = 5 if b == 4 else 8
    numbers = widths * config.dim + 2 * config.n_kv_heads * config.head_dim + 4 * config.ffn_dim
    layer = 4 * 4 * config.dim + b * numbers
    if plan.attention == "naive":
        layer += config.n_heads * plan.seq_len * (4 if b == 4 else 4 + b)
    return layer


def copied_bytes(config: ModelConfig, plan: Plan) -> int:
    """Copies in bfloat16 that autocast makes of all matrices that learn, on one GPU."""
    b = plan.dtype.itemsize
    if plan.gathers or b == 4:
        return 0
    return b * max(0, matrix_parameters(config) - plan.frozen - plan.frozen_outside)


def block_bytes(config: ModelConfig, plan: Plan) -> int:
    """What is there only while one block works in the backward pass, in bytes.

        gathered       b for the whole gradient of each parameter that learns, and 4 to reduce it;
                       4 / N for what is reduced, if it then goes to the computer's memory
        recompute      the layer's activations; autocast's copies are gone by then
        naive          2 H T float32 more for each token
        tiled          four tiles of 256 x 256 float32 for each head and row
    """
    tokens = plan.rows * plan.seq_len // plan.context_shards
    size = 0
    if plan.gathers:
        learning = block_parameters(config) - plan.frozen // config.n_layers
        size += (plan.dtype.itemsize + 4) * learning
        if plan.offload:
            size += 4 * learning // plan.gpus
    if plan.recompute:
        size += max(0, tokens * layer_bytes(config, plan) - copied_bytes(config, plan))
    if plan.attention == "naive":
        size += tokens * 2 * config.n_heads * plan.seq_len * 4
    if plan.attention == "tiled":
        size += plan.rows * config.n_heads * 4 * min(plan.seq_len, 256)**2 * 4
    return size


def fits(memory: Memory, gigabytes: int) -> bool:
    return memory.peak <= USABLE * gigabytes * GIB


def would_fit(config: ModelConfig, plan: Plan, gigabytes: int) -> Plan | None:
    """The first plan for the same GPUs that fits: rows are shared by as few as possible, and
    recomputed only where they have to be; last of all weights leave the GPU. None if there is no
    such plan."""
    shards = [n for n in range(1, plan.gpus + 1)
              if plan.gpus % n == 0 and plan.seq_len % (2 * n) == 0]
    may_offload = plan.moment_bytes == 8 and plan.frozen_bytes > 1    # 8 bits are refused with it
    choices = itertools.product((plan.offload, may_offload), [plan.context_shards, *shards],
                                (plan.recompute, True))
    for offload, context_shards, recompute in choices:
        tried = dataclasses.replace(plan, context_shards=context_shards, recompute=recompute,
                                    offload=offload)
        if fits(training_memory(config, tried), gigabytes):
            return tried
    return None


def changed_flags(plan: Plan, other: Plan) -> str:
    """The flags that turn one plan into the other: '--context-parallel 4 --recompute'."""
    flags = []
    if other.context_shards != plan.context_shards:
        flags.append(f"--context-parallel {other.context_shards}")
    if other.recompute and not plan.recompute:
        flags.append("--recompute")
    if other.offload and not plan.offload:
        flags.append("--offload")
    return " ".join(flags)


def memory_table(memory: Memory) -> str:
    """The parts in GiB, as two lines."""
    parts = {"weights": memory.weights, "gradients": memory.gradients, "AdamW": memory.optimiser,
             "gathered": memory.gathered, "activations": memory.activations, "keys": memory.keys,
             "logits": memory.logits, "block": memory.block, "peak": memory.peak}
    names = "  ".join(parts)
    numbers = "  ".join(f"{size / GIB:{len(name)}.1f}" for name, size in parts.items())
    return f"a GPU      {names}\nin GiB     {numbers}"


def describe_fit(config: ModelConfig, plan: Plan) -> str:
    """Into which GPUs the plan fits, and what would make it fit into the others."""
    memory = training_memory(config, plan)
    answers, remedies = [], []
    for size in GPU_SIZES:
        if fits(memory, size):
            answers.append(f"{size} GB: yes")
            continue
        answers.append(f"{size} GB: no")
        found = would_fit(config, plan, size)
        remedy = changed_flags(plan, found) if found else "more GPUs"
        if found and found.offload and not plan.offload:
            remedy += f" ({training_memory(config, found).computer / GIB:,.0f} GiB of RAM each)"
        remedies.append(f"{size} GB: {remedy}")
    lines = [f"fits in    {', '.join(answers)} (in {USABLE:.0%} of it: CUDA and fragments take the "
             "rest)"]
    if remedies:
        lines.append(f"would fit  {', '.join(remedies)}")
    return "\n".join(lines)
