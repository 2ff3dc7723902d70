"""LoRA: the formula, what is trained, what a run leaves, and that PEFT and transformers read it."""
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_flatten_with_path

import finetune
from common.errors import UserError
from finetune import FinetuneConfig
from methods import RopeConfig
from methods.lora import (LoRA, LoRALinear, add_lora, lora_of, restored, trainable_and_frozen)
from model import LLaMA, ModelConfig
from toy_training import V, Died, dying, logged_steps, read_state, toy_batches
from train import fit, make_optimizer
from training.extension import complete_flags, load_extended
from weights import load_config, load_model, save_model
from weights.__main__ import main as weights_command
from weights.adapter import adapter_shapes, peft_name, save_adapter, trained_tensors
from weights.export import export
from weights.size import parameter_count

L, FACTOR = 16, 2
ROPE = {"rope_type": "linear", "factor": float(FACTOR)}
TOKENS = torch.randint(0, V, (2, L * FACTOR), generator=torch.Generator().manual_seed(5))
needs_safetensors = pytest.mark.skipif(find_spec("safetensors") is None, reason="needs safetensors")
SHAPES = {"plain": {}, "grouped": {"n_kv_heads": 1}, "tied": {"tied": True, "n_kv_heads": 2}}


def base_model(seed=0, **changes):
    """A LLaMA whose attention looks at positions."""
    torch.manual_seed(seed)
    shape = dict(dim=32, n_layers=2, n_heads=4, vocab_size=V, multiple_of=8, max_seq_len=L)
    model = LLaMA(ModelConfig(**{**shape, **changes}))
    for block in model.layers:
        torch.nn.init.normal_(block.attention.wq.weight, std=0.3)
        torch.nn.init.normal_(block.attention.wk.weight, std=0.3)
    return model


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{name: folder} of SHAPES."""
    folder = tmp_path_factory.mktemp("bases")
    for name, shape in SHAPES.items():
        save_model(base_model(**shape), folder / name)
    return {name: folder / name for name in SHAPES}


def settings(base, out, **changes):
    """Eight steps at a rate that makes LoRA's part as large as the rest."""
    values = dict(model=str(base), out=str(out), lora_rank=2, lora_alpha=4.0, steps=8, lr=2e-2,
                  schedule="constant", batch_size=4, warmup=2, save_every=2, log_every=1,
                  eval_every=1000, device="cpu", base_dtype="float32")
    return FinetuneConfig(**{**values, **changes})


def adapted(config):
    return load_extended(config.model, ROPE, L, FACTOR * L, torch.device("cpu"), "auto", config)


def train(config, batches=toy_batches):
    model = adapted(config)
    fit(model, config, batches, progress=False)
    return model


@pytest.fixture(scope="module")
def runs(bases, tmp_path_factory):
    """{name: (settings, trained model)} of SHAPES, and of other settings of LoRA."""
    folder = tmp_path_factory.mktemp("runs")
    others = {"alone": {"lora_full": False}, "bfloat16": {"base_dtype": "bfloat16"},
              "int8": {"base_dtype": "int8"},
              "all": {"lora_matrices": ["wk", "wo", "w1", "w2", "w3"], "lora_rank": 3}}
    found = {}
    for name, changes in {**dict.fromkeys(SHAPES, {}), **others}.items():
        config = settings(bases.get(name, bases["grouped"]), folder / name, **changes)
        found[name] = (config, train(config))
    return found


RUNS = [*SHAPES, "alone", "bfloat16", "int8", "all"]


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens)


# ---- The formula ---------------------------------------------------------------------------------


@pytest.mark.parametrize("base_dtype, error", [("float32", 0), ("bfloat16", 2**-8),
                                               ("int8", 1 / 127)])
def test_y_is_w_x_plus_alpha_over_r_b_a_x(base_dtype, error):
    """Against float64: the output, and the gradients of x, A and B. W is rounded by `error` of its
    largest number at most."""
    torch.manual_seed(0)
    weight = torch.randn(6, 5)
    layer = LoRALinear(weight, LoRA(2, 3.0, base_dtype=base_dtype))
    torch.nn.init.normal_(layer.lora_a)
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(4, 5, requires_grad=True)
    frozen = restored(layer.weight, layer.row_scale, torch.float32)
    assert (frozen - weight).abs().max() <= error * weight.abs().max()

    W, A, B, X = (t.detach().double().numpy() for t in (frozen, layer.lora_a, layer.lora_b, x))
    whole = W + 3.0 / 2 * B @ A
    y = layer(x)
    np.testing.assert_allclose(y.detach().numpy(), X @ whole.T, rtol=1e-5, atol=1e-5)
    d = torch.randn(4, 6)
    y.backward(d)
    D = d.double().numpy()
    for gradient, expected in ((x.grad, D @ whole), (layer.lora_a.grad, 1.5 * B.T @ D.T @ X),
                               (layer.lora_b.grad, 1.5 * D.T @ X @ A.T)):
        np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert layer.weight.grad is None


def test_a_is_random_and_b_zero(bases):
    """Other numbers in every matrix and for every seed, the same for the same seed."""
    first, again, other = (adapted(settings(bases["plain"], "", seed=seed)) for seed in (0, 0, 1))
    a = [tensor for name, tensor in trained_tensors(first).items() if name.endswith("lora_a")]
    assert len(a) == 2 * 4
    assert len({tuple(tensor.flatten().tolist()) for tensor in a}) == len(a)
    assert all(0.5 < tensor.abs().max() * 32**0.5 <= 1 for tensor in a)
    for (name, x), y, z in zip(trained_tensors(first).items(), trained_tensors(again).values(),
                               trained_tensors(other).values()):
        assert torch.equal(x, y)
        assert torch.equal(x, z) != name.endswith("lora_a")
        if name.endswith("lora_b"):
            assert not x.any()


@pytest.mark.parametrize("shape", SHAPES)
def test_it_begins_as_the_base_bit_for_bit(bases, shape, tmp_path):
    extended = load_model(bases[shape], rope=ROPE)
    assert torch.equal(logits(adapted(settings(bases[shape], ""))), logits(extended))
    save_model(extended, tmp_path / "b", dtype=torch.bfloat16)  # nothing is left to be rounded
    begun = adapted(settings(tmp_path / "b", "", base_dtype="bfloat16"))
    assert begun.layers[0].attention.wq.weight.dtype == torch.bfloat16
    assert begun.tok_embeddings.weight.dtype == torch.float32
    assert torch.equal(logits(begun), logits(load_model(tmp_path / "b")))


# ---- What is trained -----------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    {}, {"lora_full": False}, {"lora_matrices": ["w2"], "lora_rank": 5}, {"base_dtype": "int8"}])
@pytest.mark.parametrize("shape", SHAPES)
def test_only_the_right_parameters_are_trained(bases, shape, changes):
    config = settings(bases[shape], "", **changes)
    model = adapted(config)
    matrices, full = config.lora_matrices, config.lora_full
    expected = {name for name, _ in model.named_parameters()
                if "lora" in name or full and ("norm" in name or name.startswith(("tok", "out")))}
    assert {name.split(".")[-2] for name in expected if "lora" in name} == set(matrices)
    model.loss(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == expected
    assert trained_tensors(model).keys() == expected
    optimized = [p for group in make_optimizer(model, config).param_groups for p in group["params"]]
    assert {id(p) for p in optimized} == {id(dict(model.named_parameters())[n]) for n in expected}

    trained, frozen = trainable_and_frozen(model.config, lora_of(model))
    assert trained == sum(p.numel() for p in optimized)
    assert frozen == sum(p.numel() for name, p in model.named_parameters()
                         if name not in expected and not name.endswith(".row_scale"))
    assert trained + frozen > parameter_count(model.config)


def test_the_names_of_the_base_stay(bases):
    """So checkpoints keep their names, and a wrapper finds ordinary parameters."""
    before = load_model(bases["plain"]).state_dict()
    after = adapted(settings(bases["plain"], "")).state_dict()
    assert {name for name in after if "lora" not in name} == set(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_training_leaves_the_base_alone(runs, bases):
    config, model = runs["grouped"]
    base = load_model(bases["grouped"])
    names = trained_tensors(model).keys()
    for name, tensor in base.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor) != (name in names), name
    assert torch.equal(logits(base), logits(base_model(**SHAPES["grouped"])))


def test_a_frozen_matrix_is_kept_as_it_is_stored(bases):
    """For the backward pass nothing else of a matrix is kept, in float32 neither."""
    model = adapted(settings(bases["plain"], "", base_dtype="bfloat16"))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.layers[0].feed_forward(torch.randn(3, 32, requires_grad=True))
    matrices = [t for t in kept if t.dim() == 2 and len(t) > 3]
    assert len(matrices) == 3
    assert all(t.dtype == torch.bfloat16 for t in matrices)


@pytest.mark.parametrize("base_dtype", ["bfloat16", "int8", "float32"])
def test_autocast_and_recompute(bases, base_dtype):
    """With recompute the gradients are the same numbers; under autocast they are near those of
    float32."""
    gradients = []
    for autocast, recompute in ((False, False), (False, True), (True, False), (True, True)):
        model = adapted(settings(bases["grouped"], "", base_dtype=base_dtype))
        model.recompute = recompute
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model.loss(TOKENS[:, :-1], TOKENS[:, 1:])
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()
                                    if p.grad is not None]))
    exact, recomputed, rounded, both = gradients
    assert torch.equal(exact, recomputed)
    assert torch.equal(rounded, both)
    assert exact.dtype == rounded.dtype == torch.float32
    assert 1e-4 < (exact - rounded).norm() / exact.norm() < 0.05


