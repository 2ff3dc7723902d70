"""Meta's layout, so that official LLaMA 1, 2 and 3 weights load as they are downloaded:

    params.json            the shape (ModelConfig); ours has two more keys, max_seq_len and rope
    consolidated.NN.pth    the tensors, one file for each GPU of Meta's training; ours has one file
    tokenizer.model        SentencePiece, or tokenizer.json

Meta trained with model parallelism: each GPU held, and saved, a part of every matrix. Loading
joins the parts along the dimension that had been cut. A weight is [out, in]; here with two files:

    wq wk wv w1 w3 output: rows         wo w2: columns         norms: copies

        +---------+                      +----+----+            +---------+
        |   00    |                      |    |    |            | 00 = 01 |
        +---------+                      | 00 | 01 |            +---------+
        |   01    |                      |    |    |
        +---------+                      +----+----+

    tok_embeddings: columns in LLaMA 1 and 2, rows in LLaMA 3; the shape of a part tells which
"""
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError, one_line
from common.files import read_json
from methods import RopeConfig
from model import ModelConfig
from weights.checks import REMAP, check_archive, starts_as_zip
from weights.save import SAVED, find_file

# ---- params.json ---------------------------------------------------------------------------------

SHAPE_KEYS = {"dim": int, "n_layers": int, "n_heads": int, "n_kv_heads": int, "vocab_size": int,
              "multiple_of": int, "ffn_dim_multiplier": float, "norm_eps": float,
              "max_seq_len": int, "head_dim": int, "ffn_dim": int}  # fields of ModelConfig
ROPE_KEYS = {"rope_theta": float, "use_scaled_rope": bool, "rope_scaling_factor": float,
             "rope_high_freq_factor": float, "rope": dict}
KEYS = SHAPE_KEYS | ROPE_KEYS | {"lora": dict}  # the last in an adapter's folder (adapter.py)
KIND_WORDS = {int: "a positive whole number", float: "a positive number", bool: "true or false",
              dict: 'an object, {"rope_type": ...}'}


def read_config(folder: str | Path) -> ModelConfig:
    """The ModelConfig of params.json. The first checkpoint tells what params.json may leave open:
    the size of the vocabulary, and whether the output is tied to the embedding."""
    file = find_file(folder, "params.json")
    shards = checkpoint_shards(folder)
    params = read_params(file)
    checkpoint = open_checkpoint(shards[0])
    layers = {name.split(".")[1] for name in checkpoint if name.startswith("layers.")}
    if len(layers) != params["n_layers"]:
        raise UserError(f"{shards[0]}: has {len(layers)} layers, and params.json n_layers "
                        f"{params['n_layers']}: do the two belong together?")
    shape = {"vocab_size": stored_vocab_size(shards, checkpoint, params["dim"])}
    shape |= {key: value for key, value in params.items() if key in SHAPE_KEYS}
    # LLaMA 3.2 1B and 3B do not store the output, or store it as the same memory.
    embedding, output = checkpoint["tok_embeddings.weight"], checkpoint.get("output.weight")
    tied = output is None or output.data_ptr() == embedding.data_ptr()
    try:
        config = ModelConfig(rope=read_rope(params), tied=tied, **shape)
        if "max_seq_len" not in params:
            config.max_seq_len = assumed_window(config)
            print(f"{file} does not say max_seq_len: a window of {config.max_seq_len} tokens is "
                  "assumed")
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return config


def read_params(file: Path) -> dict[str, Any]:
    """The keys of params.json that say something, their types checked. An unknown key may change
    what the model computes: it is refused, not ignored."""
    content = read_json(file)
    if isinstance(content, dict) and "model" in content:
        content = content["model"]  # nested in some releases
    if not isinstance(content, dict):
        raise UserError(f"{file}: not an object with the keys dim, n_layers, n_heads, ...: take "
                        "the params.json of the checkpoint")
    params = {}
    for key, value in content.items():
        if key == "max_batch_size":  # says how to run a model, not what it computes
            continue
        if key not in KEYS:
            raise UserError(f"{file}: key {key!r:.60} is none of LLaMA 1, 2 or 3: remove it only "
                            "if the model does not depend on it")
        if value is None or (key == "vocab_size" and value == -1):
            continue
        if not is_valid(value, KEYS[key]):
            raise UserError(f"{file}: {key} = {value!r:.60}: has to be {KIND_WORDS[KEYS[key]]}")
        params[key] = value
    for key in ("dim", "n_layers", "n_heads"):
        if key not in params:
            raise UserError(f"{file}: {key} is missing: take the params.json of the checkpoint")
    return params


