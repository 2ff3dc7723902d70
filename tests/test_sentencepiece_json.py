"""SentencePiece models as tokenizer.json: the same ids, and transformers needs no protobuf."""
import io
import json
import random
import subprocess
import sys

import pytest
import sentencepiece
from conftest import ROOT

tokenizers = pytest.importorskip("tokenizers")    # an extra; CI installs it, and gguf for test_gguf

from test_gguf import SAMPLE, TRICKY, make

from data.gguf_tokenizer import sentencepiece_model
from data.sentencepiece_json import CHECK_TEXTS, sentencepiece_as_json, sentencepiece_pieces
from data.tokenizer import Tokenizer
from weights import load_tokenizer, save_model
from weights.__main__ import main

MODELS = {  # settings of the trainer
    "prefix": {},                                                     # as Meta's
    "no prefix": {"add_dummy_prefix": False},
    "prefix, own symbols": {"user_defined_symbols": ["::"], "add_dummy_prefix": False},
    "spaces": {"allow_whitespace_only_pieces": True, "vocab_size": 400},
}
NO_BPE = {"unigram": {"model_type": "unigram", "vocab_size": 310},
          "normalised": {"normalization_rule_name": "nmt_nfkc"},
          "a space after each own symbol": {"user_defined_symbols": ["::"]}}


def train_sentencepiece(path, kind):
    """A model as LLaMA's, but for the settings of this kind, written to `path`."""
    trained = io.BytesIO()
    settings = dict(model_type="bpe", vocab_size=360, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
                    byte_fallback=True, split_digits=True, normalization_rule_name="identity",
                    remove_extra_whitespaces=False, character_coverage=0.99, minloglevel=2)
    text = [*SAMPLE, "        if value:\n                return [[1, 2], [3, 4]] :: x\n" * 9]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=trained,
        **settings | (MODELS | NO_BPE)[kind])
    path.write_bytes(trained.getvalue())
    return path


def texts():
    """Varied ones: all of CHECK_TEXTS, runs of one character, and random characters."""
    rng = random.Random(0)
    ranges = [(32, 127), (32, 33), (10, 11), (160, 0x2fff), (0x3000, 0xd7ff), (0x1f300, 0x1f9ff)]
    found = [*CHECK_TEXTS, *TRICKY[:-1], *SAMPLE, "".join(TRICKY), "a▁ ▁b"]
    found += [character * n for character in " \n-=a0:" for n in range(1, 40)]
    for _ in range(200):
        found.append("".join(chr(rng.randrange(*rng.choice(ranges)))
                             for _ in range(rng.randrange(1, 60))))
    return found


def test_pieces(tokenizer):
    """What is read of the bytes is what SentencePiece says."""
    model = tokenizer.model
    pieces = sentencepiece_pieces(tokenizer.path.read_bytes())
    assert len(pieces) == model.get_piece_size() == 1024
    for i, (piece, score, kind) in enumerate(pieces):
        assert (piece, score) == (model.id_to_piece(i), model.get_score(i))
        told = model.is_unknown(i), model.is_control(i), model.is_unused(i), model.is_byte(i)
        assert told == (kind == 2, kind == 3, kind == 5, kind == 6)


@pytest.mark.parametrize("kind", ["tiny", *MODELS])
def test_the_same_ids(tmp_path, kind):
    path = ROOT / "data/tiny/tokenizer.model"
    if kind != "tiny":
        path = train_sentencepiece(tmp_path / "tokenizer.model", kind)
    truth = Tokenizer(path)
    written = sentencepiece_as_json(path.read_bytes(), truth.dummy_prefix, "<s>")
    found = tokenizers.Tokenizer.from_str(written.decode())
    assert truth.dummy_prefix == (kind in ("prefix", "spaces"))
    for text in texts():
        ids = truth.model.encode(text)
        assert found.encode(text, add_special_tokens=False).ids == ids, repr(text)
        assert found.encode(text).ids == [1, *ids]
        assert found.decode(ids) == truth.model.decode(ids)


def test_of_equal_scores_the_earlier_piece_is_joined_first():
    """Mistral's runs of spaces all have one score: 16 of them are one piece, not 14 and 2."""
    runs = ["▁" * n for n in (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11, 1)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *runs]
    data = sentencepiece_model({
        "tokens": tokens, "scores": [0.0] * 259 + [-1e9] * len(runs),
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(runs), "unknown_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "add_space_prefix": False,
        "remove_extra_whitespaces": False})
    truth = sentencepiece.SentencePieceProcessor(model_proto=data)
    found = tokenizers.Tokenizer.from_str(sentencepiece_as_json(data, False, "<s>").decode())
    for n in range(1, 60):
        assert found.encode(" " * n, add_special_tokens=False).ids == truth.encode(" " * n), n


@pytest.mark.parametrize("kind", NO_BPE)
def test_what_bpe_cannot_do_is_not_written(tmp_path, capsys, kind):
    """No tokenizer.json with other ids: transformers then reads tokenizer.model."""
    path = train_sentencepiece(tmp_path / "tokenizer.model", kind)
    tokenizer = load_tokenizer(path)
    save_model(make(vocab_size=tokenizer.vocab_size), tmp_path / "meta", tokenizer)
    main(["export", "--model", str(tmp_path / "meta"), "--to", "hf", "--out", str(tmp_path / "hf")])
    assert "no tokenizer.json: it cannot do what" in capsys.readouterr().out
    assert not (tmp_path / "hf/tokenizer.json").exists()
    config = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "LlamaTokenizer"


def test_transformers_needs_neither_protobuf_nor_sentencepiece(tmp_path, tokenizer):
    """And makes SentencePiece's ids, BOS in front, with a dummy prefix and without."""
    pytest.importorskip("transformers")
    meta = load_tokenizer(train_sentencepiece(tmp_path / "tokenizer.model", "prefix"))
    expected = []
    for n, each in enumerate((tokenizer, meta)):
        save_model(make(vocab_size=each.vocab_size), tmp_path / f"meta{n}", each)
        main(["export", "--model", str(tmp_path / f"meta{n}"), "--to", "hf",
              "--out", str(tmp_path / f"hf{n}")])
        expected += [each.encode(text, bos=True) for text in TRICKY]
    code = """if True:
        import json, sys
        for name in ("google.protobuf", "sentencepiece", "torch"):  # torch: it starts sooner
            sys.modules[name] = None
        import transformers
        texts = json.load(sys.stdin)
        ids = []
        for folder in sys.argv[1:]:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            ids += [tokenizer(text)["input_ids"] for text in texts]
        print(json.dumps(ids))
    """
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "hf0", tmp_path / "hf1"],
                          capture_output=True, text=True, input=json.dumps(TRICKY))
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected
