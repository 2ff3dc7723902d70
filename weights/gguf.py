"""Models of the llama architecture in a .gguf file. data/gguf_file.py draws the format.

The order of q's and k's rows. GGUF rotates neighbours (2i, 2i+1) of a head, as Meta's code and
model.py do. Hugging Face rotates (i, i + D/2), so the converter from Hugging Face permutes the rows
of attn_q and attn_k back into Meta's order; Meta's own weights it leaves alone. Either way the rows
are taken as they are. transformers permutes them once more and computes the same logits.
"""
import json
import math
import re
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from data.gguf_file import (Header, StoredTensor, damaged, gguf_package, read_header,
                            shortest_decimal)
from methods import RopeConfig, inv_freq
from model import ModelConfig
from rope import llama3, rope_frequencies

NAMED_ROPE = "params.rope"  # export_gguf.py's key: the method by its name, as in params.json
SCALINGS = ("none", "linear", "yarn", "longrope")
REQUIRED = object()  # the default of a key that has none
UNQUANTISED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
               "F64": torch.float64}
WEIGHTS_PER_PART = 1 << 18  # dequantised at a time: several times that should stay in cache

# Keys that do not change what the model computes.
WITHOUT_EFFECT = {"tensor_data_layout", "rope.scaling.finetuned", "attention.layer_norm_epsilon",
                  "use_parallel_residual"}

# Meta's names of tensors -> GGUF's.
GGUF_NAMES = {
    "tok_embeddings": "token_embd", "norm": "output_norm", "output": "output",
    "attention_norm": "attn_norm", "attention.wq": "attn_q", "attention.wk": "attn_k",
    "attention.wv": "attn_v", "attention.wo": "attn_output", "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up"}
ROPE_TENSORS = re.compile(r"rope_(freqs|factors_short|factors_long)\.weight|"
                          r"blk\.\d+\.attn_rot_embd\.weight")


def read_config(path: str | Path) -> ModelConfig:
    """The shape of the model. An unknown key may change what the model computes: it is refused."""
    header = read_header(path)
    keys = LlamaKeys(header.metadata)
    try:
        refuse_what_is_not_llama(header.metadata, keys)
        shape = model_shape(keys, header.tensors)
        rope = rope_config(keys, header, shape["head_dim"], shape["max_seq_len"])
        rope = named_rope(header.metadata, rope, shape["head_dim"], shape["max_seq_len"])
        keys.refuse_unread()
        return ModelConfig(**shape, rope=rope)
    except UserError as error:
        if str(error).startswith(str(path)):
            raise
        raise UserError(f"{path}: {error}") from None


class LlamaKeys:
    """The keys llama.* of a header, checked as they are read."""

    def __init__(self, metadata: dict) -> None:
        self.metadata = metadata
        self.read = set(WITHOUT_EFFECT)

    def value(self, key: str, default: object = REQUIRED) -> object:
        """llama.`key`. A list has a value for each layer: if all are the same, it is that value."""
        self.read.add(key)
        value = self.metadata.get(f"llama.{key}", default)
        if value is REQUIRED:
            raise UserError(f"the key llama.{key} is missing: convert the model anew")
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            return value[0]
        return value

    def number(self, key: str, default: object = REQUIRED, kind: type = float) -> float | None:
        value = self.value(key, default)
        if value is None:  # the default
            return None
        if type(value) not in (int, kind) or not 0 <= value < 2**31:
            raise UserError(f"llama.{key} = {value!r:.60}: has to be one number, not below 0")
        return value

    def integer(self, key: str, default: object = REQUIRED) -> int | None:
        return self.number(key, default, int)

    def refuse_unread(self) -> None:
        for key in sorted(self.metadata):
            if key.startswith("llama.") and key.removeprefix("llama.") not in self.read:
                raise UserError(f"the key {key} is not known here, and may change what the model "
                                "computes: take a plain LLaMA")


def refuse_what_is_not_llama(metadata: dict, keys: LlamaKeys) -> None:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"a model of architecture {architecture!r:.60}: only llama is read (LLaMA, "
                        "Mistral, SmolLM2, TinyLlama, ...)")
    parts = metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise UserError(f"one of {parts!r:.60} parts of a model: put them together with "
                        "llama-gguf-split --merge")
    for key in "expert_count", "expert_used_count":
        count = keys.value(key, 0)
        if count:
            raise UserError(f"llama.{key} = {count!r:.60}: a mixture of experts: take a dense one")
    if not keys.value("attention.causal", True):
        raise UserError("llama.attention.causal is false: a token here sees none after it")


