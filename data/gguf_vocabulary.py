"""A tokenizer as the keys tokenizer.ggml.* of a .gguf file: data/gguf_tokenizer.py the other way.

What is written is first read back, and has to make the same ids. A tokenizer that does more than
llama.cpp does, such as another normalisation, is refused.
"""
import json

from common.errors import UserError
from data.gguf_tokenizer import (CONTROL, IGNORE_MERGES, NORMAL, PREFIX, SAMPLING, SPLIT_PATTERNS,
                                 UNUSED, USER_DEFINED, default_keys, files_of_keys)
from data.sentencepiece_json import CHECK_TEXTS, is_bpe, sentencepiece_pieces
from data.tokenizer import JsonTokenizer, Tokenizer, json_of_file, open_tokenizer_files


def vocabulary_keys(tokenizer: Tokenizer, vocab_size: int, files: dict[str, bytes]) -> dict:
    """{key: value} for a model with vocab_size rows, the last of which may stand for no token.

    files: {name: bytes} of those beside the tokenizer. Of them the chat template and the settings
    of generation are told.
    """
    is_json = isinstance(tokenizer, JsonTokenizer)
    keys = byte_level_keys(tokenizer) if is_json else sentencepiece_keys(tokenizer)
    refuse_other_ids(tokenizer, keys)
    rows_without = range(len(keys["tokens"]), vocab_size)
    keys["tokens"] = keys["tokens"] + [f"[PAD{i}]" for i in rows_without]
    keys["token_type"] = keys["token_type"] + [UNUSED] * len(rows_without)
    if "scores" in keys:
        keys["scores"] = keys["scores"] + [-1000.0] * len(rows_without)
    keys |= generation_ids(files, keys)
    keys = {PREFIX + key: value for key, value in keys.items()}
    return keys | sampling_keys(files) | chat_template_key(files)


def sentencepiece_keys(tokenizer: Tokenizer) -> dict:
    data = tokenizer.model.serialized_model_proto()
    if not is_bpe(data):
        raise UserError(f"{tokenizer.path}: no BPE model of SentencePiece: only BPE is written to "
                        "GGUF")
    pieces = sentencepiece_pieces(data)
    tokens, scores, kinds = zip(*pieces)
    trimmed = tokenizer.model.encode("a   b") == tokenizer.model.encode("a b")
    return {"model": "llama", "pre": "default", "tokens": list(tokens), "scores": list(scores),
            "token_type": list(kinds), "unknown_token_id": tokenizer.model.unk_id(),
            "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id,
            "add_bos_token": True, "add_eos_token": False,
            "add_space_prefix": tokenizer.dummy_prefix, "remove_extra_whitespaces": trimmed}


def byte_level_keys(tokenizer: JsonTokenizer) -> dict:
    """Of a tokenizer.json. An id without a token becomes one that no text has."""
    whole = json.loads(tokenizer.model.to_str())
    model = whole["model"]
    if model["type"] != "BPE":
        raise UserError(f"{tokenizer.path}: a tokenizer of type {model['type']:.40}: only BPE is "
                        "written to GGUF")
    tokens = {i: token for token, i in tokenizer.pieces.items()}
    kinds = {i: NORMAL for i in tokens}
    for added in whole["added_tokens"]:
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    ids = range(tokenizer.vocab_size)
    plain = tokenizer.encode("a")
    dressed = tokenizer.model.encode("a").ids
    return {"model": "gpt2", "pre": split_name(tokenizer, bool(model.get("ignore_merges"))),
            "tokens": [tokens.get(i, f"[PAD{i}]") for i in ids],
            "token_type": [kinds.get(i, UNUSED) for i in ids], "merges": merges,
            "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id,
            "add_bos_token": dressed != plain and dressed[0] == tokenizer.bos_id,
            "add_eos_token": dressed != plain and dressed[-1] == tokenizer.eos_id,
            "add_space_prefix": False}


def split_name(tokenizer: JsonTokenizer, ignore_merges: bool) -> str:
    """llama.cpp's name for how this tokenizer.json splits a text: found by what it does."""
    from tokenizers import Regex, pre_tokenizers
    text = "\n".join(CHECK_TEXTS)
    own = tokenizer.model.pre_tokenizer
    pieces = own and [piece for piece, _ in own.pre_tokenize_str(text)]
    bytes_as_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for name, patterns in SPLIT_PATTERNS.items():
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        known = pre_tokenizers.Sequence([*splits, bytes_as_letters])
        same_split = [piece for piece, _ in known.pre_tokenize_str(text)] == pieces
        if same_split and (name in IGNORE_MERGES) == ignore_merges:
            return name
    raise UserError(f"{tokenizer.path}: how this tokenizer splits a text has no name in llama.cpp "
                    f"that is known here; known are {', '.join(SPLIT_PATTERNS)}")


def refuse_other_ids(tokenizer: Tokenizer, keys: dict) -> None:
    """A UserError if a tokenizer with these keys would make other ids."""
    again = open_tokenizer_files(files_of_keys(default_keys(keys) | keys))
    for text in CHECK_TEXTS:
        if again.encode(text) != tokenizer.encode(text):
            raise UserError(f"{tokenizer.path}: GGUF has no words for what this tokenizer does to "
                            f"{text[:30]!r}; export without it")


# --------------------------------------------------------------------------------------------------
# What lies beside a tokenizer

def generation_ids(files: dict[str, bytes], keys: dict) -> dict:
    """The ids of generation_config.json. llama.cpp has three that end an answer: EOS, end of turn
    (eot) and end of message (eom)."""
    said = json_of_file(files, "generation_config.json")
    ends = said.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    others = [i for i in ends if i != keys["eos_token_id"]]
    found = dict(zip(("eot_token_id", "eom_token_id"), others))
    found["padding_token_id"] = said.get("pad_token_id")
    return {name: i for name, i in found.items() if type(i) is int and 0 <= i < len(keys["tokens"])}


def sampling_keys(files: dict[str, bytes]) -> dict:
    said = json_of_file(files, "generation_config.json")
    if not said.get("do_sample"):
        return {}
    return {key: said[name] for name, key in SAMPLING.items()
            if type(said.get(name)) in (int, float) and 0 <= said[name] < 2**31}


def chat_template_key(files: dict[str, bytes]) -> dict:
    """From chat_template.jinja, or from tokenizer_config.json, which may have several by name."""
    template = files.get("chat_template.jinja", b"").decode("utf-8", "replace")
    if not template:
        template = json_of_file(files, "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        by_name = {entry.get("name"): entry.get("template") for entry in template
                   if isinstance(entry, dict)}
        template = by_name.get("default")
    return {"tokenizer.chat_template": template} if isinstance(template, str) else {}
