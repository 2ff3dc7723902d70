"""The tokenizer inside a .gguf file, as the files that a model folder has: tokenizer.model for
SentencePiece, tokenizer.json for byte-level BPE.

Quantisations of one model give the same bytes, and so a tokenizer with the same sha256.
"""
import json
import struct
from pathlib import Path

from common.errors import UserError
from data.gguf_file import damaged, read_header

PREFIX = "tokenizer.ggml."
ELEMENTS = {"tokens": str, "scores": float, "token_type": int, "merges": str}  # of the arrays
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens
# generation_config.json's words for how to sample -> GGUF's.
SAMPLING = {"temperature": "general.sampling.temp", "top_k": "general.sampling.top_k",
            "top_p": "general.sampling.top_p", "min_p": "general.sampling.min_p",
            "repetition_penalty": "general.sampling.penalty_repeat"}

# How a text is split before its bytes are merged, by llama.cpp's names. The patterns are applied in
# turn, each to the pieces that the ones before it left. They are facts about the models: merges
# make sense only with the split that they were learned from.
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
ENDING = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SLASH_ENDING = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CAMEL_CASE = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + ENDING
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + ENDING
SPLIT_PATTERNS = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    **dict.fromkeys(["gpt-2", "phi-2", "mpt", "olmo"], [GPT2]),
    **dict.fromkeys(["smollm", "starcoder", "refact", "command-r"], [r"\p{N}", GPT2]),
    **dict.fromkeys(["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"], [LLAMA3_SPLIT]),
    **dict.fromkeys(["qwen2", "stablelm2", "deepseek-r1-qwen"], [QWEN2]),
    "tekken": [CAMEL_CASE + r"|\p{N}|" + SLASH_ENDING],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}", GPT2],
}
# In these, a word that is a token needs no merges, and a text begins with BOS.
IGNORE_MERGES = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"}


def gguf_tokenizer_files(path: str | Path) -> dict[str, bytes]:
    """{name: bytes}: what a model folder needs to have this tokenizer, the tokenizer itself first,
    the chat template and the settings of generation last.
    A UserError if the file has none, or one that is not known here."""
    metadata = read_header(path).metadata
    try:
        keys = tokenizer_keys(metadata)
        return files_of_keys(keys) | companions_of_keys(keys, metadata)
    except UnicodeEncodeError:
        raise damaged(f"{path}: damaged (a token that is no UTF-8)") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def files_of_keys(keys: dict) -> dict[str, bytes]:
    """{name: bytes} of the tokenizer alone. keys: complete, without their prefix."""
    if keys["model"] == "llama":
        return {"tokenizer.model": sentencepiece_model(keys)}
    if keys["model"] == "gpt2":
        return {"tokenizer.json": json.dumps(byte_level_bpe(keys), ensure_ascii=False).encode(),
                "tokenizer_config.json": json.dumps(gguf_tokenizer_config(keys)).encode()}
    raise UserError(f"{PREFIX}model {keys['model']!r:.40}: only llama (SentencePiece) and gpt2 "
                    "(byte-level BPE) are read: take the model as a Hugging Face folder")


def companions_of_keys(keys: dict, metadata: dict) -> dict[str, bytes]:
    """{name: bytes} of chat_template.jinja, if there is one, and generation_config.json."""
    ends = [keys.get(f"{name}_token_id") for name in ("eos", "eot", "eom")]
    ids = [i for i in ends if type(i) is int and 0 <= i < len(keys["tokens"])]
    ids = list(dict.fromkeys(ids))
    how = {"bos_token_id": keys["bos_token_id"], "eos_token_id": ids if len(ids) > 1 else ids[0]}
    padding = keys.get("padding_token_id")
    if type(padding) is int and 0 <= padding < len(keys["tokens"]):
        how["pad_token_id"] = padding
    sampling = {name: metadata[key] for name, key in SAMPLING.items()
                if type(metadata.get(key)) in (int, float)}
    if sampling:
        how |= {"do_sample": True} | sampling
    files = {"generation_config.json": json.dumps(how).encode()}
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        files["chat_template.jinja"] = template.encode()
    return files


# --------------------------------------------------------------------------------------------------
# The keys