def model_shape(keys: LlamaKeys, tensors: dict[str, StoredTensor]) -> dict:
    """ModelConfig's fields but `rope`. They are compared with the tensors before anything is built
    by them: wrong numbers could be as large as memory."""
    dim = keys.integer("embedding_length")
    layers = keys.integer("block_count")
    heads = keys.integer("attention.head_count")
    kv_heads = keys.integer("attention.head_count_kv", heads)
    window = keys.integer("context_length")
    ffn_dim = keys.integer("feed_forward_length")
    eps = keys.number("attention.layer_norm_rms_epsilon")
    usual_head_dim = dim // heads if heads and dim % heads == 0 else REQUIRED
    head_dim = keys.integer("attention.key_length", usual_head_dim)
    value_dim = keys.integer("attention.value_length", head_dim)
    if value_dim != head_dim:
        raise UserError(f"llama.attention.value_length {value_dim} is not key_length {head_dim}: "
                        "take a plain LLaMA")
    if 0 < keys.integer("attention.sliding_window", 0) < window:
        raise UserError("llama.attention.sliding_window is smaller than context_length: the "
                        "attention here sees all keys")
    if not 0 < eps < 1:
        raise UserError(f"llama.attention.layer_norm_rms_epsilon = {eps!r}: has to be a small one")
    if "token_embd.weight" not in tensors:
        raise UserError("token_embd.weight is missing: take a whole model")
    rows = tensors["token_embd.weight"].shape[0]
    stated = keys.value("vocab_size", rows)
    if stated != rows:
        raise damaged(f"llama.vocab_size is {stated!r:.60}, and token_embd.weight has {rows} rows")
    stored_layers = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    if len(stored_layers) != layers:
        raise damaged(f"has {len(stored_layers)} layers, and llama.block_count {layers}")
    expected = {"token_embd.weight": (rows, dim),
                "blk.0.attn_q.weight": (heads * head_dim, dim),
                "blk.0.ffn_gate.weight": (ffn_dim, dim)}
    for name, shape in expected.items():
        stored = list(tensors[name].shape) if name in tensors else "missing"
        if stored != list(shape):
            raise damaged(f"{name} is {stored}, and should be {list(shape)}")
    return dict(dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=kv_heads, head_dim=head_dim,
                ffn_dim=ffn_dim, vocab_size=rows, norm_eps=eps, max_seq_len=window,
                tied="output.weight" not in tensors)


# --------------------------------------------------------------------------------------------------
# RoPE

