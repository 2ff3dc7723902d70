"""Write a model as a .gguf file, as llama.cpp reads it: `python -m weights export --to gguf`.

weights/gguf.py reads such files, and says why the rows of q and k stay as they are. What llama.cpp
makes of the keys about RoPE was measured (tests/test_llama_cpp.py), for the angle of pair i per
token, and for the factor of cos and sin:

    linear       theta_i / scaling.factor            attn_factor
    yarn         YaRN's with its usual settings      attn_factor (0.1 ln s + 1)
    longrope     theta_i / rope_factors_i            attn_factor
    no type      theta_i / rope_freqs_i              attn_factor

The last line says every method whose frequencies are fixed; also YaRN's with other betas, whose
keys llama.cpp ignores. A method without words here is refused.
"""
import json
import math
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from common.files import whole_file
from data.gguf_file import gguf_package
from data.gguf_vocabulary import vocabulary_keys
from data.tokenizer import Tokenizer
from methods import METHODS, RopeConfig, inv_freq
from model import LLaMA, ModelConfig
from rope import rope_frequencies
from weights.checks import check_tensor_values
from weights.gguf import NAMED_ROPE, gguf_name
from weights.rope_dialects import beyond_frequencies
from weights.save import compact_tensor

FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # llama.cpp's numbers of them
KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F32"}
BLOCK = 32  # weights of Q8_0 that share a scale
Q8_0 = "q8_0"  # a --dtype that is none of PyTorch's


def require_gguf_name(out: str | Path) -> None:
    """Refuse a name that no reader would take for a GGUF file, or that is taken."""
    out = Path(out)
    if out.suffix != ".gguf":
        raise UserError(f"--out {out}: --to gguf writes one file: give it a name that ends in "
                        ".gguf")
    if out.exists():
        raise UserError(f"--out {out}: exists: name a new file")


def export_gguf(model: LLaMA, out: str | Path, tokenizer: Tokenizer | None = None,
                dtype: torch.dtype | str | None = None,
                companions: dict[str, bytes] | None = None) -> None:
    """Write the model as the new file `out`, which appears only when it is complete.

    dtype: of the matrices, float32, float16, bfloat16 or "q8_0"; None keeps the model's own.
    Vectors are float32 always. companions: {name: bytes} of the files beside the tokenizer, of
    which the chat template and the settings of generation are told.
    A model that llama.cpp cannot compute is a UserError.
    """
    require_gguf_name(out)
    package = gguf_package()
    keys, rope_tensors = rope_words(model.config)
    keys = shape_keys(model.config) | keys
    if tokenizer is not None:
        keys |= vocabulary_keys(tokenizer, model.config.vocab_size, companions or {})
    tensors = {f"{name}.weight": tensor for name, tensor in rope_tensors.items()}
    tensors |= {gguf_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    kinds = {name: stored_kind(tensor, dtype) for name, tensor in tensors.items()}
    keys["general.file_type"] = FILE_TYPES[kinds["token_embd.weight"]]

    writer = package.GGUFWriter(None, "llama")
    add_keys(writer, keys)
    for name, tensor in tensors.items():
        kind = package.GGMLQuantizationType[kinds[name]]
        block, block_bytes = package.GGML_QUANT_SIZES[kind]
        nbytes = tensor.numel() // block * block_bytes
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), nbytes, kind)
    with whole_file(out) as file:
        # The writer would open a file by its name; this one has its name only when it is whole.
        writer.fout = [file]
        writer.state = package.gguf_writer.WriterState.EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():  # one at a time is in memory twice
            writer.write_tensor_data(stored_numbers(Path(out), name, tensor, kinds[name]))


def add_keys(writer: object, keys: dict) -> None:
    """Metadata, each value of the type that it has in Python: llama.cpp insists on floats where it
    wants floats. An empty list has no type in GGUF and is left out."""
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
           bool: writer.add_bool, list: writer.add_array}
    for key, value in keys.items():
        if value != []:
            add[type(value)](key, value)


def shape_keys(config: ModelConfig) -> dict:
    """The model's shape. general.quantization_version is that of all Q8_0 files."""
    shape = {"context_length": config.max_seq_len,
             "embedding_length": config.dim,
             "block_count": config.n_layers,
             "feed_forward_length": config.ffn_dim,
             "attention.head_count": config.n_heads,
             "attention.head_count_kv": config.n_kv_heads,
             "attention.key_length": config.head_dim,
             "attention.value_length": config.head_dim,
             "attention.layer_norm_rms_epsilon": float(config.norm_eps),
             "vocab_size": config.vocab_size}
    return {"general.type": "model", "general.quantization_version": 2,
            **{f"llama.{key}": value for key, value in shape.items()}}


# --------------------------------------------------------------------------------------------------
# RoPE