# ---- Interruptions -------------------------------------------------------------------------------


def fingerprint(folder):
    """A hash of every bit of the adapter and of the state, without what the state has of its clock,
    its flags and of the random numbers of this process."""
    digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes())
    state = read_state(folder)
    kept = [state[key] for key in ("step", "model", "optimizer", "start")]
    for path, leaf in tree_flatten_with_path(kept)[0]:
        is_tensor = isinstance(leaf, torch.Tensor)
        digest.update(repr(path).encode())
        digest.update(leaf.numpy().tobytes() if is_tensor else repr(leaf).encode())
    return digest.hexdigest()


def test_an_interrupted_run_ends_as_an_uninterrupted_one(runs, tmp_path):
    config, _ = runs["bfloat16"]
    again = dataclasses.replace(config, out=str(tmp_path / "run"))
    with pytest.raises(Died):
        train(again, dying(at=5))
    assert read_state(tmp_path / "run")["step"] == 4
    train(again)
    assert logged_steps(tmp_path / "run") == list(range(1, 9))
    assert fingerprint(tmp_path / "run") == fingerprint(Path(config.out))
    with pytest.raises(UserError, match=r"other settings \(lora_alpha 4.0 there, 8.0 here\)"):
        train(dataclasses.replace(again, lora_alpha=8.0))
    with pytest.raises(UserError, match="lora_rank 2 there, None here"):
        train(dataclasses.replace(again, lora_rank=0))


def test_a_run_without_lora_has_the_settings_it_had_before(bases, tmp_path):
    """A state that knows nothing of LoRA is taken up."""
    config = settings(bases["plain"], tmp_path / "run", lora_rank=0, steps=2)
    train(config)
    assert "lora" not in repr(read_state(tmp_path / "run")["settings"])
    assert (tmp_path / "run" / "consolidated.00.pth").exists()
    train(dataclasses.replace(config, steps=3))
    assert logged_steps(tmp_path / "run") == [1, 2, 3]


def dies_before_change(n, folder, save):
    """Whether a child process that saves, and ends before its n-th change of a file in `folder`,
    did end there. No handler and no clean-up runs in it."""
    pid = os.fork()
    if pid == 0:
        seen = []

        def audit(event, arguments):
            changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
            if changes and any(str(folder) in str(a) for a in arguments):
                seen.append(event)
                if len(seen) == n:
                    os._exit(9)
        sys.addaudithook(audit)
        with contextlib.suppress(BaseException):
            save()
            os._exit(0)
        os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 9)
    return status == 9


@needs_safetensors
@pytest.mark.parametrize("before, after", [("adapter", "adapter"), ("model", "adapter"),
                                           ("adapter", "model"), ("nothing", "adapter")])