def rope_config(keys: LlamaKeys, header: Header, head_dim: int, window: int) -> RopeConfig:
    """The RopeConfig of the keys llama.rope.* and of the tensors rope_freqs, rope_factors_short and
    rope_factors_long. llama.cpp chooses short or long factors once, by the size of the context;
    here the length of the text decides, as in transformers."""
    rotated = keys.integer("rope.dimension_count", head_dim)
    if not 2 <= rotated <= head_dim or rotated % 2:
        raise UserError(f"llama.rope.dimension_count {rotated}: has to be even, at least 2, and at "
                        f"most the head_dim {head_dim}")
    rope = {"rope_theta": keys.number("rope.freq_base", 10000.0)}
    if rotated < head_dim:
        share = rotated / head_dim
        if int(share * head_dim) < rotated:  # 60 / 88 * 88 is 59.99...
            share = math.nextafter(share, 1)
        rope["partial_rotary_factor"] = share
    freqs = read_divisors(header, "rope_freqs.weight", rotated)
    short = read_divisors(header, "rope_factors_short.weight", rotated)
    long = read_divisors(header, "rope_factors_long.weight", rotated)
    kind = scaling_type(keys, freqs, short, long)
    old_factor = keys.number("rope.scale_linear", 1.0)  # from before there were scaling types
    factor = keys.number("rope.scaling.factor", old_factor) or 1.0
    original = keys.integer("rope.scaling.original_context_length", None) or None
    temperature = keys.number("rope.scaling.attn_factor", 1.0)
    temperature *= keys.number("rope.scaling.yarn_attn_factor", 1.0) or 1.0
    beta_fast = keys.number("rope.scaling.yarn_beta_fast", None)
    beta_slow = keys.number("rope.scaling.yarn_beta_slow", None)
    if keys.number("rope.scaling.yarn_ext_factor", 1.0) != 1:
        raise UserError("llama.rope.scaling.yarn_ext_factor is not 1: only whole YaRN is known")

    scaled = {**rope, "original_max_position_embeddings": original}
    if kind == "longrope":
        config = longrope_config(scaled, window, short, long, temperature)
        if factor not in (1.0, config.factor):
            raise UserError(f"llama.rope.scaling.factor {factor:g} beside rope_factors is not "
                            "context_length / original_context_length")
        return config
    if kind == "yarn" and factor != 1:
        scaled |= {"factor": factor, "beta_fast": beta_fast, "beta_slow": beta_slow}
        if temperature != 1:
            scaled["attention_factor"] = temperature * (0.1 * math.log(factor) + 1)
        return RopeConfig.from_dict({"rope_type": "yarn", **scaled}, window)
    if kind == "none":
        factor = 1.0
    if temperature != 1:  # llama.cpp has one with every type, and here longrope has
        divisors = [factor * divisor for divisor in freqs or [1.0] * (rotated // 2)]
        return longrope_config(scaled, window, divisors, divisors, temperature)
    if freqs is not None and set(freqs) != {1.0}:
        return divided_rope(scaled, factor, window, freqs)
    if factor == 1:
        return RopeConfig.from_dict(rope)
    return RopeConfig.from_dict({"rope_type": "linear", **scaled, "factor": factor})


def scaling_type(keys: LlamaKeys, freqs: list | None, short: list | None, long: list | None) -> str:
    """llama.rope.scaling.type; a UserError if it does not fit the rope tensors of the file."""
    if (short is None) != (long is None):
        raise UserError("has one of rope_factors_short.weight and rope_factors_long.weight, "
                        "not both: take a whole model")
    kind = keys.value("rope.scaling.type", "linear" if short is None else "longrope")
    if kind not in SCALINGS:
        raise UserError(f"llama.rope.scaling.type {kind!r:.60}: known are {', '.join(SCALINGS)}")
    if (kind == "longrope") != (short is not None) or freqs and kind in ("yarn", "longrope"):
        raise UserError(f"llama.rope.scaling.type {kind} and the rope tensors in the file "
                        "contradict each other: take another conversion")
    return kind


def read_divisors(header: Header, name: str, rotated: int) -> list[float] | None:
    """By what the tensor `name` divides the frequency of each pair; None if it is not there."""
    if name not in header.tensors:
        return None
    shape = list(header.tensors[name].shape)
    if shape != [rotated // 2]:
        raise damaged(f"{name} is {shape}, and {rotated // 2} pairs are rotated")
    [(_, divisors)] = read_rows(header, name)
    if not (divisors > 0).all() or not (divisors < 1e15).all():
        raise damaged(f"{name} holds numbers that are not positive")
    return [shortest_decimal(divisor) for divisor in divisors.tolist()]


def longrope_config(rope: dict, window: int, short: list[float], long: list[float],
                    attention_factor: float) -> RopeConfig:
    return RopeConfig.from_dict({"rope_type": "longrope", **rope, "short_factor": short,
                                 "long_factor": long, "attention_factor": attention_factor}, window)


def divided_rope(rope: dict, factor: float, window: int, divisors: list[float]) -> RopeConfig:
    """The RopeConfig of rope_freqs, which divide the frequencies whatever the length.

    LLaMA 3.1's scaling arrives like this, without its settings. In all releases low_freq_factor is
    1 and high_freq_factor 4; s is the largest divisor; L, if the file does not say it, is 8192 or
    L'/s. If LLaMA 3.1's rule with these gives the divisors, it is llama3, else a longrope.
    """
    divisors = [factor * divisor for divisor in divisors]
    head_dim = 2 * len(divisors)
    base = rope["rope_theta"]
    s = max(1.0, *divisors)
    expected = rope_frequencies(head_dim, base) / torch.tensor(divisors)
    for original in [rope["original_max_position_embeddings"] or 8192, round(window / s) or 1]:
        frequencies, _ = llama3(head_dim, base, s, original)
        if torch.allclose(frequencies, expected, rtol=1e-5, atol=0):
            return RopeConfig.from_dict({"rope_type": "llama3", **rope, "factor": s,
                                         "original_max_position_embeddings": original})
    return longrope_config(rope, window, divisors, divisors, attention_factor=1.0)


def named_rope(metadata: dict, found: RopeConfig, head_dim: int, window: int) -> RopeConfig:
    """The RopeConfig that export_gguf.py named, if it gives the angles of `found`, which
    llama.cpp's words say; else `found`: somebody has changed those words since."""
    if NAMED_ROPE not in metadata:
        return found
    try:
        named = RopeConfig.from_dict(json.loads(metadata[NAMED_ROPE]), window)
    except (ValueError, TypeError, RecursionError):
        raise damaged(f"{NAMED_ROPE} is no JSON object") from None
    for length in (1, max(window, named.original_max_position_embeddings or 1) + 1):
        theta, factor = inv_freq(found, head_dim, length)
        named_theta, named_factor = inv_freq(named, head_dim, length)
        same_size = theta.shape == named_theta.shape
        if not same_size or not torch.allclose(theta, named_theta, rtol=1e-5, atol=0):
            return found
        if not math.isclose(factor, named_factor, rel_tol=1e-5):
            return found
    return named


# --------------------------------------------------------------------------------------------------
# The weights

def gguf_name(name: str) -> str:
    """layers.3.attention.wq.weight -> blk.3.attn_q.weight"""
    name = name.removesuffix(".weight")
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if layer:
        return f"blk.{layer[1]}.{GGUF_NAMES[layer[2]]}.weight"
    return f"{GGUF_NAMES[name]}.weight"


def read_tensors(path: str | Path, shapes: dict[str, tuple[int, ...]]
                 ) -> Iterator[tuple[Path, str, tuple[slice, ...], torch.Tensor]]:
    """Yield (file, name, place, tensor): some rows at a time, so that they take little memory."""
    header = read_header(path)
    meta_names = {gguf_name(name): name for name in shapes}
    stored = {name for name in header.tensors if not ROPE_TENSORS.fullmatch(name)}
    for name in sorted(stored ^ meta_names.keys()):
        problem = "is no tensor of a plain LLaMA" if name in stored else "is missing"
        raise UserError(f"{path}: {name} {problem}: take a whole model of the llama architecture, "
                        "without biases or adapters")
    for name, meta_name in meta_names.items():
        shape = header.tensors[name].shape
        expected = shapes[meta_name]
        if shape != expected:
            raise damaged(f"{path}: {name} is {list(shape)}, and the header makes it "
                          f"{list(expected)}")
        for place, part in read_rows(header, name):
            yield header.path, meta_name, place, part


def read_rows(header: Header, name: str) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
    """Yield (place, part): the vector or matrix `name`, some rows at a time, as floats.

    The file is read, not mapped: mapped pages count as memory of this process, and a file that is
    cut off while it is mapped ends the process without a word.
    """
    stored = header.tensors[name]
    rows = math.prod(stored.shape[:-1])
    columns = stored.shape[-1]
    step = max(1, WEIGHTS_PER_PART // columns)
    with open(header.path, "rb") as file:
        file.seek(stored.start)
        for first in range(0, rows, step):
            data = bytearray(min(step, rows - first) * stored.row_bytes)
            if file.readinto(data) != len(data):
                raise damaged(f"{header.path}: was cut off while it was being read")
            try:
                part = dequantize(data, stored.kind)
            except NotImplementedError:
                raise UserError(f"{header.path}: {name} is {stored.kind.name}, which the package "
                                "gguf cannot decode: take F16, Q8_0, Q4_K_M or the like") from None
            if len(stored.shape) == 1:
                yield (), part
            else:
                yield (slice(first, first + step),), part.view(-1, columns)


def dequantize(data: bytearray, kind: IntEnum) -> torch.Tensor:
    """The numbers in these bytes, a vector: in float32, or as they are if not quantised."""
    if kind.name in UNQUANTISED:
        return torch.frombuffer(data, dtype=UNQUANTISED[kind.name])
    blocks = np.frombuffer(data, np.uint8).reshape(1, -1)
    with np.errstate(over="ignore", invalid="ignore"):  # loading refuses NaN, by the tensor's name
        return torch.from_numpy(gguf_package().quants.dequantize(blocks, kind)).view(-1)