def is_valid(value: Any, kind: type) -> bool:
    """Whether a value from JSON is of this kind; numbers have to be positive, and no NaN."""
    if kind is int:
        return type(value) is int and 0 < value < 2**31
    if kind is float:
        return type(value) in (int, float) and 0 < value < 2**31
    return type(value) is kind


def stored_vocab_size(shards: list[Path], checkpoint: dict[str, torch.Tensor], dim: int) -> int:
    """V by the first part of the embedding, which has all columns or all rows of [V, dim]."""
    embedding = checkpoint.get("tok_embeddings.weight")
    if embedding is None or embedding.dim() != 2:
        raise UserError(f"{shards[0]}: tok_embeddings.weight is missing or no matrix: take a whole "
                        "checkpoint in Meta's layout")
    rows, columns = embedding.shape
    if columns == dim:
        return rows * len(shards)
    if columns * len(shards) == dim:
        return rows
    raise UserError(f"{shards[0]}: tok_embeddings.weight is {[rows, columns]}, part 1 of "
                    f"{len(shards)}, and params.json says dim {dim}: do the two belong together, "
                    "and are all parts here?")


def read_rope(params: dict[str, Any]) -> RopeConfig:
    """The RopeConfig of params.json: `rope` if it is there (ours), else `use_scaled_rope`
    (LLaMA 3.1 and later), else plain RoPE.

    Meta's code scales all models by 8. That is wrong for LLaMA 3.2 1B and 3B, the only ones
    narrower than 4096: their factor is 32 (llama-models issues 166 and 241). Its later versions
    write the factors into params.json, and those win.
    """
    theta = params.get("rope_theta")
    rope = params.get("rope")
    if rope is None and params.get("use_scaled_rope"):
        factor = 32.0 if params["dim"] < 4096 else 8.0
        rope = {"rope_type": "llama3",
                "factor": params.get("rope_scaling_factor", factor),
                "low_freq_factor": 1.0,
                "high_freq_factor": params.get("rope_high_freq_factor", 4.0),
                "original_max_position_embeddings": 8192}
    rope = {"rope_theta": theta or 10000.0} | (rope or {})
    if theta is not None and theta != rope["rope_theta"]:
        raise UserError(f"rope_theta is {theta:g}, and {rope['rope_theta']} inside rope: make them "
                        "equal")
    return RopeConfig.from_dict(rope)


def assumed_window(config: ModelConfig) -> int:
    """The window of a model whose params.json has no max_seq_len, which is every release of Meta's.

        llama3 scaling         131072   LLaMA 3.1 and later
        rope_theta 500,000       8192   LLaMA 3
        rope_theta 1,000,000    16384   Code Llama
        rope_theta 10,000        2048   LLaMA 1: norm_eps 1e-6, and 65B
        rope_theta 10,000        4096   LLaMA 2: norm_eps 1e-5 (but an early 7B-chat has 1e-6)

    All times the factor of `rope` in params.json, which may also give L itself.
    """
    rope = config.rope
    if rope.rope_type == "llama3":
        return 131072
    is_65b = config.dim == 8192 and config.n_kv_heads == config.n_heads
    is_llama1 = config.norm_eps == 1e-6 or is_65b
    windows = {500000.0: 8192, 1000000.0: 16384, 10000.0: 2048 if is_llama1 else 4096}
    original = rope.original_max_position_embeddings or windows.get(rope.base)
    if original is None:
        raise UserError(f"max_seq_len is missing, and rope_theta {rope.base:g} is none of Meta's: "
                        "add the window of its training")
    return round(original * rope.factor)


# ---- consolidated.NN.pth -------------------------------------------------------------------------

def checkpoint_shards(folder: str | Path) -> list[Path]:
    """The checkpoint files of a folder, in order, none missing."""
    for place in (Path(folder) / SAVED, Path(folder)):
        found = sorted(place.glob("consolidated.*.pth"))
        for n, file in enumerate(found):
            expected = place / f"consolidated.{n:02d}.pth"
            if file != expected:
                raise UserError(f"{expected}: no such file, but there is {file.name}: copy all "
                                "parts of the checkpoint, and no other")
        if found:
            return found
    raise UserError(f"{folder}: no consolidated.00.pth in it: copy the checkpoint beside "
                    "params.json")


