"""Hugging Face's LLaMA folders: read for weights.load_model, and written by `python weights.py export`.

    config.json            the shape, in other words than Meta's (SHAPE below), and RoPE as `rope_parameters` or `rope_scaling`
    model.safetensors      the tensors under other names; or several files and model.safetensors.index.json; or old pytorch_model.bin
    tokenizer.model        SentencePiece, or tokenizer.json

The tensors are Meta's but for the rows of wq and wk. RoPE turns pairs of numbers, and the two disagree which two of a head are a pair:
neighbours (Meta, and our model.py), or one of each half (Hugging Face). Pair i of a head of D = 8, by the rows of its weight:

    Meta            row   0  1  2  3  4  5  6  7               Hugging Face    row   0  1  2  3  4  5  6  7
                    pair  0  0  1  1  2  2  3  3                               pair  0  1  2  3  0  1  2  3
                          u  v  u  v  u  v  u  v                                     u  u  u  u  v  v  v  v

So Meta's rows 0 1 2 3 4 5 6 7 are Hugging Face's 0 4 1 5 2 6 3 7 (head_order), in each head of its own: H heads of wq, K of wk. The
scores q.k are the same: q and k are permuted alike.
"""
import contextlib
import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import torch

from cli import UserError, whole_file, write_json
from data.tokenizer import IDS, beside, one_line, settings
from model import ModelConfig
from rope import METHODS, RopeConfig, inv_freq
from weights import (REMAP, check_kind, check_values, has_tokenizer, load_config, load_model, load_tokenizer, open_checkpoint,
                     original_window, plain, save_model)

ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM")  # the second: conversions of early 2023
SHAPE = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads",
         "vocab_size": "vocab_size", "intermediate_size": "ffn_dim", "head_dim": "head_dim", "max_position_embeddings": "max_seq_len"}
NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
         "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
         "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
         "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}

def hugging_face_name(name):
    """Meta's name of a tensor in Hugging Face's words: layers.3.attention.wq.weight -> model.layers.3.self_attn.q_proj.weight."""
    layer, stem = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", name).groups()
    return f"model.{layer}{NAMES[stem]}.weight" if layer else f"{NAMES[stem]}.weight"


def head_order(head_dim):
    """The row of a Hugging Face head that each row of Meta's is, [D]: 0 D/2 1 D/2+1 2 ..."""
    return torch.arange(head_dim).unflatten(0, (2, -1)).t().flatten()


def reorder(config, name, tensor, inverse=False):
    """Meta's rows of a tensor from Hugging Face's, [H*D, C] -> [H*D, C]; inverse: the other way. Only wq and wk change."""
    if not name.endswith(("attention.wq.weight", "attention.wk.weight")):
        return tensor
    order = head_order(config.head_dim).argsort() if inverse else head_order(config.head_dim)
    return tensor.unflatten(0, (-1, config.head_dim))[:, order].flatten(0, 1)     # [H*D, C] -> [H, D, C], H heads or K


# ---------------------------------------------------------------------------------------------------------------------
# In: config.json


