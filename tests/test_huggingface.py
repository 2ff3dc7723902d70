"""Hugging Face folders: reading, writing, and that transformers computes the same with both."""
import io
import json
import os
import random
import signal
import sys
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")     # an extra, as tokenizers is; CI installs both
pytest.importorskip("tokenizers")
import safetensors.torch

import weights.hugging_face
from common.cli import run_command
from common.errors import UserError
from data.tokenizer import JsonTokenizer, open_tokenizer
from methods import RopeConfig
from model import LLaMA, ModelConfig
from weights import load_config, load_model, load_tokenizer, save_model
from weights.__main__ import main as weights_command
from weights.export import export, export_hugging_face
from weights.hugging_face import head_order, hugging_face_name
from weights.save import meta_ffn_rule

ROOT = Path(__file__).resolve().parent.parent
L = 32                                                      # the original window of all toys
TOY = dict(dim=36, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=48, head_dim=8, ffn_dim=40,
           max_seq_len=L)                                   # 36 / 6 is not 8
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 36,
          "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
          "vocab_size": 48, "head_dim": 8, "intermediate_size": 40, "max_position_embeddings": L,
          "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 1000.0,
          "tie_word_embeddings": False}
TEXT = torch.randint(0, 48, (2, 90), generator=torch.Generator().manual_seed(7))
FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.0, 1.5, 2.5, 4.0]}
WINDOW = {"original_max_position_embeddings": L}

# In Hugging Face's words: (rope_parameters, max_position_embeddings).
# The toys know positions 0 .. 31; texts go up to 90.
SPOKEN = {
    "default": ({"rope_type": "default"}, L),
    "linear": ({"rope_type": "linear", "factor": 4.0}, 4 * L),
    "dynamic": ({"rope_type": "dynamic", "factor": 3.0}, L),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, **WINDOW, "beta_fast": 4.0, "beta_slow": 0.5},
             4 * L),
    "yarn, mscale": ({"rope_type": "yarn", "factor": 4.0, **WINDOW, "truncate": False,
                      "mscale": 0.7, "mscale_all_dim": 0.3, "beta_fast": 3.0}, 4 * L),
    "yarn, no L": ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0}, L),
    "llama3": ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0.5,
                "high_freq_factor": 2.0, **WINDOW}, 8 * L),
    "longrope": ({"rope_type": "longrope", "factor": 4.0, **WINDOW, **FACTORS}, 4 * L),
    "longrope, no factor": ({"rope_type": "longrope", **WINDOW, **FACTORS}, 6 * L),
    "longrope, temperature": ({"rope_type": "longrope", "factor": 2.0, "attention_factor": 1.3,
                               **WINDOW, **FACTORS}, 2 * L),
    "proportional": ({"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 2.0},
                     2 * L),
}


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers")  # only the comparisons with it; CI installs it


def randomize(model, seed=0):
    """Every tensor random, and large enough that attention prefers some keys to others."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def make(seed=0, **changes):
    config = ModelConfig(**{**TOY, "rope": RopeConfig(rope_theta=1000.0), **changes})
    return randomize(LLaMA(config), seed)


def without_label(config):
    """The arguments of transformers' LlamaConfig and MistralConfig."""
    return {key: value for key, value in config.items()
            if key not in ("architectures", "model_type")}


def theirs(transformers, **changes):
    """A random LLaMA of transformers."""
    given = without_label({**CONFIG, **changes})
    if "rope_parameters" in given:
        theta = given.pop("rope_theta")
        given["rope_parameters"] = {"rope_theta": theta, **given["rope_parameters"]}
    config = transformers.LlamaConfig(**given, bos_token_id=1, eos_token_id=2)
    return randomize(transformers.LlamaForCausalLM(config))


@torch.no_grad()
def difference(ours, model, lengths=(20, 90)):
    """The largest difference of logits at texts below and above L."""
    assert ours.config.vocab_size == 48 and max(lengths) <= TEXT.shape[1]
    found = []
    for n in lengths:
        expected = model(input_ids=TEXT[:, :n], use_cache=False).logits.float()
        found.append(float((ours(TEXT[:, :n]) - expected).abs().max()))
    return max(found)


def by_hand(folder, model=None, config=None, **changes):
    """A folder as transformers would write it, with nothing of weights/hugging_face.py: the layout
    is restated here, row by row."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = translate(model or make())
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_config(folder, {**CONFIG, **(config or {}), **changes})
    return folder


def translate(model):
    """Hugging Face's names and rows, one row at a time: row j of a head is the first of pair j for
    j < D/2, else the second of pair j - D/2."""
    words = {"wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj",
             "wo": "self_attn.o_proj", "w1": "mlp.gate_proj", "w2": "mlp.down_proj",
             "w3": "mlp.up_proj", "attention_norm": "input_layernorm",
             "ffn_norm": "post_attention_layernorm"}
    top = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    tensors, D = {}, model.config.head_dim
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[-2] in ("wq", "wk"):
            rows = []
            for h in range(len(tensor) // D):
                for j in range(D):
                    rows.append(tensor[h * D + (2 * j if j < D // 2 else 2 * (j - D // 2) + 1)])
            tensor = torch.stack(rows)
        if parts[0] in top:
            word = top[parts[0]]
        else:
            word = f"model.layers.{parts[1]}.{words[parts[-2]]}"
        tensors[f"{word}.weight"] = tensor.detach().clone()
    return tensors


def write_config(folder, config):
    """config.json without the keys whose value is "absent"."""
    config = {key: value for key, value in config.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def edit(folder, **changes):
    write_config(folder, {**read(folder / "config.json"), **changes})
    return folder


def same(a, b):
    a, b = (x if isinstance(x, dict) else x.state_dict() for x in (a, b))
    return a.keys() == b.keys() and all(x.dtype == b[name].dtype and torch.equal(x, b[name])
                                        for name, x in a.items())


def stored(folder):
    """{name: tensor} of all safetensors files of a folder."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(file)
    return tensors


def cut(folder, parts, index=True, binary=False):
    """Cut the weights of a folder into several files."""
    tensors = stored(folder)
    stem, suffix = ("pytorch_model", "bin") if binary else ("model", "safetensors")
    (folder / "model.safetensors").unlink()
    names, where = list(tensors), {}
    for n in range(parts):
        file = f"{stem}-{n + 1:05d}-of-{parts:05d}.{suffix}" if parts > 1 else f"{stem}.{suffix}"
        part = {name: tensors[name] for name in names[n::parts]}
        if binary:
            torch.save(part, folder / file)
        else:
            safetensors.torch.save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    if index and parts > 1:
        text = json.dumps({"metadata": {}, "weight_map": where})
        (folder / f"{stem}.{suffix}.index.json").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path):
    return by_hand(tmp_path / "hf")


# --------------------------------------------------------------------------------------------------
# The layout

def test_the_picture_of_the_docstring():
    assert head_order(8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert head_order(8).argsort().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert (hugging_face_name("layers.31.attention.wk.weight")
            == "model.layers.31.self_attn.k_proj.weight")


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"n_kv_heads": 6},
                                     {"head_dim": 6, "dim": 36}])
def test_a_folder_made_by_hand(tmp_path, changes, capsys):
    model = make(**changes)
    folder = by_hand(tmp_path / "hf", model, tie_word_embeddings=model.config.tied,
                     head_dim=changes.get("head_dim", 8),
                     num_key_value_heads=model.config.n_kv_heads)
    loaded = load_model(folder)
    assert same(loaded, model) and torch.equal(loaded(TEXT), model(TEXT))
    assert loaded.path == str(folder)
    assert loaded.config == model.config and not capsys.readouterr().out


@pytest.mark.parametrize("form", ["sharded", "no index", "bin", "bins", "bins without index",
                                  "inv_freq", "tied", "mistral", "1 file beside", "half beside",
                                  "old name", "tied, by its other name"])
