"""GGUF files, written here by the gguf package's own writer: what is read of them, and refused."""
import functools
import io
import json
import math
import random
import struct
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from test_weights import added_at_the_peak, in_child, same

gguf = pytest.importorskip("gguf")     # an extra, as tokenizers is; CI installs both
tokenizers = pytest.importorskip("tokenizers")
from gguf import GGMLQuantizationType as Kind
from tokenizers import pre_tokenizers

from common.errors import UserError
from data import gguf_file
from data.gguf_tokenizer import SPLIT_PATTERNS, companions_of_keys
from data import tokenizer as tokenizer_module
from data.tokenizer import Tokenizer, open_tokenizer
from methods import RopeConfig, inv_freq
from model import LLaMA, ModelConfig
from weights import load_config, load_model, load_tokenizer, save_model
from weights.__main__ import main
from weights.gguf import read_rows
from weights.load import SkipInit

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

TOY = dict(dim=256, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=64, ffn_dim=512, max_seq_len=64,
           rope=RopeConfig(rope_theta=5e4))
TOKENS = torch.tensor([[1, 7, 63, 3, 0, 22, 9]])
NAMES = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output",
         "attention_norm": "attn_norm", "ffn_norm": "ffn_norm", "attention.wq": "attn_q",
         "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output",
         "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up"}
TRICKY = ["", " ", "  ", "a", " a", "a ", "\n", "\n\n  \n", "\t\tx", "Hello world",
          "it's WE'LL they'Re", "x=12345+67  890", "1,000,000", "٣٤ ½ Ⅷ", "Café déjà vu — naïve",
          "日本語のテキスト。漢字", "🦙🦙👩‍👩‍👧", "e\u0301 \u00a0 \u3000",
          "def f(x):\n    return x ** 2\n\n\n", "a\r\nb\r\n", "\x00\x01",
          "$5 <= 6 ^ 7 ~ |x|", "camelCaseHTTPServer", "tail   ",
          "Россия 한국어 ไทย"]


def make(seed=0, **changes):
    """A small LLaMA, every tensor random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"), SkipInit():
        model = LLaMA(ModelConfig(**{**TOY, **changes}))
    tensors = {}
    for name, parameter in model.named_parameters():
        scale = 0.1 if parameter.dim() > 1 else 1
        tensors[name] = torch.randn(parameter.shape, generator=generator) * scale
    model.load_state_dict(tensors, assign=True)
    return model


def in_gguf(name):
    """A GGUF name of one of the model's parameters."""
    parts = name.removesuffix(".weight").split(".")
    if parts[0] == "layers":
        return f"blk.{parts[1]}.{NAMES['.'.join(parts[2:])]}.weight"
    return f"{NAMES[parts[0]]}.weight"


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(path, model, kind=Kind.F32, keys=None, tensors=None, names=(), tokenizer=None,
          endian=gguf.GGUFEndian.LITTLE, architecture="llama"):
    """Write a model as a .gguf file.

    keys: further or other metadata (None: left out); tensors: further or other ones; names: tensors
    left out; tokenizer: what to call on the writer to add one.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture, endianess=endian)
    rotated = int(config.head_dim * config.rope.partial_rotary_factor)
    stated = {"llama.context_length": config.max_seq_len,
              "llama.embedding_length": config.dim,
              "llama.block_count": config.n_layers,
              "llama.feed_forward_length": config.ffn_dim,
              "llama.attention.head_count": config.n_heads,
              "llama.attention.head_count_kv": config.n_kv_heads,
              "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
              "llama.rope.freq_base": config.rope.base,
              "llama.rope.dimension_count": rotated,
              "llama.attention.key_length": config.head_dim,
              "llama.attention.value_length": config.head_dim,
              **(keys or {})}
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
           bool: writer.add_bool, list: writer.add_array}
    for key, value in stated.items():
        if value is not None:
            add[type(value)](key, value)
    if tokenizer:
        tokenizer(writer)
    stored = {in_gguf(name): tensor.detach().numpy() for name, tensor in model.named_parameters()}
    for name, array in {**stored, **(tensors or {})}.items():
        if name in names:
            continue
        if isinstance(array, tuple):
            writer.add_tensor(name, array[0], raw_dtype=array[1])
        elif array.ndim == 1 or kind == Kind.F32:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    finish(writer)
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "m.gguf", make())


# --------------------------------------------------------------------------------------------------
# Weights

@pytest.mark.parametrize("changes", [
    {}, {"tied": True}, {"n_kv_heads": 8}, {"head_dim": 64}, {"norm_eps": 1e-6, "vocab_size": 77},
    {"rope": RopeConfig(rope_theta=1e4, partial_rotary_factor=0.25)}], ids=str)
def test_float32_is_the_meta_folder_bit_for_bit(tmp_path, changes):
    model = make(**changes)
    save_model(model, tmp_path / "meta")
    meta = load_model(tmp_path / "meta")
    loaded = load_model(write(tmp_path / "m.gguf", model))
    assert same(loaded, meta) and loaded.config.rope == meta.config.rope
    for name in ("dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "norm_eps", "max_seq_len",
                 "tied", "vocab_size", "n_layers"):
        assert getattr(loaded.config, name) == getattr(model.config, name), name
    assert torch.equal(loaded(TOKENS), meta(TOKENS)) and loaded.path == str(tmp_path / "m.gguf")


# Steps from zero to a block's largest magnitude (twice that for Q4_1, Q5_1: from its lowest to its
# highest), and by how many of them a weight may be off: half a one, or a whole one where there are
# not as many steps up as down.
STEP = {Kind.F16: (2**10, 0.5), Kind.BF16: (2**7, 0.5), Kind.Q8_0: (127, 0.5), Kind.Q4_0: (8, 1),
        Kind.Q4_1: (7.5, 0.5), Kind.Q5_0: (16, 1), Kind.Q5_1: (15.5, 0.5)}


@pytest.mark.parametrize("kind", STEP, ids=lambda kind: kind.name)
def test_types(tmp_path, kind):
    """Weights within the type's own precision; logits those of a Meta folder of rounded weights."""
    steps, off = STEP[kind]
    model = make()
    rounded = make()
    loaded = load_model(write(tmp_path / "m.gguf", model, kind))
    for name, parameter in model.named_parameters():
        found = loaded.get_parameter(name)
        if parameter.dim() == 1:
            assert torch.equal(found, parameter)
            continue
        error = (found - parameter).view(-1, 32).abs().amax(1)
        largest = parameter.view(-1, 32).abs().amax(1)
        assert (error <= (off / steps + 2**-9) * largest).all(), name  # the scale has 11 bits
        typical = (error > 0.2 * off / steps * largest).float().mean()
        assert typical > 0.1, f"{name}: the bound is not far from the errors"
        with torch.no_grad():
            data = gguf.quants.quantize(parameter.detach().numpy(), kind)
            numbers = torch.from_numpy(gguf.quants.dequantize(data, kind))
            rounded.get_parameter(name).copy_(numbers)
    save_model(rounded, tmp_path / "meta")
    assert torch.equal(loaded(TOKENS), load_model(tmp_path / "meta")(TOKENS))


