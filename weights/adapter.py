"""What LoRA trained, as a folder: an adapter, without the model that it adapts.

    params.json                 shape, window and RoPE, as of every model here; and how the base was
                                frozen, and a sample of its weights (`lora`)
    adapter_config.json         rank, alpha, matrices, and the place of the base, in PEFT's words
    adapter_model.safetensors   A and B, and what was trained in full, by PEFT's names

PEFT reads the folder (PeftModel.from_pretrained), on top of the same base in Hugging Face's layout
with the RoPE of params.json. load_model reads the base and merges, so that everything that takes a
model takes the folder: evaluation, export, and the next fine-tuning.
"""
import hashlib
from pathlib import Path
from typing import Any

import torch

from common.distributed import is_sharded, of_first_rank, own_part, own_rows
from common.errors import UserError
from common.files import read_json, read_json_object
from data.tokenizer import Tokenizer
from methods.lora import (BASE_DTYPES, MATRICES, FrozenLinear, LoRA, lora_of,
                          matrix_shapes, merged, restored, stored)
from model import LLaMA, ModelConfig
from weights.checks import check_tensor_values
from weights.hugging_face import NAMES, hugging_face_name, open_weights, reorder_rows
from weights.meta import read_params, read_rope
from weights.safetensors_file import NamedTensors, write_safetensors
from weights.save import (ADAPTER, ADAPTER_CONFIG, SAVED, find_file, params_json, save_folder,
                          weight_files)

PEFT_PREFIX = "base_model.model."
# {wq: q_proj, ...}: PEFT names a matrix by the last part of its module's name.
PEFT_MATRICES = {ours.split(".")[1]: theirs.split(".")[1] for ours, theirs in NAMES.items()
                 if "." in ours}
TRAINED_IN_FULL = ["embed_tokens", "lm_head", "input_layernorm", "post_attention_layernorm", "norm"]
# Settings of PEFT by which an adapter computes something else than LoRA.
OTHER_THAN_LORA = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias",
                   "fan_in_fan_out", "layers_to_transform", "layer_replication",
                   "trainable_token_indices", "target_parameters")


# ---- Save ----------------------------------------------------------------------------------------

def save_adapter(model: LLaMA, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write what is trained of a model that add_lora prepared, whole or not at all (save_folder).
    model.path is the base that it was loaded from."""
    lora = lora_of(model)
    tensors = adapter_tensors(model)
    sample = sample_of({name: restored(own_rows(module.weight)[:1, :4], first(module.row_scale),
                                       torch.float32)
                        for name, module in model.named_modules()
                        if isinstance(module, FrozenLinear)})
    note = {"lora": {"base_dtype": lora.base_dtype, "base_weights": sample}}
    json_files = {"params.json": params_json(model.config) | note,
                  ADAPTER_CONFIG: peft_config(lora, model.path, model.config.tied)}
    save_folder(folder, json_files, tokenizer, ADAPTER, lambda path: write_safetensors(
        path, model.config, tensors, torch.float32, peft_name))


def adapter_tensors(model: LLaMA) -> NamedTensors:
    """What the file of an adapter holds."""
    tensors = list(trained_tensors(model).items())
    if lora_of(model).full and model.config.tied:
        # PEFT does not tie what it loads, unless both names are there.
        tensors.append(("output.weight", model.tok_embeddings.weight.detach()))
    return tensors


def trained_tensors(model: LLaMA) -> dict[str, torch.Tensor]:
    """{name: tensor} of what training changes: all that a run has to save."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()
            if parameter.requires_grad}


def peft_config(lora: LoRA, base: str, tied: bool) -> dict[str, Any]:
    """adapter_config.json."""
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
            "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0, "bias": "none",
            "target_modules": [PEFT_MATRICES[name] for name in lora.matrices],
            "modules_to_save": TRAINED_IN_FULL if lora.full else None,
            "ensure_weight_tying": lora.full and tied, "inference_mode": True}


