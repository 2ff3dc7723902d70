"""GGUF: one file that holds a model's shape, its weights, mostly quantised, and its tokenizer. Read here, never written.

    "GGUF"  version  number of tensors  number of keys
    key, type, value                     ...   general.architecture = "llama", llama.block_count = 30, tokenizer.ggml.tokens = [...]
    name, dims, type, offset             ...   blk.0.attn_q.weight, [in, out], Q4_1, where its bytes lie
    bytes, each tensor at its offset     ...   row after row, in blocks of 32 or 256 weights that share a scale

The gguf package undoes the quantisation. Its GGUFReader is not used: it makes some Python objects for every word of the vocabulary (half
a minute and 600 MB for LLaMA 3's), and a damaged count can keep it busy for ever.

The order of q's and k's rows. GGUF turns neighbouring elements (2i, 2i+1) of a head in models of the llama architecture, as Meta's code and
model.py do. Hugging Face turns (i, i + D/2), so the converter from Hugging Face permutes the rows of attn_q and attn_k back into Meta's
order, each with its own number of heads, and leaves Meta's own weights alone. Either way the rows are in Meta's order already and are
taken as they are; whoever loads the file into a Hugging Face model has to permute them once more, as transformers does. With this the
logits are those of transformers reading the same file, and permuted they are not.
"""
import dataclasses
import json
import math
import mmap
import re
import struct
import tempfile
from pathlib import Path

import numpy as np
import torch

from cli import UserError
from model import ModelConfig
from rope import RopeConfig, inv_freq, plain_frequencies

AGAIN = "copy or download it again"

# ---------------------------------------------------------------------------------------------------------------------
# The header: keys, and where the tensors lie

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # GGUF's types, in struct's letters
STRING, ARRAY = 8, 9


@dataclasses.dataclass
class Header:
    path: Path
    metadata: dict   # key -> number, bool, str or list; an array that was not asked for is None
    tensors: dict    # name -> Stored


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in the file: its shape as PyTorch's ([out, in], the file has it the other way round), its type, and where it is."""

    shape: tuple
    kind: object     # a gguf.GGMLQuantizationType
    start: int       # bytes from the beginning of the file
    row_bytes: int


def package():
    try:
        import gguf
    except ImportError:
        raise UserError("reading a .gguf file needs the gguf package: pip install gguf") from None
    return gguf


