"""Write a model in another layout: `python -m weights export`."""
import contextlib
import dataclasses
import json
import os
from pathlib import Path

import torch

from common.device import dtype_name
from common.errors import UserError
from common.locks import locked_beside
from common.files import (read_json_object, require_new_folder, whole_file, whole_folder,
                          write_json)
from data.sentencepiece_json import sentencepiece_as_json
from data.tokenizer import IDS, Tokenizer, companion_files, json_of_file
from methods import RopeConfig
from model import LLaMA, ModelConfig
from weights.export_gguf import Q8_0, export_gguf, require_gguf_name, rope_words
from weights.hugging_face import ARCHITECTURES, SHAPE, hugging_face_name
from weights.load import load_config, load_model, with_rope
from weights.rope_dialects import (BETA, LLAMA4_BETA, MINISTRAL3, ORIGINAL, SMOLLM3,
                                   class_and_rope, refuse_what_transformers_lacks, rotated_layers,
                                   rope_to_hugging_face)
from weights.safetensors_file import NamedTensors, write_safetensors
from weights.save import save_model
from weights.size import parameter_count
from weights.tokenizer import has_tokenizer, load_tokenizer


def export(path: str | Path, to: str, out: str | Path, dtype: torch.dtype | str | None = None,
           rope: RopeConfig | dict | None = None) -> None:
    """Write the model of any folder or .gguf file, with its tokenizer, into the new folder `out`,
    or into the new file `out`.

    to: "hf" or "meta", folders, or "gguf", a file. dtype: of the weights; None keeps each, bit for
    bit; "q8_0" is for gguf. rope: as for load_model, an extension without training.
    """
    tokenizer = load_tokenizer(path) if has_tokenizer(path) else None
    if dtype == Q8_0 and to != "gguf":
        raise UserError(f"--dtype {Q8_0}: only --to gguf has it: choose another, or leave it out")
    if to == "gguf":
        require_gguf_name(out)
    else:
        require_new_folder(out)
    if to != "meta":
        # A model that the other side cannot compute is refused before its weights are read. What
        # is assumed of a config.json is printed by load_model, once.
        with contextlib.redirect_stdout(None):
            config = with_rope(load_config(path), rope)
        if to == "hf":
            config_json(config, torch.float32)
        else:
            rope_words(config)
    with locked_beside(out):
        model = load_model(path, rope, dtype=None if dtype == Q8_0 else dtype)
        if to == "hf":
            export_hugging_face(model, out, tokenizer)
        elif to == "gguf":
            companions, _ = tokenizer_files(tokenizer, Path(path))
            export_gguf(model, out, tokenizer, dtype, companions)
        else:
            save_model(model, out, tokenizer)
    origin = f"tokenizer of {tokenizer.path}" if tokenizer else "no tokenizer: there was none"
    print(f"{out}: {parameter_count(model.config):,} parameters, window "
          f"{model.config.max_seq_len}, {model.config.rope.rope_type}, {origin}")


def export_hugging_face(model: LLaMA, out: str | Path,
                        tokenizer: Tokenizer | None = None,
                        dtype: torch.dtype | None = None, shard_bytes: int = 5 * 10**9) -> None:
    """Write a folder that transformers loads as it is, RoPE scaling included.

    out: a new or empty folder; it appears under its name only when it is complete.
    dtype: of the weights; None is the model's own. shard_bytes: the largest file of weights; if
    they do not fit into one, there are several and an index.
    Files that lay beside the model or its tokenizer, such as generation_config.json, go along.
    A model that transformers cannot compute is a UserError.
    """
    tensors = [(name, tensor.detach()) for name, tensor in model.state_dict().items()]
    config = config_json(model.config, dtype or tensors[0][1].dtype)
    files, ids = tokenizer_files(tokenizer, Path(getattr(model, "path", os.devnull)))
    if tokenizer is not None:
        files |= files_for_transformers(tokenizer, files)
    with whole_folder(out) as folder:
        for name, data in files.items():
            with whole_file(folder / name) as file:
                file.write(data)
        write_json(folder / "config.json", config | ids)
        parts = split_by_size(tensors, dtype, shard_bytes)
        weight_map = {}
        total = 0
        for number, part in enumerate(parts, start=1):
            name = "model.safetensors"
            if len(parts) > 1:
                name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            total += write_safetensors(folder / name, model.config, part, dtype)
            weight_map |= {hugging_face_name(tensor_name): name for tensor_name, _ in part}
        if len(parts) > 1:
            write_json(folder / "model.safetensors.index.json",
                       {"metadata": {"total_size": total}, "weight_map": weight_map})


# --------------------------------------------------------------------------------------------------
# config.json and the tokenizer