def test_forms_of_the_weights(tmp_path, form):
    model = make(tied="tied" in form)
    folder = by_hand(tmp_path / "hf", model, tie_word_embeddings=model.config.tied)
    tensors = stored(folder)
    if form == "inv_freq":                       # transformers before 4.32 stored it in each layer
        for n in range(2):
            tensors[f"model.layers.{n}.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
    elif form == "tied":                         # written out all the same: no contradiction
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
    elif form == "tied, by its other name":
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
    elif form == "mistral":
        edit(folder, architectures=["MistralForCausalLM"], model_type="mistral",
             sliding_window=None)
        (folder / "params.json").write_text("{}")  # Mistral's own format lies beside
        (folder / "consolidated.safetensors").write_bytes(b"x")
        (folder / "adapter_model.safetensors").write_bytes(b"x")
        (folder / "model.safetensors").rename(folder / "weights.safetensors")
    elif form == "1 file beside":
        (folder / "adapter_model.safetensors").write_bytes(b"x")
        (folder / "pytorch_model.bin").write_bytes(b"x")
    elif form == "half beside":
        cut(folder, 2)
        (folder / "model-00009-of-00009.safetensors").write_bytes(b"not in the index")
    elif form == "old name":
        edit(folder, architectures=["LLaMAForCausalLM"])
    else:
        cut(folder, 1 if form == "bin" else 3, "no" not in form and "without" not in form,
            "bin" in form)
    assert same(load_model(folder), model)


@pytest.mark.parametrize("row", [0, 20, 47])
def test_a_tied_output_that_differs_in_one_row_is_refused(tmp_path, row, monkeypatch):
    folder = by_hand(tmp_path / "hf", make(tied=True), tie_word_embeddings=True)
    tensors = stored(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][row, 3] += 1
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    for at_once in (2**26, 1):                                             # all rows, one by one
        monkeypatch.setattr("weights.hugging_face.REMAP", at_once)
        with pytest.raises(UserError, match="lm_head.weight is not the embedding"):
            load_model(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(tmp_path, dtype):
    model = make().to(dtype)
    folder = by_hand(tmp_path / "hf", model)
    assert same(load_model(folder, dtype=None), model) and same(load_model(folder), model.float())


def test_mapped_anew_between_tensors(folder, monkeypatch):
    opened = []
    open_weights = weights.hugging_face.open_weights
    monkeypatch.setattr("weights.hugging_face.open_weights",
                        lambda file: opened.append(file) or open_weights(file))
    assert same(load_model(folder), make()) and len(opened) < 10
    monkeypatch.setattr("weights.hugging_face.REMAP", 1)
    assert same(load_model(folder), make()) and len(opened) > 20
    assert same(load_model(cut(folder, 2, binary=True)), make())


# --------------------------------------------------------------------------------------------------
# config.json: RoPE and windows

PI = {"type": "linear", "factor": 4}


@pytest.mark.parametrize("changes, window, original, rope", [
    ({}, 32, 32, RopeConfig(rope_theta=1000.0)),
    ({"rope_theta": "absent"}, 32, 32, RopeConfig()),
    ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 32, 32,
     RopeConfig(rope_theta=5e5)),                                          # the inner one wins
    ({"rope_scaling": PI}, 32, 8, RopeConfig("linear", 4, 8, 1000.0)),
    ({"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 4.0},
      "original_max_position_embeddings": 16}, 32, 16, RopeConfig("linear", 4, 16, 1000.0)),
    ({"rope_scaling": {"type": "dynamic", "factor": 4}}, 128, 32,
     RopeConfig("dynamic", 4, 32, 1000.0)),
    ({"rope_scaling": {"type": "dynamic", "factor": 4, "original_max_position_embeddings": 32}},
     128, 32, RopeConfig("dynamic", 4, 32, 1000.0)),
    ({"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 16,
                       "finetuned": True}}, 32, 16, RopeConfig("yarn", 2, 16, 1000.0)),
    ({"rope_scaling": {"type": "yarn", "factor": None}, "original_max_position_embeddings": 8},
     32, 8, RopeConfig("yarn", 4, 8, 1000.0)),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 4}},
     32, 4, RopeConfig("llama3", 8, 4, 1000.0)),
    ({"rope_scaling": {"type": "su", **FACTORS}, "original_max_position_embeddings": 8}, 32, 8,
     RopeConfig("longrope", 4, 8, 1000.0, options=FACTORS)),
    ({"partial_rotary_factor": 1.0}, 32, 32, RopeConfig(rope_theta=1000.0)),
    ({"rope_scaling": {"rope_type": "proportional", "factor": 2}, "partial_rotary_factor": 0.5},
     32, 16, RopeConfig("proportional", 2, None, 1000.0, partial_rotary_factor=0.5)),
    ({"rope_scaling": None, "rope_parameters": {}}, 32, 32, RopeConfig(rope_theta=1000.0)),
    ({"rope_scaling": {"type": "linear", "factor": 2},
      "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0}},
     32, 16, RopeConfig("linear", 2, 16, 1000.0)),
    ({"rope_scaling": {"type": "default", "factor": 4}}, 32, 32, RopeConfig(rope_theta=1000.0)),
])
def test_windows_and_dialects(folder, changes, window, original, rope, capsys):
    config = load_config(edit(folder, **changes))
    assert (config.max_seq_len, config.original_window, config.rope) == (window, original, rope)
    assert not capsys.readouterr().out


def test_what_is_assumed_is_said(folder, capsys):
    dynamic = {"type": "dynamic", "factor": 2, "original_max_position_embeddings": 8}
    config = load_model(edit(folder, rope_scaling=dynamic)).config
    assert config.original_window == 32 and config.max_seq_len == 64
    ignored = "8 is ignored: dynamic begins at max_position_embeddings, 32"
    assert capsys.readouterr().out.count(ignored) == 1
    edit(folder, rope_scaling=None, max_position_embeddings="absent", rms_norm_eps="absent")
    assert load_config(folder).max_seq_len == 2048
    assert "does not say max_position_embeddings" in capsys.readouterr().out
    edit(folder, architectures="absent", model_type="mistral", sliding_window=32,
         max_position_embeddings=32)
    assert load_model(folder).config.max_seq_len == 32
    ignored = "sliding_window 32 is ignored: it makes no difference up to 32 tokens"
    assert capsys.readouterr().out.count(ignored) == 1
    assert load_config(folder).norm_eps == 1e-6                            # transformers' default


@pytest.mark.parametrize("dim, ffn_dim, multiplier", [
    (4096, 11008, None), (5120, 13824, None), (8192, 22016, None), (8192, 28672, 1.3125),
    (4096, 14336, 1.3126), (2048, 8192, 1.5001), (2048, 5632, None), (576, 1536, None)])
def test_official_widths_follow_from_metas_rule(dim, ffn_dim, multiplier):
    rule = meta_ffn_rule(dim, ffn_dim)
    assert ModelConfig(dim=dim, n_heads=1, n_layers=1, **rule).ffn_dim == ffn_dim
    assert rule["multiple_of"] == 256
    expected = multiplier and pytest.approx(multiplier, abs=1e-4)
    assert rule.get("ffn_dim_multiplier") == expected


def test_any_width_survives_metas_layout(tmp_path):
    for width in (1, 37, 95, 96, 97, 640):
        model = make(ffn_dim=width)
        source = by_hand(tmp_path / f"{width}", model, intermediate_size=width)
        export(source, "meta", tmp_path / f"{width}.meta")
        assert same(load_model(tmp_path / f"{width}.meta"), model)


# --------------------------------------------------------------------------------------------------
# transformers itself: in