def hugging_face_config(folder, quiet=False):
    """ModelConfig of a Hugging Face folder. Its weights are looked at only to see that they have this shape. What had to be assumed is
    printed; what our LLaMA does not compute is refused by name, never ignored."""
    file = Path(folder) / "config.json"
    given, notes, shape = settings(file), [], {}
    sliding = refuse_others(file, given)
    for key, ours in SHAPE.items():
        value = given.get(key)
        if value is None and key in ("head_dim", "num_key_value_heads", "max_position_embeddings"):
            continue
        if type(value) is not int or not 0 < value < 2**31:
            raise UserError(f"{file}: {key} = {value!r:.60}: has to be a positive whole number" if key in given else
                            f"{file}: {key} is missing: take the config.json of the checkpoint")
        shape[ours] = value
    if "n_kv_heads" not in shape and given.get("model_type") == "mistral":
        raise UserError(f"{file}: num_key_value_heads is missing: a Mistral model has to state it")
    if "max_seq_len" not in shape:
        notes.append(f"{file} does not say max_position_embeddings: transformers' 2048 is assumed")
    window = shape.setdefault("max_seq_len", 2048)
    if sliding is not None:
        if type(sliding) is not int or sliding < window:
            raise UserError(f"{file}: sliding_window {sliding!r:.60}: attention here sees the whole text; a Mistral model without "
                            "one loads (\"sliding_window\": null)")
        notes.append(f"{file}: sliding_window {sliding} is ignored: it makes no difference up to {window} tokens; beyond it attention here "
                     "sees the whole text")
    epsilon, tied = given.get("rms_norm_eps", 1e-6), given.get("tie_word_embeddings", False)
    if type(epsilon) not in (int, float) or not 0 < epsilon < 1:
        raise UserError(f"{file}: rms_norm_eps = {epsilon!r:.60}: has to be a small positive number")
    if type(tied) is not bool:
        raise UserError(f"{file}: tie_word_embeddings = {tied!r:.60}: has to be true or false")
    try:
        rope = rope_of(given, window, notes, file)
        if rope.rope_type == "dynamic":
            shape["max_seq_len"] = round(rope.factor * window)
        config = ModelConfig(**shape, norm_eps=float(epsilon), rope=rope, tied=tied)
        inv_freq(rope, config.head_dim)  # settings of RoPE that do not fit the head
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    check_shape(folder, config)
    for note in dict.fromkeys(notes) if not quiet else ():
        print(note)
    return config


def refuse_others(file, given):
    """Whatever makes a model another than the LLaMA of model.py, but for a Mistral's sliding_window, which is returned: None is none."""
    unsaid = {"llama": ["LlamaForCausalLM"], "mistral": ["MistralForCausalLM"]}.get(str(given.get("model_type")))
    names = given.get("architectures") or unsaid
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(f"{file}: architecture {json.dumps(name):.60}: only LLaMA's loads (LlamaForCausalLM, or MistralForCausalLM "
                        "without a sliding window)")
    if (method := given.get("quantization_config")) is not None:
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise UserError(f"{file}: quantization_config {method!r:.60}: quantised weights do not load; take the release in bfloat16")
    for key in ("attention_bias", "mlp_bias"):
        if given.get(key):
            raise UserError(f"{file}: {key} is {json.dumps(given[key]):.60}, and LLaMA's layers have no biases: this model is another one "
                            "and does not load")
    if given.get("hidden_act", "silu") != "silu":
        raise UserError(f"{file}: hidden_act {given['hidden_act']!r:.60}: LLaMA's is silu; this model is another one and does not load")
    return given.get("sliding_window", 4096) if name == "MistralForCausalLM" else None  # transformers' default where nothing is said


def rope_of(given, window, notes, file):
    """The RopeConfig of a config.json: `rope_parameters` (transformers 5) or `rope_scaling`, with what older files say beside them."""
    found = [rope_from(given, given[key], window, notes, file) for key in ("rope_scaling", "rope_parameters") if given.get(key)]
    if len(found) == 2 and found[0] != found[1]:
        raise UserError("rope_scaling and rope_parameters contradict each other: remove one of them")
    return found[0] if found else rope_from(given, {}, window, notes, file)


