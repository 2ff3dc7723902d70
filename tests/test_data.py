"""data/: tokenizers, prepare, corpus, download. Nothing is lost, in both splits or half-written,
and the network may do its worst."""
import argparse
import base64
import hashlib
import inspect
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tarfile
import threading
import types
import typing
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

import data.download as download_module
import data.prepare as prepare_module
import data.sources as sources_module
import data.tokenizer as tokenizer_module
from common.errors import UserError
from data.corpus import TokenFile, corpus_for, ensure_corpus, read_tokens
from data.download import download
from data.prepare import (PrepareConfig, choose_documents, prepare, split_documents,
                          tokenizer_sample)
from data.sources import read_text, strip_gutenberg, unwanted
from data.tokenizer import Tokenizer, open_tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
NASTY = ["▁", "▁▁", "\0", "\n", "\r\n", "\r", "\t", " ", "  ", "\x0b", "\x1f", "\x7f", "\x85",
         "\xa0", "\u0301", "e\u0301", "é", "日本", "مرحبا", "\u200b", "\u2028", "\u2047", " ⁇ ",
         "\u2585", "\u3000", "\ud7ff", "\ue000", "\ufeff", "\ufffd", "\ufffe", "\U0001F600",
         "\U0010FFFF", "<s>", "</s>", "<unk>", "<0x0A>", "<0xE2>", "0", "12345", "self",
         "return x", "a"]


def source_text():
    """About 300 kB of Python, the kind of text that the small tokenizers are for."""
    modules = (argparse, inspect, typing, tarfile, zipfile)
    return [Path(module.__file__).read_text(encoding="utf-8") for module in modules]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return train_tokenizer(source_text(), tmp_path_factory.mktemp("own") / "tokenizer.model", 700)


def train_sentencepiece(path, **settings):
    """A SentencePiece model that is not trained by our function."""
    model = io.BytesIO()
    lines = iter(line for text in source_text() for line in text.splitlines())
    defaults = dict(
        sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=800,
        byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2,
        num_threads=1)
    sentencepiece.SentencePieceTrainer.train(**(defaults | settings))
    path.write_bytes(model.getvalue())
    return Tokenizer(path)


@pytest.fixture(scope="module")
def metas(tmp_path_factory):
    """A model with the settings of Meta's LLaMA 1/2 tokenizer: identity normalisation, byte
    fallback and a dummy prefix."""
    path = tmp_path_factory.mktemp("metas") / "tokenizer.model"
    return train_sentencepiece(path, add_dummy_prefix=True)


# --------------------------------------------------------------------------------------------------
# Tokenizer

def random_text(rng):
    def piece():
        if rng.random() < 0.8:
            return rng.choice(NASTY)
        ranges = [range(0x300), range(0xD800), range(0xE000, 0x110000)]
        return chr(rng.choice(rng.choice(ranges)))
    return "".join(piece() for _ in range(rng.randrange(12)))


def test_round_trip_of_any_text(own):
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(2000)]
    for text, ids in zip(texts, own.encode_batch(texts), strict=True):
        assert own.decode(ids) == text
        control = {own.model.unk_id(), own.bos_id, own.eos_id}
        assert not control & set(ids), f"a control piece in {text!r}"
    assert own.decode(own.encode("▁ ▁")) == "▁ ▁" and own.encode("▁") != own.encode(" ")


@pytest.mark.parametrize("text", NASTY + ["▁ ", " ▁x ", "x" * 5, "x "])
def test_round_trip_of_long_runs(own, text):
    text *= 20_000
    assert own.decode(own.encode(text)) == text


def test_bos_eos_and_batches(own):
    assert own.encode("ab", bos=True, eos=True) == [1, *own.encode("ab"), 2]
    assert own.decode(own.encode("ab", bos=True, eos=True)) == "ab"
    assert own.encode_batch([]) == [] and own.encode("") == []
    assert own.encode("", bos=True, eos=True) == [1, 2]
    texts = ["a", "▁ b", ""]
    assert own.encode_batch(texts, bos=True) == [own.encode(t, bos=True) for t in texts]


