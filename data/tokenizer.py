"""Text <-> token ids: Meta's SentencePiece file exactly as it is, small ones of our own that lose no character, and tokenizer.json.

No BOS and no EOS is ever added unless asked for: encode(text, bos=True, eos=True). Evaluation and training put BOS in front of every
document, training EOS behind it.

A SentencePiece model writes a space as '▁' (U+2581) and everything it has no piece for as bytes, <0x00> ... <0xFF>. Meta's puts one more
space in front of every text and takes it off again when decoding. Ours does not, so that pieces of one document can be encoded apart.
"""
import hashlib
import io
import json
import os
import re
from pathlib import Path

import sentencepiece

from cli import UserError, read_json, whole_file

SPACE = "\u2581"
SINGLE_SPACE = re.compile(f"(?<=[^ {SPACE}]) (?=[^ {SPACE}])")
PART = 1 << 16  # characters encoded at a time: bounds the memory of a long text and lets its parts run in parallel
REMEDY = "name a SentencePiece tokenizer.model, or train one with python data/prepare.py --train-tokenizer 1024 --tokenizer PATH"
BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
          "generation_config.json")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Tokenizer:
    """A SentencePiece model file.

    Attributes: vocab_size, bos_id, eos_id, path, sha256 (of the file's bytes: token files name their tokenizer by it), dummy_prefix.
    Without a dummy prefix (ours) decode(encode(x)) == x for every text. With one (Meta's) the ids are those of SentencePiece itself,
    which reads a literal '▁' as a space.
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}: {REMEDY}") from None
        self.sha256 = hashlib.sha256(data).hexdigest()
        if is_tiktoken(path):
            raise UserError(f"{path}: a tiktoken file, as LLaMA 3 has: copy the model's tokenizer.json there, which says the same")
        try:
            if not data:
                raise RuntimeError("empty file")
            self.model = sentencepiece.SentencePieceProcessor(model_proto=data)
            self.vocab_size = self.model.get_piece_size()
            pieces = [self.model.id_to_piece(i) for i in range(self.vocab_size)]
            self.dummy_prefix = self.model.encode("a", out_type=str)[0].startswith(SPACE)
        except (RuntimeError, IndexError, OSError, UnicodeError):
            raise UserError(f"{path}: not a SentencePiece model, or not a whole one: {REMEDY}") from None
        self.padded_size = self.vocab_size
        self.bos_id, self.eos_id = self.model.bos_id(), self.model.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(f"{path}: this SentencePiece model has no BOS or no EOS piece, which LLaMA needs: {REMEDY}")
        # SentencePiece cannot tell a literal '▁' from a space: ours goes in as its three bytes, which come out as themselves.
        as_bytes = [self.model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode("utf-8")]
        self.literal_space = as_bytes if not self.dummy_prefix and all(map(self.model.is_byte, as_bytes)) else []
        # No piece of ours or Meta's goes on past a space, so a text may be cut in front of one without changing its ids.
        apart = self.model.encode("a") + self.model.encode("b" if self.dummy_prefix else " b")
        self.cuttable = not any(SPACE in piece.lstrip(SPACE) for piece in pieces) and self.model.encode("a b") == apart

    def encode(self, text, bos=False, eos=False):
        """The ids of `text`, a list of ints, with BOS in front and EOS behind if asked."""
        return self.encode_batch([text], bos, eos)[0]

    def encode_batch(self, texts, bos=False, eos=False):
        """The ids of each text: a list of lists. All texts, and the parts of long ones, are encoded together on all cores."""
        cut = [list(self.parts(characters(text))) for text in texts]
        flat = [part for parts in cut for part in parts]
        threads = min(cores(), 1 + sum(map(len, flat)) // PART)  # a second one pays from about there
        ids = iter(self.model.encode(flat, num_threads=threads))
        batch = []
        for parts in cut:
            tokens = [self.bos_id] * bos
            for part in parts:
                encoded = next(ids)
                tokens += self.literal_space if self.literal_space and part == SPACE else encoded
            batch.append(tokens + [self.eos_id] * eos)
        return batch

    def parts(self, text):
        """Cut `text` where that does not change its ids: around each literal '▁' that is to be kept, and about every PART characters."""
        if self.literal_space and SPACE in text:
            for piece in re.split(f"({SPACE})", text):
                yield from [SPACE] if piece == SPACE else self.parts(piece)
            return
        start = 0
        while self.cuttable and len(text) - start > PART and (cut := SINGLE_SPACE.search(text, start + PART)):
            yield text[start:cut.start()]
            start = cut.end() if self.dummy_prefix else cut.start()  # the dummy prefix of the next part stands for the space
        yield text[start:]

    def decode(self, ids):
        """The text of a list of ids. BOS and EOS are silent; bytes that are no UTF-8 become U+FFFD."""
        return self.model.decode(known(self, ids))

    @property
    def policy(self):
        return f"BOS {self.bos_id} and EOS {self.eos_id} where asked for"

    def files(self):
        """{name: bytes} of what a model folder needs to have this tokenizer, and of what lay beside it."""
        return {**(beside(self.path.parent) if self.path.name == "tokenizer.model" else {}), "tokenizer.model": self.path.read_bytes()}


class JsonTokenizer:
    """A tokenizer.json, by the `tokenizers` package. Interface and attributes are Tokenizer's, and ids are those of transformers.

    The file does not say which tokens are BOS and EOS: tokenizer_config.json beside it does, else special_tokens_map.json, else
    config.json. The post-processor, by which many files add BOS by themselves, is not used. The name of a special token inside a text
    stands for that token, as in transformers.
    """

    def __init__(self, path):
        self.path, folder = Path(path), Path(path).parent
        try:
            from tokenizers import Tokenizer as Model
        except ImportError:
            raise UserError(f"{path}: reading it needs a package: pip install tokenizers") from None
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}: {REMEDY}") from None
        self.sha256 = hashlib.sha256(data).hexdigest()
        try:
            self.model = Model.from_str(data.decode("utf-8"))
            self.model.no_truncation(), self.model.no_padding()
            self.pieces = self.model.get_vocab(with_added_tokens=True)
            first = self.model.encode("a", add_special_tokens=False).tokens
        except (KeyboardInterrupt, MemoryError):
            raise
        except BaseException as error:  # the package has no class of its own for what it finds wrong, and a panic in Rust is no Exception
            raise UserError(f"{path}: not a tokenizer.json, or not a whole one ({one_line(error)}): copy it again") from None
        if not self.pieces:
            raise UserError(f"{path}: has no pieces: copy it again")
        self.padded_size = self.vocab_size = max(self.pieces.values()) + 1
        self.dummy_prefix = bool(first) and first[0].startswith((SPACE, "\u0120"))  # "Ġ" is the space of byte-level BPE
        self.said = {name: settings(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json")}
        self.bos_id, self.eos_id = self.special("bos"), self.special("eos")
        added = self.said["tokenizer_config.json"].get("add_bos_token")
        self.add_bos = added if isinstance(added, bool) else None  # what transformers does unasked; nothing here depends on it

    def special(self, kind):
        """The id of BOS or EOS."""
        for name, given in self.said.items():
            token = given.get(f"{kind}_token_id" if name == "config.json" else f"{kind}_token")
            token = token.get("content") if isinstance(token, dict) else token[0] if isinstance(token, list) and token else token
            if type(token) is int and token not in self.pieces.values() or isinstance(token, str) and token not in self.pieces:
                raise UserError(f"{self.path.parent / name}: {kind.upper()} is {token!r:.60}, which tokenizer.json does not have: do "
                                "the two belong together?")
            if type(token) is int or isinstance(token, str):
                return self.pieces.get(token, token)
        raise UserError(f"{self.path}: which token is {kind.upper()}? Say so in a tokenizer_config.json beside it: "
                        f"{{\"bos_token\": \"<s>\", \"eos_token\": \"</s>\"}}")

    @property
    def policy(self):
        alone = {None: "", True: "; transformers adds BOS unasked", False: "; transformers adds no BOS"}[self.add_bos]
        return f"BOS {self.bos_id} and EOS {self.eos_id} where asked for{alone}"

    def encode(self, text, bos=False, eos=False):
        """The ids of `text`, a list of ints, with BOS in front and EOS behind if asked."""
        return self.encode_batch([text], bos, eos)[0]

    def encode_batch(self, texts, bos=False, eos=False):
        """The ids of each text: a list of lists."""
        texts = [characters(text) for text in texts]
        try:
            encoded = self.model.encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # a word without any token
            raise UserError(f"{self.path}: cannot encode this text ({one_line(error)}): copy the tokenizer again") from None
        return [[self.bos_id] * bos + one.ids + [self.eos_id] * eos for one in encoded]

    def decode(self, ids):
        """The text of a list of ids. Special tokens are silent; bytes that are no UTF-8 become U+FFFD."""
        return self.model.decode(known(self, ids), skip_special_tokens=True)

    def files(self):
        """{name: bytes} of what a model folder needs to have this tokenizer, with what says BOS and EOS, and of what lay beside it."""
        files = {**(beside(self.path.parent) if self.path.name == "tokenizer.json" else {}), "tokenizer.json": self.path.read_bytes()}
        said, names = self.said["tokenizer_config.json"], {token_id: token for token, token_id in self.pieces.items()}
        if not ("tokenizer_config.json" in files and said.get("bos_token") and said.get("eos_token")):
            config = {**said, "bos_token": names[self.bos_id], "eos_token": names[self.eos_id]}
            files["tokenizer_config.json"] = json.dumps(config, indent=1).encode()
        return files


def open_tokenizer(path):
    """The Tokenizer of a tokenizer.model, the JsonTokenizer of a tokenizer.json, or what is inside a .gguf file."""
    if Path(path).suffix == ".gguf":
        import gguf_model
        return gguf_model.read_tokenizer(path)
    return JsonTokenizer(path) if Path(path).suffix == ".json" else Tokenizer(path)


def is_tiktoken(path):
    """Whether a file is a list of base64 pieces and their ranks, as LLaMA 3's tokenizer.model."""
    with open(path, "rb") as file:
        return re.match(rb"[A-Za-z0-9+/]+=* \d+\n", file.read(4096)) is not None