def read_header(path, arrays=()):
    """The Header of a .gguf file. arrays: the keys whose arrays are decoded; vocabularies are long, and most callers need none.

    Every length is held against the size of the file before it is used, so that a damaged one ends here and not in the memory.
    """
    path, gguf = Path(path), package()
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return parse(path, data, arrays, gguf)
    except IsADirectoryError:
        raise UserError(f"{path}: a folder: give the .gguf file in it") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: give the path of a .gguf file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: damaged (a name that is no UTF-8): {AGAIN}") from None
    except (struct.error, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged or cut off (its header does not fit the file): {AGAIN}") from None


def parse(path, data, arrays, gguf):
    """read_header, of the bytes of a file. Running out of them is a struct.error."""
    at = 0

    def take(letters):
        nonlocal at
        values = struct.unpack_from("<" + letters, data, at)
        at += struct.calcsize("<" + letters)
        return values[0] if len(values) == 1 else values

    def room(size):
        if size > len(data) - at:
            raise struct.error("the file ends before")
        return size

    def string(decode=True):
        nonlocal at
        size = room(take("Q"))
        at += size
        return str(data[at - size:at], "utf-8") if decode else None

    def name():
        """A string that has to be one: it will stand in messages."""
        found = string()
        if not found.isprintable() or len(found) > 200:
            raise UserError(f"{path}: damaged (a name that reads {found!r:.60}): {AGAIN}")
        return found

    def array(decode):
        nonlocal at
        kind, count = take("IQ")
        if kind == STRING:
            room(8 * count)
            values = [string(decode) for _ in range(count)]
            return values if decode else None
        if kind not in NUMBERS:
            raise UserError(f"{path}: an array of type {kind}, which no version of GGUF has: {AGAIN}")
        size = room(count * struct.calcsize("<" + NUMBERS[kind]))
        at += size
        return list(struct.unpack(f"<{count}{NUMBERS[kind]}", data[at - size:at])) if decode else None

    if data[:4] != b"GGUF":
        raise UserError(f"{path}: not a GGUF file (it begins with {data[:4]!r}): give one that llama.cpp reads")
    at = 4
    version = take("I")
    if version & 0xFFFF == 0:
        raise UserError(f"{path}: a big-endian GGUF file: convert it with gguf-convert-endian, which the gguf package brings")
    if version not in (2, 3):
        raise UserError(f"{path}: GGUF version {version}, and 2 and 3 are read: convert the model anew")
    tensor_count, key_count = take("QQ")
    metadata, tensors = {}, {}
    for _ in range(key_count):
        key, kind = name(), take("I")
        if key in metadata:
            raise UserError(f"{path}: damaged ({key!r} is there twice): {AGAIN}")
        if kind in NUMBERS:
            metadata[key] = take(NUMBERS[kind])
            if kind == 6:  # the shortest number that rounds to this float32: 1e-5, not 9.99999975e-06
                metadata[key] = float(str(np.float32(metadata[key])))
        elif kind in (STRING, ARRAY):
            metadata[key] = string() if kind == STRING else array(key in arrays or not key.startswith("tokenizer."))
        else:
            raise UserError(f"{path}: {key!r} is of type {kind}, which no version of GGUF has: {AGAIN}")
    for _ in range(tensor_count):
        key, dimensions = name(), take("I")
        if key in tensors or not 1 <= dimensions <= 4:
            raise UserError(f"{path}: damaged ({key!r} is there twice, or has {dimensions} dimensions): {AGAIN}")
        shape = tuple(reversed([take("Q") for _ in range(dimensions)]))
        number, offset = take("IQ")
        try:
            kind = gguf.GGMLQuantizationType(number)
            block, size = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise UserError(f"{path}: {key} is of type {number}, which this gguf package does not know: pip install -U gguf") from None
        if shape[-1] % block or 0 in shape:
            raise UserError(f"{path}: {key} is {list(shape)}, not in whole blocks of {block} ({kind.name}): {AGAIN}")
        tensors[key] = Stored(shape, kind, offset, shape[-1] // block * size)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise UserError(f"{path}: general.alignment = {alignment!r:.60}: {AGAIN}")
    begin = end = -(-at // alignment) * alignment
    for key, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if begin + tensor.start < end:  # else a small file could stand for a model of any size
            raise UserError(f"{path}: damaged ({key} overlaps another tensor): {AGAIN}")
        end = begin + tensor.start + math.prod(tensor.shape[:-1]) * tensor.row_bytes
        if end > len(data):
            raise UserError(f"{path}: cut off or damaged: {key} ends at byte {end}, and the file has {len(data)}: {AGAIN}")
        tensors[key] = dataclasses.replace(tensor, start=begin + tensor.start)
    return Header(path, metadata, tensors)


# ---------------------------------------------------------------------------------------------------------------------
# The shape

# Keys of the llama architecture that say nothing about what this model computes, or the same as other ones.
HARMLESS = {"vocab_size", "tensor_data_layout", "expert_count", "expert_used_count", "attention.causal",
            "rope.scaling.finetuned", "attention.layer_norm_epsilon", "use_parallel_residual"}


def read_config(path):
    """The ModelConfig of a .gguf file of the llama architecture. A key that is not known here may change what the model computes: it is
    refused by name."""
    header = read_header(path)
    try:
        return config_of(header)
    except UserError as error:
        raise error if str(error).startswith(str(path)) else UserError(f"{path}: {error}") from None


def config_of(header):
    metadata, tensors, used = header.metadata, header.tensors, set(HARMLESS)
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"a model of architecture {architecture!r:.60}: only llama is read (LLaMA, Mistral, SmolLM2, TinyLlama, ...)")
    if metadata.get("split.count", 1) not in (0, 1):
        raise UserError(f"one of {metadata['split.count']!r:.60} parts of a model: put them together with llama-gguf-split --merge")

    def get(key, kind, *default):
        """The value of llama.`key`, its type and sign checked; `default` if it is not there. A list for all layers: of one value."""
        used.add(key)
        value = metadata.get(f"llama.{key}")
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if value is None:
            if not default:
                raise UserError(f"the key llama.{key} is missing: convert the model anew")
            return default[0]
        if not (type(value) is kind if kind is str else type(value) in (int, kind) and 0 <= value < 2**31):
            raise UserError(f"llama.{key} = {value!r:.60}: has to be {'a word' if kind is str else 'one number, not below 0'}")
        return value

    for key in ("expert_count", "expert_used_count"):
        if metadata.get(f"llama.{key}"):
            raise UserError(f"llama.{key} = {metadata[f'llama.{key}']!r:.60}: a mixture of experts, which this model is not")
    if not metadata.get("llama.attention.causal", True):
        raise UserError("llama.attention.causal is false: a model that sees the text after a token too, as none here does")
    dim, layers, heads = get("embedding_length", int), get("block_count", int), get("attention.head_count", int)
    kv_heads, window, ffn_dim = get("attention.head_count_kv", int, heads), get("context_length", int), get("feed_forward_length", int)
    eps = get("attention.layer_norm_rms_epsilon", float)
    head_dim = get("attention.key_length", int, *([dim // heads] if heads and dim % heads == 0 else []))
    if (value_dim := get("attention.value_length", int, head_dim)) != head_dim:
        raise UserError(f"llama.attention.value_length {value_dim} is not key_length {head_dim}: this model has one head_dim")
    if 0 < get("attention.sliding_window", int, 0) < window:
        raise UserError("llama.attention.sliding_window is smaller than context_length: the attention here sees all keys")
    found = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    if len(found) != layers:
        raise UserError(f"has {len(found)} layers, and llama.block_count {layers}: {AGAIN}")
    if "token_embd.weight" not in tensors:
        raise UserError("token_embd.weight is missing: take a whole model")
    vocab_size = tensors["token_embd.weight"].shape[0]
    if (said := metadata.get("llama.vocab_size", vocab_size)) != vocab_size:
        raise UserError(f"llama.vocab_size is {said!r:.60}, and token_embd.weight has {vocab_size} rows: {AGAIN}")
    # Before anything is built by these numbers: wrong ones could be as large as memory.
    for name, shape in (("token_embd", (vocab_size, dim)), ("blk.0.attn_q", (heads * head_dim, dim)), ("blk.0.ffn_gate", (ffn_dim, dim))):
        if (stored := tensors.get(f"{name}.weight")) is None or stored.shape != shape:
            raise UserError(f"{name}.weight is {list(stored.shape) if stored else 'missing'}, and should be {list(shape)}: {AGAIN}")
    if not 0 < eps < 1:
        raise UserError(f"llama.attention.layer_norm_rms_epsilon = {eps!r}: has to be a small positive number")
    rope = rope_of(header, get, head_dim, window)
    if unknown := sorted(key for key in metadata if key.startswith("llama.") and key[6:] not in used):
        raise UserError(f"the key {unknown[0]} is not known here, and may change what the model computes: take a plain LLaMA")
    return ModelConfig(dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=kv_heads, vocab_size=vocab_size, norm_eps=eps,
                       max_seq_len=window, rope=rope, tied="output.weight" not in tensors, head_dim=head_dim, ffn_dim=ffn_dim)


def rope_of(header, get, head_dim, window):
    """The RopeConfig of the keys llama.rope.* and of the tensors rope_freqs, rope_factors_short and rope_factors_long, if there are any.

    rope_freqs divide the frequencies whatever the length: LLaMA 3.1's scaling arrives like this, its settings lost. If LLaMA 3.1's rule
    gives these divisors, it is what they become, else a longrope with equal short and long factors. What llama.cpp chooses once, by the
    size of the context, short or long factors, is chosen by the length of the text, as in transformers.
    """
    rotated = get("rope.dimension_count", int, head_dim)
    if not 2 <= rotated <= head_dim or rotated % 2:
        raise UserError(f"llama.rope.dimension_count {rotated}: has to be even, at least 2, and at most the head_dim {head_dim}")
    share = rotated / head_dim
    share = share if int(share * head_dim) == rotated else math.nextafter(share, 1)  # rope.py rounds down
    base = get("rope.freq_base", float, 10000.0)
    shared = {"rope_theta": base, **({"partial_rotary_factor": share} if rotated < head_dim else {})}
    old = get("rope.scale_linear", float, 1.0)  # before there were scaling types
    factor, attention = get("rope.scaling.factor", float, old) or 1.0, get("rope.scaling.attn_factor", float, 1.0)
    original = get("rope.scaling.original_context_length", int, None) or None
    divisors, short, long = (pair_factors(header, name, rotated) for name in ("rope_freqs", "rope_factors_short", "rope_factors_long"))
    if (short is None) != (long is None):
        raise UserError("has one of rope_factors_short.weight and rope_factors_long.weight, not both: take a whole model")
    kind = get("rope.scaling.type", str, "linear" if short is None else "longrope")
    yarn = {name: get(f"rope.scaling.yarn_{name}", float, None) for name in ("beta_fast", "beta_slow", "attn_factor", "ext_factor")}
    if yarn.pop("ext_factor") not in (None, 1.0, -1.0):
        raise UserError("llama.rope.scaling.yarn_ext_factor is not 1: only whole YaRN is known")
    attention *= yarn.pop("attn_factor") or 1.0
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise UserError(f"llama.rope.scaling.type {kind!r:.60}: known are none, linear, yarn and longrope")
    if (short is not None) != (kind == "longrope") or divisors is not None and kind in ("yarn", "longrope"):
        raise UserError(f"llama.rope.scaling.type {kind} and the rope tensors in the file contradict each other: take another conversion")
    if kind == "longrope":
        ratio = max(1.0, window / (original or window))
        if factor not in (1.0, ratio):
            raise UserError(f"llama.rope.scaling.factor {factor:g} beside rope_factors is not context_length / original_context_length")
        return RopeConfig.from_dict({"rope_type": "longrope", **shared, "factor": ratio, "short_factor": short, "long_factor": long,
                                     "attention_factor": attention, "original_max_position_embeddings": original or window})
    if kind == "yarn" and factor != 1:
        attention = {"attention_factor": attention * (0.1 * math.log(factor) + 1)} if attention != 1 else {}
        return RopeConfig.from_dict({"rope_type": "yarn", **shared, "factor": factor, **yarn, **attention,
                                     "original_max_position_embeddings": original or window})
    if attention != 1:
        raise UserError(f"llama.rope.scaling.attn_factor {attention:g} with scaling type {kind}: only yarn and longrope have a temperature")
    factor = 1.0 if kind == "none" else factor
    if divisors is None or set(divisors) == {1.0}:
        if factor == 1:
            return RopeConfig.from_dict(shared)
        return RopeConfig.from_dict({"rope_type": "linear", **shared, "factor": factor, "original_max_position_embeddings": original})
    if factor == 1 and (llama3 := as_llama3(divisors, shared, original, window)):
        return llama3
    factors = [factor * divisor for divisor in divisors]
    return RopeConfig.from_dict({"rope_type": "longrope", **shared, "factor": max(1.0, window / (original or window)),
                                 "short_factor": factors, "long_factor": factors, "attention_factor": 1.0,
                                 "original_max_position_embeddings": original or window})


def pair_factors(header, name, rotated):
    """One of the file's rope tensors as a list of positive numbers, one a pair; None if it is not there."""
    name = f"{name}.weight"
    if name not in header.tensors:
        return None
    if header.tensors[name].shape != (rotated // 2,):
        raise UserError(f"{name} is {list(header.tensors[name].shape)}, and {rotated // 2} pairs are rotated: {AGAIN}")
    [(_, values)] = rows_of(header, name)
    if not (values > 0).all() or not (values < 1e15).all():
        raise UserError(f"{name} holds numbers that are not positive: {AGAIN}")
    return [float(str(value)) for value in values.float().numpy()]


def as_llama3(divisors, shared, original, window):
    """The llama3 RopeConfig that divides the frequencies like this, or None. low_freq_factor is 1 and high_freq_factor 4 in all releases;
    the factor is the largest divisor; the original window, if it is not said, is LLaMA 3's or follows from the longest."""
    factor = max(divisors)
    theta = plain_frequencies(2 * len(divisors), shared["rope_theta"])
    for length in dict.fromkeys([original or 8192, round(window / factor) or 1]):
        rope = RopeConfig.from_dict({"rope_type": "llama3", **shared, "factor": max(1.0, factor),
                                     "original_max_position_embeddings": length})
        frequencies, _ = inv_freq(dataclasses.replace(rope, partial_rotary_factor=1.0), 2 * len(divisors))
        if np.allclose((theta / frequencies.double()).numpy(), divisors, rtol=1e-5, atol=0):
            return rope
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The weights

LAYER = {"attention_norm": "attn_norm", "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v",
         "attention.wo": "attn_output", "ffn_norm": "ffn_norm", "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down",
         "feed_forward.w3": "ffn_up"}
OUTER = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
FREQUENCIES = re.compile(r"rope_(freqs|factors_short|factors_long)\.weight|blk\.\d+\.attn_rot_embd\.weight")  # read before, or of no use
PART = 1 << 18  # weights read and dequantised at a time: what the package needs in between is several times that, and should stay in cache


def gguf_name(name):
    """layers.3.attention.wq.weight -> blk.3.attn_q.weight"""
    if layer := re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name):
        return f"blk.{layer[1]}.{LAYER[layer[2]]}.weight"
    return f"{OUTER[name.removesuffix('.weight')]}.weight"


def read_tensors(path, shapes):
    """Yield (file, name, where, tensor) for each part of each tensor, a few rows at a time, so that little is in memory but the model."""
    header = read_header(path)
    names = {gguf_name(name): name for name in shapes}
    for name in sorted(names.keys() ^ {name for name in header.tensors if not FREQUENCIES.fullmatch(name)}):
        what = "is missing" if name in names else "is no tensor of a plain LLaMA"
        raise UserError(f"{path}: {name} {what}: take a whole model of the llama architecture, without biases or adapters")
    for name, ours in names.items():
        if (stored := header.tensors[name].shape) != shapes[ours]:
            raise UserError(f"{path}: {name} is {list(stored)}, and the header makes it {list(shapes[ours])}: {AGAIN}")
        for where, part in rows_of(header, name):
            yield path, ours, where, part


def rows_of(header, name):
    """Yield (where, tensor): the tensor `name` in float32, float16 or bfloat16, in slices of its rows.

    The file is read, not mapped: what was touched of a mapped file counts as memory of this process, and a file that is cut off while it is
    mapped ends the process without a word.
    """
    gguf, stored = package(), header.tensors[name]
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}.get(stored.kind.name)
    rows, inner = stored.shape if len(stored.shape) > 1 else (1, *stored.shape)
    step = max(1, PART // inner)
    with open(header.path, "rb") as file:
        file.seek(stored.start)
        for first in range(0, rows, step):
            data = bytearray(min(step, rows - first) * stored.row_bytes)
            if file.readinto(data) != len(data):
                raise UserError(f"{header.path}: was cut off while it was being read: load it again")
            if plain is not None:
                part = torch.frombuffer(data, dtype=plain)
            else:
                try:
                    blocks = np.frombuffer(data, np.uint8).reshape(1, -1)
                    with np.errstate(over="ignore", invalid="ignore"):  # what is no number is refused by name later
                        part = torch.from_numpy(gguf.quants.dequantize(blocks, stored.kind))
                except NotImplementedError:
                    raise UserError(f"{header.path}: {name} is {stored.kind.name}, which the gguf package does not undo: take F16, Q8_0, "
                                    "Q4_K_M or the like") from None
            yield ((slice(first, first + step),), part.view(-1, inner)) if len(stored.shape) > 1 else ((), part.view(inner))


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # token types
ARRAYS = ("tokens", "scores", "token_type", "merges")

# How text is cut before its bytes are merged, by the names that llama.cpp gives to the ways: patterns one after the other, each of which
# cuts what the ones before it left. These are facts about the models; the merges only make sense with the cuts that they were learned from.
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
ENDING = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + ENDING
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + ENDING
TEKKEN = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}|"
          + ENDING.replace(r"[\r\n]*", r"[\r\n/]*", 1))
DEEPSEEK_CODER = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}", GPT2]
CUTS = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo"), [GPT2]),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), [r"\p{N}", GPT2]),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), [LLAMA3]),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen"), [QWEN2]),
    "tekken": [TEKKEN],
    "deepseek-coder": DEEPSEEK_CODER,
}
WHOLE = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"}  # a word that is a token needs no merges; BOS comes first


