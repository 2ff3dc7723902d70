"""`export --to gguf`: read back it is the same model. llama.cpp's view of it: test_llama_cpp."""
import json
import math
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

gguf = pytest.importorskip("gguf")     # an extra, as tokenizers is; CI installs both

from test_gguf import SIZE, TOKENS, make, train
from test_sentencepiece_json import train_sentencepiece
from test_weights import same

from common.cli import run_command
from common.errors import UserError
from data.gguf_file import read_header
from methods import METHODS, RopeConfig, inv_freq
from weights import load_config, load_model, load_tokenizer, save_model
from weights.__main__ import main
from weights.export_gguf import export_gguf

TINY = str(ROOT / "data/tiny")
FACTORS = {"short_factor": [1.5] * 16, "long_factor": [1.0 + i for i in range(16)]}
OWN_SETTINGS = {"longrope": FACTORS}
WORDLESS = {"dynamic", "dynamic_yarn", "clex", "nope", "drope", "alibi", "xpos", "proportional",
            *(name for name, method in METHODS.items() if method.distance_map)}


def rope_of(name, **settings):
    rope = {"rope_type": name, "factor": 4.0, "original_max_position_embeddings": 64,
            "rope_theta": 5e4}
    return rope | OWN_SETTINGS.get(name, {}) | settings


def command(*argv):
    main(["export", *map(str, argv)])


def refused(capsys, *argv):
    """The one line on stderr."""
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: command(*argv))
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1, line
    return line


# --------------------------------------------------------------------------------------------------
# Shape, weights, RoPE

@pytest.mark.parametrize("changes", [
    {}, {"tied": True}, {"n_kv_heads": 8}, {"head_dim": 64}, {"norm_eps": 1e-6, "vocab_size": 77},
    {"rope": RopeConfig(rope_theta=10000)}], ids=str)
def test_float32_comes_back_bit_for_bit(tmp_path, changes):
    model = make(**changes)
    export_gguf(model, tmp_path / "m.gguf")
    loaded = load_model(tmp_path / "m.gguf")
    assert same(loaded, model) and loaded.config == model.config
    assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_the_package_reads_it(tmp_path):
    """Names, shapes and types by the gguf package's own reader; only one file is left behind."""
    model = make()
    export_gguf(model, tmp_path / "m.gguf", dtype="q8_0")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    assert len(stored) == len(list(model.parameters()))
    for name, tensor in stored.items():
        kind = "F32" if "norm" in name else "Q8_0"
        assert tensor.tensor_type.name == kind, name
    assert stored["blk.1.ffn_down.weight"].shape.tolist() == [512, 256]
    assert reader.fields["general.file_type"].contents() == 7
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("dtype, kind, error", [
    (torch.float16, "F16", 2**-11), (torch.bfloat16, "BF16", 2**-8), ("q8_0", "Q8_0", 1 / 220)])
def test_types(tmp_path, dtype, kind, error):
    model = make()
    export_gguf(model, tmp_path / "m.gguf", dtype=dtype)
    loaded = load_model(tmp_path / "m.gguf")
    for name, parameter in model.named_parameters():
        found = loaded.get_parameter(name)
        if parameter.dim() == 1:
            assert torch.equal(found, parameter)
        else:
            largest = parameter.view(-1, 32).abs().amax(1, keepdim=True)
            assert ((found - parameter).view(-1, 32).abs() <= error * largest).all(), name
            assert not torch.equal(found, parameter)
    assert read_header(tmp_path / "m.gguf").tensors["output.weight"].kind.name == kind