@pytest.mark.parametrize("kind", SPOKEN)
def test_logits_equal_transformers(tmp_path, transformers, kind):
    rope, window = SPOKEN[kind]
    model = theirs(transformers, rope_parameters=rope, max_position_embeddings=window)
    model.save_pretrained(tmp_path / "new")
    ours = load_model(tmp_path / "new")
    assert difference(ours, model) < 1e-4
    assert ours.config.max_seq_len == (3 * L if kind == "dynamic" else window)
    # the same folder as older versions wrote it
    old = {("type" if key == "rope_type" else key): value for key, value in rope.items()}
    (tmp_path / "old").mkdir()
    for file in (tmp_path / "new").iterdir():
        (tmp_path / "old" / file.name).write_bytes(file.read_bytes())
    edit(tmp_path / "old", rope_parameters="absent", rope_scaling=old, rope_theta=1000.0)
    assert load_config(tmp_path / "old") == ours.config
    if kind != "default":                             # the lengths are such that the method matters
        plain = load_model(tmp_path / "new", rope={"rope_type": "default",
                                                   "partial_rotary_factor": 1.0})
        assert (ours(TEXT) - plain(TEXT)).abs().max() > 1e-2


@pytest.mark.parametrize("form", ["tied", "one key head", "no groups", "sharded",
                                  "head_dim derived", "mistral", "mistral, sliding", "bfloat16"])
def test_shapes_equal_transformers(tmp_path, transformers, form):
    changes = {"tied": {"tie_word_embeddings": True}, "one key head": {"num_key_value_heads": 1},
               "no groups": {"num_key_value_heads": None},
               "head_dim derived": {"head_dim": None}}.get(form, {})
    if "mistral" in form:
        config = transformers.MistralConfig(**without_label(CONFIG),
                                            sliding_window=L if "sliding" in form else None)
        model = randomize(transformers.MistralForCausalLM(config))
    else:
        model = theirs(transformers, **changes)
    if form == "bfloat16":
        model = model.bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="20KB" if form == "sharded" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (form == "sharded")
    ours = load_model(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert difference(ours, model, (20, L) if "sliding" in form else (20, 90)) < 1e-4
    if "sliding" in form:  # as is printed when such a model is loaded
        assert difference(ours, model, (L + 1,)) > 1e-2
    if form == "head_dim derived":
        edit(tmp_path, head_dim="absent")
        assert load_config(tmp_path).head_dim == 6


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias"])
def test_biases_are_refused(tmp_path, transformers, key):
    theirs(transformers, **{key: True}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"config.json: {key} is true, and LLaMA's layers have no "
                                        "biases"):
        load_model(tmp_path)
    edit(tmp_path, **{key: False})                                         # mislabelled
    with pytest.raises(UserError, match=r"model.safetensors: model.layers.0.\w+.\w+_proj.bias is "
                                        "no tensor of the LLaMA"):
        load_model(tmp_path)


# --------------------------------------------------------------------------------------------------
# transformers itself: out

OURS = {
    "default": RopeConfig(rope_theta=1000.0),
    "linear": RopeConfig("linear", 4.0, L, 1000.0),
    "dynamic": RopeConfig("dynamic", 3.0, L, 1000.0),
    "yarn": RopeConfig("yarn", 4.0, L, 1000.0, options={"beta_fast": 4.0, "beta_slow": 0.5}),
    "yarn as printed": RopeConfig("yarn", 4.0, L, 1000.0,
                                  options={"ramp": "turns", "beta_fast": 4.0}),
    "llama3": RopeConfig("llama3", 8.0, L, 1000.0),
    "longrope": RopeConfig("longrope", 4.0, L, 1000.0, options=FACTORS),
    "proportional": RopeConfig("proportional", 2.0, None, 1000.0, partial_rotary_factor=0.5),
    "ntk": RopeConfig("ntk", 4.0, L, 1000.0),
    "ntk, L not said": RopeConfig("ntk", 4.0, None, 1000.0),
    "ntk_by_parts": RopeConfig("ntk_by_parts", 4.0, L, 1000.0, options={"beta_fast": 4.0}),
    "dprope": RopeConfig("dprope", 4.0, L, 1000.0, options={"bins": 4, "interpolated_dims": 4}),
    "abf": RopeConfig("abf", 4.0, L, 1000.0, options={"new_rope_theta": 50000.0}),
    "resonance": RopeConfig("yarn", 4.0, L, 1000.0, resonance=True),
}


def extended(kind, **changes):
    rope = OURS[kind]
    return make(rope=rope, max_seq_len=round(rope.factor * L), **changes)


@pytest.mark.parametrize("kind", OURS)
def test_transformers_computes_the_same_with_what_is_written(tmp_path, transformers, kind):
    model = extended(kind, tied=kind == "linear")
    out = tmp_path / "out"
    export_hugging_face(model, out)
    original = (out / "config.json").read_bytes()
    written = json.loads(original)
    # transformers 5's words, and those of all before it
    for form in ("rope_parameters", "rope_scaling"):
        if form == "rope_scaling" and kind in ("default", "proportional"):
            continue
        edit(out, **{"rope_parameters": "absent", "rope_scaling": "absent", form: written[form]})
        loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
            out, output_loading_info=True)
        assert not any(report.values()) and loaded.dtype == torch.float32
        assert difference(model, loaded.eval()) < 1e-4
        expected = L if kind == "dynamic" else model.config.max_seq_len
        assert loaded.config.max_position_embeddings == expected
    (out / "config.json").write_bytes(original)
    again = load_model(out)                                                # and so do we
    assert same(again, model) and torch.allclose(again(TEXT), model(TEXT), atol=1e-5)
    assert again.config.max_seq_len == model.config.max_seq_len
    assert again.config.original_window == L
    export(out, "meta", tmp_path / "meta")
    export(tmp_path / "meta", "hf", tmp_path / "out2")
    for file in out.iterdir():
        assert file.read_bytes() == (tmp_path / "out2" / file.name).read_bytes(), file.name
    if kind in SPOKEN:
        assert again.config.rope.rope_type == kind


@pytest.mark.parametrize("rope, words", [
    (RopeConfig("dynamic_yarn", 4.0, L), "dynamic_yarn: transformers has no words"),
    (RopeConfig("nope"), "nope: transformers"),
    (RopeConfig("alibi"), "alibi"), (RopeConfig("xpos"), "xpos"),
    (RopeConfig("drope", 1.0, L), "drope"), (RopeConfig("clex", 4.0, L), "clex"),
    (RopeConfig("dynamic", 4.0, L, resonance=True), "dynamic"),
    (RopeConfig(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    (RopeConfig("default", 1.0, L, temperature="log_n"), "temperature log_n: transformers has no"),
    (RopeConfig("default", 1.0, L, temperature="llama4", no_rope_layer_interval=2),
     "temperature llama4, and no_rope_layer_interval 2: transformers has no LLaMA with it"),
    (RopeConfig("rerope", 4.0, L, no_rope_layer_interval=2), "rope_type rerope: "),
    (RopeConfig("rerope", 4.0, L, temperature="llama4"), "rope_type rerope: "),
    (RopeConfig("nope", no_rope_layer_interval=2), "nope: transformers"),
    (RopeConfig(random_positions=64), "random_positions")])
def test_what_transformers_cannot_say_is_refused(tmp_path, rope, words):
    with pytest.raises(UserError, match=words):
        export_hugging_face(make(rope=rope), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_refused_before_the_weights_are_read(tmp_path, monkeypatch):
    save_model(make(rope=RopeConfig("clex", 4.0, L)), tmp_path / "meta")
    monkeypatch.setattr("weights.export.load_model", None)
    with pytest.raises(UserError, match="clex: transformers has no words"):
        export(tmp_path / "meta", "hf", tmp_path / "out")


# --------------------------------------------------------------------------------------------------
# SmolLM3 and Ministral 3, which are LLaMA but for unrotated layers and a temperature

LLAMA4 = {"llama_4_scaling_beta": 0.1, **WINDOW}
YARN_1 = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, "mscale": 1.0,
          "mscale_all_dim": 1.0}                                           # its own factor is 1
KIN = {                                       # the class, changes of CONFIG, what RopeConfig says
    "every 4th": ("SmolLM3", {"num_hidden_layers": 4}, 4),
    "every 2nd": ("SmolLM3", {"no_rope_layer_interval": 2}, 2),
    "none": ("SmolLM3", {"no_rope_layers": [1, 1, 0]}, None),
    "all": ("SmolLM3", {"no_rope_layers": [0, 0], "no_rope_layer_interval": 3}, 1),
    "every 2nd, yarn": ("SmolLM3", {"no_rope_layers": [1, 0], "max_position_embeddings": 4 * L,
                                    "rope_parameters": {**YARN_1, **WINDOW, "mscale": 0.2}}, 2),
    "untied": ("SmolLM3", {"no_rope_layer_interval": 2, "tie_word_embeddings": False,
                           "head_dim": "absent"}, 2),
    "plain": ("Ministral3", {"rope_parameters": {"rope_type": "default", **LLAMA4},
                             "max_position_embeddings": 4 * L}, "llama4"),
    "linear": ("Ministral3", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **LLAMA4},
                              "max_position_embeddings": 4 * L}, "llama4"),
    "dynamic": ("Ministral3", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0,
                                                   **LLAMA4}}, "llama4"),
    "as released": ("Ministral3", {"rope_parameters": {
        **YARN_1, **LLAMA4, "type": "yarn", "max_position_embeddings": 4 * L},
        "max_position_embeddings": 4 * L}, "llama4"),
    "longrope": ("Ministral3", {"rope_parameters": {
        "rope_type": "longrope", "factor": 4.0, "attention_factor": 1.0, **FACTORS, **LLAMA4},
        "max_position_embeddings": 4 * L, "tie_word_embeddings": True}, "llama4"),
    "beta 0": ("Ministral3", {"rope_parameters": {**YARN_1, **LLAMA4, "mscale_all_dim": 0,
                                                  "llama_4_scaling_beta": 0},
                              "max_position_embeddings": 4 * L}, None),
}


