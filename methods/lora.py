"""LoRA: fine-tuning with few trained parameters. (Hu et al. 2021, arXiv 2106.09685)

    y = W x + (alpha / r) B A x        W [out, in] frozen        A [r, in]        B [out, r]

Fine-tuning changes W by a matrix of low rank: r (in + out) numbers are trained instead of in * out.
A begins random and B zero, so the first step begins at the pretrained model. Gradients and AdamW's
moments exist for A and B only, and W, which nobody changes, needs neither float32 nor a gradient.

For a longer window that is not enough. LongLoRA (Chen et al. 2023, arXiv 2309.12307) reached with
rank 8 a perplexity of 11.44 at 32k tokens, full fine-tuning 8.08, and a larger rank did not help.
Trained in full beside it, embeddings and norms closed the gap: 8.12. Here that is `full`.
"""
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from common.device import DTYPES
from common.distributed import own_part, own_rows

ATTENTION_MATRICES = ("wq", "wk", "wv", "wo")
MATRICES = (*ATTENTION_MATRICES, "w1", "w2", "w3")  # of a block
BASE_DTYPES = ("bfloat16", "float32", "int8")


@dataclass(frozen=True)
class LoRA:
    """The settings of an adaptation. rank 8 and alpha 16 are LongLoRA's."""
    rank: int = 8                                   # r
    alpha: float = 16.0
    matrices: tuple[str, ...] = ATTENTION_MATRICES  # these get A and B, in every block
    full: bool = True                               # embedding, output and norms are trained, too
    base_dtype: str = "bfloat16"                    # of the frozen matrices

    @property
    def scaling(self) -> float:
        """alpha / r, so that another rank needs no other learning rate."""
        return self.alpha / self.rank


def lora_of_flags(config: Any) -> LoRA | None:
    """The LoRA that a finetune.FinetuneConfig asks for; None where everything is trained."""
    if not getattr(config, "lora_rank", 0):
        return None
    return LoRA(config.lora_rank, config.lora_alpha, tuple(config.lora_matrices),
                config.lora_full, config.base_dtype)


# ---- A frozen matrix -----------------------------------------------------------------------------

def stored(weight: Tensor, base_dtype: str) -> tuple[Tensor, Tensor | None]:
    """A matrix [out, in] as it is kept while others are trained: (weight, row_scale).

    int8: w is row_scale * q, rounded, with a whole number q from -127 to 127 and one row_scale for
    each row, max |w| / 127, [out, 1]. Otherwise there is none.
    """
    if base_dtype != "int8":
        return weight.to(DTYPES[base_dtype]), None
    weight = weight.float()
    row_scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
    return (weight / row_scale).round().to(torch.int8), row_scale


