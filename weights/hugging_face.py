"""Hugging Face's LLaMA folders: config.json and the tensors.

    config.json            the shape in other words than Meta's (SHAPE), and RoPE (rope_dialects.py)
    model.safetensors      the tensors under other names (NAMES); or several files and
                           model.safetensors.index.json; or the older pytorch_model.bin
    tokenizer.model        SentencePiece, or tokenizer.json

The tensors are Meta's, except for the rows of wq and wk. RoPE rotates pairs of numbers, and the
two layouts disagree on which numbers of a head are a pair (u, v): neighbours in Meta's layout and
in model.py, one of each half in Hugging Face's. The rows of the weight of one head, D = 8:

    Meta            row   0  1  2  3  4  5  6  7
                    pair  0  0  1  1  2  2  3  3
                          u  v  u  v  u  v  u  v

    Hugging Face    row   0  1  2  3  4  5  6  7
                    pair  0  1  2  3  0  1  2  3
                          u  u  u  u  v  v  v  v

So Meta's rows 0 1 2 3 4 5 6 7 are Hugging Face's rows 0 4 1 5 2 6 3 7 (head_order), within each
head: H heads of wq, K heads of wk. The scores q.k are the same, as q and k are permuted alike.
"""
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from common.errors import UserError, one_line
from common.files import read_json_object
from methods import inv_freq
from model import ModelConfig
from weights.checks import REMAP, check_tensor_kind
from weights.meta import open_checkpoint
from weights.rope_dialects import (LLAMA, MINISTRAL3, SMOLLM3, refuse_two_temperatures,
                                   rope_from_hugging_face)

# The classes that compute what model.py does, and their model_type.
MISTRAL = "MistralForCausalLM"
ARCHITECTURES = {LLAMA: "llama", MISTRAL: "mistral", SMOLLM3: "smollm3", MINISTRAL3: "ministral3"}
# Where their defaults, which a config.json need not say, are not LLaMA's.
OWN_DEFAULTS = {
    MISTRAL: {"sliding_window": 4096},
    SMOLLM3: {"tie_word_embeddings": True, "rope_theta": 2e6, "no_rope_layer_interval": 4},
    MINISTRAL3: {"rms_norm_eps": 1e-5, "head_dim": 128}}
SHAPE = {"hidden_size": "dim", "num_hidden_layers": "n_layers",
         "num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads",
         "vocab_size": "vocab_size", "intermediate_size": "ffn_dim",
         "head_dim": "head_dim", "max_position_embeddings": "max_seq_len"}
OPTIONAL_KEYS = ("num_key_value_heads", "head_dim", "max_position_embeddings")
NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
         "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
         "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
         "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
         "feed_forward.w3": "mlp.up_proj",
         "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
ROTATED_ROWS = ("attention.wq.weight", "attention.wk.weight",
                "attention.wq.lora_b", "attention.wk.lora_b")
EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"


def hugging_face_name(name: str) -> str:
    """layers.3.attention.wq.weight -> model.layers.3.self_attn.q_proj.weight"""
    layer, stem = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", name).groups()
    prefix = f"model.{layer}" if layer else ""
    return f"{prefix}{NAMES[stem]}.weight"


def head_order(head_dim: int) -> torch.Tensor:
    """Row r of a Meta head is row head_order[r] of the Hugging Face head: 0 D/2 1 D/2+1 ..., [D]"""
    halves = torch.arange(head_dim).view(2, -1)                    # [2, D/2]: all u, then all v
    return halves.t().flatten()                                    # [D/2, 2] -> [D]: u v u v ...


def reorder_rows(config: ModelConfig, name: str, tensor: torch.Tensor,
                 inverse: bool = False) -> torch.Tensor:
    """The rows of wq or wk, Hugging Face's in Meta's order; inverse: Meta's in Hugging Face's.
    LoRA's B [out, r] has the same rows. Every other tensor is returned as it is. name: Meta's."""
    if not name.endswith(ROTATED_ROWS):
        return tensor
    order = head_order(config.head_dim)
    if inverse:
        order = order.argsort()
    heads = tensor.unflatten(0, (-1, config.head_dim))             # [H*D, C] -> [H, D, C]
    return heads[:, order].flatten(0, 1)                           # [H, D, C] -> [H*D, C]


# --------------------------------------------------------------------------------------------------
# config.json