def kin(transformers, name, **changes):
    """A random SmolLM3 or Ministral 3 of transformers, tied or not as its class has it."""
    given = {**without_label(CONFIG), "tie_word_embeddings": "absent", "pad_token_id": None,
             **changes}
    given = {key: value for key, value in given.items() if value != "absent"}
    if "rope_parameters" in given:
        given["rope_parameters"] = {"rope_theta": given.pop("rope_theta"),
                                    **given["rope_parameters"]}
    config = getattr(transformers, f"{name}Config")(**given)
    return randomize(getattr(transformers, f"{name}ForCausalLM")(config))


@pytest.mark.parametrize("kind", KIN)
def test_kin_of_llama_equals_transformers_in_and_out(tmp_path, transformers, kind):
    name, changes, expected = KIN[kind]
    model = kin(transformers, name, **changes)
    model.save_pretrained(tmp_path / "new")
    ours = load_model(tmp_path / "new")
    rope = ours.config.rope
    assert difference(ours, model) < 1e-4
    assert expected == (rope.temperature or rope.no_rope_layer_interval)
    assert ours.config.original_window == L and ours.config.tied == model.config.tie_word_embeddings
    # transformers 4 wrote the base and the rest apart
    theirs = read(tmp_path / "new/config.json")
    before = theirs["rope_parameters"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old/model.safetensors").write_bytes(
        (tmp_path / "new/model.safetensors").read_bytes())
    write_config(tmp_path / "old", {**theirs, "rope_parameters": "absent",
                                    "rope_theta": before["rope_theta"], "rope_scaling": before})
    assert load_config(tmp_path / "old") == ours.config
    if expected:                               # the lengths are such that the words matter
        ours.config.rope = RopeConfig.from_dict(
            {**rope.to_dict(), "temperature": "none", "no_rope_layer_interval": None})
        assert difference(ours, model) > 1e-2
        ours.config.rope = rope
    # and out again, by way of both layouts
    export(tmp_path / "new", "meta", tmp_path / "meta")
    export(tmp_path / "meta", "hf", tmp_path / "out")
    export(tmp_path / "out", "hf", tmp_path / "out2")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True)
    assert not any(report.values()) and difference(ours, again.eval()) < 1e-4
    assert type(again).__name__ == f"{name if expected else 'Llama'}ForCausalLM"
    reloaded = load_model(tmp_path / "out")
    assert same(reloaded, ours) and difference(reloaded, model) < 1e-4
    assert reloaded.config.max_seq_len == ours.config.max_seq_len
    assert ((tmp_path / "out/config.json").read_bytes()
            == (tmp_path / "out2/config.json").read_bytes())


@pytest.mark.parametrize("name, absent", [
    ("SmolLM3", ["tie_word_embeddings", "rope_parameters", "rms_norm_eps", "no_rope_layers",
                 "no_rope_layer_interval", "layer_types", "use_sliding_window", "head_dim"]),
    ("Ministral3", ["tie_word_embeddings", "rms_norm_eps", "head_dim", "sliding_window"])])