def read_tokenizer(path):
    """The tokenizer inside a .gguf file: a data.tokenizer.Tokenizer if it is SentencePiece's ("llama"), a JsonTokenizer if it is byte-level
    BPE ("gpt2").

    What a model folder would have, tokenizer.model or tokenizer.json, is made of the file's tokens, scores and merges and read as such.
    sha256 is that of these bytes: files that differ in their quantisation only have the same tokenizer. files() gives them for a folder.
    """
    from data.tokenizer import open_tokenizer
    header = read_header(path, {f"tokenizer.ggml.{name}" for name in ARRAYS})
    try:
        files = tokenizer_files(tokenizer_keys(header.metadata))
        with tempfile.TemporaryDirectory() as folder:
            for name, data in files.items():
                (Path(folder) / name).write_bytes(data)
            try:
                tokenizer = open_tokenizer(Path(folder) / next(iter(files)))
            except UserError as error:
                raise UserError(str(error).replace(f"{folder}/", "its tokenizer, as ")) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    tokenizer.path, tokenizer.files = Path(path), lambda: dict(files)
    return tokenizer


def tokenizer_keys(metadata):
    """The keys tokenizer.ggml.*, without this prefix, lists and ids checked; bos_token_id, eos_token_id and add_bos_token always there.

    A file that does not say add_bos_token means what llama.cpp does then: yes with SentencePiece and LLaMA 3's family, else no. A model
    without BOS begins its documents with EOS."""
    keys = {key[len("tokenizer.ggml."):]: value for key, value in metadata.items() if key.startswith("tokenizer.ggml.")}
    if "model" not in keys or not isinstance(keys.get("tokens"), list) or not keys["tokens"]:
        raise UserError("has no tokenizer inside: export it, and copy the model's tokenizer.json into the new folder")
    kinds, count = {"tokens": str, "scores": float, "token_type": int, "merges": str}, len(keys["tokens"])
    for name in ARRAYS:
        values = keys.get(name)
        if name in keys and (not isinstance(values, list) or not all(type(v) is kinds[name] for v in values)
                             or name != "merges" and len(values) != count):
            raise UserError(f"tokenizer.ggml.{name} is no list of {kinds[name].__name__}, {count} of them: {AGAIN}")
    if len(set(keys["tokens"])) != count or "" in keys["tokens"]:
        raise UserError(f"tokenizer.ggml.tokens has an empty token, or one twice: {AGAIN}")
    keys.setdefault("token_type", [NORMAL] * count)
    sentencepiece = keys["model"] == "llama"
    defaults = {"bos_token_id": keys.get("eos_token_id")}
    if sentencepiece:
        defaults = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    keys |= {key: value for key, value in defaults.items() if key not in keys}
    for key in ("eos_token_id", "bos_token_id", *(["unknown_token_id"] if sentencepiece else [])):
        if type(keys.get(key)) is not int or not 0 <= keys[key] < count:
            raise UserError(f"tokenizer.ggml.{key} is {keys.get(key)!r:.60}, and there are {count} tokens: {AGAIN}")
    flags = {"add_bos_token": sentencepiece or keys.get("pre") in WHOLE, "add_eos_token": False, "add_space_prefix": sentencepiece,
             "remove_extra_whitespaces": False}
    for key, value in flags.items():
        if type(keys.setdefault(key, value)) is not bool:
            raise UserError(f"tokenizer.ggml.{key} = {str(keys[key])[:40]}: has to be true or false")
    return keys