def rope_from(given, rope, window, notes, file):
    """One of the two dicts, completed as transformers does it. Which window is L, and which L', differs from method to method:

        linear                    max_position_embeddings is L', and L = L' / factor
        dynamic                   max_position_embeddings is L, whatever else is said: transformers computes with it; L' = factor L
        yarn, llama3, longrope    original_max_position_embeddings is L, else max_position_embeddings
    """
    if not isinstance(rope, dict):
        raise UserError(f"rope {rope!r:.60}: has to be an object like {{\"rope_type\": \"linear\", \"factor\": 2}}")
    rope = {key: value for key, value in rope.items() if value is not None or key == "factor"}
    for key in ("rope_theta", "partial_rotary_factor"):
        if given.get(key) is not None:
            rope.setdefault(key, given[key])
    name = "original_max_position_embeddings"
    kind, said = rope.get("rope_type", rope.get("type", "default")), given.get(name)  # the second as Phi-3's files have it
    if "default" in (rope.get("rope_type"), rope.get("type")):
        rope.pop("factor", None)  # of no effect; ours would divide the window by it
    if kind == "yarn":
        rope.pop("finetuned", None)  # the YaRN authors' own checkpoints
    if said is not None and (kind in ("yarn", "llama3", "longrope") or name not in rope):
        rope[name] = said
    if kind == "dynamic":
        if rope.get(name, window) != window:
            notes.append(f"{file}: {name} {rope[name]} is ignored: dynamic begins at max_position_embeddings, {window}, as in transformers")
        rope[name] = window
    config = RopeConfig.from_dict(rope, max_position_embeddings=window)
    refuse_unsayable(config)
    if kind in ("linear", "pi") and config.original_max_position_embeddings is None:
        config = dataclasses.replace(config, original_max_position_embeddings=max(1, round(window / config.factor)))
    return config


def refuse_unsayable(rope):
    """What Hugging Face's LLaMA has no room for, in either direction."""
    if rope.partial_rotary_factor != 1 and not METHODS[rope.rope_type].whole_head:
        raise UserError(f"partial_rotary_factor {rope.partial_rotary_factor:g}: transformers' LLaMA turns whole heads; only Meta's layout "
                        "has this model")
    if METHODS[rope.rope_type].adds == "network":
        raise UserError(f"rope_type {rope.rope_type}: transformers has no words for it, nor a place for what it learns; only Meta's layout "
                        "has this model")


def check_shape(folder, config):
    """Refuse a config.json that is another model's, before anything of its size is made."""
    files = checkpoint_files(folder)
    owner = tensors_of(files)
    layers = {match[1] for name in owner if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    if len(layers) != config.n_layers:
        raise UserError(f"{files[0].parent}: the weights have {len(layers)} layers, and config.json num_hidden_layers {config.n_layers}: "
                        "do the two belong together, and are all parts here?")
    for name, shape in (("tok_embeddings", (config.vocab_size, config.dim)), ("layers.0.feed_forward.w1", (config.ffn_dim, config.dim)),
                        ("layers.0.attention.wq", (config.n_heads * config.head_dim, config.dim)),
                        ("layers.0.attention.wk", (config.n_kv_heads * config.head_dim, config.dim))):
        name = hugging_face_name(f"{name}.weight")
        if name in owner:
            check_tensor(owner[name], name, open_file(owner[name])[1](name), shape)


# ---------------------------------------------------------------------------------------------------------------------
# In: the tensors


def checkpoint_files(folder):
    """The files that hold the weights, none missing. safetensors if there are any: they hold nothing but tensors."""
    folder = Path(folder)
    for stem, suffix, glob in (("model", ".safetensors", "*.safetensors"), ("pytorch_model", ".bin", "pytorch_model*.bin")):
        if (whole := folder / f"{stem}{suffix}").is_file():
            return [whole]
        if (index := folder / f"{stem}{suffix}.index.json").is_file():
            return indexed(index, suffix)
        # beside them may lie Mistral's own format (consolidated) and LoRA's additions
        found = sorted(file for file in folder.glob(glob) if not file.name.startswith(("consolidated", "adapter")))
        numbers = [re.search(r"-(\d+)-of-(\d+)\.", file.name) for file in found]
        if found and all(numbers) and (len(found) != int(numbers[0][2]) or len({int(number[1]) for number in numbers}) != len(found)):
            raise UserError(f"{folder}: {len(found)} of {int(numbers[0][2])} parts of the weights ({found[0].name}, ...): copy all of them")
        if found:
            return found
    raise UserError(f"{folder}: no model.safetensors and no pytorch_model.bin in it: copy the weights beside config.json")


def indexed(index, suffix):
    """The files that an index names. They lie beside it: a path that leads elsewhere is refused."""
    mapped = settings(index).get("weight_map")
    if not isinstance(mapped, dict) or not mapped or not all(isinstance(name, str) for name in mapped.values()):
        raise UserError(f"{index}: has no weight_map {{tensor: file}}: copy it again")
    files = []
    for name in sorted(set(mapped.values())):
        if not re.fullmatch(r"[\w-][\w.-]{0,200}", name) or not name.endswith(suffix):
            raise UserError(f"{index}: names the file {name[:60]!r}: only {suffix} files of the same folder are read")
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent / name}: no such file, but the index names it: copy all parts of the weights")
        files.append(index.parent / name)
    return files