def test_what_kin_need_not_say_is_as_in_transformers(tmp_path, transformers, name, absent):
    rope = {"rope_parameters": {"rope_type": "default", **LLAMA4}} if name == "Ministral3" else {}
    kin(transformers, name, num_hidden_layers=4, head_dim=128 if rope else 6,
        **rope).save_pretrained(tmp_path)
    edit(tmp_path, **dict.fromkeys(absent, "absent"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours = load_model(tmp_path)
    assert difference(ours, model) < 1e-4
    assert ours.config.norm_eps == model.config.rms_norm_eps
    assert ours.config.rope.base == model.config.rope_parameters["rope_theta"]


@pytest.mark.parametrize("rope", [
    RopeConfig("yarn", 4.0, L, 1000.0, temperature="llama4"),              # without YaRN's own
    RopeConfig("yarn", 4.0, L, 1000.0, temperature="llama4", options={"ramp": "turns"}),
    RopeConfig("ntk", 4.0, L, 1000.0, temperature="llama4"),
    RopeConfig("longrope", 4.0, L, 1000.0, no_rope_layer_interval=2, options=FACTORS),
    RopeConfig("yarn", 4.0, L, 1000.0, no_rope_layer_interval=2, temperature="none")])
def test_kin_of_llama_that_began_here(tmp_path, transformers, rope):
    model = make(rope=rope, max_seq_len=4 * L)
    export_hugging_face(model, tmp_path / "hf")
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    again = load_model(tmp_path / "hf")
    assert difference(model, there) < 1e-4 and difference(again, there) < 1e-4
    assert again.config.rope.temperature in (rope.temperature, None)


def test_llama_4_is_refused(tmp_path, transformers):
    """Its own words, flat or nested, and under LLaMA's label."""
    shape = {**without_label(CONFIG), "num_local_experts": 2, "pad_token_id": None,
             "intermediate_size_mlp": 40}
    text = transformers.Llama4TextConfig(**shape)
    whole = transformers.Llama4Config(text_config=shape)
    for config, name in ((text, "Llama4ForCausalLM"), (whole, "Llama4ForConditionalGeneration")):
        config.architectures = [name]
        folder = tmp_path / name
        config.save_pretrained(folder)
        with pytest.raises(UserError, match=f'architecture "{name}": only LLaMA.s loads .*not 4'):
            load_model(folder)
        edit(folder, architectures=["LlamaForCausalLM"])
        with pytest.raises(UserError, match="(text_config|num_local_experts) is set, as in Llama"):
            load_model(folder)
        edit(folder, num_local_experts="absent", text_config="absent")
    with pytest.raises(UserError, match="attn_temperature_tuning is set, as in Llama 4"):
        load_model(tmp_path / "Llama4ForCausalLM")


# --------------------------------------------------------------------------------------------------
# Round trips

def mixed(model):
    """bfloat16 with float32 norms, as some checkpoints are."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data if "norm" in name else parameter.data.bfloat16()
    return model


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"n_kv_heads": 6}, {"head_dim": 6},
                                     {"ffn_dim": 37}])
@pytest.mark.parametrize("cast", [lambda model: model, lambda model: model.bfloat16(), mixed],
                         ids=["float32", "bfloat16", "mixed"])
def test_round_trips_are_exact(tmp_path, changes, cast):
    rope = RopeConfig("yarn", 4.0, L, 1000.0)
    model = cast(make(**changes, rope=rope, max_seq_len=4 * L))
    save_model(model, tmp_path / "meta")
    for source, to, out in (("meta", "hf", "hf"), ("hf", "meta", "meta2"), ("meta2", "hf", "hf2"),
                            ("meta2", "meta", "meta3")):
        export(tmp_path / source, to, tmp_path / out)
    for out in ("hf", "meta2", "hf2", "meta3"):
        loaded = load_model(tmp_path / out, dtype=None)
        assert same(loaded, model) and loaded.config.rope == model.config.rope
        assert loaded.config.max_seq_len == 4 * L
    assert same(stored(tmp_path / "hf"), stored(tmp_path / "hf2"))
    assert same(stored(tmp_path / "hf"), translate(model))
    first, second = (tmp_path / out / "config.json" for out in ("hf", "hf2"))
    assert first.read_bytes() == second.read_bytes()
    first, last = (torch.load(tmp_path / out / "consolidated.00.pth", weights_only=True)
                   for out in ("meta", "meta3"))
    assert same(first, last)


def test_window_of_a_model_tuned_without_scaling_survives(tmp_path):
    rope = RopeConfig("default", original_max_position_embeddings=L)
    model = make(rope=rope, max_seq_len=4 * L)
    export_hugging_face(model, tmp_path / "hf")
    assert load_config(tmp_path / "hf").rope == model.config.rope
    assert load_config(tmp_path / "hf").max_seq_len == 4 * L


def test_several_files_and_an_index(tmp_path, transformers):
    model, out = extended("llama3"), tmp_path / "hf"
    export_hugging_face(model, out, shard_bytes=20_000)
    index = read(out / "model.safetensors.index.json")
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(files) > 2 and files == sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors"
                     for n in range(1, len(files) + 1)]
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    for file in files:
        part = safetensors.torch.load_file(out / file)
        assert all(index["weight_map"][name] == file for name in part)
        assert sum(t.nbytes for t in part.values()) <= 20_000
    assert same(load_model(out), model) and same(stored(out), translate(model))
    assert difference(model, transformers.AutoModelForCausalLM.from_pretrained(out).eval()) < 1e-4


def test_another_dtype(tmp_path):
    model = make()
    export_hugging_face(model, tmp_path / "a", dtype=torch.bfloat16)
    save_model(model, tmp_path / "meta")
    for to, out in (("hf", "b"), ("meta", "c")):
        weights_command(["export", "--model", str(tmp_path / "meta"), "--to", to,
                         "--out", str(tmp_path / out), "--dtype", "bfloat16"])
    half = make().bfloat16()
    for name in "abc":
        assert same(load_model(tmp_path / name, dtype=None), half)
    assert read(tmp_path / "a/config.json")["torch_dtype"] == "bfloat16"
    with torch.no_grad():
        model.output.weight[3, 4] = 70_000.0
    with pytest.raises(UserError, match="output.weight reaches 7e.04, too large for torch.float16"):
        export_hugging_face(model, tmp_path / "d", dtype=torch.float16)
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "c", "meta"}


# --------------------------------------------------------------------------------------------------
# A folder is written whole or not at all

def test_a_folder_that_holds_something_is_left_alone(tmp_path, folder):
    for to in ("hf", "meta"):
        with pytest.raises(UserError, match="--out .*: exists and is not empty: name a new folder"):
            export(folder, to, folder)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="exists and is not empty"):
        export(folder, "hf", tmp_path / "file")
    (tmp_path / "empty").mkdir()
    export(folder, "hf", tmp_path / "empty")
    assert same(load_model(tmp_path / "empty"), make())


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    """A disk that is full at the n-th file: one error that names it, and no folder. Afterwards it
    works."""
    flush, calls = os.fsync, 0

    def full(descriptor):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(28, "No space left on device")
        flush(descriptor)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as error:
        export_hugging_face(make(), tmp_path / "out")  # config.json takes two, one for the folder
    assert str(error.value.filename).endswith("model.safetensors") and not list(tmp_path.iterdir())
    export_hugging_face(make(), tmp_path / "out")
    assert same(load_model(tmp_path / "out"), make())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_killed_at_every_step(tmp_path):
    """An export in a process that is killed just before its n-th rename leaves no folder, or a
    whole one, and the next succeeds."""
    for step in range(1, 30):
        out = tmp_path / str(step)
        child = os.fork()
        if child == 0:
            replace_, left = os.replace, [step]

            def counted(*args):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return replace_(*args)
            try:
                os.replace = counted
                export_hugging_face(make(), out, shard_bytes=20_000)
            finally:
                os._exit(1 if sys.exc_info()[0] else 0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL) and out.exists() == (code == 0)
        if code:
            export_hugging_face(make(), out)
        assert same(load_model(out), make())
        if not code:
            break
    assert step > 3 and not code
    assert not list(tmp_path.glob(".*"))


# --------------------------------------------------------------------------------------------------
# What is refused

def resave(change):
    """The weights, changed by change({name: tensor})."""
    def spoil(folder):
        tensors = stored(folder)
        tensors = change(tensors) or tensors
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return spoil


def added(name, tensor):
    """The weights with one more, or another, tensor."""
    return resave(lambda tensors: tensors.update({name: tensor}))


def without(name):
    return resave(lambda tensors: {k: v for k, v in tensors.items() if k != name})


def cast(name, dtype):
    return resave(lambda tensors: tensors.update({name: tensors[name].to(dtype)}))


def header(text):
    """A safetensors file of this header."""
    data = len(text).to_bytes(8, "little") + text.encode() + b"\0" * 64
    return write("model.safetensors", data)


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def index_of(value):
    def spoil(folder):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(value))
    return spoil


def mapped_to(file):
    """An index that names this file."""
    return index_of({"weight_map": {"a": file}})


class Hostile:
    def __reduce__(self):
        return print, ("code of the file ran",)


def pickled(name):
    def spoil(folder):
        (folder / "model.safetensors").unlink()
        torch.save({"model.norm.weight": Hostile()}, folder / name)
    return spoil


def in_bin(change, compress=False):
    """An old .bin in which one tensor is change({name: tensor})."""
    def spoil(folder):
        tensors, data = stored(folder), io.BytesIO()
        torch.save({**tensors, Q: change(tensors)}, data)
        (folder / "model.safetensors").unlink()
        file, compression = folder / "pytorch_model.bin", 8 if compress else 0
        with zipfile.ZipFile(data) as old, zipfile.ZipFile(file, "w", compression) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
    return spoil


def truncated(fraction):
    def spoil(folder):
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:int(fraction * len(data))])
    return spoil


def missing_part(folder):
    (cut(folder, 3, index=False) / "model-00002-of-00003.safetensors").unlink()


def stored_twice(folder):
    cut(folder, 2, index=False)
    safetensors.torch.save_file({Q: torch.zeros(1)}, folder / "more.safetensors")


def config(**changes):
    return lambda folder: edit(folder, **changes)


def mistral(**changes):
    return config(architectures=["MistralForCausalLM"], **changes)


def smollm3(**changes):
    return config(architectures=["SmolLM3ForCausalLM"], **changes)


def ministral3(changes=None, **rope):
    return config(**{"architectures": ["Ministral3ForCausalLM"], "rope_parameters": {
        "rope_type": "default", "llama_4_scaling_beta": 0.1, **WINDOW, **rope}, **(changes or {})})


def scaled(**rope):
    return config(rope_scaling=rope)


Q = "model.layers.1.self_attn.q_proj.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"
Q_NORM = "model.layers.0.self_attn.q_norm.weight"
DAMAGED = "model.safetensors: damaged, cut off, or no safetensors file"
NO_JSON = "config.json: not a JSON file"
WRONG = [
    # the label
    (config(architectures=["Qwen2ForCausalLM"]),
     'config.json: architecture "Qwen2ForCausalLM": only LLaMA.s loads'),
    (config(architectures=["LlamaForSequenceClassification"]),
     "architecture .LlamaForSequenceClassification"),
    (config(architectures="absent", model_type="gpt2"), "config.json: architecture null"),
    (config(architectures=7), "architecture 7"),
    (config(architectures=["LlamaForCausalLM", "X"]), "architecture .+X"),
    (mistral(sliding_window=31), "sliding_window 31: attention here sees the whole text"),
    (mistral(max_position_embeddings=8192), "sliding_window 4096"),
    (mistral(sliding_window="\x1b" * 999), r"sliding_window '.x1b"),
    (mistral(model_type="mistral", sliding_window=None, num_key_value_heads="absent"),
     "num_key_value_heads is missing"),
    (smollm3(num_key_value_heads="absent"), "num_key_value_heads is missing"),
    (smollm3(max_position_embeddings="absent"), "max_position_embeddings is missing"),
    (smollm3(use_sliding_window=True, sliding_window=16), "sliding_window 16: attention here"),
    (smollm3(layer_types=["full_attention", "sliding_attention"]), "layer_types .'full_attention'"),
    (smollm3(layer_types=7), "layer_types 7"),
    (smollm3(attention_bias=True), "attention_bias is true"),
    (smollm3(no_rope_layers=[0, 1]), r"no_rope_layers .0, 1.: only models that leave every n-th"),
    (smollm3(no_rope_layers=[1]), "no_rope_layers .1.: has to be a list"),
    (smollm3(no_rope_layers="1" * 999), "no_rope_layers '11"),
    (smollm3(no_rope_layers=[[], 1]), "no_rope_layers .*has to be a list"),
    (smollm3(no_rope_layer_interval=0), "no_rope_layer_interval 0: has to be a positive"),
    (smollm3(no_rope_layer_interval="4"), "no_rope_layer_interval = '4': give a whole number"),
    (ministral3({"sliding_window": 16}), "sliding_window 16: attention here"),
    (ministral3({"layer_types": ["sliding_attention"]}), "layer_types .'sliding_attention'"),
    (ministral3({"rope_parameters": None}), "rope_parameters is missing"),
    (ministral3(llama_4_scaling_beta=0.2), "llama_4_scaling_beta 0.2: only 0.1 loads, or 0"),
    (ministral3(llama_4_scaling_beta=["x" * 999]), "llama_4_scaling_beta .'xx"),
    (ministral3(original_max_position_embeddings=None), "temperature llama4 needs original_max"),
    (ministral3(rope_type="yarn", factor=4.0),
     "llama_4_scaling_beta, and yarn has an attention factor of 1.139: a model with two"),
    (ministral3(rope_type="longrope", factor=4.0, **FACTORS), "longrope has an attention factor"),
    (ministral3(rope_type="dynamic", factor=4.0, original_max_position_embeddings=16),
     "llama_4_scaling_beta counts from original_max_position_embeddings 16, and dynamic from "),
    (ministral3({"architectures": ["LlamaForCausalLM"]}), "unknown key 'llama_4_scaling_beta'"),
    (scaled(rope_type="default", temperature="llama4", **WINDOW), "temperature llama4: transf"),
    (scaled(rope_type="default", no_rope_layer_interval=2), "no_rope_layer_interval 2: transf"),
    (config(attention_bias=True), "attention_bias is true"),
    (config(mlp_bias=True), "mlp_bias is true"),
    (config(hidden_act="gelu"), "hidden_act 'gelu': LLaMA's is silu"),
    (config(quantization_config={"quant_method": "gptq", "bits": 4}),
     "quantization_config 'gptq': quantised weights do not load"),
    (config(quantization_config=True), "quantization_config True: quantised"),
    (config(quantization_config={"quant_method": "a\nb\x1b" * 99}),
     r"quantization_config 'a.nb.x1b"),
    (config(hidden_act="\n" * 999), r"hidden_act '.n"),
    (config(attention_bias="x" * 999), 'attention_bias is "xx'),
    # the numbers
    (config(hidden_size="3" * 999), "hidden_size = '33"),
    (config(rms_norm_eps=[0] * 999), "rms_norm_eps = .0, 0"),
    (config(hidden_size="36"), "hidden_size = '36': has to be a positive whole number"),
    (config(num_hidden_layers=True), "num_hidden_layers = True"),
    (config(vocab_size="absent"), "vocab_size is missing"),
    (config(intermediate_size=0), "intermediate_size = 0"),
    (config(num_hidden_layers=2**40), "num_hidden_layers = 1099511627776"),
    (config(num_hidden_layers=3), "have 2 layers, .* num_hidden_layers 3"),
    (config(num_hidden_layers=2**30), "have 2 layers"),
    (config(vocab_size=2**31 - 1), r"embed_tokens.weight is \[48, 36\], and config.json"),
    (config(num_attention_heads=2**30),
     r"q_proj.weight is \[48, 36\], and config.json makes it \[8589934592, 36\]"),
    (config(num_key_value_heads=4), "n_heads 6 has to be a multiple of n_kv_heads 4"),
    (config(num_key_value_heads=1), "k_proj.weight is"),
    (config(head_dim=7), "head_dim = 7"), (config(head_dim="absent"), "q_proj.weight is"),
    (config(intermediate_size=41), "gate_proj.weight is"),
    (config(rms_norm_eps="small"), "rms_norm_eps = 'small'"),
    (config(tie_word_embeddings="no"), "tie_word_embeddings = 'no'"),
    (config(rope_theta=-1), "rope_theta"),
    (config(max_position_embeddings=1.5), "max_position_embeddings = 1.5"),
    (config(tie_word_embeddings=True),
     "lm_head.weight is not the embedding, and config.json has tie_word_embeddings true"),
    # RoPE
    (scaled(type="yam", factor=2), "rope_type 'yam' is unknown"),
    (config(rope_scaling=[1]), "has to be an object"),
    (scaled(factor=2), "factor 2 without a method"), (scaled(type=["linear"]), "rope_type"),
    (config(rope_scaling={"type": "linear", "factor": 2},
            rope_parameters={"rope_type": "linear", "factor": 3}), "contradict each other"),
    (scaled(type="linear", rope_type="yarn", factor=2), "contradict each other"),
    (config(partial_rotary_factor=0.5),
     "partial_rotary_factor 0.5: transformers' LLaMA turns whole heads"),
    (scaled(rope_type="clex", factor=2.0), "rope_type clex: .* only Meta's layout has this model"),
    (config(rope_scaling=["\n"] * 999), "has to be an object"),
    (config(rope_parameters={"full_attention": {"rope_type": "default"}}),
     "unknown key 'full_attention'"),
    (scaled(type="longrope", factor=2, short_factor=[1.0], long_factor=[1.0]),
     "1 short and 1 long factors for 4"),
    # files
    (write("config.json", b"{"), NO_JSON), (write("config.json", b"[" * 100_000), NO_JSON),
    (write("config.json", b'{"hidden_size": ' + b"9" * 10_000 + b"}"), NO_JSON),
    (write("config.json", b"[]"), "config.json: holds no object"),
    (write("config.json", b"\xff\xfe"), NO_JSON),
    (lambda folder: (folder / "model.safetensors").unlink(),
     "no model.safetensors and no pytorch_model.bin"),
    (truncated(0), DAMAGED), (truncated(0.1), DAMAGED), (truncated(0.9), DAMAGED),
    (write("model.safetensors", b"version https://git-lfs"), DAMAGED),
    (header("{" * 50_000), DAMAGED),
    (header('{"a": {"dtype": "F32", "shape": [999999999999, 99999999999], '
            '"data_offsets": [0, 64]}}'), DAMAGED),
    (header('{"a": {"dtype": "F32", "shape": [16], "data_offsets": [-1, 64]}}'), DAMAGED),
    (pickled("pytorch_model.bin"),
     "pytorch_model.bin: refused, since loading it would run code"),
    (pickled("model.safetensors"), DAMAGED),
    (in_bin(lambda t: t[Q].to_sparse()), f"pytorch_model.bin: {Q} is sparse or without values"),
    (in_bin(lambda t: t[Q].to("meta")), f"pytorch_model.bin: {Q} is sparse or without values"),
    (in_bin(lambda t: torch.zeros(1, 1).expand(48, 36)),
     f"pytorch_model.bin: {Q} repeats the numbers that the file holds"),
    (in_bin(lambda t: t[Q], compress=True),
     r"pytorch_model.bin: damaged, cut off.*\(its records are compressed\)"),
    (mapped_to("../model.safetensors"),
     r"names the file '../model.safetensors': only .safetensors files of the same folder"),
    (mapped_to("/etc/passwd"), "names the file '/etc/passwd'"),
    (mapped_to("x" * 999 + ".safetensors"), "names the file 'xxx"),
    (mapped_to("x.bin"), "names the file 'x.bin'"),
    (mapped_to("a\0.safetensors"), "names the file"), (mapped_to(3), "has no weight_map"),
    (index_of({"weight_map": {}}), "has no weight_map"), (index_of([]), "holds no object"),
    (mapped_to("b.safetensors"), "b.safetensors: no such file, but the index names it"),
    (missing_part, "2 of 3 parts of the weights"), (stored_twice, f"{Q} is in .* too"),
    # tensors
    (without("lm_head.weight"), r"lm_head.weight is missing \(or is tie_word_embeddings true"),
    (without(Q), f"model.safetensors: {Q} is missing"),
    (added(BIAS, torch.zeros(48)), "q_proj.bias is no tensor of the LLaMA"),
    (added(Q_NORM, torch.zeros(8)), "q_norm.weight is no tensor of the LLaMA"),
    (added("a\n\x1b[31m", torch.zeros(1)), r"damaged .a tensor is called 'a.n"),
    (added("a" * 999, torch.zeros(1)), r"damaged .a tensor is called 'aaa"),
    (resave(lambda t: {k.removeprefix("model."): v for k, v in t.items()}), "have 0 layers"),
    (added(Q, torch.zeros(36, 48)),
     rf"{Q} is \[36, 48\], and config.json makes it \[48, 36\]"),
    (cast(Q, torch.float8_e4m3fn),
     f"{Q} is torch.float8_e4m3fn: quantised weights do not load"),
    (cast(Q, torch.int8), f"{Q} is torch.int8: quantised weights do not load"),
    (resave(lambda t: t.update({Q: t[Q] / 0})), "attention.wq.weight holds NaN or infinity"),
]


@pytest.mark.parametrize("spoil, words", WRONG,
                         ids=[f"{n} {words[:40]}" for n, (_, words) in enumerate(WRONG)])
def test_what_does_not_load_is_one_line(folder, spoil, words, capsys):
    spoil(folder)
    with pytest.raises(UserError, match=words) as error:
        load_model(folder)
    assert str(error.value).isprintable() and len(str(error.value)) < 400
    assert not capsys.readouterr().out


def test_random_damage_is_refused_or_harmless(tmp_path):
    """Bytes changed at random in the header of the weights and in config.json: a line, or a model
    of finite numbers."""
    folder, generator, refused = by_hand(tmp_path / "hf"), random.Random(0), 0
    whole = {name: (folder / name).read_bytes() for name in ("model.safetensors", "config.json")}
    start = 8 + int.from_bytes(whole["model.safetensors"][:8], "little")
    for n in range(200):
        name = ("model.safetensors", "config.json")[n % 2]
        data = bytearray(whole[name])
        for _ in range(2):
            byte = generator.choice([0, 34, 44, 48, 57, 91, 123, 125, 255,
                                     generator.randrange(256)])
            data[generator.randrange(min(start, len(data)))] = byte
        for other in whole:
            (folder / other).write_bytes(data if other == name else whole[other])
        try:
            assert all(parameter.isfinite().all() for parameter in load_model(folder).parameters())
        except UserError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 400
    assert refused > 100


def test_a_mistake_is_one_line_and_exit_code_2(folder, capfd):
    truncated(0.5)(folder)
    out = folder.parent / "out"
    with pytest.raises(SystemExit) as end:
        run_command(lambda: weights_command(["export", "--model", str(folder), "--to", "meta",
                                             "--out", str(out)]))
    shown = capfd.readouterr()
    assert (end.value.code, shown.out) == (2, "") and not out.exists()
    assert shown.err.startswith(f"error: {folder}/model.safetensors: damaged, cut off")
    assert shown.err.count("\n") == 1


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match="model.safetensors: reading it needs a package: pip "
                                        "install safetensors"):
        load_model(folder)
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="tokenizer.json: reading it needs a package: pip install "
                                        "tokenizers"):
        load_tokenizer(folder)


# --------------------------------------------------------------------------------------------------
# Tokenizers

TEXTS = ["hello world", "def f(x):\n    return x + 1\n", "  two  spaces \n\n\t tab ", "1234567",
         "\u00e9 \u6f22\u5b57 \U0001f642", "", "\n", "a",
         "The grass is green. The sky is blue. The sun is yellow. Here we go."]


@pytest.fixture(scope="module")
def json_folder(tmp_path_factory):
    """A byte-level BPE tokenizer.json as LLaMA 3's: it adds BOS by its post-processor, and
    truncates, which nobody asked for here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False,
                                  special_tokens=["<|begin|>", "<|end|>", "<|user|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator(TEXTS * 4, trainer)
    model.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A <|end|>", pair=None,
        special_tokens=[("<|begin|>", 0), ("<|end|>", 1)])
    model.enable_truncation(4)
    model.enable_padding(length=16, pad_id=1, pad_token="<|end|>")
    folder = tmp_path_factory.mktemp("json")
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>",
         "add_bos_token": True, "eos_token": {"__type": "AddedToken", "content": "<|end|>"}}))
    return folder