def test_killed_between_files_it_is_one_model_or_the_other(bases, tmp_path, before, after):
    def save(kind, factor, seed, folder):
        if kind == "nothing":
            return
        config = settings(bases["plain"], "", seed=seed)
        rope = {"rope_type": "linear", "factor": factor}
        lora = config if kind == "adapter" else None
        model = load_extended(config.model, rope, L, int(factor * L), torch.device("cpu"), "auto",
                              lora)
        torch.nn.init.constant_(model.norm.weight, 1 + seed)
        (save_adapter if lora else save_model)(model, folder)

    save(before, 2.0, 1, tmp_path / "before")
    save(after, 4.0, 2, tmp_path / "after")
    allowed = [logits(load_model(tmp_path / name)) for name in ("before", "after")
               if (tmp_path / name).exists()]
    outcomes = set()
    for n in range(1, 100):
        folder = tmp_path / f"killed{n}"
        if before != "nothing":
            shutil.copytree(tmp_path / "before", folder)
        died = dies_before_change(n, folder, lambda: save(after, 4.0, 2, folder))
        if before == "nothing" and outcomes == set():
            with contextlib.suppress(UserError):  # until it is there, and then it stays
                load_model(folder)
                outcomes.add(0)
        else:
            found = logits(load_model(folder))
            outcomes.add([torch.equal(found, model) for model in allowed].index(True))
        save(after, 4.0, 2, folder)  # the next save ends the move
        assert torch.equal(logits(load_model(folder)), allowed[-1])
        assert not {".saved", ".saving"} & {path.name for path in folder.iterdir()}
        both = {"consolidated.00.pth", "adapter_config.json"} <= {p.name for p in folder.iterdir()}
        assert not both
        if not died:
            break
    assert n > 3
    assert outcomes == set(range(len(allowed)))


# ---- What a run leaves ---------------------------------------------------------------------------


@needs_safetensors
@pytest.mark.parametrize("name", RUNS)
def test_the_folder_loads_as_the_trained_model(runs, name):
    """Merged, in float32; and without LoRA's part it is another model."""
    config, model = runs[name]
    loaded = load_model(config.out)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    assert isinstance(loaded.layers[0].attention.wq, torch.nn.Linear)
    assert loaded.config.rope.factor == FACTOR
    assert loaded.config.original_window == L
    assert loaded.config.max_seq_len == FACTOR * L
    assert load_config(config.out) == loaded.config
    assert {p.dtype for p in load_model(config.out, dtype=torch.bfloat16).parameters()} == {
        torch.bfloat16}
    untrained = load_model(config.model, rope=ROPE)
    assert (logits(untrained) - logits(loaded)).abs().max() > 0.1


@needs_safetensors
def test_a_window_that_no_factor_says_travels_too(bases, tmp_path):
    """Direct fine-tuning: plain RoPE, and a window of 2 L."""
    plain = {"rope_type": "default", "factor": 1.0}
    model = load_extended(str(bases["plain"]), plain, L, 2 * L, torch.device("cpu"), "auto",
                          settings(bases["plain"], ""))
    save_adapter(model, tmp_path / "run")
    loaded = load_model(tmp_path / "run")
    assert (loaded.config.original_window, loaded.config.max_seq_len) == (L, 2 * L)
    assert loaded.config == load_config(tmp_path / "run") == model.config


def test_the_folder_has_no_copy_of_the_base(runs):
    config, model = runs["alone"]
    names = {file.name for file in Path(config.out).iterdir()}
    assert names == {"params.json", "adapter_config.json", "adapter_model.safetensors",
                     "metrics.jsonl", "run.json", "state.pt"}
    numbers = sum(t.numel() for t in trained_tensors(model).values())
    assert (Path(config.out) / "adapter_model.safetensors").stat().st_size < 4 * numbers + 5000
    assert read_state(config.out)["model"].keys() == trained_tensors(model).keys()


@needs_safetensors
def test_fine_tuning_goes_on_from_an_adapter(runs, tmp_path):
    """The base may be an adapter's folder itself; another RoPE may be asked for as of any model."""
    config, model = runs["grouped"]
    second = settings(config.out, tmp_path / "second", steps=2)
    assert torch.equal(logits(adapted(second)), logits(load_model(config.out)))
    twice = train(second)
    torch.testing.assert_close(logits(load_model(second.out)), logits(twice), rtol=0, atol=1e-5)
    assert load_model(second.out, rope={"rope_type": "yarn", "factor": 4}).config.max_seq_len == 64