def test_rows_that_are_no_whole_blocks_of_q8_0(tmp_path):
    model = make(dim=48, n_heads=2, n_kv_heads=1, ffn_dim=64)
    export_gguf(model, tmp_path / "m.gguf", dtype="q8_0")
    tensors = read_header(tmp_path / "m.gguf").tensors
    assert tensors["blk.0.attn_q.weight"].kind.name == "F16"
    assert tensors["blk.0.ffn_down.weight"].kind.name == "Q8_0"


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("settings", [{}, {"resonance": True}], ids=["", "resonance"])
def test_every_method(tmp_path, name, settings):
    """The same rope and the same logits, short and long; or one line that names the method."""
    model = make()
    save_model(model, tmp_path / "meta")
    model = load_model(tmp_path / "meta", rope_of(name, **settings))
    path = tmp_path / "m.gguf"
    if name in WORDLESS or (name == "longrope" and settings):
        share = {"partial_rotary_factor": 0.5} if name == "proportional" else {}
        model = load_model(tmp_path / "meta", rope_of(name, **settings, **share))
        with pytest.raises(UserError, match=f"rope_type {name}: |partial_rotary_factor 0.5"):
            export_gguf(model, path)
        assert not path.exists()
        return
    export_gguf(model, path)
    loaded = load_model(path)
    assert loaded.config.rope == model.config.rope
    assert loaded.config.max_seq_len == model.config.max_seq_len
    for length in (40, 200):
        tokens = torch.arange(length)[None] % 64
        assert torch.equal(loaded(tokens), model(tokens))


@pytest.mark.parametrize("settings, words", [
    ({"temperature": "log_n"}, "temperature log_n: llama.cpp has no such thing"),
    ({"no_rope_layer_interval": 4}, "no_rope_layer_interval 4: llama.cpp has no such thing")])
def test_what_is_more_than_frequencies_is_refused(tmp_path, settings, words):
    model = make(rope=RopeConfig.from_dict(rope_of("yarn", **settings)))
    with pytest.raises(UserError, match=words):
        export_gguf(model, tmp_path / "m.gguf")


def test_a_temperature_taken_away_is_said(tmp_path):
    rope = RopeConfig.from_dict(rope_of("yarn", temperature="none"))
    export_gguf(make(rope=rope), tmp_path / "m.gguf")
    loaded = load_config(tmp_path / "m.gguf")
    assert inv_freq(loaded.rope, 32)[1] == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("name", sorted(set(METHODS) - WORDLESS))
def test_other_readers_find_the_angles(tmp_path, name):
    """Without params.rope, by llama.cpp's words alone: the same frequencies and temperature."""
    model = make(rope=RopeConfig.from_dict(rope_of(name)), max_seq_len=256)
    export_gguf(model, tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole.replace(b"params.rope", b"params.none"))
    found = load_config(tmp_path / "m.gguf")
    assert found.max_seq_len == 256
    for length in (64, 256):
        theta, temperature = inv_freq(model.config.rope, 32, length)
        found_theta, found_temperature = inv_freq(found.rope, 32, length)
        assert torch.allclose(found_theta, theta, rtol=1e-6, atol=0)
        assert found_temperature == pytest.approx(temperature, rel=1e-6)


