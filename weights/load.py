"""Load a model, whatever its layout. meta.py, hugging_face.py and gguf.py each have two functions:

    read_config(path) -> ModelConfig
    read_tensors(path, {name: shape}) yields (file, name, place, tensor): `tensor` belongs in
                                      [place] of the model's tensor `name`, `place` being slices
"""
import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from common.device import choose_device
from common.distributed import join_process_group, own_part
from common.errors import UserError
from methods import RopeConfig, build_clex
from methods.checks import check_attention
from model import LLaMA, ModelConfig
from weights import gguf, hugging_face, meta
from weights.adapter import adapted_config, base_of, is_adapter, merge_adapter
from weights.checks import check_crc, check_tensor_values
from weights.presets import how_to_get_weights, preset_config
from weights.save import SAVED, find_file


@torch.no_grad()
def load_model(path: str | Path, rope: RopeConfig | dict | None = None,
               device: str | torch.device = "cpu", dtype: torch.dtype | None = torch.float32,
               attention: str = "auto",
               shard: Callable[[LLaMA], torch.device] | None = None) -> LLaMA:
    """The model of a folder or .gguf file: model(tokens [B, T]) -> logits [B, T, V].

    rope: None keeps the model's own; a RopeConfig or a dict replaces it (with_rope).
    device: a name, as for --device, or a torch.device.
    dtype: of all weights; None leaves each as it is stored.
    shard: prepares the model, still empty, to share its weights among GPUs and returns the device
        to keep them on (shard_weights of common/distributed.py); each GPU then reads its rows only,
        in the dtype that it gave them.
    Every tensor goes from the memory-mapped file straight to its place, dtype and device. At the
    peak there are the model, one tensor, and a sixteenth of a file. UserErrors name file, tensor
    and remedy.
    """
    device = choose_device(str(device))
    if is_adapter(path):
        return load_adapted(path, rope, device, dtype, attention, shard)
    layout = model_format(path)
    stored_config = layout.read_config(path)
    config = with_rope(stored_config, rope)
    check_attention(attention, config.rope.rope_type, device)
    model = empty_model(config, attention)
    untrained = {}
    if config.rope.rope_type != stored_config.rope.rope_type:
        untrained = untrained_clex(config, dtype or torch.float32, device)
    shapes = {name: tuple(parameter.shape)
              for name, parameter in model.named_parameters() if name not in untrained}
    tensors = dict(untrained)
    if shard is not None:       # this rank's rows are made, and are filled in place
        kept_on = shard(model)
        tensors = dict(model.to_empty(device=kept_on).named_parameters())
        for name, tensor in untrained.items():
            part, own = own_part(tensors[name], (), tensor)
            part.copy_(own)
    checked = None              # the last file whose checksums were; of several GPUs one checks
    for file, name, place, stored in layout.read_tensors(path, shapes):
        if file != checked and (shard is None or join_process_group()[0] == 0):
            check_crc(file)
            checked = file
        if name not in tensors:
            tensors[name] = torch.empty(shapes[name], dtype=dtype or stored.dtype, device=device)
        part, stored = own_part(tensors[name], place, stored)
        if len(stored) > 0:
            check_tensor_values(file, name, stored, part.dtype)
            part.copy_(stored)
    model.load_state_dict(tensors, assign=True)
    model.path = str(path)  # results name their model by it
    return model


def empty_model(config: ModelConfig, attention: str = "auto") -> LLaMA:
    """A model of shapes alone, which takes no memory: on PyTorch's device "meta"."""
    with torch.device("meta"), SkipInit():
        return LLaMA(config, attention)


def load_adapted(folder: str | Path, rope: RopeConfig | dict | None, device: torch.device,
                 dtype: torch.dtype | None, attention: str,
                 shard: Callable[[LLaMA], torch.device] | None) -> LLaMA:
    """load_model for what LoRA left: its base, with the adapter merged into it."""
    config = with_rope(load_config(folder), rope)
    model = load_model(base_of(folder), config.rope, device, None, attention, shard)
    merge_adapter(model, folder, dtype)
    model.config, model.path = config, str(folder)
    return model