def refuse_what_llama_cpp_lacks(rope: RopeConfig) -> None:
    """A UserError for what no key of GGUF says."""
    method = METHODS[rope.rope_type]
    problem = None
    if beyond_frequencies(rope):
        raise UserError(f"{beyond_frequencies(rope)}: llama.cpp has no such thing; export to meta")
    if not method.extends_rope or method.mechanism != "angles":
        problem = "llama.cpp's LLaMA only rotates, by fixed angles"
    elif method.length_dependent and rope.rope_type != "longrope":
        problem = "llama.cpp's frequencies do not change with the length of the text"
    elif rope.rope_type == "longrope" and rope.resonance:
        problem = "with resonance llama.cpp has no words for it"
    if problem:
        raise UserError(f"rope_type {rope.rope_type}: {problem}; export to hf or meta, or choose "
                        "a fixed method with --rope")
    if rope.random_positions:
        raise UserError("random_positions: llama.cpp has no such positions; export without them")
    if rope.partial_rotary_factor != 1:
        raise UserError(f"partial_rotary_factor {rope.partial_rotary_factor:g}: llama.cpp's LLaMA "
                        "turns whole heads; only Meta's layout has this model")


def rope_words(config: ModelConfig) -> tuple[dict, dict[str, torch.Tensor]]:
    """(keys, tensors) that say how positions are computed.

    NAMED_ROPE is for our own reader: the method by its name, as in params.json. It is trusted only
    where it gives the angles that llama.cpp's own words give.
    """
    rope = config.rope
    refuse_what_llama_cpp_lacks(rope)
    keys = {"freq_base": float(rope.base), "dimension_count": config.head_dim}
    tensors = {}
    is_plain = not rope.resonance and rope.options.keys() <= {"attention_factor", "mscale",
                                                              "mscale_all_dim"}
    if rope.rope_type == "longrope":
        _, temperature = inv_freq(rope, config.head_dim)
        for length in ("short", "long"):
            factors = torch.tensor(rope.setting(f"{length}_factor"), dtype=torch.float32)
            tensors[f"rope_factors_{length}"] = factors
        keys |= {"scaling.type": "longrope", "scaling.attn_factor": temperature}
    elif rope.rope_type == "linear" and is_plain:
        keys |= {"scaling.type": "linear", "scaling.factor": float(rope.factor)}
    elif rope.rope_type == "yarn" and is_plain and rope.factor > 1:
        keys |= yarn_words(rope, config.head_dim)
    elif rope.rope_type != "default" or not is_plain:
        tensors["rope_freqs"], temperature = frequency_divisors(rope, config.head_dim)
        if temperature != 1:
            keys["scaling.attn_factor"] = temperature
    if rope.original_max_position_embeddings is not None:
        keys["scaling.original_context_length"] = rope.original_max_position_embeddings
    keys = {f"llama.rope.{key}": value for key, value in keys.items()}
    return keys | {NAMED_ROPE: json.dumps(rope.to_dict())}, tensors


def yarn_words(rope: RopeConfig, head_dim: int) -> dict:
    """attn_factor is by what llama.cpp multiplies the 0.1 ln s + 1 that it computes by itself."""
    _, temperature = inv_freq(rope, head_dim)
    return {"scaling.type": "yarn", "scaling.factor": float(rope.factor),
            "scaling.attn_factor": temperature / (0.1 * math.log(rope.factor) + 1)}


def frequency_divisors(rope: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """(theta_i / theta'_i, attention_factor) of a method with fixed frequencies theta'_i > 0."""
    frequencies, attention_factor = inv_freq(rope, head_dim)                       # [D/2]
    if not (frequencies > 0).all():
        raise UserError(f"rope_type {rope.rope_type}: pairs that stand still have no words in "
                        "llama.cpp; export to hf or meta")
    plain = rope_frequencies(head_dim, rope.base)                                  # [D/2]
    return (plain / frequencies.double()).float(), attention_factor


# --------------------------------------------------------------------------------------------------
# The weights

def stored_kind(tensor: torch.Tensor, dtype: torch.dtype | str | None) -> str:
    """GGUF's name of the type that a tensor is stored in. llama.cpp adds vectors in float32; rows
    that are not whole blocks of Q8_0 are float16."""
    if tensor.dim() == 1:
        return "F32"
    if dtype == Q8_0:
        return "F16" if tensor.shape[1] % BLOCK else "Q8_0"
    return KINDS[dtype or tensor.dtype]


def stored_numbers(path: Path, name: str, tensor: torch.Tensor, kind: str) -> np.ndarray:
    """A tensor as its bytes in the file; a UserError if it holds what the type cannot."""
    in_memory = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    check_tensor_values(path, name, tensor, in_memory)
    tensor = compact_tensor(tensor, in_memory)
    if kind == "BF16":
        return tensor.view(torch.int16).numpy()  # numpy has no bfloat16
    if kind == "Q8_0":
        package = gguf_package()
        return package.quants.quantize(tensor.numpy(), package.GGMLQuantizationType.Q8_0)
    return tensor.numpy()