def test_llama_cpps_words_win(tmp_path):
    """Somebody has changed them since: the method that params.rope names is no longer the model's.
    """
    export_gguf(make(rope=RopeConfig.from_dict(rope_of("linear"))), tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    key = b"llama.rope.scaling.factor"
    place = whole.index(key) + len(key) + 4
    changed = whole[:place] + np.float32(2).tobytes() + whole[place + 4:]
    (tmp_path / "m.gguf").write_bytes(changed)
    assert load_config(tmp_path / "m.gguf").rope.factor == 2
    (tmp_path / "m.gguf").write_bytes(whole.replace(b'{"rope_type"', b'["rope_type"'))
    with pytest.raises(UserError, match="params.rope is no JSON object"):
        load_config(tmp_path / "m.gguf")


def test_rope_and_factor_extend_untrained(tmp_path, capsys):
    for to, out in (("gguf", "m.gguf"), ("hf", "hf"), ("meta", "meta")):
        command("--model", TINY, "--to", to, "--out", tmp_path / out, "--rope", "pi", "--factor", 4)
        config = load_config(tmp_path / out)
        assert (config.rope.rope_type, config.rope.factor) == ("linear", 4)
        assert (config.max_seq_len, config.original_window) == (1024, 256)
    there = ["--model", TINY, "--to", "gguf", "--out", tmp_path / "n.gguf"]
    assert "needs --rope" in refused(capsys, *there, "--factor", 2)
    assert "needs --factor" in refused(capsys, *there, "--rope", "yarn")
    line = refused(capsys, *there, "--rope", "dynamic", "--factor", 2)
    assert "rope_type dynamic: llama.cpp's frequencies do not change with the length" in line
    assert not (tmp_path / "n.gguf").exists()


def test_refused_in_one_line(tmp_path, capsys, monkeypatch):
    there = ["--model", TINY, "--to", "gguf", "--out"]
    assert "ends in .gguf" in refused(capsys, *there, tmp_path / "m")
    (tmp_path / "m.gguf").write_text("mine")
    assert "m.gguf: exists" in refused(capsys, *there, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "mine"
    line = refused(capsys, "--model", TINY, "--to", "hf", "--out", tmp_path / "hf",
                   "--dtype", "q8_0")
    assert "--dtype q8_0: only --to gguf has it" in line
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf" in refused(capsys, *there, tmp_path / "n.gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_numbers_that_a_type_cannot_hold(tmp_path):
    """Found while the file is written: nothing is left behind."""
    model = make()
    for name, value, dtype in (("output", 1e6, torch.float16), ("norm", math.nan, None)):
        with torch.no_grad():
            model.get_parameter(f"{name}.weight").view(-1)[-1] = value
        with pytest.raises(UserError, match="output(_norm)?.weight .*(too large|NaN)"):
            export_gguf(model, tmp_path / "m.gguf", dtype=dtype)
        assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# Tokenizers and what lies beside them

TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>é{% endif %}")
HOW = {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 0, "do_sample": True,
       "temperature": 0.6, "top_k": 40, "top_p": 0.95}


@pytest.fixture(params=["tokenizer.json", "tokenizer.model"])
def chat_model(request, tmp_path, tokenizer):
    """A Meta folder with a tokenizer, a chat template and settings of generation."""
    folder = tmp_path / "meta"
    if request.param == "tokenizer.json":
        (tmp_path / "t").mkdir()
        train("smollm").save(str(tmp_path / "t/tokenizer.json"))
        (tmp_path / "t/tokenizer_config.json").write_text(json.dumps(
            {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}))
        save_model(make(vocab_size=SIZE), folder, load_tokenizer(tmp_path / "t"))
    else:
        save_model(make(vocab_size=1024), folder, tokenizer)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(HOW))
    return folder


def test_how_to_chat_goes_all_the_way_round(tmp_path, chat_model):
    """Meta -> GGUF -> Meta -> GGUF -> Hugging Face: tokenizer, template and settings are there."""
    transformers = pytest.importorskip("transformers")
    truth = load_tokenizer(chat_model)
    steps = [("gguf", "1.gguf"), ("meta", "2"), ("gguf", "3.gguf"), ("hf", "4")]
    source = chat_model
    for to, out in steps:
        command("--model", source, "--to", to, "--out", tmp_path / out)
        source = tmp_path / out
        found = load_tokenizer(source)
        assert found.encode("it's the test, 123", True) == truth.encode("it's the test, 123", True)
        assert (found.bos_id, found.eos_id) == (truth.bos_id, truth.eos_id)
    for out in ("2", "4"):
        assert (tmp_path / out / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE
        assert json.loads((tmp_path / out / "generation_config.json").read_text()) == HOW
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "4")
    asked = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False,
                                       add_generation_prompt=True)
    assert asked == "<|im_start|>user: hi<|im_end|>\n<|im_start|>é"
    told = json.loads((tmp_path / "4/tokenizer_config.json").read_text())
    assert told["chat_template"] == TEMPLATE, "where transformers before 4.54 looks"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "4")
    how = model.generation_config
    assert (how.eos_token_id, how.temperature, how.top_k, how.top_p) == ([2, 0], 0.6, 40, 0.95)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "3.gguf").read_bytes()