def config_json(config: ModelConfig, dtype: torch.dtype) -> dict:
    """config.json of a LLaMA. RoPE stands there twice: as rope_parameters for transformers 5, and
    as rope_scaling for everything older."""
    name, rope = class_and_rope(config.rope)
    refuse_what_transformers_lacks(rope)
    if config.dim % config.n_heads:
        raise UserError(f"dim {config.dim} is no multiple of n_heads {config.n_heads}, which "
                        "transformers' LLaMA asks for")
    original = config.original_window
    if rope.rope_type not in ("default", "linear", "proportional"):  # L' / factor is L for these
        rope = dataclasses.replace(rope, original_max_position_embeddings=original)
    # Sorted, so that the bytes do not depend on the layout that a model came from.
    parameters = dict(sorted(rope_to_hugging_face(rope, config.head_dim).items()))
    shape = {key: getattr(config, field) for key, field in SHAPE.items()}
    if name == MINISTRAL3:
        parameters |= {BETA: LLAMA4_BETA, ORIGINAL: original}
    elif name == SMOLLM3:
        every = config.rope.no_rope_layer_interval
        shape |= {"no_rope_layer_interval": every,
                  "no_rope_layers": rotated_layers(every, config.n_layers)}
    if rope.rope_type == "dynamic":
        shape["max_position_embeddings"] = original  # transformers counts from here
    elif rope.original_max_position_embeddings and ORIGINAL not in parameters:
        shape[ORIGINAL] = original  # without effect in transformers; load_model knows L by it
    scaling = None
    if parameters["rope_type"] not in ("default", "proportional"):
        scaling = {key: value for key, value in parameters.items()
                   if key not in ("rope_theta", "partial_rotary_factor")}
    return {"architectures": [name], "model_type": ARCHITECTURES[name], **shape,
            "hidden_act": "silu", "rms_norm_eps": config.norm_eps, "attention_bias": False,
            "mlp_bias": False, "tie_word_embeddings": config.tied,
            "rope_theta": parameters["rope_theta"], "rope_parameters": parameters,
            "rope_scaling": scaling, "torch_dtype": dtype_name(dtype),
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def tokenizer_files(tokenizer: Tokenizer | None, source: Path
                    ) -> tuple[dict[str, bytes], dict[str, int | list]]:
    """({name: bytes} of the files that go along, the ids of BOS and EOS for config.json).

    source: where the model was loaded from. Its config.json says the ids, if it is the tokenizer's
    folder too; else generation_config.json does, else the tokenizer.
    """
    ids = {}
    if tokenizer is None:
        files = companion_files(source)
    else:
        files = tokenizer.files()
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    ids |= json_of_file(files, "generation_config.json")
    if tokenizer is None or tokenizer.path.parent == source:
        ids |= read_json_object(source / "config.json")
    return files, {key: ids[key] for key in IDS if ids.get(key) is not None}


def files_for_transformers(tokenizer: Tokenizer, files: dict[str, bytes]) -> dict[str, bytes]:
    """What transformers wants beside a tokenizer.model: tokenizer.json, so that it needs no
    protobuf, and tokenizer_config.json. Its versions before 4.54 look for the chat template in the
    latter only."""
    added = {}
    if "tokenizer.model" in files and "tokenizer.json" not in files:
        bos = tokenizer.model.id_to_piece(tokenizer.bos_id)
        proto = tokenizer.model.serialized_model_proto()
        written = sentencepiece_as_json(proto, tokenizer.dummy_prefix, bos)
        if written is None:
            print(f"no tokenizer.json: it cannot do what {tokenizer.path} does; transformers needs "
                  "protobuf, to read tokenizer.model")
        else:
            added["tokenizer.json"] = written
    given = json_of_file(files, "tokenizer_config.json")
    config = given
    if "tokenizer.model" in files and not given:
        config = tokenizer_config(tokenizer, "tokenizer.json" in files | added)
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].decode("utf-8", "replace")
        config = {"chat_template": template} | config
    if config != given:
        added["tokenizer_config.json"] = json.dumps(config, indent=1).encode()
    return added


def tokenizer_config(tokenizer: Tokenizer, has_json: bool) -> dict:
    """The object in tokenizer_config.json for a SentencePiece model, by which transformers makes
    the same ids: BOS in front, no EOS, and a space in front only if the model adds one itself."""
    piece = tokenizer.model.id_to_piece
    kind = "PreTrainedTokenizerFast" if has_json else "LlamaTokenizer"
    return {"tokenizer_class": kind, "bos_token": piece(tokenizer.bos_id),
            "eos_token": piece(tokenizer.eos_id), "unk_token": piece(tokenizer.model.unk_id()),
            "add_bos_token": True, "add_eos_token": False, "legacy": False,
            "add_prefix_space": tokenizer.dummy_prefix, "clean_up_tokenization_spaces": False}


# --------------------------------------------------------------------------------------------------
# Weights

def split_by_size(tensors: NamedTensors, dtype: torch.dtype | None, most: int
                  ) -> list[NamedTensors]:
    """The tensors in parts of at most `most` bytes. A larger tensor is a part of its own."""
    parts = [[]]
    size = 0
    for name, tensor in tensors:
        nbytes = tensor.numel() * (dtype or tensor.dtype).itemsize
        if parts[-1] and size + nbytes > most:
            parts.append([])
            size = 0
        parts[-1].append((name, tensor))
        size += nbytes
    return parts