def tokenizer_keys(metadata: dict) -> dict:
    """The keys tokenizer.ggml.* without this prefix, checked, the defaults filled in."""
    keys = {key.removeprefix(PREFIX): value
            for key, value in metadata.items() if key.startswith(PREFIX)}
    if "model" not in keys or not isinstance(keys.get("tokens"), list) or not keys["tokens"]:
        raise UserError("has no tokenizer inside: export it, and copy the model's tokenizer.json "
                        "into the new folder")
    keys = default_keys(keys) | keys
    check_keys(keys)
    drop_padding(keys)
    return keys


def drop_padding(keys: dict) -> None:
    """Leave out the tokens at the end that only fill the rows of a model's embedding."""
    used = len(keys["tokens"])
    named = [keys.get(f"{name}_token_id") for name in ("bos", "eos", "unknown")]
    while used - 1 not in named and keys["tokens"][used - 1] == f"[PAD{used - 1}]":
        used -= 1
    for name in ("tokens", "scores", "token_type"):
        if name in keys:
            keys[name] = keys[name][:used]


def default_keys(keys: dict) -> dict:
    """What llama.cpp assumes where a file does not say it."""
    sentencepiece = keys["model"] == "llama"
    defaults = {"pre": "default",
                "token_type": [NORMAL] * len(keys["tokens"]),
                "add_bos_token": sentencepiece or str(keys.get("pre")) in IGNORE_MERGES,
                "add_eos_token": False,
                "add_space_prefix": sentencepiece,
                "remove_extra_whitespaces": False}
    if sentencepiece:
        return defaults | {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    # A model without BOS begins its documents with EOS.
    return defaults | {"bos_token_id": keys.get("eos_token_id")}


def check_keys(keys: dict) -> None:
    count = len(keys["tokens"])
    for name, kind in ELEMENTS.items():
        if name not in keys:
            continue
        values = keys[name]
        is_list = isinstance(values, list) and all(type(value) is kind for value in values)
        if not is_list or (name != "merges" and len(values) != count):
            raise damaged(f"{PREFIX}{name} is no list of {kind.__name__}, {count} of them")
    if len(set(keys["tokens"])) != count or "" in keys["tokens"]:
        raise damaged(f"{PREFIX}tokens has an empty token, or one twice")
    ids = ["eos_token_id", "bos_token_id"]
    if keys["model"] == "llama":
        ids.append("unknown_token_id")
    for name in ids:
        value = keys.get(name)
        if type(value) is not int or not 0 <= value < count:
            raise damaged(f"{PREFIX}{name} is {value!r:.60}, and there are {count} tokens")
    for name in "add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces":
        if type(keys[name]) is not bool:
            raise UserError(f"{PREFIX}{name} = {keys[name]!r:.40}: has to be true or false")


# --------------------------------------------------------------------------------------------------
# Byte-level BPE: tokenizer.json

def gguf_tokenizer_config(keys: dict) -> dict:
    """The object in tokenizer_config.json, which names BOS and EOS."""
    return {"tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": keys["tokens"][keys["bos_token_id"]],
            "eos_token": keys["tokens"][keys["eos_token_id"]],
            "add_bos_token": keys["add_bos_token"],
            "add_eos_token": keys["add_eos_token"],
            "clean_up_tokenization_spaces": False}


def byte_level_bpe(keys: dict) -> dict:
    """The object in tokenizer.json. Each of the 256 bytes is written as a visible character ("Ġ" is
    the space). Tokens of the types CONTROL, such as <|im_start|>, and USER_DEFINED are written as
    they are, and found in a text before it is split."""
    tokens = keys["tokens"]
    pre = str(keys["pre"])
    if pre not in SPLIT_PATTERNS:
        raise UserError(f"{PREFIX}pre {pre[:40]!r}: how this model cuts its text is not known here;"
                        f" known are {', '.join(SPLIT_PATTERNS)}: take its Hugging Face folder")
    merges = [merge.split(" ", 1) for merge in keys.get("merges", [])]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    for pair in merges:
        if len(pair) != 2 or not vocabulary.keys() >= {*pair, "".join(pair)}:
            raise damaged(f"{PREFIX}merges has {' '.join(pair)!r:.60}, which are no tokens")
    added = [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": kind == CONTROL}
             for i, (token, kind) in enumerate(zip(tokens, keys["token_type"]))
             if kind in (CONTROL, USER_DEFINED)]
    prepend = {"type": "Prepend", "prepend": " "}
    splits = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
               "invert": False} for pattern in SPLIT_PATTERNS[pre]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
             "ignore_merges": pre in IGNORE_MERGES, "vocab": vocabulary, "merges": merges}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": prepend if keys["add_space_prefix"] else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
            "post_processor": bos_eos_template(keys) or byte_level,
            "decoder": byte_level, "model": model}