def read_config(folder: str | Path) -> ModelConfig:
    """ModelConfig of a folder. What had to be assumed is printed; a model that model.py does not
    compute is a UserError. Of the weights only the shapes are read, to see that they fit."""
    config, notes = config_and_notes(folder)
    check_stored_shapes(folder, config)
    for note in dict.fromkeys(notes):
        print(f"{Path(folder) / 'config.json'}: {note}")
    return config


def config_and_notes(folder: str | Path) -> tuple[ModelConfig, list[str]]:
    """(ModelConfig of config.json, one line for each assumption)."""
    file = Path(folder) / "config.json"
    given = read_json_object(file)
    notes = []
    try:
        refuse_other_models(given)
        name = architecture(given)
        given = OWN_DEFAULTS.get(name, {}) | given
        shape = read_shape(given, notes)
        window = shape["max_seq_len"]
        check_sliding_window(given, window, notes)
        norm_eps = given.get("rms_norm_eps", 1e-6)
        if type(norm_eps) not in (int, float) or not 0 < norm_eps < 1:
            raise UserError(f"rms_norm_eps = {norm_eps!r:.60}: has to be a small positive number")
        tied = given.get("tie_word_embeddings", False)
        if type(tied) is not bool:
            raise UserError(f"tie_word_embeddings = {tied!r:.60}: has to be true or false")
        rope = rope_from_hugging_face(given, window, notes, name)
        if rope.rope_type == "dynamic":
            shape["max_seq_len"] = round(rope.factor * window)
        config = ModelConfig(**shape, norm_eps=float(norm_eps), rope=rope, tied=tied)
        inv_freq(rope, config.head_dim)  # refuses settings that do not fit the head
        refuse_two_temperatures(rope, config.head_dim)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return config, notes


def architecture(given: dict) -> object:
    """The class of the model in transformers. Some files say only model_type."""
    names = given.get("architectures")
    if not names:
        class_of = {model_type: name for name, model_type in ARCHITECTURES.items()}
        return class_of.get(str(given.get("model_type")))
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    return LLAMA if name == "LLaMAForCausalLM" else name  # as conversions of early 2023 write it


def refuse_other_models(given: dict) -> None:
    """A UserError for anything by which a model is not the LLaMA of model.py."""
    name = architecture(given)
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(f"architecture {json.dumps(name):.60}: only LLaMA's loads (LLaMA 1 to 3, "
                        f"not 4: {', '.join(ARCHITECTURES)}, without a sliding window)")
    for key in ("text_config", "num_local_experts", "attn_temperature_tuning"):
        if given.get(key):
            raise UserError(f"{key} is set, as in Llama 4: images, experts and its temperature are "
                            "not LLaMA's; this model is another one and does not load")
    method = given.get("quantization_config")
    if method is not None:
        if isinstance(method, dict):
            method = method.get("quant_method")
        raise UserError(f"quantization_config {method!r:.60}: quantised weights do not load; take "
                        "the release in bfloat16")
    for key in ("attention_bias", "mlp_bias"):
        if given.get(key):
            raise UserError(f"{key} is {json.dumps(given[key]):.60}, and LLaMA's layers have no "
                            "biases: this model is another one and does not load")
    activation = given.get("hidden_act", "silu")
    if activation != "silu":
        raise UserError(f"hidden_act {activation!r:.60}: LLaMA's is silu; this model is another "
                        "one and does not load")


def read_shape(given: dict, notes: list[str]) -> dict[str, int]:
    """The numbers of ModelConfig that SHAPE names."""
    shape = {}
    optional = OPTIONAL_KEYS if architecture(given) == LLAMA else ("head_dim",)
    for key, name in SHAPE.items():
        value = given.get(key)
        if value is None and key in optional:
            continue
        if key not in given:
            raise UserError(f"{key} is missing: take the config.json of the checkpoint")
        if type(value) is not int or not 0 < value < 2**31:
            raise UserError(f"{key} = {value!r:.60}: has to be a positive whole number")
        shape[name] = value
    if "max_seq_len" not in shape:
        notes.append("does not say max_position_embeddings: transformers' 2048 is assumed")
        shape["max_seq_len"] = 2048
    return shape