@needs_safetensors
def test_a_base_with_a_network_for_its_positions(tmp_path):
    """CLEX's network belongs to CLEX: an adapter with other positions does without, and CLEX asked
    for begins untrained."""
    clex = {"rope_type": "clex", "original_max_position_embeddings": L}
    save_model(base_model(rope=RopeConfig.from_dict(clex)), tmp_path / "base")
    config = settings(tmp_path / "base", tmp_path / "run", steps=2)
    model = train(config)
    loaded = load_model(config.out)
    assert loaded.clex is None
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    assert load_model(config.out, rope={"rope_type": "clex"}).clex is not None


@needs_safetensors
def test_the_base_may_move_with_the_adapter(runs, bases, tmp_path, monkeypatch):
    """A relative path counts from the working directory, and else from the adapter's folder."""
    config, model = runs["plain"]
    shutil.copytree(config.out, tmp_path / "runs" / "adapter")
    file = tmp_path / "runs" / "adapter" / "adapter_config.json"
    for place, path in (("here", "here"), ("runs/base", "../base")):
        shutil.copytree(bases["plain"], tmp_path / place)
        file.write_text(json.dumps(json.loads(file.read_text())
                                   | {"base_model_name_or_path": path}))
        monkeypatch.chdir(tmp_path)
        loaded = load_model(file.parent)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


# ---- Others read it ------------------------------------------------------------------------------


@needs_safetensors
@pytest.mark.parametrize("name", RUNS)
def test_the_merged_export_has_the_logits_of_the_adapted_model(runs, name, tmp_path):
    pytest.importorskip("transformers")
    from transformers import LlamaForCausalLM
    config, model = runs[name]
    export(config.out, "hf", tmp_path / "hf")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, logits(model), rtol=0, atol=1e-4)


@needs_safetensors
@pytest.mark.parametrize("to, out", [("meta", "m"), ("gguf", "m.gguf")])
def test_other_exports_are_merged_too(runs, to, out, tmp_path):
    if to == "gguf":
        pytest.importorskip("gguf")
    config, model = runs["tied"]
    export(config.out, to, tmp_path / out)
    torch.testing.assert_close(logits(load_model(tmp_path / out)), logits(model), rtol=0,
                               atol=1e-5)


@pytest.mark.parametrize("name", [*SHAPES, "alone", "all"])
def test_peft_gives_the_same_logits(runs, name, tmp_path):
    pytest.importorskip("peft")
    from peft import PeftModel
    from transformers import LlamaForCausalLM
    config, model = runs[name]
    export(config.model, "hf", tmp_path / "hf", rope=ROPE)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, config.out).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, logits(model), rtol=0, atol=1e-4)
        whole = theirs.merge_and_unload()
        torch.testing.assert_close(whole(TOKENS).logits, logits(model), rtol=0, atol=1e-4)


def test_peft_writes_the_names_that_we_write(bases):
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import LlamaConfig, LlamaForCausalLM
    config = load_config(bases["grouped"])
    theirs = LlamaForCausalLM(LlamaConfig(
        hidden_size=config.dim, num_hidden_layers=config.n_layers, vocab_size=V,
        num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads,
        intermediate_size=config.ffn_dim))
    theirs = get_peft_model(theirs, LoraConfig(
        r=3, target_modules=["q_proj", "down_proj"], modules_to_save=[
            "embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm"]))
    shapes = adapter_shapes(config, LoRA(3, matrices=("wq", "w2")))
    assert {peft_name(name): shape for name, shape in shapes.items()} == {
        name: tuple(t.shape) for name, t in get_peft_model_state_dict(theirs).items()}


# ---- AdamW in 8 bits -----------------------------------------------------------------------------