# Where the scales lie in a block, in bytes.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
          "IQ4_NL": (0,), "IQ4_XS": (0,)}


def k_quants(kind, shape, generator):
    """Random blocks of a type that the package only decodes; their scales are small numbers."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = generator.integers(0, 256, (shape[0], shape[1] // block, size), np.uint8)
    for place in SCALES[kind.name]:
        scales = generator.uniform(1e-4, 1e-3, data.shape[:2]).astype(np.float16)
        data[..., place:place + 2] = scales[..., None].view(np.uint8)
    return data.reshape(shape[0], -1)


@pytest.mark.parametrize("kind", SCALES)
def test_k_quants(tmp_path, monkeypatch, kind):
    """Each row in its place, read a few rows at a time: what the package makes of the tensor."""
    kind = Kind[kind]
    model = make()
    generator = np.random.default_rng(0)
    quantised = {in_gguf(name): (k_quants(kind, p.shape, generator), kind)
                 for name, p in model.named_parameters() if p.dim() > 1}
    path = write(tmp_path / "m.gguf", model, tensors=quantised)
    monkeypatch.setattr("weights.gguf.WEIGHTS_PER_PART", 1500)  # 5 rows of 256, 2 of 512
    loaded = load_model(path)
    for name, parameter in loaded.named_parameters():
        if parameter.dim() > 1:
            expected = gguf.quants.dequantize(quantised[in_gguf(name)][0], kind)
            assert np.array_equal(parameter.detach().numpy(), expected), name
    assert loaded(TOKENS).isfinite().all()


def test_q6_k_by_hand(tmp_path):
    """Q6_K by its definition: 16 scales of 8 bits and one of 16 for 256 weights of 6 bits, 4 in ql
    and 2 in qh, less 32."""
    data = k_quants(Kind.Q6_K, (64, 256), np.random.default_rng(1))
    tensors = {"output.weight": (data, Kind.Q6_K)}
    loaded = load_model(write(tmp_path / "m.gguf", make(), tensors=tensors))
    for row, block in zip(loaded.output.weight.detach().numpy()[:3], data):
        scales = block[192:208].view(np.int8)
        d = float(block[208:210].view(np.float16)[0])
        for i in range(256):
            half, quarter, lane = i // 128, i % 128 // 32, i % 32
            low = block[64 * half + lane + 32 * (quarter % 2)] >> 4 * (quarter // 2) & 15
            high = block[128 + 32 * half + lane] >> 2 * quarter & 3
            expected = d * int(scales[i // 16]) * (int(low) + 16 * int(high) - 32)
            assert row[i] == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_a_hugging_face_model_by_way_of_the_converter(tmp_path, kv_heads):
    """The converter permutes q's and k's rows out of Hugging Face's order; the logits are those of
    transformers before."""
    pytest.importorskip("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
        vocab_size=64, num_key_value_heads=kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4})).eval()
    state = theirs.state_dict()
    model = make(n_kv_heads=kv_heads, norm_eps=theirs.config.rms_norm_eps)
    with torch.no_grad():
        for tensor in state.values():  # wide enough that positions matter
            tensor.mul_(4 if tensor.dim() > 1 else 1)
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    tensors = {}
    for name, tensor in state.items():
        array = tensor.numpy()
        for part, heads in (("q_proj", 8), ("k_proj", kv_heads)):
            if part in name:
                array = array.reshape(heads, 2, 16, 256).swapaxes(1, 2).reshape(-1, 256)
        name = mapping.get_name(name, try_suffixes=(".weight",))
        tensors[name] = np.ascontiguousarray(array)
    tokens = torch.randint(64, (2, 40))
    loaded = load_model(write(tmp_path / "m.gguf", model, tensors=tensors))
    with torch.no_grad():
        difference = (loaded(tokens) - theirs(tokens).logits).abs().max()
    assert difference < 1e-4


def test_the_header_is_what_the_package_reads(tmp_path):
    keys = {"general.name": "Llama é", "general.tags": ["a", "b"], "a.list": [1, 2, 3],
            "a.flag": True, "tokenizer.ggml.tokens": ["<s>", "é"], "a.halves": [0.5, 1.5]}
    path = write(tmp_path / "m.gguf", make(), Kind.Q4_0, keys)
    header = gguf_file.read_header(path)
    reader = gguf.GGUFReader(path)
    expected = {}
    for key, field in reader.fields.items():
        value = field.contents()
        if not key.startswith("GGUF."):
            expected[key] = pytest.approx(value) if isinstance(value, float) else value
    assert header.metadata == expected
    found = [(name, t.shape, t.kind, t.start) for name, t in header.tensors.items()]
    assert found == [(t.name, tuple(map(int, reversed(t.shape))), t.tensor_type, t.data_offset)
                     for t in reader.tensors]
    assert load_config(path).norm_eps == 1e-5, "not 9.99999974e-06"


def test_metas_own_code_runs_what_is_exported(tmp_path):
    """It knows neither ffn_dim nor head_dim; SmolLM2's width of 1536 comes of its rule with
    multiple_of 256."""
    model = make(dim=576, n_heads=9, n_kv_heads=3, ffn_dim=1536, head_dim=64, n_layers=1)
    path = write(tmp_path / "m.gguf", model)
    main(["export", "--model", str(path), "--to", "meta", "--out", str(tmp_path / "meta")])
    params = json.loads((tmp_path / "meta/params.json").read_text(encoding="utf-8"))
    assert params["multiple_of"] == 256 and not {"ffn_dim", "head_dim"} & set(params)
    assert same(load_model(tmp_path / "meta"), model)
    save_model(make(ffn_dim=28672 // 56), tmp_path / "other")
    params = json.loads((tmp_path / "other/params.json").read_text(encoding="utf-8"))
    assert "ffn_dim" not in params and load_config(tmp_path / "other").ffn_dim == 512


def test_one_number_for_each_layer(tmp_path):
    """Some converters write a list; if all layers agree, it is their number."""
    model = make()
    keys = {"llama.attention.head_count_kv": [2, 2], "llama.feed_forward_length": [512, 512]}
    assert same(load_model(write(tmp_path / "m.gguf", model, keys=keys)), model)


def test_other_dtypes(tmp_path):
    path = write(tmp_path / "m.gguf", make(), Kind.Q8_0)
    whole = load_model(path)
    half = load_model(path, dtype=torch.bfloat16)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter.bfloat16(), half.get_parameter(name))


# --------------------------------------------------------------------------------------------------
# RoPE

def llama3_divisors(pairs, base, factor, low=1.0, high=4.0, window=8192):
    """LLaMA 3.1's rule as its converter writes it into rope_freqs."""
    found = []
    for i in range(pairs):
        wavelength = 2 * math.pi * base ** (i / pairs)
        smooth = (window / wavelength - low) / (high - low)
        if wavelength < window / high:
            found.append(1.0)
        elif wavelength > window / low:
            found.append(factor)
        else:
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