def peft_name(name: str) -> str:
    """layers.0.attention.wq.lora_a -> PREFIX model.layers.0.self_attn.q_proj.lora_A.weight,
    norm.weight -> PREFIX model.norm.weight; PREFIX is PEFT's base_model.model."""
    module, part = name.rsplit(".", 1)
    module = PEFT_PREFIX + hugging_face_name(f"{module}.weight").removesuffix("weight")
    return module + {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}.get(part, part)


def first(row_scale: torch.Tensor | None) -> torch.Tensor | None:
    return None if row_scale is None else row_scale[:1]


def sample_of(corners: dict[str, torch.Tensor]) -> str:
    """A word for the weights of a base: a hash of the first four numbers of every matrix."""
    digest = hashlib.sha256()
    for name in sorted(corners):
        digest.update(name.encode() + corners[name].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


# ---- Load ----------------------------------------------------------------------------------------

def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter of ours. One of PEFT's own has no params.json; it may lie
    beside a whole model, which is then what is read."""
    path = Path(path)
    replaced = path / SAVED  # by a model, in a save that was killed while it moved its files
    return (path.is_dir() and find_file(path, "params.json").is_file()
            and find_file(path, ADAPTER_CONFIG).is_file()
            and [file.name for file in weight_files(replaced)] in ([], [ADAPTER]))


def base_of(folder: str | Path) -> str:
    """The path of the model that an adapter adapts. A relative one counts from the working
    directory, as it did in the training; if nothing is there, from the adapter's folder."""
    file = find_file(folder, ADAPTER_CONFIG)
    base = read_json_object(file).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise UserError(f"{file}: base_model_name_or_path has to be the path of the model that was "
                        "adapted")
    places = [Path(base), Path(folder) / base]
    for place in places:
        if place.exists() and place.resolve() != Path(folder).resolve():
            return str(place)
    raise UserError(f"{file}: the base model {base} is not there: put it back, or write its new "
                    "place there as base_model_name_or_path")


def adapted_config(folder: str | Path, base: ModelConfig) -> ModelConfig:
    """The ModelConfig of an adapter: the shape of its base, and window and RoPE of its params.json.
    """
    file = find_file(folder, "params.json")
    params = read_params(file)
    if params.get("max_seq_len") is None:
        raise UserError(f"{file}: max_seq_len, the window of the adapter, is missing")
    for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size"):
        if params.get(name) != getattr(base, name):
            raise UserError(f"{file}: {name} is {params.get(name)}, and the base model has "
                            f"{getattr(base, name)}: it is not the one that was adapted")
    shape = {name: getattr(base, name) for name in ("dim", "n_layers", "n_heads", "n_kv_heads",
             "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps", "tied", "head_dim",
             "ffn_dim")}
    try:
        return ModelConfig(**shape, rope=read_rope(params), max_seq_len=params["max_seq_len"])
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def read_lora(folder: str | Path) -> tuple[LoRA, str]:
    """(settings, sample of the base) of an adapter's two JSON files, checked."""
    file = find_file(folder, ADAPTER_CONFIG)
    given = read_json_object(file)
    note = read_json(find_file(folder, "params.json")).get("lora")
    ours = {theirs: name for name, theirs in PEFT_MATRICES.items()}
    rank, alpha, targets = (given.get(key) for key in ("r", "lora_alpha", "target_modules"))
    other = [key for key in OTHER_THAN_LORA if given.get(key)]
    problem = None
    if given.get("peft_type") != "LORA" or other:
        problem = f"{other[0] if other else 'peft_type'} is set: this is another method than LoRA"
    elif type(rank) is not int or rank < 1:
        problem = f"r = {rank!r:.60}: has to be a positive whole number"
    elif type(alpha) not in (int, float) or not alpha > 0:
        problem = f"lora_alpha = {alpha!r:.60}: has to be a positive number"
    elif not isinstance(targets, list) or not targets or not set(map(str, targets)) <= set(ours):
        problem = f"target_modules = {targets!r:.60}: has to name some of {', '.join(ours)}"
    elif not isinstance(note, dict) or note.get("base_dtype") not in BASE_DTYPES:
        problem = "params.json beside it has no `lora` with the base_dtype of the training"
    if problem:
        raise UserError(f"{file}: {problem}; take the folder as finetune.py left it")
    lora = LoRA(rank, float(alpha), tuple(ours[name] for name in targets),
                bool(given.get("modules_to_save")), note["base_dtype"])
    return lora, str(note.get("base_weights"))


def read_adapter(folder: str | Path, config: ModelConfig, lora: LoRA) -> dict[str, torch.Tensor]:
    """{our name: tensor}, rows in Meta's order. Everything that `lora` says, and nothing else."""
    file = find_file(folder, ADAPTER)
    if not file.is_file():
        raise UserError(f"{file}: no such file: copy it beside {ADAPTER_CONFIG}")
    in_file = open_weights(file)
    shapes = adapter_shapes(config, lora)
    for name in {peft_name(name) for name in shapes} ^ set(in_file):
        where = "is missing" if name not in in_file else "is none of this adapter"
        raise UserError(f"{file}: {name:.100} {where}: take {ADAPTER_CONFIG} and {ADAPTER} of one "
                        "training")
    tensors = {}
    for name, shape in shapes.items():
        tensor = in_file[peft_name(name)]
        check_tensor_values(file, name, tensor, torch.float32)
        if tuple(tensor.shape) != shape:
            raise UserError(f"{file}: {peft_name(name)} is {list(tensor.shape)}, and should be "
                            f"{list(shape)}: take all files of one training")
        tensors[name] = reorder_rows(config, name, tensor.float())
    return tensors


def adapter_shapes(config: ModelConfig, lora: LoRA) -> dict[str, tuple[int, ...]]:
    """{our name: shape} of the tensors in the file of an adapter."""
    matrices = matrix_shapes(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(config.n_layers):
        for name in lora.matrices:
            part = "attention" if name in ("wq", "wk", "wv", "wo") else "feed_forward"
            rows, columns = matrices[name]
            shapes[f"layers.{layer}.{part}.{name}.lora_a"] = (lora.rank, columns)
            shapes[f"layers.{layer}.{part}.{name}.lora_b"] = (rows, lora.rank)
        if lora.full:
            for norm in ("attention_norm", "ffn_norm"):
                shapes[f"layers.{layer}.{norm}.weight"] = (config.dim,)
    if lora.full:
        shapes["norm.weight"] = (config.dim,)
        for name in ("tok_embeddings.weight", "output.weight"):
            shapes[name] = (config.vocab_size, config.dim)
    return shapes


def merge_adapter(model: LLaMA, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Make the base model, as it was loaded, the adapted one, in place:

        W + (alpha / r) B A   in float32, W rounded as it was in the training, then cast to dtype

    dtype: None is float32; shared weights keep theirs. A base with other weights than those adapted
    is a UserError.
    """
    lora, sample = read_lora(folder)
    tensors = read_adapter(folder, model.config, lora)
    corners = {}
    for name, parameter in model.named_parameters():
        weight = own_rows(parameter).detach()   # all, or of several GPUs those that this one has
        module, kind = name.removesuffix(".weight"), name.split(".")[-2]
        if kind in MATRICES:
            weight = restored(*stored(weight, lora.base_dtype), torch.float32)
            corners[module] = weight[:1, :4]
        if kind in lora.matrices:
            a, b = (tensors[f"{module}.{part}"].to(weight.device) for part in ("lora_a", "lora_b"))
            weight = merged(weight, a, own_part(parameter, (), b)[1], lora)
        if name in tensors:
            weight = own_part(parameter, (), tensors[name])[1]
        weight = weight.to(parameter.device, dtype or torch.float32)
        check_tensor_values(find_file(folder, ADAPTER), name, weight, weight.dtype)
        if is_sharded(model):
            own_rows(parameter).copy_(weight)
        else:
            parameter.data = weight
    found = sample_of(corners)  # the corners are in rank 0's rows
    if (of_first_rank(found) if is_sharded(model) else found) != sample:
        raise UserError(f"{base_of(folder)}: has other weights than the model that {folder} "
                        "adapts: put that one there, or give its place in adapter_config.json")
