"""A SentencePiece BPE model as a tokenizer.json, which transformers reads without protobuf."""
import json
import struct
from collections.abc import Iterator

import sentencepiece

from common.errors import UserError
from data.gguf_tokenizer import (BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, begin_and_end)

SPACE_MARK = "\u2581"
# Two tokenizers that make the same ids of these are taken to be the same.
CHECK_TEXTS = [
    "", " ", "   ", "a", " a", "a ", "  a  b   c ", "Hello world", "it's WE'LL they'Re I'LL",
    "x=12345+67  890", "1,000,000 1234567", "\u0663\u0664 \u00bd \u2167", "\n", "\n\n  \n", "\t\tx",
    "Caf\u00e9 d\u00e9j\u00e0 vu \u2014 na\u00efve", "e\u0301 \ufb01 \u2460 \u00a0 \u3000 \ufeff",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3002 \ud55c\uad6d\uc5b4 \u0e44\u0e17\u0e22",
    "\U0001f999\U0001f999 \U0001f469\u200d\U0001f467", "def f(x):\n    return x ** 2\n\n\n",
    "a\r\nb\r\n", "\x01\x7f", "$5 <= 6 ^ 7 ~ |x| //\n/* */", "camelCaseHTTPServer", "<0x0A> <0xZZ",
    "\u0420\u043e\u0441\u0441\u0438\u044f", "\u0395\u03bb\u03bb\u03ac\u03b4\u03b1",
    "The quick brown fox jumps over the lazy dog; internationalization of counterrevolutionaries."]


def sentencepiece_pieces(data: bytes) -> list[tuple[str, float, int]]:
    """[(piece, score, type)] of a tokenizer.model."""
    pieces = []
    for number, piece in protobuf_fields(data):
        if number == 1:
            fields = {2: 0.0, 3: NORMAL} | dict(protobuf_fields(piece))
            pieces.append((fields[1].decode(), fields[2], fields[3]))
    return pieces


def is_bpe(data: bytes) -> bool:
    """Whether a tokenizer.model joins pieces by their scores, as LLaMA's; else it is a Unigram
    model, say, which takes the likeliest cut of a word."""
    trainer = dict(protobuf_fields(data)).get(2, b"")
    return dict(protobuf_fields(trainer)).get(3) == 2


def protobuf_fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """(number, value) of each field of a protocol buffer: gguf_tokenizer.protobuf the other way."""
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        wire_type = tag & 7
        if wire_type == 0:
            value, at = read_varint(data, at)
        else:
            size = {1: 8, 5: 4}.get(wire_type)
            if size is None:
                size, at = read_varint(data, at)
            value = data[at:at + size]
            at += size
            if wire_type == 5:
                [value] = struct.unpack("<f", value)
        yield tag >> 3, value


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """(number, where the next field begins). Seven bits a byte, the lowest first."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def sentencepiece_as_json(data: bytes, dummy_prefix: bool, bos: str) -> bytes | None:
    """The bytes of a tokenizer.json that makes the same ids as this tokenizer.model, with BOS in
    front where special tokens are asked for. None if it does not: no merges imitate a Unigram
    model, or a normalisation. A special token's name inside a text stands for that token."""
    try:
        import tokenizers
    except ImportError:
        raise UserError("writing tokenizer.json needs a package: pip install tokenizers") from None
    if not is_bpe(data):
        return None
    pieces = sentencepiece_pieces(data)
    written = json.dumps(tokenizer_json(pieces, dummy_prefix, bos), ensure_ascii=False)
    found = tokenizers.Tokenizer.from_str(written)
    truth = sentencepiece.SentencePieceProcessor(model_proto=data)
    own = [f"a{piece}b" for piece, _, kind in pieces if kind == USER_DEFINED]
    for text in CHECK_TEXTS + own:
        if found.encode(text, add_special_tokens=False).ids != truth.encode(text):
            return None
    return written.encode()


def tokenizer_json(pieces: list[tuple[str, float, int]], dummy_prefix: bool, bos: str) -> dict:
    """The object in tokenizer.json. A space is written as SPACE_MARK, and a character without a
    piece as its bytes."""
    vocabulary = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    unknown = next(piece for piece, _, kind in pieces if kind == UNKNOWN)
    added = [{"id": i, "content": piece, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": kind == USER_DEFINED and not dummy_prefix,
              "special": kind != USER_DEFINED}
             for i, (piece, _, kind) in enumerate(pieces)
             if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    unmark = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
    prepend = {"type": "Prepend", "prepend": SPACE_MARK}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    prefix = [prepend] if dummy_prefix else []
    suffix = [strip] if dummy_prefix else []
    model = {"type": "BPE", "dropout": None, "unk_token": unknown,
             "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
             "byte_fallback": any(kind == BYTE for _, _, kind in pieces), "ignore_merges": False,
             "vocab": vocabulary, "merges": merges_of(pieces)}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": [*prefix, mark]},
            "pre_tokenizer": None, "post_processor": begin_and_end([bos], [], vocabulary),
            "decoder": {"type": "Sequence", "decoders": [
                unmark, {"type": "ByteFallback"}, {"type": "Fuse"}, *suffix]},
            "model": model}


def merges_of(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose joint piece has the highest score, BPE those whose
    merge comes first: so the merges are all cuts of all pieces in two, by the piece's score."""
    place = {piece: i for i, (piece, _, kind) in enumerate(pieces) if kind == NORMAL}
    merges = []
    for piece in place:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in place and right in place:
                score = pieces[place[piece]][1]
                merges.append((-score, place[piece], place[left], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]