UNEVEN = np.linspace(1, 9, 16, dtype=np.float32)
UNEVEN_LIST = [float(str(f)) for f in UNEVEN]
SCALED = "llama.rope.scaling."
ROPES = [  # (keys, tensors, the RopeConfig)
    ({}, {}, {}),
    ({SCALED + "type": "none", SCALED + "factor": 4.0}, {}, {}),
    ({SCALED + "type": "linear", SCALED + "factor": 4.0}, {},
     {"rope_type": "linear", "factor": 4.0}),
    ({SCALED + "factor": 4.0, SCALED + "original_context_length": 16}, {},
     {"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 16}),
    ({"llama.rope.scale_linear": 2.0}, {}, {"rope_type": "linear", "factor": 2.0}),
    ({SCALED + "type": "yarn", SCALED + "factor": 4.0, SCALED + "original_context_length": 16}, {},
     {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    ({SCALED + "type": "yarn", SCALED + "factor": 4.0, SCALED + "original_context_length": 16,
      SCALED + "attn_factor": 0.5, SCALED + "yarn_beta_fast": 16.0}, {},
     {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
      "beta_fast": 16.0, "attention_factor": 0.5 * (0.1 * math.log(4) + 1)}),
    ({SCALED + "type": "longrope", SCALED + "original_context_length": 16,
      SCALED + "attn_factor": 1.25},
     {"rope_factors_short": np.ones(16, np.float32), "rope_factors_long": UNEVEN},
     {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16,
      "attention_factor": 1.25, "short_factor": [1.0] * 16, "long_factor": UNEVEN_LIST}),
    ({SCALED + "type": "linear", SCALED + "factor": 4.0, SCALED + "attn_factor": 1.25,
      SCALED + "original_context_length": 16}, {},
     {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16,
      "attention_factor": 1.25, "short_factor": [4.0] * 16, "long_factor": [4.0] * 16}),
    ({}, {"rope_freqs": np.ones(16, np.float32)}, {}),
    ({}, {"rope_freqs": UNEVEN},
     {"rope_type": "longrope", "original_max_position_embeddings": 64, "attention_factor": 1.0,
      "short_factor": UNEVEN_LIST, "long_factor": UNEVEN_LIST}),
    ({}, {"rope_freqs": llama3_divisors(16, 5e4, 8)},
     {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}),
    ({SCALED + "original_context_length": 2048},
     {"rope_freqs": llama3_divisors(16, 5e4, 32, window=2048)},
     {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 2048}),
    ({"llama.context_length": 4096}, {"rope_freqs": llama3_divisors(16, 5e4, 8, window=512)},
     {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512}),
]


@pytest.mark.parametrize("keys, tensors, said", ROPES, ids=range(len(ROPES)))
def test_rope(tmp_path, keys, tensors, said):
    model = make()
    rope = RopeConfig.from_dict({"rope_theta": 5e4, **said})
    stored = {f"{name}.weight": array for name, array in tensors.items()}
    loaded = load_model(write(tmp_path / "m.gguf", model, keys=keys, tensors=stored))
    assert loaded.config.rope == rope
    assert loaded.config.max_seq_len == keys.get("llama.context_length", 64)
    save_model(make(rope=rope), tmp_path / "meta")
    tokens = torch.arange(48)[None]
    assert torch.equal(loaded(tokens), load_model(tmp_path / "meta")(tokens))
    if "rope_freqs" in tensors:
        plain, _ = inv_freq(RopeConfig(rope_theta=5e4), 32, 64)
        found, _ = inv_freq(loaded.config.rope, 32, 64)
        divisors = torch.from_numpy(tensors["rope_freqs"])
        assert torch.allclose(plain / found, divisors, rtol=1e-5)


def test_divided_and_scaled(tmp_path):
    """rope_freqs and a linear factor: both divide."""
    keys = {SCALED + "type": "linear", SCALED + "factor": 2.0}
    path = write(tmp_path / "m.gguf", make(), keys=keys, tensors={"rope_freqs.weight": UNEVEN})
    plain, _ = inv_freq(RopeConfig(rope_theta=5e4), 32, 64)
    found, _ = inv_freq(load_config(path).rope, 32, 64)
    assert torch.allclose(plain / found, 2 * torch.from_numpy(UNEVEN), rtol=1e-5)


def test_rope_of_llama_3_1_and_3_2(tmp_path):
    """Both releases: 128 and 64 wide heads, factor 8 and 32, base 500000."""
    for head_dim, factor in ((128, 8), (64, 32)):
        model = make(head_dim=head_dim, n_layers=1, max_seq_len=131072,
                     rope=RopeConfig(rope_theta=5e5))
        tensors = {"rope_freqs.weight": llama3_divisors(head_dim // 2, 5e5, factor)}
        config = load_config(write(tmp_path / "m.gguf", model, tensors=tensors))
        assert config.rope == RopeConfig("llama3", factor, 8192, 5e5)
        assert config.original_window == 8192


def test_partial_rotary_whose_share_is_no_round_number(tmp_path):
    for rotated in (2, 30, 58, 60, 86):  # 60 / 88 * 88 is 59.99...
        model = make(dim=88, n_heads=1, n_kv_heads=1, ffn_dim=8, n_layers=1)
        keys = {"llama.rope.dimension_count": rotated}
        path = write(tmp_path / "m.gguf", model, keys=keys)
        assert len(inv_freq(load_config(path).rope, 88)[0]) == rotated // 2


# --------------------------------------------------------------------------------------------------
# What is refused

def keyed(words, **changes):
    keys = {key.replace("__", "."): value for key, value in changes.items()}
    return pytest.param(dict(keys=keys), words, id=words[:50])


ONES = np.ones(16, np.float32)
REFUSED = [
    pytest.param(dict(architecture="qwen2"), "a model of architecture 'qwen2': only llama",
                 id="architecture"),
    pytest.param(dict(endian=gguf.GGUFEndian.BIG), "a big-endian GGUF file: convert it",
                 id="endian"),
    keyed("llama.expert_count = 8: a mixture of experts", llama__expert_count=8),
    keyed("one of 3 parts of a model", split__count=3),
    keyed("one of .three. parts", split__count="three"),
    keyed("one of .3, 3. parts", split__count=[3, 3]),
    keyed("attention.causal is false", llama__attention__causal=False),
    keyed("llama.expert_count = 'a.nb.x1b", llama__expert_count="a\nb\x1b" * 99),
    keyed("llama.vocab_size is '.n", llama__vocab_size="\n" * 999),
    keyed("llama.rope.scaling.type '.n", llama__rope__scaling__type="\n" * 999),
    keyed("llama.block_count = '.n", llama__block_count="\n" * 999),
    keyed("damaged .a name that reads 'llama.x.n", **{"llama.x\n": 1}),
    keyed("damaged .a name that reads 'xxx", **{"x" * 999: 1}),
    pytest.param(dict(architecture="\n" * 999), "a model of architecture '.n",
                 id="architecture of line ends"),
    pytest.param(dict(tensors={"a\x1b": np.ones(16, np.float32)}),
                 r"damaged .a name that reads 'a.x1b'", id="name of a tensor"),
    keyed("llama.context_length is missing", llama__context_length=None),
    keyed("llama.attention.head_count is missing", llama__attention__head_count=None),
    keyed("llama.attention.key_length is missing", llama__attention__head_count=0,
          llama__attention__key_length=None),
    keyed("llama.attention.key_length is missing", llama__attention__head_count=7,
          llama__attention__key_length=None),
    keyed("llama.embedding_length = 'x': has to be one number", llama__embedding_length="x"),
    keyed("llama.feed_forward_length = .512, 256.: has to be one number",
          llama__feed_forward_length=[512, 256]),
    keyed("token_embd.weight is .64, 256., and should be .64, 128.", llama__embedding_length=128),
    keyed("blk.0.ffn_gate.weight is .512, 256., and should be .500, 256.",
          llama__feed_forward_length=500),
    keyed("blk.0.attn_k.weight is .64, 256., and the header makes it .128, 256.",
          llama__attention__head_count_kv=4),
    keyed("blk.0.attn_q.weight is .256, 256., and should be .512, 256.",
          llama__attention__key_length=64, llama__attention__value_length=64),
    keyed("value_length 64 is not key_length 32", llama__attention__value_length=64),
    keyed("has 2 layers, and llama.block_count 2000000000", llama__block_count=2000000000),
    keyed("n_heads 8 has to be a multiple of n_kv_heads 3", llama__attention__head_count_kv=3),
    keyed("llama.vocab_size is 65, and token_embd.weight has 64 rows", llama__vocab_size=65),
    keyed("layer_norm_rms_epsilon = 0.0: has to be a small",
          llama__attention__layer_norm_rms_epsilon=0.0),
    keyed("layer_norm_rms_epsilon = nan", llama__attention__layer_norm_rms_epsilon=math.nan),
    keyed("sliding_window is smaller than context_length", llama__attention__sliding_window=32),
    keyed("the key llama.logit_scale is not known here", llama__logit_scale=2.0),
    keyed("dimension_count 34: has to be even", llama__rope__dimension_count=34),
    keyed("dimension_count 7: has to be even", llama__rope__dimension_count=7),
    keyed("llama.rope.freq_base = inf: has to be one number", llama__rope__freq_base=math.inf),
    keyed("rope_theta 1: the base has to be greater than 1", llama__rope__freq_base=1.0),
    keyed("llama.rope.scaling.type 'ntk': known are", llama__rope__scaling__type="ntk"),
    keyed("scaling.type longrope and the rope tensors", llama__rope__scaling__type="longrope"),
    keyed("rope factor 0.5", llama__rope__scaling__factor=0.5),
    keyed("yarn_ext_factor is not 1", llama__rope__scaling__yarn_ext_factor=0.5),
    pytest.param(dict(tensors={"rope_freqs.weight": ONES[:8]}),
                 "rope_freqs.weight is .8., and 16 pairs are rotated", id="freqs"),
    pytest.param(dict(tensors={"rope_freqs.weight": 0 * ONES}),
                 "rope_freqs.weight holds numbers that are not positive", id="zeros"),
    pytest.param(dict(tensors={"rope_factors_long.weight": ONES}),
                 "has one of rope_factors_short.weight and", id="one"),
    pytest.param(dict(tensors={"rope_freqs.weight": 2 * ONES},
                      keys={SCALED + "type": "yarn", SCALED + "factor": 2.0}), "contradict",
                 id="both"),
    pytest.param(dict(tensors={"rope_factors_short.weight": ONES, "rope_factors_long.weight": ONES},
                      keys={SCALED + "original_context_length": 16, SCALED + "factor": 3.0}),
                 "scaling.factor 3 beside rope_factors is not", id="longrope's factor"),
    pytest.param(dict(names=["blk.1.ffn_up.weight"]),
                 "blk.1.ffn_up.weight is missing: take a whole model", id="missing"),
    pytest.param(dict(names=["token_embd.weight"]), "token_embd.weight is missing", id="embedding"),
    pytest.param(dict(names=["output_norm.weight"]), "output_norm.weight is missing", id="norm"),
    pytest.param(dict(tensors={"blk.0.attn_q.bias": ONES}),
                 "blk.0.attn_q.bias is no tensor of a plain LLaMA", id="bias"),
    pytest.param(dict(tensors={"blk.1.attn_norm.weight": ONES}),
                 "blk.1.attn_norm.weight is .16., and the header makes it .256.", id="shape"),
    pytest.param(dict(tensors={"output_norm.weight": np.full(256, np.nan, np.float32)}),
                 "norm.weight holds NaN or infinity", id="nan"),
    pytest.param(dict(tensors={"output.weight": (np.zeros((64, 320), np.uint8), Kind.Q8_1)}),
                 "output.weight is Q8_1, which", id="type"),
]


@pytest.mark.parametrize("changes, words", REFUSED)
def test_refused_in_one_line(tmp_path, changes, words):
    path = write(tmp_path / "m.gguf", make(), **changes)
    with pytest.raises(UserError, match=words) as error:
        load_model(path)
    message = str(error.value)
    assert message.isprintable() and len(message) < 400
    assert message.startswith(str(path)) and message.count(str(path)) == 1


def test_tensors_that_share_their_bytes(file):
    """A small file could say so of a model of any size."""
    whole = file.read_bytes()
    name = b"blk.1.attn_norm.weight"
    # Behind the name: the number of dimensions, one dimension, the type, and then the offset.
    place = whole.index(name) + len(name) + 4 + 8 + 4
    file.write_bytes(whole[:place] + struct.pack("<Q", 0) + whole[place + 8:])
    with pytest.raises(UserError, match="overlaps another tensor"):
        load_config(file)


def test_head_of_the_file(tmp_path, file):
    whole = file.read_bytes()
    starts = {b"GGML": "not a GGUF file .it begins with b'GGML'", b"": "damaged or cut off",
              b"PK\x03\x04": "not a GGUF file", b"GGUF": "damaged or cut off",
              b"GGUF\x01\0\0\0": "GGUF version 1, and 2 and 3 are read"}
    for start, words in starts.items():
        file.write_bytes(start + whole[8:] if len(start) == 8 else start)
        with pytest.raises(UserError, match=words):
            load_model(file)
    with pytest.raises(UserError, match="none.gguf: no such file"):
        load_model(tmp_path / "none.gguf")
    (tmp_path / "d.gguf").mkdir()
    with pytest.raises(UserError, match="give the folder of a model"):
        load_model(tmp_path / "d.gguf")
    with pytest.raises(UserError, match="d.gguf: a folder: give"):
        gguf_file.read_header(tmp_path / "d.gguf")


def test_cut_off_anywhere(file):
    whole = file.read_bytes()
    for size in [*range(8, 300, 7), *np.linspace(300, len(whole) - 1, 40, dtype=int)]:
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match="cut off") as error:
            load_config(file)
        assert "\n" not in str(error.value)


def test_lengths_that_lie(tmp_path):
    """Every 8-byte length in the header, made enormous: refused at once, and without memory for
    it."""
    tokens = {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.scores": [0.0, 1.0]}
    file = write(tmp_path / "m.gguf", make(), keys=tokens)
    whole = file.read_bytes()
    end = gguf.GGUFReader(file).data_offset
    tracemalloc.start()
    for place in range(8, end - 8):
        number = struct.unpack_from("<Q", whole, place)[0]
        if 0 < number < 2000:
            for lie in (2**63, 2**40, 2**32):
                changed = whole[:place] + struct.pack("<Q", lie) + whole[place + 8:end]
                file.write_bytes(changed + bytes(100))
                with pytest.raises(UserError) as error:
                    gguf_file.read_header(file)
                assert "\n" not in str(error.value)
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()


def test_arrays_longer_than_any_vocabulary(tmp_path, monkeypatch):
    """In a large file a wrong count may fit, and would fill the memory with Python's numbers."""
    path = write(tmp_path / "m.gguf", make(), keys={"a.list": [1, 2, 3, 4]})
    monkeypatch.setattr(gguf_file, "LONGEST_ARRAY", 4)
    assert load_config(path).dim == 256
    monkeypatch.setattr(gguf_file, "LONGEST_ARRAY", 3)
    with pytest.raises(UserError, match="m.gguf: damaged .an array of 4 elements"):
        load_config(path)


def test_random_damage_never_ends_in_a_traceback(tmp_path, recwarn):
    """Bytes overwritten in the header: a UserError, or a model whose numbers are numbers."""
    model = make(dim=32, n_heads=2, n_kv_heads=1, ffn_dim=32, vocab_size=32)
    file = write(tmp_path / "m.gguf", model, Kind.Q8_0, tensors={"rope_freqs.weight": ONES[:8] * 2})
    whole = file.read_bytes()
    end = gguf.GGUFReader(file).data_offset
    generator = random.Random(0)
    refused = 0
    for _ in range(250):
        data = bytearray(whole)
        for _ in range(2):
            place = generator.randrange(end + 200)
            data[place] = generator.choice([0, 1, 255, generator.randrange(256)])
        file.write_bytes(data)
        try:
            assert all(p.isfinite().all() for p in load_model(file).parameters())
        except UserError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 400
    assert refused > 100 and not recwarn.list


def test_a_file_cut_off_while_it_is_read(file):
    header = gguf_file.read_header(file)
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(UserError, match="was cut off while it was being read"):
        for name in header.tensors:
            list(read_rows(header, name))


def test_without_the_package(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="needs the gguf package: pip install gguf"):
        load_model(file)


# --------------------------------------------------------------------------------------------------
# Tokenizers

SAMPLE = ["it's the test of the tests, 12345 and 67890;\n\n"
          "  def function(value):\n        return value + 100\n",
          "Café déjà vu, naïve — 日本語 漢字 🦙\r\n"] * 30
SIZE = 320
TINY = Path(__file__).resolve().parent.parent / "data/tiny/tokenizer.model"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3 = tokenizers.Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+")
PRE = {  # as the models' own tokenizer.json have it
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "llama-bpe": pre_tokenizers.Sequence([
        pre_tokenizers.Split(LLAMA3, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
}


def train(pre):
    """A byte-level BPE tokenizer, trained by the tokenizers package."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = PRE[pre]
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(SAMPLE, tokenizers.trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


@pytest.mark.parametrize("pre", PRE)
def test_long_texts_are_encoded_in_parts(pre, tmp_path, monkeypatch):
    """With the ids of the whole, and little at a time: the package takes 170 bytes a character."""
    train(pre).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": SPECIAL[0], "eos_token": SPECIAL[0]}), encoding="utf-8")
    tokenizer = open_tokenizer(tmp_path)
    text = "".join(SAMPLE).replace(";\n\n", ";\nand\t\nso on.\n\n\tOr\n")
    whole = tokenizer.encode(text)
    model, sizes = tokenizer.model, []

    class Recorder:
        @staticmethod
        def encode_batch(texts, **rest):
            sizes.append(sum(map(len, texts)))
            return model.encode_batch(texts, **rest)
    tokenizer.model = Recorder
    monkeypatch.setattr(tokenizer_module, "PART", 40)
    alone = tokenizer.encode("a")
    assert tokenizer.encode_batch([text, "", "a", text]) == [whole, [], alone, whole]
    assert sum(sizes) == 2 * len(text) + 2, "each once"
    assert max(sizes) < len(text) / 5, "few parts at a time"


def byte_level(tokenizer, pre, **keys):
    """What adds this tokenizer to a GGUF writer."""
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    types = [3 if token in SPECIAL else 1 for token in tokens]
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]

    def add(writer):
        writer.add_tokenizer_model(keys.get("model", "gpt2"))
        if pre:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(keys.get("tokens", tokens))
        writer.add_token_types(keys.get("types", types))
        writer.add_token_merges(keys.get("merges", merges))
        if keys.get("bos", 1) is not None:
            writer.add_bos_token_id(keys.get("bos", 1))
        if keys.get("eos", 1) is not None:
            writer.add_eos_token_id(keys.get("eos", 1))
        if "add_bos" in keys:
            writer.add_add_bos_token(keys["add_bos"])
        if "add_eos" in keys:
            writer.add_add_eos_token(keys["add_eos"])
    return add


def sentencepiece_keys(path, **keys):
    """What adds a SentencePiece model to a GGUF writer."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = range(model.get_piece_size())
    kinds = []
    for i in ids:
        if model.is_unknown(i):
            kinds.append(2)
        elif model.is_control(i):
            kinds.append(3)
        else:
            kinds.append(6 if model.is_byte(i) else 1)

    def add(writer):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(keys.get("tokens", [model.id_to_piece(i) for i in ids]))
        writer.add_token_scores([model.get_score(i) for i in ids])
        writer.add_token_types(keys.get("types", kinds))
        if "prefix" in keys:
            writer.add_add_space_prefix(keys["prefix"])
    return add


@pytest.fixture(scope="module")
def trained():
    return {pre: train(pre) for pre in PRE}


@pytest.mark.parametrize("pre", PRE)
def test_byte_level(tmp_path, trained, pre):
    truth = trained[pre]
    add = byte_level(truth, pre, bos=1, eos=2)
    path = write(tmp_path / "m.gguf", make(vocab_size=SIZE), tokenizer=add)
    tokenizer = load_tokenizer(path, load_config(path).vocab_size)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (SIZE, 1, 2)
    assert not tokenizer.dummy_prefix and tokenizer.path == path
    for text in [*TRICKY, *SAMPLE[:2], "".join(TRICKY)]:
        ids = tokenizer.encode(text)
        assert ids == truth.encode(text, add_special_tokens=False).ids, text
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("a", bos=True, eos=True) == [1, *tokenizer.encode("a"), 2]
    assert tokenizer.encode("<|im_end|>x")[0] == 2
    assert tokenizer.decode([1, *tokenizer.encode("x"), 2]) == "x"
    assert ("BOS unasked" in tokenizer.policy) == (pre == "llama-bpe")


def test_splits_differ_where_they_should():
    """Each way of splitting a text against what its models are known to do."""
    def split(pre, text):
        patterns = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
                    for pattern in SPLIT_PATTERNS[pre]]
        return [piece for piece, _ in pre_tokenizers.Sequence(patterns).pre_tokenize_str(text)]
    assert split("gpt-2", "in  1234 I'LL we'll") == ["in", " ", " 1234", " I", "'", "LL", " we",
                                                     "'ll"]
    assert split("smollm", "in  1234") == ["in", "  ", "1", "2", "3", "4"]
    assert split("default", "x<=12345.") == ["x", "<=", "123", "45", "."]
    assert split("llama-bpe", "in  12345 I'LL\n\n x") == ["in", " ", " ", "123", "45", " I", "'LL",
                                                          "\n\n", " x"]
    assert split("qwen2", "123 a") == ["1", "2", "3", " a"]
    assert split("tekken", "camelCase HTTPServer//\n12") == ["camel", "Case", " HTTPServer", "//\n",
                                                             "1", "2"]
    assert split("deepseek-coder", "a b\n(12)") == ["a", " b", "\n", "(", "1", "2", ")"]
    for pre in SPLIT_PATTERNS:
        for text in TRICKY:
            assert "".join(split(pre, text)) == text


def test_sentencepiece(tmp_path):
    """Our tiny tokenizer, which has no dummy prefix, and one that has, as Meta's: the ids of the
    original."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAMPLE), model_writer=trained, model_type="bpe", vocab_size=360,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        character_coverage=0.99, minloglevel=2)
    meta = tmp_path / "meta.model"
    meta.write_bytes(trained.getvalue())
    for original, keys in ((TINY, {"prefix": False}), (meta, {}), (meta, {"prefix": True})):
        truth = Tokenizer(original)
        path = write(tmp_path / "m.gguf", make(vocab_size=truth.vocab_size),
                     tokenizer=sentencepiece_keys(original, **keys))
        tokenizer = load_tokenizer(path, truth.vocab_size)
        for name in ("vocab_size", "bos_id", "eos_id", "dummy_prefix", "cuttable", "literal_space"):
            assert getattr(tokenizer, name) == getattr(truth, name), name
        for text in [*TRICKY, *SAMPLE[:2], "▁a ▁", "".join(TRICKY), "<s></s><unk>"]:
            ids = truth.encode(text, bos=True, eos=True)
            assert tokenizer.encode(text, bos=True, eos=True) == ids, text
            decoded = tokenizer.decode(tokenizer.encode(text))
            assert decoded == truth.decode(truth.encode(text))
            assert truth.dummy_prefix or decoded == text


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_tokenizer_goes_into_a_folder(tmp_path, trained, kind):
    """A folder saved from a .gguf file has the same tokenizer; another quantisation has it too."""
    if kind == "gpt2":
        add = byte_level(trained["smollm"], "smollm")
        size = SIZE
    else:
        add = sentencepiece_keys(TINY, prefix=False)
        size = Tokenizer(TINY).vocab_size
    model = make(vocab_size=size)
    first = load_tokenizer(write(tmp_path / "a.gguf", model, Kind.F32, tokenizer=add))
    second = load_tokenizer(write(tmp_path / "b.gguf", model, Kind.Q8_0, tokenizer=add))
    save_model(model, tmp_path / "meta", first)
    third = load_tokenizer(tmp_path / "meta", size)
    assert first.sha256 == second.sha256 == third.sha256
    assert all(third.encode(text) == first.encode(text) for text in TRICKY)
    assert (third.bos_id, third.eos_id) == (first.bos_id, first.eos_id)


def test_transformers_adds_what_the_file_says(tmp_path, trained):
    """BOS and EOS around a text, and around a pair of texts."""
    tokenizer = trained["gpt-2"]
    plain = tokenizer.encode("the test", add_special_tokens=False).ids
    for bos, eos in ((True, True), (True, False), (False, True), (False, False)):
        add = byte_level(tokenizer, "gpt-2", bos=1, eos=2, add_bos=bos, add_eos=eos)
        path = write(tmp_path / "m.gguf", make(vocab_size=SIZE), tokenizer=add)
        files = load_tokenizer(path).files()
        found = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        before = [1] if bos else []
        after = [2] if eos else []
        assert found.encode("the test").ids == [*before, *plain, *after]
        assert found.encode("the test", "the test").ids == [*before, *plain, *plain, *after]


TOKENIZERS_REFUSED = [
    (dict(model="bert"), "tokenizer.ggml.model 'bert': only llama .SentencePiece. and gpt2"),
    (dict(pre="jumble"), "tokenizer.ggml.pre 'jumble': how this model cuts its text is not known "
                         "here"),
    (dict(eos=None, bos=None), "eos_token_id is None"),
    (dict(bos=SIZE), "bos_token_id is 320, and there are 320 tokens"),
    (dict(merges=["q zz"]), "merges has 'q zz', which are no tokens"),
    (dict(tokens=["a"] * SIZE), "has an empty token, or one twice"),
    (dict(tokens=["a"]), "token_type is no list of int, 1 of them"),
    (dict(model="llama"), "tokenizer.ggml.scores is missing"),
]


@pytest.mark.parametrize("keys, words", TOKENIZERS_REFUSED,
                         ids=[words[:40] for _, words in TOKENIZERS_REFUSED])
def test_tokenizers_refused_in_one_line(tmp_path, trained, keys, words):
    add = byte_level(trained["gpt-2"], **{"pre": "gpt-2", **keys})
    path = write(tmp_path / "m.gguf", make(vocab_size=SIZE), tokenizer=add)
    with pytest.raises(UserError, match=words) as error:
        load_tokenizer(path)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(str(path)) and message.count(str(path)) == 1


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_token_that_is_no_utf8(tmp_path, trained, kind):
    """It spoils the tokenizer, not the model."""
    model = make()
    if kind == "gpt2":
        tokens = [*(b"t%d" % i for i in range(SIZE - 1)), b"\xff"]
        add = byte_level(trained["gpt-2"], "gpt-2", tokens=tokens, merges=[])
    else:
        tokens = [*(b"t%d" % i for i in range(Tokenizer(TINY).vocab_size - 1)), b"\xff"]
        add = sentencepiece_keys(TINY, tokens=tokens)
    path = write(tmp_path / "m.gguf", model, tokenizer=add)
    assert same(load_model(path), model)
    with pytest.raises(UserError, match="m.gguf: damaged .a token that is no UTF-8"):
        load_tokenizer(path)


def test_a_file_without_tokenizer_or_with_another_size(tmp_path, file, trained, capsys):
    main(["info", "--model", str(file)])
    for to in ("hf", "meta"):
        main(["export", "--model", str(file), "--to", to, "--out", str(tmp_path / to)])
        assert same(load_model(tmp_path / to), make())
    assert "tokenizer   none" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no tokenizer inside"):
        load_tokenizer(file)
    path = write(tmp_path / "t.gguf", make(), tokenizer=byte_level(trained["gpt-2"], None))
    with pytest.raises(UserError, match="has 320 pieces, and the model's vocabulary 64"):
        load_tokenizer(path, 64)
    add = sentencepiece_keys(TINY, types=[1] * Tokenizer(TINY).vocab_size)
    path = write(tmp_path / "s.gguf", make(), tokenizer=add)
    words = "token_type: one token, tokenizer.ggml.unknown_token_id, has to be of type 2"
    with pytest.raises(UserError, match=words):
        load_tokenizer(path)


def test_bos_where_the_file_leaves_it_open(tmp_path, trained):
    """Without BOS a document begins with EOS; add_bos_token is the file's, if it says so."""
    add = byte_level(trained["gpt-2"], None, bos=None, eos=2, add_bos=True)
    path = write(tmp_path / "m.gguf", make(vocab_size=SIZE), tokenizer=add)
    tokenizer = load_tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 2)
    assert "adds BOS unasked" in tokenizer.policy


def test_a_word_that_no_merge_makes(tmp_path, trained):
    """LLaMA 3's are tokens all the same; others are only made by merges."""
    for pre in ("llama-bpe", "gpt-2"):
        add = byte_level(trained[pre], pre, merges=[])
        word = trained[pre].token_to_id("\u0120the")
        path = write(tmp_path / f"{pre}.gguf", make(vocab_size=SIZE), tokenizer=add)
        tokenizer = load_tokenizer(path)
        assert word and (tokenizer.encode(" the") == [word]) == (pre == "llama-bpe")


def test_the_eos_of_a_chat_model(tmp_path):
    """Some files call it USER_DEFINED (4); it is EOS all the same."""
    truth = Tokenizer(TINY)
    types = [2, 3, 4] + [6] * 256 + [1] * (truth.vocab_size - 259)
    add = sentencepiece_keys(TINY, types=types, prefix=False)
    tokenizer = load_tokenizer(write(tmp_path / "m.gguf", make(), tokenizer=add))
    assert tokenizer.eos_id == 2
    assert tokenizer.encode("def f(x)", eos=True) == truth.encode("def f(x)", eos=True)


def test_info(tmp_path, trained, capsys):
    path = write(tmp_path / "m.gguf", make(vocab_size=SIZE), Kind.Q4_0,
                 tokenizer=byte_level(trained["smollm"], "smollm"))
    main(["info", "--model", str(path)])
    shown = capsys.readouterr().out
    for words in ("2 layers", "dim 256", "2 key/value heads", "320 pieces",
                  "64 tokens, original 64", "BOS 1"):
        assert words in shown


# --------------------------------------------------------------------------------------------------
# Memory

def write_zeros(path, config, kind):
    """A model of zeros, matrices of this type."""
    with torch.device("meta"):
        model = LLaMA(config)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"context_length": config.max_seq_len, "embedding_length": config.dim,
                       "block_count": config.n_layers, "feed_forward_length": config.ffn_dim,
                       "attention.head_count": config.n_heads}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for name, p in model.named_parameters():
        if p.dim() == 1 or kind == Kind.F32:
            writer.add_tensor(in_gguf(name), np.zeros(p.shape, np.float32))
        else:
            data = np.zeros((p.shape[0], p.shape[1] // 32 * 34), np.uint8)
            writer.add_tensor(in_gguf(name), data, raw_dtype=kind)
    finish(writer)
    return path


def test_a_model_is_never_in_memory_twice(tmp_path):
    """The peak of loading 145 MiB of weights from 40 MiB in Q8_0, and from 145 MiB in float32: the
    model and some 20 MiB, which do not grow with it."""
    config = ModelConfig(dim=1024, n_layers=2, n_heads=8, vocab_size=6000, max_seq_len=64)
    paths = [write_zeros(tmp_path / f"{kind.name}.gguf", config, kind)
             for kind in (Kind.Q8_0, Kind.F32)]

    def load_and_print(path):
        added, loaded = added_at_the_peak(lambda: load_model(path))
        print(added, sum(p.nbytes for p in loaded.parameters()) / 2**20)

    for path in paths:
        code, printed = in_child(functools.partial(load_and_print, path))
        assert code == 0, printed
        added, size = map(float, printed.split())
        message = f"{added:.0f} MiB at the peak for a model of {size:.0f} MiB"
        assert size > 140 and size - 10 < added < size + 33, message


@pytest.mark.parametrize("odd", [[3, 4], {"a": 1}, 3.0, "3", -1, 9, None])
def test_an_end_token_that_is_no_id_is_left_out(odd):
    keys = {"tokens": list("abcdefgh"), "bos_token_id": 1, "eos_token_id": 2, "eot_token_id": odd,
            "eom_token_id": 5}
    how = json.loads(companions_of_keys(keys, {})["generation_config.json"])
    assert how["eos_token_id"] == [2, 5]