def bos_eos_template(keys: dict) -> dict | None:
    """Makes transformers add BOS and EOS unasked; None if the model wants neither."""
    bos = [keys["tokens"][keys["bos_token_id"]]] if keys["add_bos_token"] else []
    eos = [keys["tokens"][keys["eos_token_id"]]] if keys["add_eos_token"] else []
    if not bos and not eos:
        return None
    return begin_and_end(bos, eos, {token: keys["tokens"].index(token) for token in bos + eos})


def begin_and_end(bos: list[str], eos: list[str], id_of: dict[str, int]) -> dict:
    """The post-processor with these tokens around a text, and around a pair of texts."""
    before = [{"SpecialToken": {"id": token, "type_id": 0}} for token in bos]
    after = [{"SpecialToken": {"id": token, "type_id": 0}} for token in eos]
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    ids = {token: {"id": token, "ids": [id_of[token]], "tokens": [token]} for token in bos + eos}
    return {"type": "TemplateProcessing", "single": [*before, first, *after],
            "pair": [*before, first, second, *after], "special_tokens": ids}


# --------------------------------------------------------------------------------------------------
# SentencePiece: tokenizer.model

def sentencepiece_model(keys: dict) -> bytes:
    """The bytes of a tokenizer.model with these pieces, as LLaMA's: BPE, bytes for characters that
    have no piece, no normalisation. Fields have the numbers of sentencepiece_model.proto."""
    if "scores" not in keys:
        raise damaged(f"{PREFIX}scores is missing")
    tokens = keys["tokens"]
    kinds = list(keys["token_type"])
    unknown = keys["unknown_token_id"]
    bos = keys["bos_token_id"]
    eos = keys["eos_token_id"]
    kinds[bos] = CONTROL
    kinds[eos] = CONTROL  # a chat model may call its EOS USER_DEFINED
    if kinds[unknown] != UNKNOWN or kinds.count(UNKNOWN) != 1 or not set(kinds) <= set(range(1, 7)):
        raise damaged(f"{PREFIX}token_type: one token, {PREFIX}unknown_token_id, has to be of type "
                      f"{UNKNOWN}")
    pieces = [(1, protobuf((1, token), (2, score), (3, kind)))
              for token, score, kind in zip(tokens, keys["scores"], kinds)]
    trainer = protobuf((3, 2), (4, len(tokens)), (35, 1),  # BPE, vocab_size, byte_fallback
                       (40, unknown), (41, bos), (42, eos),
                       (45, tokens[unknown]), (46, tokens[bos]), (47, tokens[eos]))
    normalizer = protobuf((1, "identity"), (3, keys["add_space_prefix"]),
                          (4, keys["remove_extra_whitespaces"]), (5, 1))  # a space is written "▁"
    return protobuf(*pieces, (2, trainer), (3, normalizer))


def protobuf(*fields: tuple[int, bytes | str | float | int]) -> bytes:
    """A protocol buffer: field after field, each its number and wire type, then its value."""
    written = []
    for number, value in fields:
        if isinstance(value, float):
            written += [varint(number << 3 | 5), struct.pack("<f", value)]
        elif isinstance(value, int):
            written += [varint(number << 3), varint(value)]
        else:
            data = value.encode() if isinstance(value, str) else value
            written += [varint(number << 3 | 2), varint(len(data)), data]
    return b"".join(written)


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth bit says that another byte follows."""
    written = []
    while value >= 128:
        written.append(value & 127 | 128)
        value >>= 7
    return bytes([*written, value])
