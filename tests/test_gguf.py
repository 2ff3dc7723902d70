"""GGUF files: what gguf_model.py makes of them, and what it refuses. They are written here with the gguf package's own writer."""
import io
import json
import math
import random
import resource
import struct
import sys
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch

import gguf_model
import weights
from cli import UserError
from data.tokenizer import Tokenizer
from gguf import GGMLQuantizationType as Kind
from model import LLaMA, ModelConfig
from rope import RopeConfig, inv_freq
from test_weights import in_child, same
from weights import load_config, load_model, load_tokenizer, save_model

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

TOY = dict(dim=256, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=64, ffn_dim=512, max_seq_len=64, rope=RopeConfig(rope_theta=5e4))
TOKENS = torch.tensor([[1, 7, 63, 3, 0, 22, 9]])
NAMES = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output", "attention_norm": "attn_norm", "ffn_norm": "ffn_norm",
         "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output",
         "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up"}
TRICKY = ["", " ", "  ", "a", " a", "a ", "\n", "\n\n  \n", "\t\tx", "Hello world", "it's WE'LL they'Re", "x=12345+67  890", "1,000,000",
          "٣٤ ½ Ⅷ", "Café déjà vu — naïve", "日本語のテキスト。漢字", "🦙🦙👩‍👩‍👧", "e\u0301 \u00a0 \u3000", "def f(x):\n    return x ** 2\n\n\n",
          "a\r\nb\r\n", "\x00\x01", "$5 <= 6 ^ 7 ~ |x|", "camelCaseHTTPServer", "tail   ", "Россия 한국어 ไทย"]


def make(seed=0, **changes):
    """A small LLaMA, every tensor random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = LLaMA(ModelConfig(**{**TOY, **changes}))
    model.load_state_dict({name: torch.randn(p.shape, generator=generator) * (0.1 if p.dim() > 1 else 1)
                           for name, p in model.named_parameters()}, assign=True)
    return model


def in_gguf(name):
    """A GGUF name of one of the model's parameters."""
    parts = name.removesuffix(".weight").split(".")
    return f"blk.{parts[1]}.{NAMES['.'.join(parts[2:])]}.weight" if parts[0] == "layers" else f"{NAMES[parts[0]]}.weight"


def write(path, model, kind=Kind.F32, keys=None, tensors=None, names=None, tokenizer=None, endian=gguf.GGUFEndian.LITTLE,
          architecture="llama"):
    """Write a model as a .gguf file. keys: further or other metadata (None: left out); tensors: further or other ones; names: tensors left
    out; tokenizer: what to call on the writer to add one."""
    c, writer = model.config, gguf.GGUFWriter(path, architecture, endianess=endian)
    stated = {"llama.context_length": c.max_seq_len, "llama.embedding_length": c.dim, "llama.block_count": c.n_layers,
              "llama.feed_forward_length": c.ffn_dim, "llama.attention.head_count": c.n_heads,
              "llama.attention.head_count_kv": c.n_kv_heads,
              "llama.attention.layer_norm_rms_epsilon": c.norm_eps, "llama.rope.freq_base": c.rope.base,
              "llama.rope.dimension_count": int(c.head_dim * c.rope.partial_rotary_factor), "llama.attention.key_length": c.head_dim,
              "llama.attention.value_length": c.head_dim, **(keys or {})}
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool, list: writer.add_array}
    for key, value in stated.items():
        if value is not None:
            add[type(value)](key, value)
    if tokenizer:
        tokenizer(writer)
    stored = {in_gguf(name): tensor.detach().numpy() for name, tensor in model.named_parameters()}
    for name, array in {**stored, **(tensors or {})}.items():
        if name in (names or ()):
            continue
        if isinstance(array, np.ndarray) and (array.ndim == 1 or kind == Kind.F32):
            writer.add_tensor(name, array)
        else:
            data, its_kind = array if isinstance(array, tuple) else (gguf.quants.quantize(array, kind), kind)
            writer.add_tensor(name, data, raw_dtype=its_kind)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "m.gguf", make())


# ---------------------------------------------------------------------------------------------------------------------
# Weights


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"n_kv_heads": 8}, {"head_dim": 64}, {"norm_eps": 1e-6, "vocab_size": 77},
                                     {"rope": RopeConfig(rope_theta=1e4, partial_rotary_factor=0.25)}], ids=str)