def open_file(file):
    """(names, get) of a file of weights: get(name) is the tensor, memory-mapped. Nothing in a file is ever run."""
    if file.suffix == ".bin":
        checkpoint = open_checkpoint(file)
        return list(checkpoint), checkpoint.__getitem__
    try:
        from safetensors import safe_open
    except ImportError:
        raise UserError(f"{file}: reading it needs a package: pip install safetensors") from None

    def guarded(action, *args):
        try:
            return action(*args)
        except (MemoryError, PermissionError):
            raise
        except Exception as error:  # SafetensorError, and whatever else damaged bytes lead to
            raise UserError(f"{file}: damaged, cut off, or no safetensors file ({one_line(error)}): copy it again") from None
    opened = guarded(lambda: safe_open(str(file), framework="pt", device="cpu"))
    return list(guarded(opened.keys)), lambda name: guarded(opened.get_tensor, name)


def tensors_of(files):
    """{name: file} of all tensors. Frequencies that old versions stored are computed here: they are left out."""
    owner = {}
    for file in files:
        for name in open_file(file)[0]:
            if not name.isprintable() or len(name) > 200:
                raise UserError(f"{file}: damaged (a tensor is called {name!r:.60}): copy it again")
            if name in owner:
                raise UserError(f"{file}: {name} is in {owner[name].name} too: leave the files of one checkpoint there, and no other")
            if not name.endswith("rotary_emb.inv_freq"):
                owner[name] = file
    return owner


def hugging_face_tensors(folder, shapes):
    """Yield (file, name, where, tensor) for each tensor, under Meta's name and with Meta's rows."""
    config, files = hugging_face_config(folder, quiet=True), checkpoint_files(folder)
    owner, wanted = tensors_of(files), {hugging_face_name(name): name for name in shapes}
    embedding, output = "model.embed_tokens.weight", "lm_head.weight"
    if config.tied and output in owner:
        if embedding in owner:
            check_tied(owner)
            del owner[output]
        else:  # of two names for one tensor some writers keep this one
            wanted[output] = wanted.pop(embedding)
    for name in sorted(set(owner) ^ set(wanted)):
        if name in owner:
            raise UserError(f"{owner[name]}: {name} is no tensor of the LLaMA that config.json describes: do the two belong together?")
        hint = " (or is tie_word_embeddings true?)" if name == "lm_head.weight" else ""
        place = files[0].parent if len(files) > 1 else files[0]
        raise UserError(f"{place}: {name} is missing{hint}: take config.json and all of its weights")
    for file in files:
        read, remap, (names, get) = 0, max(file.stat().st_size / 16, REMAP), open_file(file)
        for name in names:
            if owner.get(name) != file:
                continue
            tensor = get(name)
            check_tensor(file, name, tensor, shapes[wanted[name]])
            yield file, wanted[name], (), reorder(config, wanted[name], tensor)
            read += tensor.nbytes
            del tensor
            if read > remap:
                del get  # the old mapping first: its pages are this process's memory until nobody holds it
                read, (_, get) = 0, open_file(file)


def check_tensor(file, name, tensor, shape):
    check_kind(file, name, tensor)
    if tuple(tensor.shape) != tuple(shape):
        raise UserError(f"{file}: {name} is {list(tensor.shape)}, and config.json makes it {list(shape)}: do the two belong together?")


def check_tied(owner):
    """A tied output that is written out all the same has to be the embedding. Compared 16 MiB at a time: it is the largest tensor."""
    row, rows = 0, 1
    while row < rows:
        a, b = (open_file(owner[name])[1](name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
        step = max(1, REMAP // 4 // a[:1].nbytes)
        if a.shape != b.shape or not torch.equal(a[row:row + step], b[row:row + step]):
            raise UserError(f"{owner['lm_head.weight']}: lm_head.weight is not the embedding, and config.json has tie_word_embeddings "
                            "true: set it to false")
        row, rows = row + step, len(a)
        del a, b  # and with them what was read of the files


# ---------------------------------------------------------------------------------------------------------------------
# Out

SAFETENSORS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def export(path, to, out, dtype=None):
    """What `python weights.py export` does: the model of any folder as Hugging Face's layout ("hf") or Meta's ("meta"), bit for bit.

    dtype: of the weights; None keeps each as it is stored. The folder `out` has to be new or empty.
    """
    tokenizer = load_tokenizer(path) if has_tokenizer(path) else None
    free_folder(out)
    if to == "hf":
        with contextlib.redirect_stdout(None):  # load_model says again what is assumed
            config_json(load_config(path), torch.float32)  # what cannot be said is refused before the weights are read
    model = load_model(path, dtype=dtype)
    (export_hugging_face if to == "hf" else save_model)(model, out, tokenizer)
    kept = f"tokenizer of {tokenizer.path}" if tokenizer else "no tokenizer: there was none"
    print(f"{out}: {model.config.parameters():,} parameters, window {model.config.max_seq_len}, {model.config.rope.rope_type}, {kept}")


def export_hugging_face(model, out, tokenizer=None, dtype=None, shard_bytes=5 * 10**9):
    """Write a model as a Hugging Face folder that transformers loads as it is, RoPE scaling included.

    tokenizer: a Tokenizer, or None. dtype: of the weights, if not the model's own. Above shard_bytes there are several files and an index.
    The folder appears under its name only when it is complete; it has to be new or empty. A RoPE method that transformers has no words for
    is a UserError. What lay beside the model or its tokenizer, such as generation_config.json, goes along.
    """
    tensors = [(name, tensor.detach()) for name, tensor in model.state_dict().items()]
    described, source = config_json(model.config, dtype or tensors[0][1].dtype), Path(getattr(model, "path", os.devnull))
    files, given = tokenizer.files() if tokenizer else beside(source), {}
    if tokenizer:
        given = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        if "tokenizer.model" in files and "tokenizer_config.json" not in files:
            files["tokenizer_config.json"] = tokenizer_config(tokenizer)
    given |= json.loads(files.get("generation_config.json", b"{}"))
    if not tokenizer or tokenizer.path.parent == source:
        given |= settings(source / "config.json")
    described |= {key: given[key] for key in IDS if given.get(key) is not None}
    with whole_folder(out) as saving:
        for name, data in files.items():
            with whole_file(saving / name) as file:
                file.write(data)
        write_json(saving / "config.json", described)
        parts, size = [[]], 0
        for name, tensor in tensors:
            nbytes = tensor.numel() * (dtype or tensor.dtype).itemsize
            if parts[-1] and size + nbytes > shard_bytes:
                parts, size = [*parts, []], 0
            parts[-1].append((name, tensor))
            size += nbytes
        where, total = {}, 0
        for n, part in enumerate(parts):
            name = "model.safetensors" if len(parts) == 1 else f"model-{n + 1:05d}-of-{len(parts):05d}.safetensors"
            total += write_safetensors(saving / name, model.config, part, dtype)
            where |= {hugging_face_name(tensor): name for tensor, _ in part}
        if len(parts) > 1:
            write_json(saving / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def config_json(config, dtype):
    """config.json of a LLaMA. RoPE stands there twice, for transformers 5 (rope_parameters) and for all that is older (rope_scaling)."""
    rope = config.rope
    refuse_unsayable(rope)
    if config.dim % config.n_heads:
        raise UserError(f"dim {config.dim} is no multiple of n_heads {config.n_heads}, which transformers' LLaMA asks for")
    original = original_window(config)
    if rope.rope_type not in ("default", "linear", "proportional"):
        rope = dataclasses.replace(rope, original_max_position_embeddings=original)
    parameters = dict(sorted(rope.to_hugging_face(config.head_dim).items()))  # the same bytes, by whatever way a model came
    ours = {key: getattr(config, name) for key, name in SHAPE.items()}
    if rope.rope_type == "dynamic":
        ours["max_position_embeddings"] = original  # transformers counts from here
    elif rope.original_max_position_embeddings and "original_max_position_embeddings" not in parameters:
        ours["original_max_position_embeddings"] = original  # of no effect there; we know L by it again
    scaling = {key: value for key, value in parameters.items() if key not in ("rope_theta", "partial_rotary_factor")}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **ours, "hidden_act": "silu", "rms_norm_eps": config.norm_eps,
            "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": config.tied, "rope_theta": parameters["rope_theta"],
            "rope_parameters": parameters, "rope_scaling": None if parameters["rope_type"] in ("default", "proportional") else scaling,
            "torch_dtype": str(dtype).removeprefix("torch."), "bos_token_id": None, "eos_token_id": None}


def tokenizer_config(tokenizer):
    """tokenizer_config.json for a SentencePiece model, by which transformers' LlamaTokenizer makes the same ids: BOS in front, no EOS, and
    a space before the text only if the model itself puts one there."""
    piece = tokenizer.model.id_to_piece
    return json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": piece(tokenizer.bos_id), "eos_token": piece(tokenizer.eos_id),
                       "unk_token": piece(tokenizer.model.unk_id()), "add_bos_token": True, "add_eos_token": False, "legacy": False,
                       "add_prefix_space": tokenizer.dummy_prefix, "clean_up_tokenization_spaces": False}, indent=1).encode()


def write_safetensors(path, config, tensors, dtype):
    """Write [(Meta's name, tensor)] as a safetensors file, one tensor at a time; returns the bytes of the tensors.

    The format: the length of the header, 8 bytes, little-endian; the header, JSON {name: {dtype, shape, data_offsets}}, filled up with
    spaces to a multiple of 8; the tensors.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors:
        kind, start = dtype or tensor.dtype, end
        end += tensor.numel() * kind.itemsize
        header[hugging_face_name(name)] = {"dtype": SAFETENSORS[kind], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    try:
        with whole_file(path) as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name, tensor in tensors:
                check_values(path, name, tensor, dtype or tensor.dtype)
                file.write(plain(reorder(config, name, tensor.cpu(), inverse=True), dtype).flatten().view(torch.uint8).numpy())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    return end


def free_folder(out):
    """Refuse a folder that holds something: its files and ours would be mixed."""
    out = Path(out)
    if out.exists() and not out.is_dir() or out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: exists and is not empty: name a new folder")


@contextlib.contextmanager
def whole_folder(out):
    """A folder that appears under its name only when it is complete: it is filled beside its place, as .NAME.saving, and then renamed."""
    free_folder(out)
    out = Path(out).resolve()
    saving = out.with_name(f".{out.name}.saving")
    shutil.rmtree(saving, ignore_errors=True)
    saving.mkdir(parents=True)
    try:
        yield saving
        os.replace(saving, out)
    except BaseException:
        shutil.rmtree(saving, ignore_errors=True)
        raise