def copy_files(source, folder):
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


def test_tokenizer_json_makes_the_ids_of_transformers(json_folder, transformers):
    ours = load_tokenizer(json_folder)
    reference = transformers.AutoTokenizer.from_pretrained(json_folder)
    assert isinstance(ours, JsonTokenizer) and ours.vocab_size == len(reference) == 300
    assert (ours.bos_id, ours.eos_id, ours.dummy_prefix, ours.add_bos) == (0, 1, False, True)
    assert len(ours.sha256) == 64
    for text in [*TEXTS, "x<|user|>y", "word " * 200]:
        ids = reference(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.encode(text, bos=True) == [0, *ids] and ours.encode(text, eos=True) == [*ids, 1]
        assert ours.decode(ours.encode(text, bos=True, eos=True)) == text.replace("<|user|>", "")
    assert ours.encode_batch(TEXTS, bos=True) == [[0, *ours.encode(text)] for text in TEXTS]
    with pytest.raises(UserError, match="half of a surrogate pair"):
        ours.encode("\ud800")
    with pytest.raises(UserError, match="token 300 is not in the vocabulary"):
        ours.decode([300])


@pytest.mark.parametrize("by", ["pre_tokenizer", "normalizer"])
def test_a_space_in_front_is_noticed(tmp_path, json_folder, by):
    """Nor is a text encoded in parts, which would have a space each."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    model = Tokenizer.from_file(str(json_folder / "tokenizer.json"))
    if by == "pre_tokenizer":
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        model.normalizer = normalizers.Prepend(" ")
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(
        {"bos_token": {"content": "<|end|>"}, "eos_token": "<|user|>"}))
    tokenizer = open_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.dummy_prefix and not tokenizer.cuttable
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (1, 2, None)


NO_TOKENIZER = "tokenizer.json: not a tokenizer.json, or not a whole one"


@pytest.mark.parametrize("beside, words", [
    ({}, "which token is BOS. Say so in a tokenizer_config.json"),
    ({"tokenizer_config.json": {"bos_token": "<|begin|>"}}, "which token is EOS"),
    ({"tokenizer_config.json": {"bos_token": "<s>"}},
     "tokenizer_config.json: BOS is '<s>', which tokenizer.json does not have"),
    ({"config.json": {"bos_token_id": 0, "eos_token_id": [900, 1]}},
     "config.json: EOS is 900, which"),
    ({"config.json": []}, "config.json: holds no object"),
    ({"tokenizer.json": {}}, NO_TOKENIZER),
    ({"tokenizer.json": {"model": {"type": "BPE", "vocab": {}, "merges": []}}},
     "tokenizer.json: has no pieces"),
    ({"tokenizer.json": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
                         # a panic inside the package
                         "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}},
     "tokenizer.json: not a tokenizer.json"),
    ({"tokenizer_config.json": {"bos_token": "\x1b\n" * 999}},
     r"tokenizer_config.json: BOS is '.x1b.n"),
])
def test_tokenizer_json_errors(tmp_path, json_folder, beside, words):
    (tmp_path / "tokenizer.json").write_bytes((json_folder / "tokenizer.json").read_bytes())
    for name, value in beside.items():
        (tmp_path / name).write_text(json.dumps(value))
    with pytest.raises(UserError, match=words) as error:
        load_tokenizer(tmp_path)
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_a_text_that_a_tokenizer_json_has_no_tokens_for(tmp_path):
    model = {"type": "WordPiece", "unk_token": "x", "continuing_subword_prefix": "##",
             "max_input_chars_per_word": 100, "vocab": {"a": 0}}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "a",
                                                                "eos_token": "a"}))
    with pytest.raises(UserError, match="tokenizer.json: cannot encode this text .WordPiece error"):
        load_tokenizer(tmp_path).encode("b")


def test_which_tokenizer_of_a_folder(tmp_path, json_folder, tokenizer):
    copy_files(json_folder, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "tokenizer.json"
    assert load_tokenizer(tmp_path, 300).path == load_tokenizer(file).path == file
    # LLaMA 3's tiktoken file, which says the same
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert load_tokenizer(tmp_path).path.name == "tokenizer.json"
    assert open_tokenizer(tmp_path).path.name == "tokenizer.json"
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    assert load_tokenizer(tmp_path).path.name == "tokenizer.model"


def test_a_vocabulary_may_be_rounded_up(json_folder, tokenizer):
    for given, size in ((json_folder, 300), (tokenizer.path, tokenizer.vocab_size)):
        rounded = load_tokenizer(given, size + 20)
        assert rounded.vocab_size == size
        assert rounded.decode([*rounded.encode("hello"), size + 19]) == "hello"
        with pytest.raises(UserError, match="is not in the vocabulary"):
            rounded.decode([size + 20])
        for wrong in (size - 1, 3 * size):
            with pytest.raises(UserError, match=f"has {size} pieces, and the model's vocabulary "
                                                f"{wrong}"):
                load_tokenizer(given, wrong)


def test_tokenizers_travel_with_an_export(tmp_path, json_folder, tokenizer, transformers):
    """SentencePiece: transformers makes the same ids of what we write, BOS in front.
    tokenizer.json: with the words for BOS and EOS."""
    save_model(make(vocab_size=1024), tmp_path / "meta", tokenizer)
    export(tmp_path / "meta", "hf", tmp_path / "hf")
    for kind in (transformers.AutoTokenizer, transformers.LlamaTokenizer):
        reference = kind.from_pretrained(tmp_path / "hf")
        assert reference.bos_token_id == tokenizer.bos_id
        assert reference.eos_token_id == tokenizer.eos_id and len(reference) == 1024
        for text in TEXTS:
            ids = tokenizer.encode(text, bos=True)
            assert reference(text)["input_ids"] == ids
            assert reference.decode(ids, skip_special_tokens=True) == text
    config = read(tmp_path / "hf/config.json")
    assert config["bos_token_id"] == tokenizer.bos_id
    assert config["eos_token_id"] == tokenizer.eos_id
    export(tmp_path / "hf", "meta", tmp_path / "meta2")
    assert load_tokenizer(tmp_path / "meta2", 1024).sha256 == tokenizer.sha256

    save_model(make(vocab_size=304), tmp_path / "json", load_tokenizer(json_folder))
    (tmp_path / "json/chat_template.jinja").write_text("{{ x }}")
    export(tmp_path / "json", "hf", tmp_path / "json.hf")
    export(tmp_path / "json.hf", "meta", tmp_path / "json.meta")
    for name in ("json", "json.hf", "json.meta"):
        loaded = load_tokenizer(tmp_path / name, 304)
        assert loaded.sha256 == load_tokenizer(json_folder).sha256
        assert (loaded.bos_id, loaded.eos_id, loaded.add_bos) == (0, 1, True)
    assert (tmp_path / "json.hf/chat_template.jinja").exists()
    assert (tmp_path / "json.meta/chat_template.jinja").exists()
    export(tmp_path / "json.meta", "hf", tmp_path / "json.hf2")
    first, second = ({file.name: file.read_bytes() for file in (tmp_path / out).iterdir()
                      if "tokenizer" in file.name} for out in ("json.hf", "json.hf2"))
    assert first == second
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "json.hf").eos_token_id == 1


def test_ids_that_end_a_text_are_kept(tmp_path, json_folder):
    """LLaMA 3's chat models end at any of several tokens, which only config.json says."""
    folder = by_hand(tmp_path / "hf", make(vocab_size=300), vocab_size=300, bos_token_id=0,
                     eos_token_id=[1, 2], pad_token_id=2)
    copy_files(json_folder, folder)
    export(folder, "hf", tmp_path / "again")
    export(folder, "meta", tmp_path / "meta")
    export(tmp_path / "meta", "hf", tmp_path / "and again")
    for out in ("again", "and again"):
        config = read(tmp_path / out / "config.json")
        assert config["bos_token_id"] == 0
        assert config["eos_token_id"] == [1, 2] and config["pad_token_id"] == 2


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_how_to_generate_travels_with_an_export(tmp_path, json_folder, transformers,
                                                with_tokenizer):
    folder = by_hand(tmp_path / "hf", make(vocab_size=300), vocab_size=300, eos_token_id=1)
    if with_tokenizer:
        copy_files(json_folder, folder)
    said = {"bos_token_id": 0, "eos_token_id": [1, 2], "do_sample": True, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(said))
    export(folder, "hf", tmp_path / "a")
    if with_tokenizer:
        export(folder, "meta", tmp_path / "b")
        export(tmp_path / "b", "hf", tmp_path / "c")
    for out in "ac" if with_tokenizer else "a":
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / out)
        how = loaded.generation_config
        assert (how.eos_token_id, how.temperature, how.do_sample) == ([1, 2], 0.6, True)
    config = read(tmp_path / "a/config.json")
    assert config["eos_token_id"] == 1, "config.json's own, as it was"
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match="generation_config.json: not a JSON file"):
        export(folder, "hf", tmp_path / "d")


def test_info(folder, json_folder, capsys):
    edit(folder, rope_scaling={"type": "linear", "factor": 4})
    weights_command(["info", "--model", str(folder)])
    shown = capsys.readouterr().out
    for words in ("2 layers", "6 heads of 8, 2 key/value heads", "32 tokens, original 8",
                  "tokenizer   none"):
        assert words in shown
    save_model(make(vocab_size=300), folder.parent / "meta", load_tokenizer(json_folder))
    weights_command(["info", "--model", str(folder.parent / "meta")])
    assert ("300 pieces, BOS 0 and EOS 1 where asked for; transformers adds BOS unasked"
            in capsys.readouterr().out)


def test_a_header_whose_length_reads_pk_is_no_zip_archive(folder):
    """The first eight bytes of a .safetensors file are the length of its header."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    longer = int.from_bytes(b"PK\0\0\0\0\0\0", "little")
    assert size < longer
    header = data[8:8 + size] + b" " * (longer - size)
    path.write_bytes(longer.to_bytes(8, "little") + header + data[8 + size:])
    assert path.read_bytes()[:2] == b"PK"
    load_model(folder)