def test_float32_is_the_meta_folder_bit_for_bit(tmp_path, changes):
    model = make(**changes)
    save_model(model, tmp_path / "meta")
    meta, loaded = load_model(tmp_path / "meta"), load_model(write(tmp_path / "m.gguf", model))
    assert same(loaded, meta) and loaded.config.rope == meta.config.rope
    for name in ("dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "norm_eps", "max_seq_len", "tied", "vocab_size", "n_layers"):
        assert getattr(loaded.config, name) == getattr(model.config, name), name
    assert torch.equal(loaded(TOKENS), meta(TOKENS)) and loaded.path == str(tmp_path / "m.gguf")


STEP = {  # steps from zero to a block's largest magnitude (twice that for Q4_1, Q5_1: from its lowest to its highest), and how many of
    # them a weight may be off: half a one, or a whole one where the number of steps up and down is not the same
    Kind.F16: (2**10, 0.5), Kind.BF16: (2**7, 0.5), Kind.Q8_0: (127, 0.5), Kind.Q4_0: (8, 1), Kind.Q4_1: (7.5, 0.5), Kind.Q5_0: (16, 1),
    Kind.Q5_1: (15.5, 0.5)}


@pytest.mark.parametrize("kind", STEP, ids=lambda kind: kind.name)
def test_types(tmp_path, kind):
    """Weights within the type's own precision; logits those of the Meta folder that holds the rounded weights."""
    model, rounded, (steps, off) = make(), make(), STEP[kind]
    loaded = load_model(write(tmp_path / "m.gguf", model, kind))
    for name, parameter in model.named_parameters():
        found = loaded.get_parameter(name)
        if parameter.dim() == 1:
            assert torch.equal(found, parameter)
            continue
        error, largest = (found - parameter).view(-1, 32).abs().amax(1), parameter.view(-1, 32).abs().amax(1)
        assert (error <= (off / steps + 2**-9) * largest).all(), name  # and the scale itself has 11 bits
        assert (error > 0.2 * off / steps * largest).float().mean() > 0.1, f"{name}: the bound is not far from what happens"
        with torch.no_grad():
            data = gguf.quants.quantize(parameter.detach().numpy(), kind)
            rounded.get_parameter(name).copy_(torch.from_numpy(gguf.quants.dequantize(data, kind)))
    save_model(rounded, tmp_path / "meta")
    assert torch.equal(loaded(TOKENS), load_model(tmp_path / "meta")(TOKENS))


def k_quants(kind, shape, generator):
    """Random blocks of a type that the package only decodes; their scales, wherever they lie, are made small numbers."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = generator.integers(0, 256, (shape[0], shape[1] // block, size), np.uint8)
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,)}[kind.name]
    for place in places:
        data[..., place:place + 2] = generator.uniform(1e-4, 1e-3, data.shape[:2]).astype(np.float16)[..., None].view(np.uint8)
    return data.reshape(shape[0], -1)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_k_quants(tmp_path, monkeypatch, kind):
    """Each row in its place, read in parts of a few rows: what the package makes of the whole tensor."""
    model, kind, generator = make(), Kind[kind], np.random.default_rng(0)
    quantised = {in_gguf(name): (k_quants(kind, p.shape, generator), kind) for name, p in model.named_parameters() if p.dim() > 1}
    path = write(tmp_path / "m.gguf", model, tensors=quantised)
    monkeypatch.setattr(gguf_model, "PART", 1500)  # 5 rows of 256, 2 of 512
    loaded = load_model(path)
    for name, parameter in loaded.named_parameters():
        if parameter.dim() > 1:
            assert np.array_equal(parameter.detach().numpy(), gguf.quants.dequantize(quantised[in_gguf(name)][0], kind)), name
    assert loaded(TOKENS).isfinite().all()


def test_q6_k_by_hand(tmp_path):
    """Q6_K by its definition: 16 scales of 8 bits and one of 16 for 256 weights of 6 bits, 4 in ql and 2 in qh, less 32."""
    model, generator = make(), np.random.default_rng(1)
    data = k_quants(Kind.Q6_K, (64, 256), generator)
    loaded = load_model(write(tmp_path / "m.gguf", model, tensors={"output.weight": (data, Kind.Q6_K)}))
    for row, block in zip(loaded.output.weight.detach().numpy()[:3], data):
        scales, d = block[192:208].view(np.int8), float(block[208:210].view(np.float16)[0])
        for i in range(256):
            half, quarter, lane = i // 128, i % 128 // 32, i % 32
            low = block[64 * half + lane + 32 * (quarter % 2)] >> 4 * (quarter // 2) & 15
            high = block[128 + 32 * half + lane] >> 2 * quarter & 3
            assert row[i] == pytest.approx(d * int(scales[i // 16]) * (int(low) + 16 * int(high) - 32), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_a_hugging_face_model_by_way_of_the_converter(tmp_path, kv_heads):
    """The converter permutes q's and k's rows out of Hugging Face's order; the logits are those of transformers before."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8, vocab_size=64,
                                          num_key_value_heads=kv_heads, rope_parameters={"rope_type": "default", "rope_theta": 5e4})).eval()
    state, model = theirs.state_dict(), make(n_kv_heads=kv_heads, norm_eps=theirs.config.rms_norm_eps)
    with torch.no_grad():
        for name, tensor in state.items():  # wide enough that positions matter
            tensor.mul_(4 if tensor.dim() > 1 else 1)
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    tensors = {}
    for name, tensor in state.items():
        array = tensor.numpy()
        for part, heads in (("q_proj", 8), ("k_proj", kv_heads)):
            if part in name:
                array = array.reshape(heads, 2, 16, 256).swapaxes(1, 2).reshape(-1, 256)
        tensors[mapping.get_name(name, try_suffixes=(".weight",))] = np.ascontiguousarray(array)
    tokens = torch.randint(64, (2, 40))
    with torch.no_grad():
        difference = (load_model(write(tmp_path / "m.gguf", model, tensors=tensors))(tokens) - theirs(tokens).logits).abs().max()
    assert difference < 1e-4