def open_checkpoint(file: Path) -> dict[str, torch.Tensor]:
    """{name: tensor} of a .pth file, memory-mapped; read, if it is in the format of PyTorch before
    1.6. Code inside a pickle never runs."""
    is_zip = starts_as_zip(file)
    try:
        if is_zip:
            check_archive(file)
        with warnings.catch_warnings():  # an odd pickle is refused below, if it is wrong
            warnings.simplefilter("ignore")
            checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes raise anything
        # Before this stands PyTorch's advice how to run the code in the file after all.
        reason = str(error).split("WeightsUnpickler error: ")[-1]
        code = re.search(r"GLOBAL ([\w.]+)", reason)
        if code:
            raise UserError(f"{file}: refused, since loading it would run code ({code[1]:.60}): "
                            "take weights saved as plain tensors") from None
        raise UserError(f"{file}: damaged, cut off, or no PyTorch checkpoint "
                        f"({one_line(reason or repr(error))}): copy it again") from None
    check_named_tensors(file, checkpoint)
    return checkpoint


def check_named_tensors(file: Path, checkpoint: Any) -> None:
    """Refuse a checkpoint that is not {printable name: tensor with values in memory}."""
    if not isinstance(checkpoint, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor)
            for name, tensor in checkpoint.items()):
        raise UserError(f"{file}: holds something other than named tensors: give weights in Meta's "
                        "layout, not a training state")
    for name, tensor in checkpoint.items():
        if not name.isprintable() or len(name) > 200:
            raise UserError(f"{file}: damaged (a tensor is called {name!r:.60}): copy it again")
        if tensor.is_nested or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UserError(f"{file}: {name} is sparse or without values: take weights saved as "
                            "plain tensors")


def read_tensors(folder: str | Path, shapes: dict[str, tuple[int, ...]],
                 ) -> Iterator[tuple[Path, str, tuple[slice, ...], torch.Tensor]]:
    """Yield (file, name, place, tensor) for each part of each tensor: it belongs in [place] of the
    model's tensor, whose shape is shapes[name]."""
    shards = checkpoint_shards(folder)
    for n, file in enumerate(shards):
        before = os.stat(file)
        checkpoint = open_checkpoint(file)
        check_names(file, checkpoint, shapes)
        bytes_read = 0  # of this mapping
        for name, shape in shapes.items():
            part = checkpoint[name]
            place = place_in_whole(name, shape, tuple(part.shape), n, len(shards))
            if place is None:
                raise UserError(f"{file}: {name} is {list(part.shape)}, part {n + 1} of "
                                f"{len(shards)}, and params.json makes the whole {list(shape)}: do "
                                "the two belong together, and are all parts here?")
            if len(shape) > 1 or n == 0:  # of the copies of a norm one is enough
                yield file, name, place, part
            bytes_read += part.nbytes
            if bytes_read > max(before.st_size / 16, REMAP):
                after = os.stat(file)
                if (after.st_ino, after.st_mtime_ns) != (before.st_ino, before.st_mtime_ns):
                    raise UserError(f"{file}: was replaced while it was being read: load it again")
                checkpoint = open_checkpoint(file)
                bytes_read = 0


def check_names(file: Path, checkpoint: dict[str, torch.Tensor],
                shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint that lacks a tensor of the model, or has one too many."""
    for name in checkpoint:
        # Not read: frequencies, a tied output that is written all the same, and the network of a
        # CLEX that another method replaces.
        unused = name.endswith("rope.freqs") or name == "output.weight" or name.startswith("clex.")
        if name not in shapes and not unused:
            raise UserError(f"{file}: {name} is no tensor of the model that params.json describes: "
                            "take params.json and all of its checkpoint, in Meta's layout")
    for name in shapes:
        if name not in checkpoint:
            raise UserError(f"{file}: {name} is missing: take params.json and all of its "
                            "checkpoint, in Meta's layout")


def place_in_whole(name: str, whole: tuple[int, ...], part: tuple[int, ...], n: int,
                   shards: int) -> tuple[slice, ...] | None:
    """The slices of a tensor of shape `whole` that part n of `shards` fills, by the picture at the
    head of this file; None if it does not fit."""
    if len(whole) == 1:
        return () if part == whole else None
    if len(part) != 2:
        return None
    columns = name.endswith(("wo.weight", "w2.weight"))
    if name == "tok_embeddings.weight":
        columns = part[0] == whole[0]
    dim = 1 if columns else 0
    if part[dim] * shards != whole[dim] or part[1 - dim] != whole[1 - dim]:
        return None
    cut = slice(n * part[dim], (n + 1) * part[dim])
    return (slice(None), cut) if columns else (cut,)