class SkipInit(TorchFunctionMode):
    """Inside it the functions of torch.nn.init do nothing. A tensor on the meta device has no
    values to fill, yet PyTorch would import torch._dynamo to do it, which takes over a second."""

    def __torch_function__(self, function: Callable, types: tuple, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return None
        return function(*args, **(kwargs or {}))


def untrained_clex(config: ModelConfig, dtype: torch.dtype,
                   device: torch.device) -> dict[str, torch.Tensor]:
    """{name: tensor} of CLEX's network before its training, always the same numbers; {} for the
    other methods, which learn nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_clex(config.rope, config.head_dim)
    if network is None:
        return {}
    return {f"clex.{name}": tensor.to(device, dtype)
            for name, tensor in network.state_dict().items()}


def load_config(path: str | Path) -> ModelConfig:
    """The ModelConfig of a folder or .gguf file, without its weights; or of a preset (presets.py),
    to plan with."""
    preset = preset_config(str(path))
    if preset is not None and not Path(path).exists():
        return preset
    if is_adapter(path):
        return adapted_config(path, load_config(base_of(path)))
    return model_format(path).read_config(path)


def model_format(path: str | Path) -> ModuleType:
    """The module that reads this folder or file: meta, hugging_face or gguf."""
    path = Path(path)
    if path.suffix == ".gguf" and not path.is_dir():
        return gguf
    has_params = find_file(path, "params.json").is_file()
    checkpoints = [*path.glob("consolidated.*.pth"), *(path / SAVED).glob("consolidated.*.pth")]
    # Mistral's Hugging Face folders have a params.json too, but no such checkpoint.
    if (path / "config.json").is_file() and not (has_params and checkpoints):
        return hugging_face
    if has_params:
        return meta
    raise UserError(f"{path}: {why_no_model(path)}")


def why_no_model(path: Path) -> str:
    """What is wrong with a path that is no model, and all that would do."""
    if preset_config(str(path)) is not None and not path.exists():
        return ("known by name only, for --dry-run and python -m weights info: "
                + how_to_get_weights(str(path)))
    problem = "no such folder or file"
    if path.is_dir():
        problem = "no params.json in it, and no config.json"
    elif path.exists():
        problem = "a file"
    return (f"{problem}: give the folder of a model, Meta's (params.json, consolidated.00.pth, "
            "tokenizer.model) or Hugging Face's (config.json, model.safetensors, tokenizer.json), "
            "or a .gguf file; python -m weights fetch gets a small one")


def with_rope(config: ModelConfig, rope: RopeConfig | dict | None) -> ModelConfig:
    """The same model with another RoPE, and the window that follows from it: L' = factor * L.

    Factors never compound: they count from the original window L. A model that was extended by 4
    and is now given factor 2 has window 2L, not 8L. Settings that `rope` does not give stay as the
    weights were trained: L, the base, the rotated share, temperature, unrotated layers and random
    positions. (An explicit {"random_positions": 0} or {"temperature": "none"} ends these.) Another
    L than the weights were trained with is refused.
    """
    if rope is None:
        return config
    if isinstance(rope, RopeConfig):
        given = rope.to_dict() | {"rope_theta": rope.rope_theta}  # None where no base was given
    elif isinstance(rope, dict):
        given = rope
    else:
        raise UserError(f"rope {rope!r}: give a RopeConfig, or a dict like "
                        "{'rope_type': 'linear', 'factor': 4}")
    given = {key: value for key, value in given.items() if value is not None}
    original = config.original_window
    if given.get("original_max_position_embeddings", original) != original:
        raise UserError(f"original_max_position_embeddings "
                        f"{given['original_max_position_embeddings']!r:.60}: the model was trained "
                        f"with a window of {original}: leave it out, the factor counts from there")
    trained = {"rope_theta": config.rope.base,
               "original_max_position_embeddings": original,
               "partial_rotary_factor": config.rope.partial_rotary_factor,
               "random_positions": config.rope.random_positions,
               "no_rope_layer_interval": config.rope.no_rope_layer_interval,
               "temperature": config.rope.temperature}
    new = RopeConfig.from_dict(trained | given)
    if new == dataclasses.replace(config.rope, original_max_position_embeddings=original):
        # Nor does the window change, which fine-tuning without scaling leaves above factor * L.
        return config
    window = round(new.factor * new.original_max_position_embeddings)
    return dataclasses.replace(config, rope=new, max_seq_len=window)