def test_adamw_in_8_bits(tmp_path):
    """Near AdamW, the same after an interruption, and its moments are bytes. (Uncompiled.)"""
    pytest.importorskip("torchao")
    model = base_model(dim=64, n_layers=1)
    save_model(model, tmp_path / "base")
    config = settings(tmp_path / "base", tmp_path / "run", lora_rank=0, optimizer="adamw8bit",
                      lr=1e-3)
    torch.compiler.set_stance("force_eager")
    try:
        eight = train(config)
        again = dataclasses.replace(config, out=str(tmp_path / "again"))
        with pytest.raises(Died):
            train(again, dying(at=5))
        resumed = train(again)
    finally:
        torch.compiler.set_stance("default")
    for a, b in zip(eight.parameters(), resumed.parameters()):
        assert torch.equal(a, b)
    moments = read_state(config.out)["optimizer"]["state"]
    assert any(getattr(s["exp_avg"], "codes", s["exp_avg"]).dtype == torch.uint8
               for s in moments.values())
    exact = train(dataclasses.replace(config, out=str(tmp_path / "exact"), optimizer="adamw"))
    start = torch.cat([p.flatten() for p in model.parameters()])
    moved, exactly = (torch.cat([p.flatten() for p in m.parameters()]) - start
                      for m in (eight, exact))
    assert 0 < (moved - exactly).norm() / exactly.norm() < 0.2


# ---- Flags and mistakes --------------------------------------------------------------------------