def test_layout_is_llamas(own):
    assert (own.model.unk_id(), own.bos_id, own.eos_id, own.model.pad_id()) == (0, 1, 2, -1)
    assert own.vocab_size == 700
    byte_pieces = [own.model.id_to_piece(i) for i in range(3, 259)]
    assert byte_pieces == [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [own.model.id_to_piece(i) for i in range(259, 700)]
    assert all(len(piece) == 1 for piece in pieces if any(c.isdigit() for c in piece))
    assert len(own.encode("x = 907")) == len(own.encode("x = ")) + 3
    assert len(own.encode(" " * 16)) <= 2
    assert len(own.encode("\n\n")) == 1 and len(own.encode("):\n")) == 1
    text = source_text()[0]
    assert len(text) / len(own.encode(text)) > 2


def test_training_is_deterministic(own, tmp_path):
    again = train_tokenizer(iter(source_text()), tmp_path / "again.model", 700)
    assert again.path.read_bytes() == own.path.read_bytes()
    assert again.sha256 == hashlib.sha256(own.path.read_bytes()).hexdigest()


def test_control_words_in_the_training_text_stay_words(tmp_path):
    rng = random.Random(0)
    control = ["<s>", "</s>", "<unk>", "<0x0A>", "<0x41>"]
    words = control * 50 + ["".join(rng.choices("abcdefghij", k=5)) for _ in range(250)]
    text = " ".join(rng.choices(words, k=20_000)) + "\t\0▁▅"
    tokenizer = train_tokenizer([text], tmp_path / "t.model", 500)
    for word in control + ["\t", "\0", "▁", "▅"]:
        ids = tokenizer.encode(word)
        assert tokenizer.decode(ids) == word and min(ids) > 2


@pytest.mark.parametrize("part", [1, 7, 100])
def test_parts_do_not_change_the_ids(own, metas, tmp_path, monkeypatch, part):
    """The reference is SentencePiece on the whole text."""
    monkeypatch.setattr(tokenizer_module, "PART", part)
    crossing = train_sentencepiece(tmp_path / "crossing.model", add_dummy_prefix=False,
                                   split_by_whitespace=False)
    squeezing = train_sentencepiece(tmp_path / "squeezing.model", add_dummy_prefix=False,
                                    remove_extra_whitespaces=True)
    assert own.cuttable and metas.cuttable
    assert not crossing.cuttable and not squeezing.cuttable
    assert len(list(own.parts("def f(x, y):\n    return x + y\n" * 20))) > 2
    texts = [" a  b c ", "a b", " ", "  x", "", "x ", "日本 a\u0301 b \n c"]
    texts += [text[:3000] for text in source_text()]
    for tokenizer in (own, metas, crossing, squeezing):
        for text in texts:
            ids = tokenizer.model.encode(text)
            assert tokenizer.encode(text) == ids, (tokenizer.path, text[:50])


def test_metas_tokenizer_is_left_as_it_is(metas):
    rng = random.Random(1)
    for text in [random_text(rng) for _ in range(1000)] + ["▁a▁", "a ▁ b", " lead", "trail "]:
        ids = metas.encode(text)
        assert ids == metas.model.encode(text)
        assert metas.decode(ids) == metas.model.decode(ids) == text.replace("▁", " ")
    assert metas.model.id_to_piece(metas.encode("a")[0]).startswith("▁")


def test_files_that_are_no_tokenizer(own, tmp_path):
    whole = own.path.read_bytes()
    broken = {"empty": b"", "text": b"no tokenizer\n" * 200, "zeros": bytes(1000),
              "cut off": whole[:5000], "one byte short": whole[:-1]}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="not a SentencePiece model"):
            Tokenizer(tmp_path / name)
    (tmp_path / "llama3").write_bytes(b"IQ== 0\nIg== 1\n" * 200)
    with pytest.raises(UserError, match="a tiktoken file, as LLaMA 3 has"):
        Tokenizer(tmp_path / "llama3")
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match="--train-tokenizer"):
            Tokenizer(path)
    with pytest.raises(UserError, match="no BOS"):
        train_sentencepiece(tmp_path / "no bos.model", bos_id=-1, eos_id=1)
    rng = random.Random(0)
    for _ in range(200):  # one bit turned over: it loads, or it is a UserError, never anything else
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (tmp_path / "bit").write_bytes(content)
        try:
            Tokenizer(tmp_path / "bit")
        except UserError:
            pass


def test_wrong_text_and_wrong_ids(own, tmp_path):
    with pytest.raises(UserError, match=r"U\+DC80, at 3"):
        own.encode("abc\udc80")
    for ids in ([700], [5, -1], [2**40]):
        with pytest.raises(UserError, match="vocabulary"):
            own.decode(ids)
    assert own.decode(np.array(own.encode("numpy"))) == "numpy" and own.decode([]) == ""
    wrong = [([], 700, "no text"), (["\n "], 700, "no text"), (source_text(), 100, "360"),
             (["too little"], 700, "<= "), (["a\ud800"], 700, "surrogate")]
    for texts, size, reason in wrong:
        with pytest.raises(UserError, match=reason):
            train_tokenizer(texts, tmp_path / "t.model", size)
        assert list(tmp_path.iterdir()) == []


def test_passkey_prompts_are_in_the_sample(own, tmp_path):
    """A tokenizer that has seen them needs fewer tokens for them, and a window of L tokens holds
    more of their words."""
    for i, text in enumerate(source_text()):
        (tmp_path / f"{i}.py").write_text(text, encoding="utf-8")
    paths = sorted(tmp_path.glob("*.py"))
    sample = list(tokenizer_sample(paths, read_text))
    assert [text for text in sample if len(text) > 1000] == source_text()
    tokenizer = train_tokenizer(sample, tmp_path / "t.model", 700)
    prompt = ("The grass is green. The sky is blue. The pass key is 91537. Remember it. "
              "What is the pass key? The pass key is")
    assert len(tokenizer.encode(prompt)) < 0.9 * len(own.encode(prompt))
    bounded = list(tokenizer_sample(paths, read_text, megabytes=0.01))
    assert bounded[-1] != sample[-1], "the sample must be bounded"


# --------------------------------------------------------------------------------------------------
# Documents -> token folder