def beside(folder):
    """{name: bytes} of what has no use here but goes where the tokenizer goes: transformers' other form of it, its words for a chat, and
    generation_config.json, the ids that end an answer, of which chat models have several. Where only config.json says them, a
    generation_config.json is made of it, as transformers would."""
    files = {name: (folder / name).read_bytes() for name in BESIDE if (folder / name).is_file()}
    ids = {key: value for key, value in settings(folder / "config.json").items() if key in IDS and value is not None}
    if not settings(folder / "generation_config.json") and ids:
        files["generation_config.json"] = json.dumps(ids).encode()
    return files


def one_line(error):
    """What an exception of another package says, short and printable."""
    return "".join(filter(str.isprintable, " ".join(str(error).split())))[:100] or type(error).__name__


def settings(file):
    """The object in a JSON file; {} where there is none."""
    given = read_json(file) if file.is_file() else {}
    if not isinstance(given, dict):
        raise UserError(f"{file}: holds no object {{...}}: copy it again")
    return given


def known(tokenizer, ids):
    """`ids` without those by which the model's vocabulary was rounded up (padded_size); others that are no token are refused."""
    ids = [int(i) for i in ids]
    if ids and not 0 <= min(ids) <= max(ids) < tokenizer.padded_size:
        wrong = max(ids) if min(ids) >= 0 else min(ids)
        raise UserError(f"token {wrong} is not in the vocabulary of {tokenizer.path} (0 to {tokenizer.vocab_size - 1}): "
                        "take the tokenizer that was made with this model or token file")
    return [i for i in ids if i < tokenizer.vocab_size]


def cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def characters(text):
    """`text` itself, if UTF-8 can hold it: half of a surrogate pair (as file names and broken JSON may have) is no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the text holds half of a surrogate pair, U+{ord(text[error.start]):04X}, at {error.start}: "
                        "read it as UTF-8") from None
    return text


def train_tokenizer(texts, path, vocab_size=1024):
    """Train a SentencePiece BPE model on an iterable of texts and write it to `path`; returns its Tokenizer.

    The layout is LLaMA's: unk 0, BOS 1, EOS 2, the 256 bytes, then pieces. Digits are always single tokens. White space is kept exactly
    (no normalisation, no dummy prefix; runs of spaces and newlines are pieces). The same texts give the same bytes: one thread, no shuffle.
    """
    if vocab_size < 360:
        raise UserError(f"--train-tokenizer {vocab_size}: 3 control pieces, 256 bytes and the visible ASCII characters need 360; "
                        "1024 is a good small number")
    # SentencePiece skips long "sentences". It keeps tabs and NUL out of its pieces: they are bytes.
    sentences = [text[i:i + 4096] for text in map(characters, texts) for i in range(0, len(text), 4096)]
    if not any(map(str.strip, sentences)):
        raise UserError("there is no text to train a tokenizer on: name files with --text")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1, byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            character_coverage=0.9995, required_chars="".join(map(chr, range(33, 127))), max_sentence_length=1 << 20,
            shuffle_input_sentence=False, num_threads=1, minloglevel=2)
    except RuntimeError as error:  # "... Vocabulary size too high (1024). Please set it to a value <= 387."
        reason = str(error).split("] ")[-1].strip(" .")
        raise UserError(f"a tokenizer of {vocab_size} pieces cannot be trained on this text: {reason}: "
                        "give more text, or another number") from None
    with whole_file(path) as file:
        file.write(model.getvalue())
    return Tokenizer(path)