@needs_safetensors
def test_the_command_makes_it(corpus_folder, tokenizer, tmp_path, capsys):
    base = base_model(vocab_size=tokenizer.vocab_size)
    save_model(base, tmp_path / "base", tokenizer)
    finetune.main(["--model", str(tmp_path / "base"), "--corpus", str(corpus_folder), "--out",
                   str(tmp_path / "out"), *"--lora-rank 4 --steps 2 --passkey-share 0".split(),
                   *"--no-baseline --no-eval --device cpu".split()])
    printed = capsys.readouterr().out
    trained, frozen = trainable_and_frozen(base.config, LoRA(4))
    assert (f"lora       rank 4, alpha 16 on wq wk wv wo, embedding, output and norms in full: "
            f"{trained:,} parameters trained, {frozen:,} frozen in bfloat16") in printed
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (4, 16)
    assert (tmp_path / "out" / "tokenizer.model").exists()
    weights_command(["info", "--model", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert f"window      {2 * L} tokens, original {L}" in printed
    assert f"adapter     LoRA of rank 4, to be merged into {tmp_path / 'base'}" in printed
    weights_command(["export", "--model", str(tmp_path / "out"), "--to", "hf", "--out",
                     str(tmp_path / "hf")])
    assert torch.equal(logits(load_model(tmp_path / "hf")), logits(load_model(tmp_path / "out")))


@pytest.mark.parametrize("changes, words", [
    ({"lora_rank": -1}, "--lora-rank -1: has to be at least 1"),
    ({"lora_alpha": 0.0}, "--lora-alpha 0.0: has to be a positive number"),
    ({"lora_alpha": float("nan")}, "--lora-alpha nan: has to be a positive number"),
    ({"lora_matrices": ["wq", "wx"]}, "--lora-matrices wq wx: give some of wq wk wv wo w1 w2 w3"),
    ({"lora_matrices": ["wq", "wq"]}, "each once"),
    ({"rope": "clex"}, "--lora-rank with --rope clex: an adapter has no place for"),
    ({"lora_rank": 0, "lora_alpha": 16.0, "base_dtype": "int8"},
     "--base-dtype is for LoRA: give --lora-rank, too"),
    ({"lora_rank": 0, "base_dtype": "bfloat16"}, "--lora-alpha is for LoRA")])
def test_wrong_flags_are_one_line(bases, changes, words):
    config = settings(bases["plain"], "out/x", **changes)
    with pytest.raises(UserError, match=words) as error:
        complete_flags(config, load_config(bases["plain"]))
    assert "\n" not in str(error.value)


def test_lora_has_folders_of_its_own(bases):
    config = settings(bases["plain"], "", lora_rank=8, lora_alpha=16.0, eval=False)
    config, _, direct_out = complete_flags(config, load_config(bases["plain"]))
    assert (config.out, direct_out) == ("out/pi-lora8-x2", "out/direct-lora8-x2")
    assert config.results == "out/finetune-pi-lora8.json"
    defaults = FinetuneConfig()
    lora = LoRA()
    assert (8, defaults.lora_alpha, tuple(defaults.lora_matrices), defaults.lora_full,
            defaults.base_dtype) == (lora.rank, lora.alpha, lora.matrices, lora.full,
                                     lora.base_dtype)


def rewrite(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def overwrite_tensors(file, change):
    from safetensors.torch import load_file, save_file
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


A_NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@needs_safetensors
@pytest.mark.parametrize("damage, words", [
    (lambda f: rewrite(f / "adapter_config.json", base_model_name_or_path="gone/model"),
     "the base model gone/model is not there: put it back"),
    (lambda f: rewrite(f / "adapter_config.json", base_model_name_or_path=str(f)),
     "adapter is not there"),  # its own base
    (lambda f: rewrite(f / "adapter_config.json", base_model_name_or_path=None),
     "base_model_name_or_path has to be the path"),
    (lambda f: rewrite(f / "adapter_config.json", use_dora=True), "use_dora is set: .* than LoRA"),
    (lambda f: rewrite(f / "adapter_config.json", peft_type="IA3"), "peft_type is set"),
    (lambda f: rewrite(f / "adapter_config.json", r=0), "r = 0: has to be a positive whole number"),
    (lambda f: rewrite(f / "adapter_config.json", r=3), "should be "),
    (lambda f: rewrite(f / "adapter_config.json", lora_alpha="x"), "lora_alpha = 'x': has to be"),
    (lambda f: rewrite(f / "adapter_config.json", target_modules=["conv"]),
     r"target_modules = \['conv'\]: has to name some of q_proj"),
    (lambda f: rewrite(f / "adapter_config.json", target_modules=["q_proj"]), "is none of this"),
    (lambda f: rewrite(f / "adapter_config.json", modules_to_save=None), "is none of this adapter"),
    (lambda f: rewrite(f / "params.json", lora=None), "has no `lora` with the base_dtype"),
    (lambda f: rewrite(f / "params.json", dim=64), "dim is 64, and the base model has 32"),
    (lambda f: rewrite(f / "params.json", max_seq_len=None), "max_seq_len, .* is missing"),
    (lambda f: (f / "adapter_model.safetensors").unlink(), "no such file: copy it beside"),
    (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 99), "damaged, cut off"),
    (lambda f: overwrite_tensors(f / "adapter_model.safetensors", lambda t: t.pop(A_NAME)),
     f"{A_NAME} is missing"),
    (lambda f: overwrite_tensors(f / "adapter_model.safetensors",
                                 lambda t: t[A_NAME].fill_(float("nan"))), "NaN or infinity")])
def test_a_damaged_adapter_is_one_line(runs, tmp_path, damage, words):
    folder = shutil.copytree(runs["plain"][0].out, tmp_path / "adapter")
    damage(folder)
    with pytest.raises(UserError, match=words) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


@needs_safetensors
def test_another_base_is_noticed(runs, tmp_path):
    """Of the same shape: one number of the corner of one matrix differs."""
    folder = shutil.copytree(runs["plain"][0].out, tmp_path / "adapter")
    other = base_model()
    with torch.no_grad():
        other.layers[1].feed_forward.w3.weight[0, 3] += 1
    save_model(other, tmp_path / "other")
    rewrite(folder / "adapter_config.json", base_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(UserError, match="has other weights than the model that"):
        load_model(folder)


def test_a_missing_package_is_named(bases, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    monkeypatch.setitem(sys.modules, "torchao", None)
    config = settings(bases["plain"], "", optimizer="adamw8bit")
    with pytest.raises(UserError, match="pip install torchao"):
        make_optimizer(adapted(config), config)


def test_without_safetensors_no_training_begins_that_could_not_be_measured(bases, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    base = load_config(bases["plain"])
    config = FinetuneConfig(model=str(bases["plain"]), lora_rank=2, lr=1e-3)
    with pytest.raises(UserError, match="--lora-rank: pip install safetensors to measure it"):
        complete_flags(config, base)
    complete_flags(dataclasses.replace(config, eval=False), base)


def test_add_lora_is_all_that_is_needed():
    """From Python, without flags."""
    model = base_model()
    before = logits(model)
    add_lora(model, LoRA(base_dtype="float32"))
    assert torch.equal(logits(model), before)