def tokenizer_files(keys):
    """{name: bytes}: the files in which a model folder has this tokenizer, the tokenizer itself first."""
    if keys["model"] == "llama":
        return {"tokenizer.model": sentencepiece_model(keys)}
    if keys["model"] != "gpt2":
        raise UserError(f"tokenizer.ggml.model {str(keys['model'])[:40]!r}: only llama (SentencePiece) and gpt2 (byte-level BPE) are read: "
                        "take the model as a Hugging Face folder")
    tokens = keys["tokens"]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokens[keys["bos_token_id"]],
              "eos_token": tokens[keys["eos_token_id"]], "add_bos_token": keys["add_bos_token"], "add_eos_token": keys["add_eos_token"],
              "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": json.dumps(byte_level(keys), ensure_ascii=False).encode(),
            "tokenizer_config.json": json.dumps(config).encode()}


def byte_level(keys):
    """A byte-level BPE as the object that a tokenizer.json holds.

    Each of the 256 bytes is written as a visible character ("Ġ" is the space); the tokens of type CONTROL, such as <|im_start|>, and
    USER_DEFINED ones are found in a text before it is cut, and are written as they are."""
    tokens, kinds, pre = keys["tokens"], keys["token_type"], keys.get("pre", "default")
    if pre not in CUTS:
        raise UserError(f"tokenizer.ggml.pre {str(pre)[:40]!r}: how this model cuts its text is not known here; known are "
                        f"{', '.join(CUTS)}: take the model as a Hugging Face folder")
    pairs = [tuple(merge.split(" ", 1)) for merge in keys.get("merges", [])]
    known = set(tokens)
    for pair in pairs:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= known:
            raise UserError(f"tokenizer.ggml.merges has {' '.join(pair)!r:.60}, which are no tokens: {AGAIN}")
    cuts = [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} for regex in CUTS[pre]]
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    added = [{"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": kinds[i] == CONTROL} for i in range(len(tokens)) if kinds[i] in (CONTROL, USER_DEFINED)]
    begin, end = [keys["bos_token_id"]] * keys["add_bos_token"], [keys["eos_token_id"]] * keys["add_eos_token"]  # for transformers, unasked
    around = {i: {"SpecialToken": {"id": tokens[i], "type_id": 0}} for i in begin + end}
    texts = [{"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB")]
    template = {"type": "TemplateProcessing", **{name: [*map(around.get, begin), *texts[:n], *map(around.get, end)]
                                                 for n, name in ((1, "single"), (2, "pair"))},
                "special_tokens": {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in around}}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "fuse_unk": False, "byte_fallback": False, "ignore_merges": pre in WHOLE,
             "vocab": {token: i for i, token in enumerate(tokens)}, "merges": pairs}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": {"type": "Prepend", "prepend": " "} if keys["add_space_prefix"] else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, as_bytes]},
            "post_processor": template if around else as_bytes, "decoder": as_bytes, "model": model}