def test_the_header_is_what_the_package_reads(tmp_path):
    keys = {"general.name": "Llama é", "general.tags": ["a", "b"], "a.list": [1, 2, 3], "a.flag": True}
    path = write(tmp_path / "m.gguf", make(), Kind.Q4_0, keys)
    header, reader = gguf_model.read_header(path), gguf.GGUFReader(path)
    assert header.metadata == {key: pytest.approx(field.contents()) if isinstance(field.contents(), float) else field.contents()
                               for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert [(name, t.shape, t.kind, t.start) for name, t in header.tensors.items()] == \
        [(t.name, tuple(map(int, reversed(t.shape))), t.tensor_type, t.data_offset) for t in reader.tensors]
    assert load_config(path).norm_eps == 1e-5, "not 9.99999974e-06"


def test_metas_own_code_runs_what_is_exported(tmp_path):
    """It knows neither ffn_dim nor head_dim; SmolLM2's width of 1536 comes of its rule with multiple_of 256."""
    model = make(dim=576, n_heads=9, n_kv_heads=3, ffn_dim=1536, head_dim=64, n_layers=1)
    weights.main(["export", "--model", str(write(tmp_path / "m.gguf", model)), "--to", "meta", "--out", str(tmp_path / "meta")])
    params = json.loads((tmp_path / "meta/params.json").read_text(encoding="utf-8"))
    assert params["multiple_of"] == 256 and not {"ffn_dim", "head_dim"} & set(params) and same(load_model(tmp_path / "meta"), model)
    save_model(make(ffn_dim=28672 // 56), tmp_path / "other")
    params = json.loads((tmp_path / "other/params.json").read_text(encoding="utf-8"))
    assert "ffn_dim" not in params and load_config(tmp_path / "other").ffn_dim == 512


def test_other_dtypes(tmp_path):
    path = write(tmp_path / "m.gguf", make(), Kind.Q8_0)
    whole, half = load_model(path), load_model(path, dtype=torch.bfloat16)
    assert all(torch.equal(p.bfloat16(), half.get_parameter(name)) for name, p in whole.named_parameters())


# ---------------------------------------------------------------------------------------------------------------------
# RoPE

def llama3_divisors(pairs, base, factor, low=1.0, high=4.0, window=8192):
    """LLaMA 3.1's rule as its converter writes it into rope_freqs."""
    found = []
    for i in range(pairs):
        wavelength = 2 * math.pi * base ** (i / pairs)
        smooth = (window / wavelength - low) / (high - low)
        found.append(1.0 if wavelength < window / high else factor if wavelength > window / low else 1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


UNEVEN = np.linspace(1, 9, 16, dtype=np.float32)
SCALED = "llama.rope.scaling."
ROPES = [
    ({}, {}, {}),
    ({SCALED + "type": "none", SCALED + "factor": 4.0}, {}, {}),
    ({SCALED + "type": "linear", SCALED + "factor": 4.0}, {}, {"rope_type": "linear", "factor": 4.0}),
    ({SCALED + "factor": 4.0, SCALED + "original_context_length": 16}, {},
     {"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 16}),
    ({"llama.rope.scale_linear": 2.0}, {}, {"rope_type": "linear", "factor": 2.0}),
    ({SCALED + "type": "yarn", SCALED + "factor": 4.0, SCALED + "original_context_length": 16}, {},
     {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    ({SCALED + "type": "yarn", SCALED + "factor": 4.0, SCALED + "original_context_length": 16, SCALED + "attn_factor": 0.5,
      SCALED + "yarn_beta_fast": 16.0}, {},
     {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16.0,
      "attention_factor": 0.5 * (0.1 * math.log(4) + 1)}),
    ({SCALED + "type": "longrope", SCALED + "original_context_length": 16, SCALED + "attn_factor": 1.25},
     {"rope_factors_short": np.ones(16, np.float32), "rope_factors_long": UNEVEN},
     {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.25, "short_factor": [1.0] * 16,
      "long_factor": [float(str(f)) for f in UNEVEN]}),
    ({}, {"rope_freqs": np.ones(16, np.float32)}, {}),
    ({}, {"rope_freqs": UNEVEN}, {"rope_type": "longrope", "original_max_position_embeddings": 64, "attention_factor": 1.0,
                                  "short_factor": [float(str(f)) for f in UNEVEN], "long_factor": [float(str(f)) for f in UNEVEN]}),
    ({}, {"rope_freqs": llama3_divisors(16, 5e4, 8)}, {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}),
    ({SCALED + "original_context_length": 2048}, {"rope_freqs": llama3_divisors(16, 5e4, 32, window=2048)},
     {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 2048}),
    ({"llama.context_length": 4096}, {"rope_freqs": llama3_divisors(16, 5e4, 8, window=512)},
     {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512}),
]


@pytest.mark.parametrize("keys, tensors, said", ROPES, ids=range(len(ROPES)))
def test_rope(tmp_path, keys, tensors, said):
    model, rope = make(), RopeConfig.from_dict({"rope_theta": 5e4, **said})
    path = write(tmp_path / "m.gguf", model, keys=keys, tensors={f"{name}.weight": array for name, array in tensors.items()})
    loaded, tokens = load_model(path), torch.arange(48)[None]
    assert loaded.config.rope == rope and loaded.config.max_seq_len == keys.get("llama.context_length", 64)
    save_model(model, tmp_path / "meta")
    assert torch.equal(loaded(tokens), load_model(tmp_path / "meta", rope)(tokens))
    if "rope_freqs" in tensors:
        plain, found = (inv_freq(r, 32, 64)[0] for r in (RopeConfig(rope_theta=5e4), loaded.config.rope))
        assert torch.allclose(plain / found, torch.from_numpy(tensors["rope_freqs"]), rtol=1e-5)


def test_rope_of_llama_3_1_and_3_2(tmp_path):
    """Both releases: 128 and 64 wide heads, factor 8 and 32, base 500000."""
    for head_dim, factor in ((128, 8), (64, 32)):
        model = make(head_dim=head_dim, n_layers=1, max_seq_len=131072, rope=RopeConfig(rope_theta=5e5))
        path = write(tmp_path / "m.gguf", model, tensors={"rope_freqs.weight": llama3_divisors(head_dim // 2, 5e5, factor)})
        assert load_config(path).rope == RopeConfig("llama3", factor, 8192, 5e5) and weights.original_window(load_config(path)) == 8192


def test_partial_rotary_whose_share_is_no_round_number(tmp_path):
    for rotated in (2, 30, 58, 60, 86):  # 60 / 88 * 88 is 59.99...
        model = make(dim=88, n_heads=1, n_kv_heads=1, ffn_dim=8, n_layers=1)
        path = write(tmp_path / "m.gguf", model, keys={"llama.rope.dimension_count": rotated})
        assert len(inv_freq(load_config(path).rope, 88)[0]) == rotated // 2


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

def keyed(words, **changes):
    return pytest.param(dict(keys={key.replace("__", "."): value for key, value in changes.items()}), words, id=words[:50])


ONES = np.ones(16, np.float32)
REFUSED = [
    pytest.param(dict(architecture="qwen2"), "a model of architecture 'qwen2': only llama", id="architecture"),
    pytest.param(dict(endian=gguf.GGUFEndian.BIG), "a big-endian GGUF file: convert it", id="endian"),
    keyed("llama.expert_count = 8: a mixture of experts", llama__expert_count=8),
    keyed("one of 3 parts of a model", split__count=3), keyed("one of .three. parts", split__count="three"),
    keyed("one of .3, 3. parts", split__count=[3, 3]), keyed("attention.causal is false", llama__attention__causal=False),
    keyed("llama.expert_count = 'a.nb.x1b", llama__expert_count="a\nb\x1b" * 99),
    keyed("llama.vocab_size is '.n", llama__vocab_size="\n" * 999),
    keyed("llama.rope.scaling.type '.n", llama__rope__scaling__type="\n" * 999),
    keyed("llama.block_count = '.n", llama__block_count="\n" * 999), keyed("damaged .a name that reads 'llama.x.n", **{"llama.x\n": 1}),
    keyed("damaged .a name that reads 'xxx", **{"x" * 999: 1}),
    pytest.param(dict(architecture="\n" * 999), "a model of architecture '.n", id="architecture of line ends"),
    pytest.param(dict(tensors={"a\x1b": np.ones(16, np.float32)}), r"damaged .a name that reads 'a.x1b'", id="name of a tensor"),
    keyed("llama.context_length is missing", llama__context_length=None),
    keyed("llama.attention.head_count is missing", llama__attention__head_count=None),
    keyed("llama.attention.key_length is missing", llama__attention__head_count=0, llama__attention__key_length=None),
    keyed("llama.attention.key_length is missing", llama__attention__head_count=7, llama__attention__key_length=None),
    keyed("llama.embedding_length = 'x': has to be one number", llama__embedding_length="x"),
    keyed("llama.feed_forward_length = .512, 256.: has to be one number", llama__feed_forward_length=[512, 256]),
    keyed("token_embd.weight is .64, 256., and should be .64, 128.", llama__embedding_length=128),
    keyed("blk.0.ffn_gate.weight is .512, 256., and should be .500, 256.", llama__feed_forward_length=500),
    keyed("blk.0.attn_k.weight is .64, 256., and the header makes it .128, 256.", llama__attention__head_count_kv=4),
    keyed("blk.0.attn_q.weight is .256, 256., and should be .512, 256.", llama__attention__key_length=64,
          llama__attention__value_length=64),
    keyed("value_length 64 is not key_length 32", llama__attention__value_length=64),
    keyed("has 2 layers, and llama.block_count 2000000000", llama__block_count=2000000000),
    keyed("n_heads 8 has to be a multiple of n_kv_heads 3", llama__attention__head_count_kv=3),
    keyed("llama.vocab_size is 65, and token_embd.weight has 64 rows", llama__vocab_size=65),
    keyed("layer_norm_rms_epsilon = 0.0: has to be a small", llama__attention__layer_norm_rms_epsilon=0.0),
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
    keyed("attn_factor 2 with scaling type linear", llama__rope__scaling__attn_factor=2.0),
    keyed("yarn_ext_factor is not 1", llama__rope__scaling__yarn_ext_factor=0.5),
    pytest.param(dict(tensors={"rope_freqs.weight": ONES[:8]}), "rope_freqs.weight is .8., and 16 pairs are rotated", id="freqs"),
    pytest.param(dict(tensors={"rope_freqs.weight": 0 * ONES}), "rope_freqs.weight holds numbers that are not positive", id="zeros"),
    pytest.param(dict(tensors={"rope_factors_long.weight": ONES}), "has one of rope_factors_short.weight and", id="one"),
    pytest.param(dict(tensors={"rope_freqs.weight": 2 * ONES}, keys={SCALED + "type": "yarn", SCALED + "factor": 2.0}), "contradict",
                 id="both"),
    pytest.param(dict(names=["blk.1.ffn_up.weight"]), "blk.1.ffn_up.weight is missing: take a whole model", id="missing"),
    pytest.param(dict(names=["token_embd.weight"]), "token_embd.weight is missing", id="embedding"),
    pytest.param(dict(names=["output_norm.weight"]), "output_norm.weight is missing", id="norm"),
    pytest.param(dict(tensors={"blk.0.attn_q.bias": ONES}), "blk.0.attn_q.bias is no tensor of a plain LLaMA", id="bias"),
    pytest.param(dict(tensors={"blk.1.attn_norm.weight": ONES}), "blk.1.attn_norm.weight is .16., and the header makes it .256.",
                 id="shape"),
    pytest.param(dict(tensors={"output_norm.weight": np.full(256, np.nan, np.float32)}), "norm.weight holds NaN or infinity", id="nan"),
    pytest.param(dict(tensors={"output.weight": (np.zeros((64, 256 // 32 * 40), np.uint8), Kind.Q8_1)}), "output.weight is Q8_1, which",
                 id="type"),
]


@pytest.mark.parametrize("changes, words", REFUSED)
def test_refused_in_one_line(tmp_path, changes, words):
    path = write(tmp_path / "m.gguf", make(), **changes)
    with pytest.raises(UserError, match=words) as error:
        load_model(path)
    assert str(error.value).isprintable() and len(str(error.value)) < 400 and str(error.value).startswith(str(path))


def test_tensors_that_share_their_bytes(file):
    """A small file could say so of a model of any size."""
    whole, name, pos = file.read_bytes(), b"blk.1.attn_norm.weight", 0
    pos = whole.index(name) + len(name) + 4 + 8 + 4  # number of dimensions, one dimension, type: then the offset
    file.write_bytes(whole[:pos] + struct.pack("<Q", 0) + whole[pos + 8:])
    with pytest.raises(UserError, match="overlaps another tensor"):
        load_config(file)


def test_head_of_the_file(tmp_path, file):
    whole = file.read_bytes()
    starts = {b"GGML": "not a GGUF file .it begins with b'GGML'", b"": "damaged or cut off", b"PK\x03\x04": "not a GGUF file",
              b"GGUF": "damaged or cut off", b"GGUF\x01\0\0\0": "GGUF version 1, and 2 and 3 are read"}
    for start, words in starts.items():
        file.write_bytes(start + whole[8:] if len(start) == 8 else start)
        with pytest.raises(UserError, match=words):
            load_model(file)
    with pytest.raises(UserError, match="none.gguf: no such file"):
        load_model(tmp_path / "none.gguf")
    (tmp_path / "d.gguf").mkdir()
    with pytest.raises(UserError, match="give a folder|a folder: give"):
        load_model(tmp_path / "d.gguf")


def test_cut_off_anywhere(file):
    whole = file.read_bytes()
    for size in [*range(8, 300, 7), *np.linspace(300, len(whole) - 1, 40, dtype=int)]:
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match="cut off") as error:
            load_config(file)
        assert "\n" not in str(error.value)


def test_lengths_that_lie(file):
    """Every 8-byte length in the header, made enormous: refused at once, and without memory for it."""
    whole, end = file.read_bytes(), gguf.GGUFReader(file).data_offset
    tracemalloc.start()
    for place in range(8, end - 8):
        number = struct.unpack_from("<Q", whole, place)[0]
        if 0 < number < 2000:
            for lie in (2**63, 2**40, 2**32):
                file.write_bytes(whole[:place] + struct.pack("<Q", lie) + whole[place + 8:end] + bytes(100))
                with pytest.raises(UserError) as error:
                    gguf_model.read_header(file)
                assert "\n" not in str(error.value)
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()


def test_random_damage_never_ends_in_a_traceback(tmp_path, recwarn):
    """Bytes overwritten in the header: a UserError, or a model whose numbers are numbers."""
    model = make(dim=32, n_heads=2, n_kv_heads=1, ffn_dim=32, vocab_size=32)
    file = write(tmp_path / "m.gguf", model, Kind.Q8_0, tensors={"rope_freqs.weight": ONES[:8] * 2})
    generator, refused = random.Random(0), 0
    whole, end = file.read_bytes(), gguf.GGUFReader(file).data_offset
    for _ in range(250):
        data = bytearray(whole)
        for _ in range(2):
            data[generator.randrange(end + 200)] = generator.choice([0, 1, 255, generator.randrange(256)])
        file.write_bytes(data)
        try:
            assert all(p.isfinite().all() for p in load_model(file).parameters())
        except UserError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 400
    assert refused > 100 and not recwarn.list


def test_a_file_cut_off_while_it_is_read(file):
    header = gguf_model.read_header(file)
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(UserError, match="was cut off while it was being read"):
        [list(gguf_model.rows_of(header, name)) for name in header.tensors]


def test_without_the_package(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="needs the gguf package: pip install gguf"):
        load_model(file)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers

SAMPLE = ["it's the test of the tests, 12345 and 67890;\n\n  def function(value):\n        return value + 100\n",
          "Café déjà vu, naïve — 日本語 漢字 🦙\r\n"] * 30
SIZE, TINY = 320, Path(weights.__file__).parent / "data/tiny/tokenizer.model"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PRE = {  # as the models' own tokenizer.json have it
    "gpt-2": tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.Digits(individual_digits=True),
                                                  tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "llama-bpe": tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.Split(tokenizers.Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
        "isolated"), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
}


def train(pre):
    """A byte-level BPE tokenizer, trained by the tokenizers package."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer, tokenizer.decoder = PRE[pre], tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(SAMPLE, tokenizers.trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=SPECIAL, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def byte_level(tokenizer, pre, **keys):
    """What adds this tokenizer to a GGUF writer."""
    def add(writer):
        tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
        writer.add_tokenizer_model(keys.get("model", "gpt2"))
        if pre:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(keys.get("tokens", tokens))
        writer.add_token_types(keys.get("types", [3 if token in SPECIAL else 1 for token in tokens]))
        writer.add_token_merges(keys.get("merges", [" ".join(pair) for pair in state(tokenizer)["merges"]]))
        for name in ("bos", "eos"):
            if keys.get(name, 1) is not None:
                getattr(writer, f"add_{name}_token_id")(keys.get(name, 1))
        if "add_bos" in keys:
            writer.add_add_bos_token(keys["add_bos"])
    return add


def state(tokenizer):
    return json.loads(tokenizer.to_str())["model"]


def sentencepiece_keys(path, **keys):
    """What adds a SentencePiece model to a GGUF writer."""
    def add(writer):
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        ids = range(model.get_piece_size())
        kinds = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in ids]
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
    path = write(tmp_path / "m.gguf", make(vocab_size=SIZE), tokenizer=byte_level(truth, pre, bos=1, eos=2))
    tokenizer = load_tokenizer(path, load_config(path).vocab_size)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.dummy_prefix, tokenizer.path) == (SIZE, 1, 2, False, path)
    for text in [*TRICKY, *SAMPLE[:2], "".join(TRICKY)]:
        assert tokenizer.encode(text) == truth.encode(text, add_special_tokens=False).ids, text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a", bos=True, eos=True) == [1, *tokenizer.encode("a"), 2]
    assert tokenizer.encode("<|im_end|>x")[0] == 2 and tokenizer.decode([1, *tokenizer.encode("x"), 2]) == "x"
    assert ("BOS unasked" in tokenizer.policy) == (pre == "llama-bpe")


def test_cuts_differ_where_they_should():
    """Each way of cutting against what its models are known to do."""
    def cut(pre, text):
        cuts = [tokenizers.pre_tokenizers.Split(tokenizers.Regex(regex), "isolated") for regex in gguf_model.CUTS[pre]]
        return [piece for piece, _ in tokenizers.pre_tokenizers.Sequence(cuts).pre_tokenize_str(text)]
    assert cut("gpt-2", "in  1234 I'LL we'll") == ["in", " ", " 1234", " I", "'", "LL", " we", "'ll"]
    assert cut("smollm", "in  1234") == ["in", "  ", "1", "2", "3", "4"]
    assert cut("default", "x<=12345.") == ["x", "<=", "123", "45", "."]
    assert cut("llama-bpe", "in  12345 I'LL\n\n x") == ["in", " ", " ", "123", "45", " I", "'LL", "\n\n", " x"]
    assert cut("qwen2", "123 a") == ["1", "2", "3", " a"]
    assert cut("tekken", "camelCase HTTPServer//\n12") == ["camel", "Case", " HTTPServer", "//\n", "1", "2"]
    assert cut("deepseek-coder", "a b\n(12)") == ["a", " b", "\n", "(", "1", "2", ")"]
    for pre in gguf_model.CUTS:
        for text in TRICKY:
            assert "".join(cut(pre, text)) == text


def test_sentencepiece(tmp_path):
    """Our tiny tokenizer, which has no dummy prefix, and one that has, as Meta's: the ids of the original."""
    meta = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAMPLE), model_writer=meta, model_type="bpe", vocab_size=360, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.99,
        minloglevel=2)
    (tmp_path / "meta.model").write_bytes(meta.getvalue())
    meta = tmp_path / "meta.model"
    for original, keys in ((TINY, {"prefix": False}), (meta, {}), (meta, {"prefix": True})):
        truth = Tokenizer(original)
        path = write(tmp_path / "m.gguf", make(vocab_size=truth.vocab_size), tokenizer=sentencepiece_keys(original, **keys))
        tokenizer = load_tokenizer(path, truth.vocab_size)
        for name in ("vocab_size", "bos_id", "eos_id", "dummy_prefix", "cuttable", "literal_space"):
            assert getattr(tokenizer, name) == getattr(truth, name), name
        for text in [*TRICKY, *SAMPLE[:2], "▁a ▁", "".join(TRICKY), "<s></s><unk>"]:
            assert tokenizer.encode(text, bos=True, eos=True) == truth.encode(text, bos=True, eos=True), text
            assert tokenizer.decode(tokenizer.encode(text)) == truth.decode(truth.encode(text))
            assert truth.dummy_prefix or tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_tokenizer_goes_into_a_folder(tmp_path, trained, kind):
    """What is saved from a .gguf file is a folder with the same tokenizer; another quantisation has the same one too."""
    add = byte_level(trained["smollm"], "smollm") if kind == "gpt2" else sentencepiece_keys(TINY, prefix=False)
    size = SIZE if kind == "gpt2" else Tokenizer(TINY).vocab_size
    first, second = (load_tokenizer(write(tmp_path / f"{type.name}.gguf", make(vocab_size=size), type, tokenizer=add))
                     for type in (Kind.F32, Kind.Q8_0))
    save_model(make(vocab_size=size), tmp_path / "meta", first)
    third = load_tokenizer(tmp_path / "meta", size)
    assert first.sha256 == second.sha256 == third.sha256
    assert all(third.encode(text) == first.encode(text) for text in TRICKY) and (third.bos_id, third.eos_id) == (first.bos_id, first.eos_id)


TOKENIZERS_REFUSED = [
    (dict(model="bert"), "tokenizer.ggml.model 'bert': only llama .SentencePiece. and gpt2"),
    (dict(pre="jumble"), "tokenizer.ggml.pre 'jumble': how this model cuts its text is not known here"),
    (dict(eos=None, bos=None), "eos_token_id is None"),
    (dict(bos=SIZE), "bos_token_id is 320, and there are 320 tokens"),
    (dict(merges=["q zz"]), "merges has 'q zz', which are no tokens"),
    (dict(tokens=["a"] * SIZE), "has an empty token, or one twice"),
    (dict(tokens=["a"]), "token_type is no list of int, 1 of them"),
    (dict(model="llama"), "tokenizer.ggml.scores is missing"),
]


@pytest.mark.parametrize("keys, words", TOKENIZERS_REFUSED, ids=[words[:40] for _, words in TOKENIZERS_REFUSED])
def test_tokenizers_refused_in_one_line(tmp_path, trained, keys, words):
    path = write(tmp_path / "m.gguf", make(vocab_size=SIZE), tokenizer=byte_level(trained["gpt-2"], **{"pre": "gpt-2", **keys}))
    with pytest.raises(UserError, match=words) as error:
        load_tokenizer(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path))


def test_a_file_without_tokenizer_or_with_another_size(tmp_path, file, trained, capsys):
    weights.main(["info", "--model", str(file)])
    for to in ("hf", "meta"):
        weights.main(["export", "--model", str(file), "--to", to, "--out", str(tmp_path / to)])
        assert same(load_model(tmp_path / to), make())
    assert "tokenizer   none" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no tokenizer inside"):
        load_tokenizer(file)
    path = write(tmp_path / "t.gguf", make(vocab_size=64), tokenizer=byte_level(trained["gpt-2"], None))
    with pytest.raises(UserError, match="has 320 pieces, and the model's vocabulary 64"):
        load_tokenizer(path, 64)
    path = write(tmp_path / "s.gguf", make(vocab_size=64), tokenizer=sentencepiece_keys(TINY, types=[1] * Tokenizer(TINY).vocab_size))
    with pytest.raises(UserError, match="token_type: one token, tokenizer.ggml.unknown_token_id, has to be of type 2"):
        load_tokenizer(path)


def test_bos_where_the_file_leaves_it_open(tmp_path, trained):
    """Without BOS a document begins with EOS; add_bos_token is the file's, if it says so."""
    add = byte_level(trained["gpt-2"], None, bos=None, eos=2, add_bos=True)
    tokenizer = load_tokenizer(write(tmp_path / "m.gguf", make(vocab_size=SIZE), tokenizer=add))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 2) and "adds BOS unasked" in tokenizer.policy


def test_a_word_that_no_merge_makes(tmp_path, trained):
    """LLaMA 3's are tokens all the same; others are only made by merges."""
    for pre in ("llama-bpe", "gpt-2"):
        add, word = byte_level(trained[pre], pre, merges=[]), trained[pre].token_to_id("\u0120the")
        tokenizer = load_tokenizer(write(tmp_path / f"{pre}.gguf", make(vocab_size=SIZE), tokenizer=add))
        assert word and (tokenizer.encode(" the") == [word]) == (pre == "llama-bpe")


def test_the_eos_of_a_chat_model(tmp_path):
    """Some files call it USER_DEFINED (4); it is EOS all the same."""
    truth = Tokenizer(TINY)
    types = [2, 3, 4] + [6] * 256 + [1] * (truth.vocab_size - 259)
    tokenizer = load_tokenizer(write(tmp_path / "m.gguf", make(), tokenizer=sentencepiece_keys(TINY, types=types, prefix=False)))
    assert tokenizer.eos_id == 2 and tokenizer.encode("def f(x)", eos=True) == truth.encode("def f(x)", eos=True)


def test_info(tmp_path, trained, capsys):
    path = write(tmp_path / "m.gguf", make(vocab_size=SIZE), Kind.Q4_0, tokenizer=byte_level(trained["smollm"], "smollm"))
    weights.main(["info", "--model", str(path)])
    shown = capsys.readouterr().out
    for words in ("2 layers", "dim 256", "2 key/value heads", "320 pieces", "64 tokens, original 64", "BOS 1"):
        assert words in shown


# ---------------------------------------------------------------------------------------------------------------------
# Memory

def test_a_model_is_never_in_memory_twice(tmp_path):
    """The peak of loading 150 MiB of weights from 40 MiB in Q8_0, and from 150 MiB in float32: the model and little more."""
    config = ModelConfig(dim=1024, n_layers=2, n_heads=8, vocab_size=6000, max_seq_len=64)
    with torch.device("meta"):
        model = LLaMA(config)
    files = {}
    for kind in (Kind.Q8_0, Kind.F32):
        writer = gguf.GGUFWriter(tmp_path / f"{kind.name}.gguf", "llama")
        for key, value in (("context_length", 64), ("embedding_length", 1024), ("block_count", 2), ("feed_forward_length", config.ffn_dim),
                           ("attention.head_count", 8)):
            writer.add_uint32(f"llama.{key}", value)
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        for name, p in model.named_parameters():
            zeros = np.zeros(p.shape, np.float32)
            flat = p.dim() == 1 or kind == Kind.F32
            data = zeros if flat else np.zeros((p.shape[0], p.shape[1] // 32 * 34), np.uint8)
            writer.add_tensor(in_gguf(name), data, raw_dtype=None if flat else kind)
        writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
        files[kind] = tmp_path / f"{kind.name}.gguf"

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**20

    def action():
        before = peak()
        loaded = load_model(path)
        print(peak() - before, sum(p.nbytes for p in loaded.parameters()) / 2**20)
    for path in files.values():
        code, printed = in_child(action)
        assert code == 0, printed
        added, size = map(float, printed.split())
        assert size > 140 and size - 60 < added < size + 20, f"{added:.0f} MiB at the peak for a model of {size:.0f} MiB"