def test_keys_that_llama_cpp_reads(tmp_path, chat_model):
    command("--model", chat_model, "--to", "gguf", "--out", tmp_path / "m.gguf")
    keys = read_header(tmp_path / "m.gguf").metadata
    assert keys["tokenizer.chat_template"] == TEMPLATE
    assert keys["tokenizer.ggml.eos_token_id"] == 2 and keys["tokenizer.ggml.eot_token_id"] == 0
    assert keys["tokenizer.ggml.padding_token_id"] == 0
    assert keys["general.sampling.temp"] == 0.6 and keys["general.sampling.top_k"] == 40
    (chat_model / "generation_config.json").write_text(json.dumps(HOW | {"do_sample": False}))
    command("--model", chat_model, "--to", "gguf", "--out", tmp_path / "n.gguf")
    assert "general.sampling.temp" not in read_header(tmp_path / "n.gguf").metadata


@pytest.mark.parametrize("said, key", [
    ({"top_k": -1}, "top_k"), ({"temperature": 1e300}, "temp"), ({"top_p": math.nan}, "top_p")])
def test_settings_out_of_range_are_not_told(tmp_path, chat_model, said, key):
    (chat_model / "generation_config.json").write_text(json.dumps(HOW | said))
    command("--model", chat_model, "--to", "gguf", "--out", tmp_path / "m.gguf")
    keys = read_header(tmp_path / "m.gguf").metadata
    assert f"general.sampling.{key}" not in keys and "tokenizer.chat_template" in keys


@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
@pytest.mark.parametrize("to", ["gguf", "hf"])
def test_damaged_companions(tmp_path, capsys, tokenizer, to, content):
    save_model(make(vocab_size=1024), tmp_path / "meta", tokenizer)
    for name in ("tokenizer_config.json", "generation_config.json"):
        file = tmp_path / "meta" / name
        file.write_text(content, errors="surrogateescape")
        line = refused(capsys, "--model", tmp_path / "meta", "--to", to, "--out",
                       tmp_path / "m.gguf")
        assert f"{name}, beside the tokenizer: holds no object" in line
        assert not (tmp_path / "m.gguf").exists()
        file.unlink()


@pytest.mark.parametrize("change, words", [
    (lambda whole: whole.update(normalizer={"type": "NFC"}), "GGUF has no words for what"),
    (lambda whole: whole.update(pre_tokenizer={"type": "Whitespace"}), "how this tokenizer splits"),
    (lambda whole: whole.update(pre_tokenizer=None), "how this tokenizer splits"),
    (lambda whole: whole["model"].update(type="WordLevel", unk_token="!"), "only BPE is written"),
], ids=["NFC", "split", "no split", "type"])
def test_tokenizers_without_words(tmp_path, capsys, change, words):
    whole = json.loads(train("smollm").to_str())
    change(whole)
    (tmp_path / "t").mkdir()
    (tmp_path / "t/tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    (tmp_path / "t/tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}))
    save_model(make(vocab_size=SIZE), tmp_path / "meta", load_tokenizer(tmp_path / "t"))
    line = refused(capsys, "--model", tmp_path / "meta", "--to", "gguf", "--out",
                   tmp_path / "m.gguf")
    assert words in line and not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("kind, words", [
    ("unigram", "no BPE model of SentencePiece"), ("normalised", "GGUF has no words for what")])
def test_sentencepiece_models_without_words(tmp_path, capsys, kind, words):
    tokenizer = load_tokenizer(train_sentencepiece(tmp_path / "tokenizer.model", kind))
    save_model(make(vocab_size=tokenizer.vocab_size), tmp_path / "meta", tokenizer)
    line = refused(capsys, "--model", tmp_path / "meta", "--to", "gguf", "--out",
                   tmp_path / "m.gguf")
    assert words in line and not (tmp_path / "m.gguf").exists()


def test_rows_without_a_token(tmp_path, tokenizer):
    """The embedding's last rows, which only round it up, are no tokens when read back."""
    save_model(make(vocab_size=1056), tmp_path / "meta", tokenizer)
    command("--model", tmp_path / "meta", "--to", "gguf", "--out", tmp_path / "m.gguf")
    keys = read_header(tmp_path / "m.gguf").metadata
    assert len(keys["tokenizer.ggml.tokens"]) == 1056
    found = load_tokenizer(tmp_path / "m.gguf", 1056)
    assert (found.vocab_size, found.padded_size) == (1024, 1056)