def write_documents(folder, n=40, seed=0):
    """n files of different length; returns {name: text}."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    words = ["return", "self", "x▁y", "é", "\t", "12", "日本"]
    texts = {}
    for i in range(n):
        text = " ".join(rng.choices(words, k=rng.randrange(5, 300)))
        texts[f"{i}.txt"] = f"document {i}\n" + text
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    return texts


def read_meta(folder):
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def read_folder(folder, tokenizer):
    """{split: [texts]}, checking the format on the way."""
    meta = read_meta(folder)
    found = {}
    for split in ("train", "val"):
        ids = np.fromfile(folder / f"{split}.bin", dtype=meta["dtype"])
        offsets = np.load(folder / f"{split}.docs.npy")
        counts = meta["splits"][split]
        assert offsets.dtype == np.int64 and offsets[0] == 0
        assert offsets[-1] == len(ids) == counts["tokens"]
        assert len(offsets) == counts["documents"] + 1
        documents = [ids[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:])]
        for document in documents:
            assert document[0] == tokenizer.bos_id == 1 and document[-1] == tokenizer.eos_id == 2
            assert not {1, 2} & set(document[1:-1])
        found[split] = [tokenizer.decode(d) for d in documents]
        assert counts["characters"] == sum(map(len, found[split]))
    assert meta["tokenizer_sha256"] == tokenizer.sha256
    assert meta["vocab_size"] == tokenizer.vocab_size
    return found


def leftovers(folder):
    """Names of everything that should not be there after a command."""
    return [path.name for path in Path(folder).rglob("*")
            if path.suffix in (".tmp", ".part") or path.name.startswith(".")]


def docs_config(tmp_path, tokenizer, **settings):
    """The files in tmp_path/docs -> the token folder tmp_path/out."""
    settings.setdefault("text", [str(tmp_path / "docs")])
    settings.setdefault("out", str(tmp_path / "out"))
    return PrepareConfig(tokenizer=str(tokenizer.path), **settings)


def content_hash(text):
    return hashlib.sha256(" ".join(text.split()).encode("utf-8")).digest()


def test_token_folder_holds_every_document(own, tmp_path):
    texts = write_documents(tmp_path / "docs")
    out = prepare(docs_config(tmp_path, own, out=str(tmp_path / "new" / "out"), val_fraction=0.3))
    found = read_folder(out, own)
    assert sorted(found["train"] + found["val"]) == sorted(texts.values())
    chosen = {text: int.from_bytes(content_hash(text)[-8:], "big") / 2**64 < 0.3
              for text in texts.values()}
    for split, texts_of in found.items():
        assert all(chosen[text] == (split == "val") for text in texts_of)
        assert texts_of == sorted(texts_of, key=content_hash)  # the order is the hashes'
    assert 0 < len(found["val"]) < len(found["train"])
    meta = read_meta(out)
    assert meta["source"] == "text" and meta["dtype"] == "uint16"
    assert meta["settings"]["val_fraction"] == 0.3
    assert leftovers(tmp_path) == []


def test_documents_do_not_depend_on_their_paths(own, tmp_path):
    """Other names, other folders, another order and twice the same text give the same bytes."""
    texts = write_documents(tmp_path / "a")
    for i, text in enumerate(reversed(texts.values())):
        for name in (f"b/{i % 3}/{i}.md", f"b/copy/{99 - i}"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    a, b = [prepare(docs_config(tmp_path, own, text=[str(tmp_path / name)],
                                out=str(tmp_path / f"out-{name}"))) for name in "ab"]
    for name in ("train.bin", "val.bin", "train.docs.npy", "val.docs.npy"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    assert read_meta(b)["left_out"] == {"duplicate": len(texts)}


def test_copies_in_other_white_space_are_one_document(tmp_path):
    text = "def f(x):\n    return x\n" * 9
    copies = {"unix": text, "dos": text.replace("\n", "\r\n"), "mac": text.replace("\n", "\r"),
              "tabs": text.replace("    ", "\t"), "bom": "\ufeff" + text, "end": text + "\n\n"}
    for name, copy in copies.items():
        (tmp_path / name).write_text(copy, encoding="utf-8", newline="")
    (tmp_path / "other").write_text(text.replace("x", "y"), encoding="utf-8")
    files = [(path, None) for path in sorted(tmp_path.iterdir())]
    documents, left_out = choose_documents(files, read_text, unwanted, None)
    assert len(documents) == 2 and left_out == {"duplicate": 5}
    assert read_text(tmp_path / "dos") == read_text(tmp_path / "bom") == text


def test_part_of_a_source_is_a_prefix_and_keeps_its_splits(own, tmp_path):
    texts = write_documents(tmp_path / "docs", 60)
    whole = read_folder(prepare(docs_config(tmp_path, own, val_fraction=0.3)), own)
    part = read_folder(prepare(docs_config(tmp_path, own, val_fraction=0.3, max_mb=0.02,
                                           out=str(tmp_path / "part"))), own)
    for split in part:
        assert part[split] and part[split] == whole[split][:len(part[split])]
    characters = sum(len(text) for split in part.values() for text in split)
    assert 0.015e6 < characters <= 0.02e6 < sum(map(len, texts.values()))


def test_share_of_validation():
    documents = [(hashlib.sha256(bytes([i, j])).digest(), None, (i, j))
                 for i in range(40) for j in range(50)]
    sizes = {fraction: len(split_documents(documents, fraction)["val"])
             for fraction in (0, 1e-9, 0.1, 1)}
    assert sizes[0] == 0 and sizes[1e-9] == 1 and 160 < sizes[0.1] < 240 and sizes[1] == 2000
    assert split_documents(documents[:1], 0.02) == {"train": [(0, 0)], "val": []}
    order = sorted(documents)
    share = [len(split_documents(order[k:k + 500], 0.2)["val"]) for k in range(0, 2000, 500)]
    assert all(60 < n < 140 for n in share), "the split must not depend on the place in the order"


def test_python_source(own, tmp_path, monkeypatch):
    """Which files of an installation are documents."""
    def code(name, lines=40):
        functions = [f"def {name}_{chr(97 + i % 26)}(first, second):\n"
                     f"    return first + second * {i}" for i in range(lines)]
        return f'"""Module {name}."""\n' + "\n".join(functions)
    lib, site = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    wanted = {"lib/good.py": code("good"), "lib/deep/er/fine.py": code("fine"),
              "lib/site-packages/pkg/code.py": code("pkg").replace("\n", "\r\n"),
              "lib/mentions.py": code("mentions") + "\n# this text was generated by nobody\n"}
    others = {"lib/short.py": "x = 1\n",
              "lib/table.py": "T = [\n" + "    12345, 67890, 13579,\n" * 50 + "]\n",
              "lib/long.py": code("long") + "\nx = '" + "word " * 300 + "'\n",
              "lib/wide.py": ("word = " + "'some text' + " * 12 + "''\n") * 40,
              "lib/made.py": "# Automatically generated, do not edit\n" + code("made"),
              "lib/test/test_a.py": code("test_a"), "lib/site-packages/pkg/tests/b.py": code("b"),
              "lib/site-packages/pip/_vendor/c.py": code("c"), "lib/__pycache__/d.py": code("d"),
              "lib/site-packages/pkg/copy_of_good.py": code("good"), "lib/notes.txt": code("notes")}
    for name, text in (wanted | others).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    (lib / "latin.py").write_bytes(code("latin").replace("Module", "Módule").encode("latin-1"))
    (lib / "binary.py").write_bytes(code("binary").encode() + b"\0")
    paths = {"stdlib": str(lib), "platstdlib": str(lib), "purelib": str(site), "platlib": str(site)}
    monkeypatch.setattr(sources_module.sysconfig, "get_paths", lambda: paths)
    out = prepare(PrepareConfig(tokenizer=str(own.path), out=str(tmp_path / "out")))
    found = read_folder(out, own)
    expected = sorted(text.replace("\r\n", "\n") for text in wanted.values())
    assert sorted(found["train"] + found["val"]) == expected
    meta = read_meta(out)
    assert meta["left_out"] == {"binary or not UTF-8": 2, "shorter than 500 characters": 1,
                                "mostly digits": 1, "huge lines": 2, "generated": 1, "duplicate": 1}
    assert meta["source"] == "python" and meta["max_mb"] == 32


def test_large_vocabulary_is_uint32(own, tmp_path, monkeypatch):
    class Large:
        vocab_size, bos_id, eos_id, sha256 = 70_000, 1, 2, "large"

        def __init__(self, path):
            pass

        def encode_batch(self, texts, bos, eos):
            return [[1, 69_999, 65_536, 2] for _ in texts]

    write_documents(tmp_path / "docs", 3)
    monkeypatch.setattr(prepare_module, "open_tokenizer", Large)
    out = prepare(PrepareConfig(text=[str(tmp_path / "docs")], tokenizer="large",
                                out=str(tmp_path / "out")))
    assert np.fromfile(out / "train.bin", np.uint32).tolist() == [1, 69_999, 65_536, 2] * 2
    assert read_meta(out)["dtype"] == "uint32"


def test_groups_do_not_change_the_files(own, tmp_path, monkeypatch):
    """More text than is held at a time: the same documents."""
    texts = write_documents(tmp_path / "docs", 30)
    sizes = []
    encode_batch = Tokenizer.encode_batch
    monkeypatch.setattr(prepare_module, "GROUP", 3000)

    def measured(self, group, **kwargs):
        sizes.append(sum(map(len, group)))
        return encode_batch(self, group, **kwargs)

    monkeypatch.setattr(Tokenizer, "encode_batch", measured)
    found = read_folder(prepare(docs_config(tmp_path, own, val_fraction=0)), own)
    assert sorted(found["train"]) == sorted(texts.values()) and found["val"] == []
    assert len(sizes) > 5 and max(sizes) < 3000 + max(map(len, texts.values()))


def test_tokenizer_is_trained_once_and_never_replaced(own, tmp_path, monkeypatch):
    for i, text in enumerate(source_text()):
        (tmp_path / f"docs{i}.py").write_text(text, encoding="utf-8")
    config = dict(text=[str(p) for p in tmp_path.glob("*.py")], out=str(tmp_path / "out"))
    path = tmp_path / "new" / "tokenizer.model"
    out = prepare(PrepareConfig(tokenizer=str(path), train_tokenizer=500, **config))
    assert Tokenizer(path).vocab_size == 500 and read_folder(out, Tokenizer(path))["train"]
    for tokenizer in (str(path), ""):
        with pytest.raises(UserError, match="does not exist yet"):
            prepare(PrepareConfig(tokenizer=tokenizer, train_tokenizer=600, **config))
    shutil.rmtree(out)  # interrupted after the tokenizer: the same command goes on, and no other
    before = path.read_bytes()
    with pytest.raises(UserError, match="does not exist yet"):
        prepare(PrepareConfig(tokenizer=str(path), train_tokenizer=600, **config))
    assert not out.exists() and path.read_bytes() == before
    prepare(PrepareConfig(tokenizer=str(path), train_tokenizer=500, **config))
    assert path.read_bytes() == before and read_folder(out, Tokenizer(path))["train"]
    with pytest.raises(UserError, match="No such file"):  # a name that was mistyped is not trained
        prepare(PrepareConfig(tokenizer=str(tmp_path / "mistyped.model"), **config))
    monkeypatch.setattr(prepare_module, "TOKENIZER", tmp_path / "default.model")
    prepare(PrepareConfig(**config))
    assert Tokenizer(tmp_path / "default.model").vocab_size == 1024


# --------------------------------------------------------------------------------------------------
# Mistakes and accidents

def test_wrong_settings(own, tmp_path):
    write_documents(tmp_path / "docs", 3)
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    (tmp_path / "binary").write_bytes(b"MZ\0\0")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work", encoding="utf-8")
    good = dict(text=[str(tmp_path / "docs")], tokenizer=str(own.path), out=str(tmp_path / "out"))
    for change, reason in [
            (dict(text=[str(tmp_path / "nowhere")]), "no such file or folder"),
            (dict(text=[str(tmp_path / "empty.txt")]), "empty"),
            (dict(text=[str(tmp_path / "latin.txt")]), "UTF-8"),
            (dict(text=[str(tmp_path / "binary")]), "binary"),
            (dict(text=[str(tmp_path / "hollow")]), "no text"),
            (dict(val_fraction=-0.1), "between 0 and 1"),
            (dict(val_fraction=float("nan")), "between 0 and 1"),
            (dict(max_mb=0), "above 0"),
            (dict(max_mb=float("nan")), "above 0"),
            (dict(books=[1342]), "--source gutenberg"),
            (dict(text=[], source="gutenberg"), "--books"),
            (dict(mirror="ftp://x"), "https://"),
            (dict(out=str(tmp_path / "full")), "name another folder"),
            (dict(out=str(tmp_path / "binary")), "name another folder"),
            (dict(tokenizer=str(tmp_path / "binary")), "not a SentencePiece model"),
            (dict(text=[], source="gutenberg", books=[1], mirror="http://127.0.0.1:1",
                  tokenizer=str(tmp_path / "binary")),
             "not a SentencePiece model")]:  # found out before the download
        with pytest.raises(UserError, match=reason) as caught:
            prepare(PrepareConfig(**{**good, **change}))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists() and leftovers(tmp_path) == []
    assert (tmp_path / "full" / "thesis.tex").exists()


def test_documents_that_are_too_large(own, tmp_path, monkeypatch):
    write_documents(tmp_path / "docs", 3)
    monkeypatch.setattr(sources_module, "LARGEST_MB", 1e-5)
    with pytest.raises(UserError, match="split it"):
        prepare(docs_config(tmp_path, own))


def test_of_a_long_book_only_the_beginning_is_read(own, tmp_path, monkeypatch):
    path = tmp_path / "book.txt"
    text = "Déjà vu, naïve — 日本語. One two three.\n" * 20000
    path.write_bytes(("\ufeff" + text.replace("\n", "\r\n")).encode())
    whole = own.encode(text, bos=True)
    assert read_tokens(path, own, 0) == whole
    monkeypatch.setattr(sources_module, "LARGEST_MB", 0.1)
    for n in (1, 100, 1001, 3000):
        assert read_tokens(path, own, n) == whole[:n]
    with pytest.raises(UserError, match="too large for one document"):
        read_tokens(path, own, 0)
    path.write_text(" " * 50000 + "end", encoding="utf-8")  # few tokens in many bytes
    whole = own.encode(path.read_text(encoding="utf-8"), bos=True)
    assert read_tokens(path, own, 100) == whole[:100]
    path.write_bytes(b"\xff" * 90000)
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_tokens(path, own, 10)


def test_folders_may_hold_other_things(own, tmp_path):
    texts = write_documents(tmp_path / "docs", 3)
    (tmp_path / "docs" / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "docs" / "old.txt").write_bytes("déjà vu".encode("latin-1"))
    (tmp_path / "docs" / "blank").write_bytes(b"\n")
    (tmp_path / "docs" / ".hidden").write_bytes(b"secret")
    (tmp_path / "docs" / ".git").mkdir()
    (tmp_path / "docs" / ".git" / "config").write_bytes(b"secret")
    os.mkfifo(tmp_path / "docs" / "pipe")  # opening it would wait for ever
    out = prepare(docs_config(tmp_path, own, val_fraction=0))
    assert sorted(read_folder(out, own)["train"]) == sorted(texts.values())
    assert read_meta(out)["left_out"] == {"binary or not UTF-8": 2, "empty": 1}


@pytest.mark.parametrize("accident", [OSError(28, "No space left on device"), KeyboardInterrupt(),
                                      RuntimeError("bug")])
def test_what_was_there_stays_when_a_run_fails(own, tmp_path, monkeypatch, accident):
    write_documents(tmp_path / "docs", 5)
    config = docs_config(tmp_path, own)
    prepare(config)

    def content():
        return {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    before = content()
    write_documents(tmp_path / "docs", 9, seed=1)

    def fail(path, value):
        raise accident

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_json", fail)  # the last file of the folder
        with pytest.raises(type(accident)):
            prepare(config)
    assert content() == before and leftovers(tmp_path) == []
    prepare(config)
    assert content() != before and leftovers(tmp_path) == []


def command(*args, **kwargs):
    return subprocess.run([sys.executable, str(ROOT / "data" / "prepare.py"), *map(str, args)],
                          capture_output=True, encoding="utf-8", timeout=300, **kwargs)


def test_command_line(own, tmp_path):
    write_documents(tmp_path / "docs")
    done = command("--text", tmp_path / "docs", "--tokenizer", own.path, "--out", tmp_path / "out",
                   cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and "characters a token" in done.stdout
    assert read_folder(tmp_path / "out", own)["train"]
    made_by = json.loads((tmp_path / "out" / "meta.json").read_text(encoding="utf-8"))["versions"]
    assert set(made_by) == {"python", "numpy"}, "PyTorch was imported"
    failed = command("--text", tmp_path / "nowhere", "--tokenizer", own.path,
                     "--out", tmp_path / "other", cwd=tmp_path)
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr == f"error: --text {tmp_path / 'nowhere'}: no such file or folder\n"
    assert not (tmp_path / "other").exists()


def test_full_disk(own, tmp_path):
    """No file may grow beyond 1,000 bytes: one line, exit code 2, and nothing is left."""
    write_documents(tmp_path / "docs")
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    failed = command("--text", tmp_path / "docs", "--tokenizer", own.path,
                     "--out", tmp_path / "out", preexec_fn=limit)
    assert failed.returncode == 2 and failed.stderr.startswith("error: File too large")
    assert failed.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists() and leftovers(tmp_path) == []


def test_ensure_corpus(own, tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    for i in range(20):
        text = f'"""Module {i}."""\n' + f"def function_of_{i}(x):\n    return x\n\n" * 30
        (tmp_path / "lib" / f"m{i}.py").write_text(text, encoding="utf-8")
    paths = dict.fromkeys(["stdlib", "platstdlib", "purelib", "platlib"], str(tmp_path / "lib"))
    monkeypatch.setattr(sources_module.sysconfig, "get_paths", lambda: paths)
    folder = tmp_path / "corpus"
    other = train_tokenizer(source_text(), tmp_path / "other.model", 500)

    def made(*args, **kwargs):
        """Was the folder made anew?"""
        before = (folder / "meta.json").stat().st_ino if folder.exists() else None
        assert ensure_corpus(folder, *args, **kwargs) == folder
        return (folder / "meta.json").stat().st_ino != before

    with pytest.raises(UserError, match="corpus: no such token folder: name one that is there"):
        ensure_corpus(folder, own.path, max_mb=0.01)
    assert not folder.exists(), "the name may be mistyped"
    prepare(PrepareConfig(tokenizer=str(own.path), out=str(folder), max_mb=0.01))
    assert not made(own.path, max_mb=0.01) and not made(own.path, max_mb=0.005)
    assert not made(own.path)  # whatever size it has
    before = (folder / "train.bin").read_bytes()
    larger = folder.with_name("corpus-1mb")  # another size, another folder
    assert corpus_for(folder, own, max_mb=1) == larger and not larger.exists()
    assert ensure_corpus(folder, own.path, max_mb=1) == larger
    assert ensure_corpus(larger, own.path, max_mb=1) == larger
    assert ensure_corpus(larger, own.path, max_mb=2) == larger  # the source holds less than 1 MB
    assert len(read_folder(larger, own)["train"]) > len(read_folder(folder, own)["train"])
    beside = folder.with_name(f"corpus-{other.sha256[:8]}")  # another tokenizer, another folder
    assert ensure_corpus(folder, other.path, max_mb=1) == beside
    assert read_folder(beside, other)["train"]
    assert not made(own.path, max_mb=0.01) and (folder / "train.bin").read_bytes() == before
    content = (beside / "train.bin").read_bytes()
    (beside / "train.bin").write_bytes(content[:-2])
    with pytest.warns(UserWarning, match="cut off: it is made again"):
        assert ensure_corpus(folder, other.path, max_mb=1) == beside
    assert (beside / "train.bin").read_bytes() == content
    (beside / "train.bin").unlink()
    with pytest.warns(UserWarning, match="not a whole token folder: it is made again"):
        assert ensure_corpus(folder, other.path, max_mb=1) == beside
    assert (beside / "train.bin").read_bytes() == content

    prepare(PrepareConfig(text=[str(tmp_path / "lib")], tokenizer=str(own.path), out=str(folder)))
    assert not made(own.path, max_mb=1000)  # a user's own text: as much as there is
    with pytest.raises(UserError, match="another tokenizer"):
        ensure_corpus(folder, other.path)
    (folder / "val.docs.npy").unlink()
    with pytest.raises(UserError, match="cut off"):
        ensure_corpus(folder, own.path)
    (folder / "meta.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="not a whole token folder"):
        ensure_corpus(folder, own.path)


def test_a_tokenizer_is_found_in_a_models_folder(own, tmp_path):
    (tmp_path / "text.txt").write_text("One two three. " * 200, encoding="utf-8")
    config = PrepareConfig(text=[str(tmp_path / "text.txt")], tokenizer=str(own.path.parent),
                           out=str(tmp_path / "tokens"))
    meta = json.loads((prepare(config) / "meta.json").read_text(encoding="utf-8"))
    assert meta["tokenizer_sha256"] == own.sha256
    with pytest.raises(UserError, match="tokenizer.model: No such file"):
        open_tokenizer(tmp_path)


def test_the_default_corpus_has_a_folder_for_each_size(own, tmp_path):
    """train.py's 96 MB never take the place of the 32 MB on which all others are measured. A folder
    that is there already keeps serving."""
    folder = tmp_path / "python"
    larger = tmp_path / "python-96mb"
    assert corpus_for(folder, own) == corpus_for(folder, own, 32) == folder
    assert corpus_for(folder, own, 96.0) == corpus_for(larger, own, 96.0) == larger
    for size, left_out, expected in ((32, {"beyond --max-mb": 9}, larger), (32, {}, folder),
                                     (96, {"beyond --max-mb": 9}, folder)):
        folder.mkdir(exist_ok=True)
        meta = {"source": "python", "tokenizer_sha256": own.sha256, "max_mb": size,
                "left_out": left_out}
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        assert corpus_for(folder, own, 96) == expected
        assert corpus_for(folder, own, 32) == corpus_for(folder, own) == folder
    stranger = types.SimpleNamespace(sha256="0a1b2c3d4e5f")
    alone = tmp_path / "alone"  # where python is not there, and python-96mb of another tokenizer is
    (alone / "python-96mb").mkdir(parents=True)
    shutil.copy(folder / "meta.json", alone / "python-96mb")
    assert corpus_for(alone / "python", own, 96) == alone / "python-96mb"
    assert corpus_for(alone / "python", stranger, 96) == alone / "python-0a1b2c3d-96mb"
    assert corpus_for(folder, stranger, 96) == tmp_path / "python-0a1b2c3d-96mb"
    assert corpus_for(tmp_path / "mine", own, 96) == tmp_path / "mine"


# --------------------------------------------------------------------------------------------------
# Downloads, from a server on this machine that misbehaves as it is told

class Server(ThreadingHTTPServer):
    """files: {path: bytes}; script: {path: [misbehaviour of the first request, of the second,
    ...]}; seen: [(path, Range, If-Range)]."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.script, self.seen, self.etag = {}, {}, [], {}
        self.over, self.waited_in_vain = threading.Event(), False
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def ranges(self):
        return [r for _, r, _ in self.seen]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, wanted = self.server, self.headers["Range"]
        server.seen.append((self.path, wanted, self.headers["If-Range"]))
        steps = server.script.get(self.path, [])
        how = steps.pop(0) if len(steps) > 1 else steps[0] if steps else "fine"
        body = server.files.get(self.path)
        if isinstance(how, int) or body is None:
            return self.send_error(how if isinstance(how, int) else 404)
        etag = server.etag.get(self.path, '"1"')
        resumes = wanted and how != "no ranges" and self.headers["If-Range"] in (None, etag)
        start = int(wanted.split("=")[1].rstrip("-")) if resumes else 0
        if start >= len(body) and start:
            return self.send_error(416)
        part = body[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if etag:
            self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(part) + (7 if how == "wrong length" else 0)))
        self.end_headers()
        if how == "corrupt":
            part = bytes([part[0] ^ 1]) + part[1:]
        if how in ("stall", "cut off", "no ranges"):
            part = part[:len(part) // 2]
        self.wfile.write(part)
        self.wfile.flush()
        if how == "stall":
            server.waited_in_vain |= not server.over.wait(20)
        self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    # A busy machine's own pauses are no stalls. A test with a stall makes it short.
    monkeypatch.setattr(download_module, "TIMEOUT", 60)
    pauses = []
    monkeypatch.setattr(download_module.time, "sleep", pauses.append)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        server.pauses = pauses
        server.files["/f"] = bytes(range(256)) * 400  # 102,400 bytes
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


def md5(content):
    return hashlib.md5(content).hexdigest()


@pytest.mark.parametrize("script, checksum, ranges", [
    (["fine"], True, [None]),
    (["fine"], False, [None]),
    (["cut off", "fine"], False, [None, "bytes=51200-"]),
    (["cut off", "cut off", "fine"], True, [None, "bytes=51200-", "bytes=76800-"]),
    (["stall", "fine"], False, [None, "bytes=51200-"]),
    (["cut off", "no ranges", "fine"], False, [None, "bytes=51200-", "bytes=51200-"]),
    ([503, 429, 500, "fine"], False, [None, None, None, None]),
    (["corrupt", "fine"], True, [None, None]),
    (["cut off", "corrupt", "fine"], True, [None, "bytes=51200-", None]),
    (["cut off", 416, "fine"], True, [None, "bytes=51200-", None]),
    (["cut off", 503, "fine"], False, [None, "bytes=51200-", "bytes=51200-"]),
])
def test_download_recovers(server, tmp_path, monkeypatch, script, checksum, ranges):
    server.script["/f"] = list(script)
    if "stall" in script:
        monkeypatch.setattr(download_module, "TIMEOUT", 0.8)
    path = download(server.url + "/f", tmp_path / "new" / "f",
                    md5(server.files["/f"]) if checksum else None)
    assert path.read_bytes() == server.files["/f"]
    assert [p.name for p in path.parent.iterdir()] == ["f"]
    assert server.ranges() == ranges and len(server.pauses) == len(ranges) - 1
    assert not server.waited_in_vain, "it must not wait until the server ends a stalled connection"
    assert all(if_range == ('"1"' if r else None) for _, r, if_range in server.seen)
    # A file that is there is not fetched again.
    assert download(server.url + "/f", path) == path and len(server.seen) == len(ranges)


@pytest.mark.parametrize("script, checksum, requests, reason", [
    ([404], False, 1, "HTTP 404"), ([403], True, 1, "HTTP 403"), ([503], False, 6, "HTTP 503"),
    (["corrupt"], True, 6, "MD5"),
    (["cut off", "no ranges"], False, 7, "cut off after 51200 of 102400 bytes"),
    (["wrong length"], False, 7, "cut off after 102400 of 102407 bytes"),
    ([408], False, 6, "HTTP 408")])
def test_download_gives_up_in_one_line(server, tmp_path, script, checksum, requests, reason):
    server.script["/f"] = list(script)
    with pytest.raises(UserError) as caught:
        download(server.url + "/f", tmp_path / "f", md5(server.files["/f"]) if checksum else None)
    message = str(caught.value)
    assert message.startswith(server.url + "/f: ") and reason in message
    assert "check the" in message and "\n" not in message
    assert len(server.seen) == requests and not (tmp_path / "f").exists()


def test_pauses_double_up_to_a_limit(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "ATTEMPTS", 9)
    server.script["/f"] = [503]
    with pytest.raises(UserError):
        download(server.url + "/f", tmp_path / "f")
    assert server.pauses == [1, 2, 4, 8, 16, 30, 30, 30]


def test_no_server_at_all(server, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="check the network and run the same command again"):
        download("http://127.0.0.1:1/f", tmp_path / "f")
    assert len(server.pauses) == 5


@pytest.mark.parametrize("address", [
    "http://[", "http:///x", "http://", "x", "nothing://127.0.0.1/f", "http://127.0.0.1:x/f",
    "http://a b/f", f"http://{64 * 'a'}.org/f"])
def test_what_is_no_address_is_asked_for_once(server, tmp_path, address):
    with pytest.raises(UserError, match="check the number or the address") as caught:
        download(address, tmp_path / "f")
    assert str(caught.value).startswith(f"{address}: ")
    assert server.pauses == []
    assert not (tmp_path / "f").exists()


def test_progress_is_not_failure(server, tmp_path):
    """A line that breaks after every little piece gets there: half of the rest each time, more
    pieces than ATTEMPTS."""
    server.script["/f"] = ["cut off"] * 12 + ["fine"]
    assert download(server.url + "/f", tmp_path / "f").read_bytes() == server.files["/f"]
    assert len(server.seen) == 13


def test_file_that_changes_on_the_server_is_not_mixed(server, tmp_path):
    server.script["/f"] = ["cut off", "fine"]
    new = bytes(reversed(server.files["/f"]))

    def change(seconds):
        server.files["/f"], server.etag["/f"] = new, '"2"'

    download_module.time.sleep = change  # the fixture's patch is undone at the end
    assert download(server.url + "/f", tmp_path / "f").read_bytes() == new
    assert server.seen[1] == ("/f", "bytes=51200-", '"1"')


def test_without_validator_or_checksum_it_starts_again(server, tmp_path):
    server.etag["/f"] = ""
    server.script["/f"] = ["cut off", "fine"]
    assert download(server.url + "/f", tmp_path / "f").read_bytes() == server.files["/f"]
    assert server.ranges() == [None, None]


@pytest.mark.parametrize("checksum, ranges", [(True, ["bytes=1000-"]), (False, [None])])
def test_download_goes_on_in_the_next_run(server, tmp_path, checksum, ranges):
    """With a checksum the part that an earlier run left is used; without, nothing tells whether it
    belongs to the same file."""
    (tmp_path / "f.part").write_bytes(server.files["/f"][:1000])
    path = download(server.url + "/f", tmp_path / "f",
                    md5(server.files["/f"]) if checksum else None)
    assert path.read_bytes() == server.files["/f"] and server.ranges() == ranges


@pytest.mark.parametrize("checksum", [True, False])
def test_what_an_earlier_run_left_is_no_progress(server, tmp_path, checksum):
    (tmp_path / "f.part").write_bytes(server.files["/f"][:1000])
    server.script["/f"] = [503]
    with pytest.raises(UserError, match="HTTP 503"):
        download(server.url + "/f", tmp_path / "f", md5(server.files["/f"]) if checksum else None)
    assert len(server.seen) == 6
    assert (tmp_path / "f.part").stat().st_size == (1000 if checksum else 0)


def test_full_disk_is_not_retried(server, tmp_path, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(download_module.Transfer, "receive", full)
    with pytest.raises(OSError, match="No space left"):
        download(server.url + "/f", tmp_path / "f")
    assert server.pauses == [] and not (tmp_path / "f").exists()


BOOK = ("\ufeffThe Project Gutenberg eBook of Emma\r\n\r\n"
        "*** START OF THE PROJECT GUTENBERG EBOOK EMMA ***\r\n\r\n"
        "Emma Woodhouse, {}\r\n\r\n"
        "*** END OF THE PROJECT GUTENBERG EBOOK EMMA ***\r\n\r\nlicence")


def test_gutenberg_books(own, server, tmp_path):
    for number in (158, 84, 11):
        book = BOOK.format(f"handsome, clever, and rich * {number}")
        server.files[f"/cache/epub/{number}/pg{number}.txt"] = book.encode("utf-8")
    server.script["/cache/epub/84/pg84.txt"] = ["cut off", "fine"]
    config = dict(source="gutenberg", tokenizer=str(own.path), out=str(tmp_path / "out"),
                  mirror=server.url + "/")
    out = prepare(PrepareConfig(books=[158, 84, 11], **config))
    found = read_folder(out, own)
    books = [f"Emma Woodhouse, handsome, clever, and rich * {n}\n" for n in (11, 84, 158)]
    assert sorted(found["train"] + found["val"]) == sorted(books) and found["val"]
    with pytest.raises(UserError, match="HTTP 404 Not Found: check the number"):
        prepare(PrepareConfig(books=[5], **config))
    half = BOOK.split("*** END")[0].encode("utf-8")
    for page in (b"<html>Please log in</html>", half, b"\xff\0"):
        server.files["/cache/epub/7/pg7.txt"] = page
        with pytest.raises(UserError, match="not the whole plain text"):
            prepare(PrepareConfig(books=[7], **config))
    assert not any((tmp_path / "downloads").rglob("pg7*")) and read_folder(out, own) == found


def test_strip_gutenberg():
    assert strip_gutenberg(BOOK.format("x")) == "Emma Woodhouse, x\n"
    old = ("a ***START OF THIS PROJECT GUTENBERG EBOOK A\nTALE*** b "
           "*** END OF THIS PROJECT GUTENBERG EBOOK A\nTALE *** c")
    assert strip_gutenberg(old) == "b\n"
    assert strip_gutenberg("nothing") == ""
    assert strip_gutenberg("*** START OF THE PROJECT GUTENBERG EBOOK X *** cut") == ""


def put_pg19(server, books, page_size=2):
    """Lay out {split: [texts]} as the bucket has it: a listing in pages, and the files."""
    for split, texts in books.items():
        items = []
        for i, text in enumerate(texts):
            content = text.encode("utf-8")
            server.files[f"/deepmind-gutenberg/{split}/{i}.txt"] = content
            checksum = base64.b64encode(hashlib.md5(content).digest()).decode()
            items.append({"name": f"{split}/{i}.txt", "size": str(len(content)),
                          "md5Hash": checksum})
        for page in range(0, len(items), page_size):
            more = {"nextPageToken": str(page + page_size)} if page + page_size < len(items) else {}
            token = f"&pageToken={page}" if page else ""
            fields = "nextPageToken%2Citems%28name%2Csize%2Cmd5Hash%29"
            url = f"/storage/v1/b/deepmind-gutenberg/o?prefix={split}%2F&fields={fields}{token}"
            listing = {"items": items[page:page + page_size], **more}
            server.files[url] = json.dumps(listing).encode("utf-8")


def test_pg19(own, server, tmp_path):
    test = [f"test book {i}\n" * 20 for i in range(5)]
    train = [f"train book {i}\n" * 20 for i in range(7)] + ["test  book 3\n" * 20]
    put_pg19(server, {"test": test, "train": train})
    server.script["/deepmind-gutenberg/test/1.txt"] = ["corrupt", "fine"]
    server.script["/deepmind-gutenberg/train/2.txt"] = ["cut off", 503, "fine"]
    config = PrepareConfig(source="pg19", tokenizer=str(own.path), out=str(tmp_path / "out"),
                           mirror=server.url)
    found = read_folder(prepare(config), own)
    assert sorted(found["val"]) == sorted(test), "the test split is the validation split"
    # A book of the test split is not trained on.
    assert sorted(found["train"]) == sorted(train[:-1])
    server.seen.clear()
    config.max_mb, config.val_fraction = 1e-6 * 3.5 * len(train[0]), 0.0
    found = read_folder(prepare(config), own)
    assert sorted(found["val"]) == sorted(test) and len(found["train"]) in (2, 3)
    books = [path for path, *_ in server.seen if path.endswith(".txt")]
    assert not books, "books are downloaded once"


def test_pg19_that_cannot_be(own, server, tmp_path):
    config = PrepareConfig(source="pg19", tokenizer=str(own.path), out=str(tmp_path / "out"),
                           mirror=server.url)
    put_pg19(server, {"test": ["a test book"], "train": ["a train book"]})
    server.script["/deepmind-gutenberg/train/0.txt"] = ["corrupt"]
    with pytest.raises(UserError, match="train/0.txt: .*MD5"):
        prepare(config)
    listing = next(path for path in server.files if "prefix=test" in path)
    for content in (b"<html>Please log in</html>", b"[]", b'{"items": [{"name": "test/1.txt"}]}',
                    b'{"items": 5}'):
        server.files[listing] = content
        with pytest.raises(UserError, match="not a listing"):
            prepare(config)
    evil = {"items": [{"name": "test/../../../evil.txt", "size": "1", "md5Hash": ""}]}
    server.files[listing] = json.dumps(evil).encode("utf-8")
    server.script.clear()
    prepare(config)
    assert not list(tmp_path.rglob("evil*"))
    assert not [path for path, *_ in server.seen if "evil" in path]


def test_a_single_book_is_cut_in_two(own, tmp_path):
    text = "".join(f"Line {i} of the only book.\n" for i in range(400))
    (tmp_path / "book.txt").write_text(text)
    config = PrepareConfig(text=[str(tmp_path / "book.txt")], tokenizer=str(own.path),
                           out=str(tmp_path / "out"))

    def part(split):
        (document,) = TokenFile(prepare(config), split).documents()
        return own.decode(document[1:-1].tolist())
    assert part("train") + part("val") == text
    assert 0.09 < len(part("val")) / len(text) < 0.11
    config.val_fraction = 0.5
    assert 0.49 < len(part("val")) / len(text) < 0.51
    config.val_fraction = 0
    assert part("train") == text
    config.val_fraction = 1
    assert part("val") == text