def check_sliding_window(given: dict, window: int, notes: list[str]) -> None:
    """Refuse a Mistral or SmolLM3 whose sliding window is shorter than its context: attention in
    model.py always sees the whole text."""
    name, kinds = architecture(given), given.get("layer_types") or ["full_attention"]
    if name == LLAMA:
        return
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UserError(f"layer_types {kinds!r:.60}: attention here sees the whole text; a model "
                        "whose layers all have full_attention loads")
    sliding = given.get("sliding_window")
    if sliding is None or name == SMOLLM3 and not given.get("use_sliding_window"):
        return
    if type(sliding) is not int or sliding < window:
        raise UserError(f"sliding_window {sliding!r:.60}: attention here sees the whole text; a "
                        "model without one loads (\"sliding_window\": null)")
    notes.append(f"sliding_window {sliding} is ignored: it makes no difference up to {window} "
                 "tokens; beyond it attention here sees the whole text")


def check_stored_shapes(folder: str | Path, config: ModelConfig) -> None:
    """Refuse a config.json that belongs to other weights, before memory for them is taken."""
    file_of = find_tensors(folder)
    layers = len({name.split(".")[2] for name in file_of if name.startswith("model.layers.")})
    if layers != config.n_layers:
        raise UserError(f"{folder}: the weights have {layers} layers, and config.json "
                        f"num_hidden_layers {config.n_layers}: do the two belong together, and "
                        "are all parts here?")
    query_rows = config.n_heads * config.head_dim
    key_rows = config.n_kv_heads * config.head_dim
    shapes = {"tok_embeddings.weight": (config.vocab_size, config.dim),
              "layers.0.feed_forward.w1.weight": (config.ffn_dim, config.dim),
              "layers.0.attention.wq.weight": (query_rows, config.dim),
              "layers.0.attention.wk.weight": (key_rows, config.dim)}
    for name, shape in shapes.items():
        name = hugging_face_name(name)
        if name in file_of:
            tensor = open_weights(file_of[name])[name]
            check_tensor(file_of[name], name, tensor, shape)