def restored(weight: Tensor, row_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The numbers that a stored matrix stands for, in a dtype to compute with."""
    if row_scale is None:
        return weight.to(dtype)
    return (weight.float() * row_scale).to(dtype)


class FrozenProduct(torch.autograd.Function):
    """W x, without a gradient for W. What is kept for the backward pass is W as it is stored;
    autograd by itself would keep each matrix in the dtype of x as well."""

    @staticmethod
    def forward(ctx, x, weight, row_scale):
        ctx.save_for_backward(weight, row_scale)
        return F.linear(x, restored(weight, row_scale, x.dtype))

    @staticmethod
    def backward(ctx, grad):
        weight, row_scale = ctx.saved_tensors
        return grad @ restored(weight, row_scale, grad.dtype), None, None


class FrozenLinear(nn.Module):
    """A matrix of the pretrained model. The weight keeps its name in the state dict."""

    def __init__(self, weight: Tensor, base_dtype: str):
        super().__init__()
        weight, row_scale = stored(weight.detach(), base_dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.row_scale = None
        if row_scale is not None:
            self.row_scale = nn.Parameter(row_scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return FrozenProduct.apply(x, self.weight, self.row_scale)


# ---- LoRA ----------------------------------------------------------------------------------------

class LoRALinear(FrozenLinear):
    """W x + (alpha / r) B A x. A and B are stored in float32, whatever W is."""

    def __init__(self, weight: Tensor, lora: LoRA):
        super().__init__(weight, lora.base_dtype)
        rows, columns = weight.shape
        self.lora_a = nn.Parameter(torch.empty(lora.rank, columns, device=weight.device))  # [r, in]
        self.lora_b = nn.Parameter(torch.empty(rows, lora.rank, device=weight.device))  # [out, r]
        self.scaling = lora.scaling

    def forward(self, x: Tensor) -> Tensor:
        low_rank = F.linear(F.linear(x, self.lora_a), self.lora_b)    # [.., in] -> [.., out]
        return super().forward(x) + self.scaling * low_rank


def add_lora(model: nn.Module, lora: LoRA, seed: int = 0) -> None:
    """Prepare a loaded LLaMA for LoRA, in place. model: of any dtype. seed: of A."""
    freeze(model, lora)
    init_lora(model, seed)


def freeze(model: nn.Module, lora: LoRA) -> None:
    """Freeze a LLaMA's matrices, in place; those that `lora` names get A and B, still without
    values. Matrix by matrix it becomes lora.base_dtype. Without `lora.full` embedding, output and
    norms are frozen as well, in float32."""
    for block in model.layers:
        for part in (block.attention, block.feed_forward):
            for name, linear in list(part.named_children()):
                if name in lora.matrices:
                    setattr(part, name, LoRALinear(linear.weight, lora))
                else:
                    setattr(part, name, FrozenLinear(linear.weight, lora.base_dtype))
    for module in beside_the_matrices(model):
        module.float().requires_grad_(lora.full)
    model.lora = lora


@torch.no_grad()
def init_lora(model: nn.Module, seed: int = 0) -> None:
    """A uniform between -1/sqrt(in) and 1/sqrt(in), B zero. Of several GPUs each has its rows."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same A for every device
    for module in model.modules():
        if isinstance(module, LoRALinear):
            a = torch.empty(module.lora_a.shape)                                         # [r, in]
            largest = 1 / math.sqrt(a.shape[1])
            a.uniform_(-largest, largest, generator=generator)
            part, own = own_part(module.lora_a, (), a)
            part.copy_(own)
            own_rows(module.lora_b).zero_()


def beside_the_matrices(model: nn.Module) -> list[nn.Module]:
    """Embedding, output (None in a model that ties it to the embedding) and norms."""
    norms = [norm for block in model.layers for norm in (block.attention_norm, block.ffn_norm)]
    modules = [model.tok_embeddings, model.output, model.norm, *norms]
    return [module for module in modules if module is not None]


def lora_of(model: nn.Module) -> LoRA | None:
    """The settings that add_lora was given; None for a model that is trained in full."""
    return getattr(model, "lora", None)


def merged(weight: Tensor, a: Tensor, b: Tensor, lora: LoRA) -> Tensor:
    """W + (alpha / r) B A in float32, [out, in]: one matrix that computes what the three do."""
    return weight.float() + lora.scaling * (b.float() @ a.float())


# ---- Before there is a model ---------------------------------------------------------------------

def matrix_shapes(shape: Any) -> dict[str, tuple[int, int]]:
    """{name: (out, in)} of the matrices of a block. shape: a ModelConfig."""
    C, ffn = shape.dim, shape.ffn_dim
    queries, keys = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    return {"wq": (queries, C), "wk": (keys, C), "wv": (keys, C), "wo": (C, queries),
            "w1": (ffn, C), "w2": (C, ffn), "w3": (ffn, C)}


def trainable_and_frozen(shape: Any, lora: LoRA) -> tuple[int, int]:
    """(parameters that are trained, those of the pretrained model that are not).

        A and B             r (in + out) for each adapted matrix
        embedding, output   V C each; one of them if they are tied
        norms               (2 layers + 1) C
    """
    matrices = matrix_shapes(shape)
    adapters = shape.n_layers * sum(lora.rank * sum(matrices[name]) for name in lora.matrices)
    frozen = shape.n_layers * sum(rows * columns for rows, columns in matrices.values())
    embeddings = (1 if shape.tied else 2) * shape.vocab_size * shape.dim
    beside = embeddings + (2 * shape.n_layers + 1) * shape.dim
    return (adapters + beside, frozen) if lora.full else (adapters, frozen + beside)