def sentencepiece_model(keys):
    """The bytes of a SentencePiece tokenizer.model with these pieces: BPE with bytes for what has no piece, and no normalisation, as
    LLaMA's. A protocol buffer is a row of fields, each its number and kind, then its value: few enough here to be written by hand."""
    if "scores" not in keys:
        raise UserError(f"tokenizer.ggml.scores is missing: {AGAIN}")

    def varint(value):
        return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)

    def field(number, value):
        if isinstance(value, float):
            return varint(number << 3 | 5) + struct.pack("<f", value)
        if isinstance(value, int):
            return varint(number << 3) + varint(value)
        value = value.encode() if isinstance(value, str) else value
        return varint(number << 3 | 2) + varint(len(value)) + value

    tokens, kinds = keys["tokens"], list(keys["token_type"])
    unknown, begin, end = (keys[f"{name}_token_id"] for name in ("unknown", "bos", "eos"))
    kinds[begin] = kinds[end] = CONTROL  # a chat model may have called its EOS a USER_DEFINED one
    if kinds[unknown] != UNKNOWN or kinds.count(UNKNOWN) != 1 or not set(kinds) <= set(range(1, 7)):
        raise UserError(f"tokenizer.ggml.token_type: one token, tokenizer.ggml.unknown_token_id, has to be of type 2: {AGAIN}")
    pieces = b"".join(field(1, field(1, token) + field(2, score) + field(3, kind))
                      for token, score, kind in zip(tokens, keys["scores"], kinds))
    trainer = (field(3, 2) + field(4, len(tokens)) + field(35, 1) + field(40, unknown) + field(41, begin) + field(42, end)  # 3, 2: BPE
               + field(45, tokens[unknown]) + field(46, tokens[begin]) + field(47, tokens[end]))
    normalizer = (field(1, "identity") + field(3, int(keys["add_space_prefix"])) + field(4, int(keys["remove_extra_whitespaces"]))
                  + field(5, 1))
    return pieces + field(2, trainer) + field(3, normalizer)