def check_tensor(file: Path, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a tensor that is not floating point, or not of this shape."""
    check_tensor_kind(file, name, tensor)
    if tuple(tensor.shape) != shape:
        raise UserError(f"{file}: {name} is {list(tensor.shape)}, and config.json makes it "
                        f"{list(shape)}: do the two belong together?")


# --------------------------------------------------------------------------------------------------
# Files

def find_tensors(folder: str | Path) -> dict[str, Path]:
    """{name: file} of all tensors, but for the frequencies that transformers before 4.32 stored."""
    file_of = {}
    for file in checkpoint_files(folder):
        for name in open_weights(file):
            if not name.isprintable() or len(name) > 200:
                raise UserError(f"{file}: damaged (a tensor is called {name!r:.60}): copy it again")
            if name in file_of:
                raise UserError(f"{file}: {name} is in {file_of[name].name} too: leave the files "
                                "of one checkpoint there, and no other")
            if not name.endswith("rotary_emb.inv_freq"):
                file_of[name] = file
    return file_of


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The files that hold the weights, none missing; safetensors rather than pickles."""
    folder = Path(folder)
    files = (files_of_kind(folder, "model", ".safetensors", "*.safetensors")
             or files_of_kind(folder, "pytorch_model", ".bin", "pytorch_model*.bin"))
    if not files:
        raise UserError(f"{folder}: no model.safetensors and no pytorch_model.bin in it: copy the "
                        "weights beside config.json")
    return files


def files_of_kind(folder: Path, stem: str, suffix: str, pattern: str) -> list[Path]:
    """One file, or those of an index, or all that fit the pattern; [] if there are none."""
    single = folder / f"{stem}{suffix}"
    if single.is_file():
        return [single]
    index = folder / f"{stem}{suffix}.index.json"
    if index.is_file():
        return files_of_index(index, suffix)
    # Beside them may lie Mistral's own format (consolidated) and LoRA's weights (adapter).
    files = [file for file in sorted(folder.glob(pattern))
             if not file.name.startswith(("consolidated", "adapter"))]
    parts = [re.search(r"-(\d+)-of-(\d+)\.", file.name) for file in files]
    if files and all(parts):
        total = int(parts[0][2])
        numbers = {int(part[1]) for part in parts}
        if len(files) != total or len(numbers) != total:
            raise UserError(f"{folder}: {len(files)} of {total} parts of the weights "
                            f"({files[0].name}, ...): copy all of them")
    return files


def files_of_index(index: Path, suffix: str) -> list[Path]:
    """The files that an index names. They lie beside it: a path that leads elsewhere is refused."""
    mapped = read_json_object(index).get("weight_map")
    if (not isinstance(mapped, dict) or not mapped
            or not all(isinstance(name, str) for name in mapped.values())):
        raise UserError(f"{index}: has no weight_map {{tensor: file}}: copy it again")
    files = []
    for name in sorted(set(mapped.values())):
        if not re.fullmatch(r"[\w-][\w.-]{0,200}", name) or not name.endswith(suffix):
            raise UserError(f"{index}: names the file {name[:60]!r}: only {suffix} files of the "
                            "same folder are read")
        file = index.parent / name
        if not file.is_file():
            raise UserError(f"{file}: no such file, but the index names it: copy all parts")
        files.append(file)
    return files


def open_weights(file: Path) -> dict[str, torch.Tensor]:
    """{name: tensor} of a file of weights, memory-mapped. Code inside a file never runs."""
    if file.suffix == ".bin":
        return open_checkpoint(file)
    try:
        from safetensors import safe_open
    except ImportError:
        raise UserError(f"{file}: reading it needs a package: pip install safetensors") from None
    try:
        with safe_open(str(file), framework="pt", device="cpu") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # damaged bytes raise anything
        raise UserError(f"{file}: damaged, cut off, or no safetensors file ({one_line(error)}): "
                        "copy it again") from None


# --------------------------------------------------------------------------------------------------
# Tensors

def read_tensors(folder: str | Path, shapes: dict[str, tuple[int, ...]]
                 ) -> Iterator[tuple[Path, str, tuple, torch.Tensor]]:
    """Yield (file, name, (), tensor) for each tensor, with Meta's name and Meta's order of rows.

    shapes: {Meta's name: shape} of all tensors that the model has.
    """
    config, _ = config_and_notes(folder)
    file_of = find_tensors(folder)
    meta_name = {hugging_face_name(name): name for name in shapes}
    if config.tied and OUTPUT in file_of:
        if EMBEDDING in file_of:
            check_tied_output(file_of, config)
            del file_of[OUTPUT]
        else:  # of two names for one tensor some writers keep this one
            meta_name[OUTPUT] = meta_name.pop(EMBEDDING)
    files = sorted(set(file_of.values()))
    refuse_missing_and_unknown(files[0] if len(files) == 1 else folder, file_of, meta_name)
    for file in files:
        names = [name for name in file_of if file_of[name] == file]
        for name, tensor in mapped_tensors(file, names):
            ours = meta_name[name]
            check_tensor(file, name, tensor, shapes[ours])
            yield file, ours, (), reorder_rows(config, ours, tensor)


def mapped_tensors(file: Path, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor). The file is mapped anew after each sixteenth, as pages that were read
    count as memory of this process until nobody holds the mapping."""
    limit = max(file.stat().st_size / 16, REMAP)
    tensors = open_weights(file)
    read = 0
    for name in names:
        yield name, tensors[name]
        read += tensors[name].nbytes
        if read > limit:
            del tensors  # before the next mapping, not after it
            tensors = open_weights(file)
            read = 0


def refuse_missing_and_unknown(place: str | Path, file_of: dict[str, Path],
                               meta_name: dict[str, str]) -> None:
    """A UserError if the files hold other tensors than the model has."""
    for name in sorted(file_of.keys() ^ meta_name.keys()):
        if name in file_of:
            raise UserError(f"{file_of[name]}: {name} is no tensor of the LLaMA that config.json "
                            "describes: do the two belong together?")
        hint = " (or is tie_word_embeddings true?)" if name == OUTPUT else ""
        raise UserError(f"{place}: {name} is missing{hint}: take config.json and all its weights")


def check_tied_output(file_of: dict[str, Path], config: ModelConfig) -> None:
    """A tied output that is stored all the same has to equal the embedding. It is the largest
    tensor: compared some rows at a time, of a file mapped anew each time."""
    rows = max(1, REMAP // 16 // config.dim)  # 16 MiB in float32
    for start in range(0, config.vocab_size, rows):
        embedding = open_weights(file_of[EMBEDDING])[EMBEDDING]
        output = open_weights(file_of[OUTPUT])[OUTPUT]
        part = slice(start, start + rows)
        if embedding.shape != output.shape or not torch.equal(embedding[part], output[part]):
            raise UserError(f"{file_of[OUTPUT]}: lm_head.weight is not the embedding, and "
                            "config.json has tie_word_embeddings true: set it to false")
        del embedding, output  # and with them the pages that were read
