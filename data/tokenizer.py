"""Text <-> token ids: a SentencePiece tokenizer.model (Meta's or ours), tokenizer.json, or .gguf.

BOS and EOS are added on request only: encode(text, bos=True, eos=True). Training and evaluation
put BOS in front of every document; training puts EOS behind it.

SentencePiece writes a space as '▁' (U+2581), and a character that has no piece as its bytes,
<0x00> ... <0xFF>. Meta's model puts a space in front of every text, the dummy prefix, and drops
it in decoding. Ours has no dummy prefix, so the parts of a document can be encoded separately.
"""
import hashlib
import io
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from common.environment import usable_cores
from common.errors import UserError, one_line
from common.files import read_json_object, whole_file
from data.gguf_tokenizer import gguf_tokenizer_files

SPACE = "\u2581"
SINGLE_SPACE = re.compile(f"(?<=[^ {SPACE}]) (?=[^ {SPACE}])")
PARTS_AT_ONCE = 8  # of a tokenizer.json: the package takes 170 bytes a character
PART = 1 << 16  # characters encoded at a time: bounds the memory, and the parts run in parallel
REMEDY = ("name a SentencePiece tokenizer.model, or train one with "
          "python data/prepare.py --train-tokenizer 1024 --tokenizer PATH")
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json", "chat_template.jinja", "generation_config.json")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Tokenizer:
    """A SentencePiece model file.

    vocab_size    number of pieces
    padded_size   size of the model's vocabulary, which may be rounded up
    sha256        of the file's bytes: token folders name their tokenizer by it
    dummy_prefix  whether encode puts a space in front of a text

    Without a dummy prefix (ours), decode(encode(text)) == text for every text. With one (Meta's),
    the ids are those of SentencePiece itself, which reads a literal '▁' as a space.
    """

    file_name = "tokenizer.model"
    add_bos = None  # whether transformers would add BOS unasked, if a file says so

    def __init__(self, path: str | Path):
        self.path = Path(path)
        data = read_tokenizer_file(path)
        self.sha256 = hashlib.sha256(data).hexdigest()
        if is_tiktoken(path):
            raise UserError(f"{path}: a tiktoken file, as LLaMA 3 has: copy the model's "
                            "tokenizer.json there, which says the same")
        try:
            if not data:
                raise RuntimeError("empty file")
            self.model = sentencepiece.SentencePieceProcessor(model_proto=data)
            self.vocab_size = self.padded_size = self.model.get_piece_size()
            pieces = [self.model.id_to_piece(i) for i in range(self.vocab_size)]
            self.dummy_prefix = self.model.encode("a", out_type=str)[0].startswith(SPACE)
        except (RuntimeError, IndexError, OSError, UnicodeError):
            raise UserError(f"{path}: not a SentencePiece model, or not a whole one: "
                            f"{REMEDY}") from None
        self.bos_id = self.model.bos_id()
        self.eos_id = self.model.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(f"{path}: this SentencePiece model has no BOS or no EOS piece, "
                            f"which LLaMA needs: {REMEDY}")

        # SentencePiece takes a literal '▁' for a space. Ours encodes it as its three bytes instead.
        as_bytes = [self.model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode("utf-8")]
        has_bytes = all(self.model.is_byte(i) for i in as_bytes)
        self.literal_space = as_bytes if has_bytes and not self.dummy_prefix else []

        # If no piece goes on past a space, a text cut in front of one keeps its ids.
        crosses_space = any(SPACE in piece.lstrip(SPACE) for piece in pieces)
        second = "b" if self.dummy_prefix else " b"
        separately = self.model.encode("a") + self.model.encode(second)
        self.cuttable = not crosses_space and self.model.encode("a b") == separately

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of `text`, with BOS in front and EOS behind on request."""
        return self.encode_batch([text], bos, eos)[0]

    def encode_batch(self, texts: Iterable[str], bos: bool = False,
                     eos: bool = False) -> list[list[int]]:
        """The ids of each text. Together they are encoded faster than one after another."""
        begin = [self.bos_id] if bos else []
        end = [self.eos_id] if eos else []
        texts = [check_characters(text) for text in texts]
        return [begin + ids + end for ids in self.encode_plain(texts)]

    def encode_plain(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text. All texts, and the parts of long ones, share the cores."""
        parts = [(n, part) for n, text in enumerate(texts) for part in self.parts(text)]
        characters = sum(len(text) for text in texts)
        threads = min(usable_cores(), 1 + characters // PART)  # a second one pays from about there
        encoded = self.model.encode([part for _, part in parts], num_threads=threads)
        batch = [[] for _ in texts]
        for (n, part), ids in zip(parts, encoded):
            batch[n] += self.literal_space if self.literal_space and part == SPACE else ids
        return batch

    def parts(self, text: str) -> Iterator[str]:
        """Cut `text` where its ids allow: around a literal '▁', and about every PART characters."""
        pieces = re.split(f"({SPACE})", text) if self.literal_space else [text]
        for piece in pieces:
            start = 0
            while self.cuttable and len(piece) - start > PART:
                space = SINGLE_SPACE.search(piece, start + PART)
                if space is None:
                    break
                yield piece[start:space.start()]
                # The dummy prefix of the next part, if there is one, stands for the space.
                start = space.end() if self.dummy_prefix else space.start()
            yield piece[start:]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. BOS and EOS are silent; bytes that are no UTF-8 become U+FFFD."""
        return self.model.decode(drop_padding_ids(self, ids))

    @property
    def policy(self) -> str:
        """The use of BOS and EOS, for headers."""
        unasked = {None: "", True: "; transformers adds BOS unasked",
                   False: "; transformers adds no BOS"}
        return f"BOS {self.bos_id} and EOS {self.eos_id} where asked for{unasked[self.add_bos]}"

    def files(self) -> dict[str, bytes]:
        """{name: bytes} of the files that give a model folder this tokenizer."""
        files = companion_files(self.path.parent) if self.path.name == self.file_name else {}
        files[self.file_name] = self.path.read_bytes()
        return files


class JsonTokenizer(Tokenizer):
    """A tokenizer.json, read by the `tokenizers` package. The ids are those of transformers.

    BOS and EOS are named by the first of tokenizer_config.json, special_tokens_map.json and
    config.json beside it that does. The post-processor, by which many files add BOS unasked, is
    not used. A special token's name inside a text stands for that token.
    """

    file_name = "tokenizer.json"

    def __init__(self, path: str | Path):
        try:
            from tokenizers import Tokenizer as TokenizersModel
        except ImportError:
            raise UserError(f"{path}: reading it needs a package: pip install tokenizers") from None
        self.path = Path(path)
        data = read_tokenizer_file(path)
        self.sha256 = hashlib.sha256(data).hexdigest()
        try:
            self.model = TokenizersModel.from_str(data.decode("utf-8"))
            self.model.no_truncation()
            self.model.no_padding()
            self.pieces = self.model.get_vocab(with_added_tokens=True)
            first = self.model.encode("a", add_special_tokens=False).tokens
        except (KeyboardInterrupt, MemoryError):
            raise
        except BaseException as error:  # the package's errors share no class; Rust panics are here
            raise UserError(f"{path}: not a tokenizer.json, or not a whole one "
                            f"({one_line(error)}): copy it again") from None
        if not self.pieces:
            raise UserError(f"{path}: has no pieces: copy it again")
        self.vocab_size = self.padded_size = max(self.pieces.values()) + 1
        # Byte-level BPE cuts a text into words first. Where a text begins with a space that is not
        # its own, every part would get one.
        steps = json.loads(data)
        pre_tokenizer, normalizer = (json.dumps(steps.get(step))
                                     for step in ("pre_tokenizer", "normalizer"))
        adds_space = '"add_prefix_space": true' in pre_tokenizer or '"Prepend"' in normalizer
        self.cuttable = '"ByteLevel"' in pre_tokenizer and not adds_space
        # Byte-level BPE writes a space as "Ġ" (U+0120).
        self.dummy_prefix = bool(first) and first[0].startswith((SPACE, "\u0120"))
        names = ("tokenizer_config.json", "special_tokens_map.json", "config.json")
        self.configs = {name: read_json_object(self.path.parent / name) for name in names}
        self.bos_id = self.special_id("bos")
        self.eos_id = self.special_id("eos")
        add_bos = self.configs["tokenizer_config.json"].get("add_bos_token")
        self.add_bos = add_bos if isinstance(add_bos, bool) else None

    def special_id(self, kind: str) -> int:
        """The id of the token `kind`, "bos" or "eos"."""
        for name, config in self.configs.items():
            token = config.get(f"{kind}_token_id" if name == "config.json" else f"{kind}_token")
            if isinstance(token, dict):
                token = token.get("content")
            elif isinstance(token, list) and token:
                token = token[0]
            if isinstance(token, str) and token in self.pieces:
                return self.pieces[token]
            if type(token) is int and token in self.pieces.values():
                return token
            if isinstance(token, str) or type(token) is int:
                raise UserError(f"{self.path.parent / name}: {kind.upper()} is {token!r:.60}, "
                                "which tokenizer.json does not have: do the two belong together?")
        raise UserError(f"{self.path}: which token is {kind.upper()}? Say so in a tokenizer_config"
                        '.json beside it: {"bos_token": "<s>", "eos_token": "</s>"}')

    def encode_plain(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text. Long texts go in parts, few at a time."""
        parts = [(n, part) for n, text in enumerate(texts) for part in self.parts(text)]
        batch: list[list[int]] = [[] for _ in texts]
        for i in range(0, len(parts), PARTS_AT_ONCE):
            owners, pieces = zip(*parts[i:i + PARTS_AT_ONCE])
            try:
                encoded = self.model.encode_batch(pieces, add_special_tokens=False)
            except Exception as error:  # a word without any token
                raise UserError(f"{self.path}: cannot encode this text ({one_line(error)}): "
                                "copy the tokenizer again") from None
            for n, encoding in zip(owners, encoded):
                batch[n] += encoding.ids
        return batch

    def parts(self, text: str) -> Iterator[str]:
        """Cut `text` about every PART characters, after a line end that follows a visible character
        and precedes a letter: a word ends there for every byte-level tokenizer."""
        start = 0
        for cut in re.finditer(r"(?<=\S)\n(?=[A-Za-z])", text) if self.cuttable else ():
            if cut.end() - start > PART:
                yield text[start:cut.end()]
                start = cut.end()
        yield text[start:]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Special tokens are silent; bytes that are no UTF-8 become U+FFFD."""
        return self.model.decode(drop_padding_ids(self, ids), skip_special_tokens=True)

    def files(self) -> dict[str, bytes]:
        files = super().files()
        config = self.configs["tokenizer_config.json"]
        names_both = config.get("bos_token") and config.get("eos_token")
        if not names_both or "tokenizer_config.json" not in files:
            piece_of = {i: piece for piece, i in self.pieces.items()}
            special = {"bos_token": piece_of[self.bos_id], "eos_token": piece_of[self.eos_id]}
            files["tokenizer_config.json"] = json.dumps(config | special, indent=1).encode()
        return files


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.model, a tokenizer.json, a folder with one of them, or inside a
    .gguf file."""
    if Path(path).is_dir():
        path = choose_file(Path(path) / "tokenizer.model", Path(path) / "tokenizer.json")
    suffix = Path(path).suffix
    if suffix == ".gguf":
        return read_gguf_tokenizer(path)
    return JsonTokenizer(path) if suffix == ".json" else Tokenizer(path)


def choose_file(model_file: Path, json_file: Path) -> Path:
    """Of a folder with both, tokenizer.model; tokenizer.json where that is missing or a tiktoken
    file, as in LLaMA 3."""
    if json_file.is_file() and (not model_file.exists() or is_tiktoken(model_file)):
        return json_file
    return model_file


def read_gguf_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer inside a .gguf file, opened as the tokenizer.model or tokenizer.json that says
    the same. sha256 is that file's: quantisations of one model share their tokenizer."""
    files = gguf_tokenizer_files(path)
    try:
        tokenizer = open_tokenizer_files(files)
    except UserError as error:
        raise UserError(f"{path}: its tokenizer, as {error}") from None
    tokenizer.path = Path(path)
    tokenizer.files = files.copy
    return tokenizer


def open_tokenizer_files(files: dict[str, bytes]) -> Tokenizer:
    """The tokenizer of {name: bytes}, the first of which is the tokenizer itself."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        try:
            return open_tokenizer(Path(folder) / next(iter(files)))
        except UserError as error:
            raise UserError(str(error).replace(f"{folder}/", "")) from None


def read_tokenizer_file(path: str | Path) -> bytes:
    """The bytes of a tokenizer file."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: {REMEDY}") from None


def is_tiktoken(path: str | Path) -> bool:
    """Whether a file lists base64 pieces and their ranks, as LLaMA 3's tokenizer.model does."""
    with open(path, "rb") as file:
        return re.match(rb"[A-Za-z0-9+/]+=* \d+\n", file.read(4096)) is not None


def companion_files(folder: Path) -> dict[str, bytes]:
    """{name: bytes} of the files that go where the tokenizer goes, though nothing here reads them:
    transformers' form of it, its chat template, and generation_config.json, the ids that end an
    answer. If only config.json has these ids, a generation_config.json is made of them."""
    files = {}
    for name in COMPANIONS:
        if (folder / name).is_file():
            files[name] = (folder / name).read_bytes()
    config = read_json_object(folder / "config.json")
    ids = {key: config[key] for key in config if key in IDS and config[key] is not None}
    if ids and not read_json_object(folder / "generation_config.json"):
        files["generation_config.json"] = json.dumps(ids).encode()
    return files


def json_of_file(files: dict[str, bytes], name: str) -> dict:
    """The object in one of a tokenizer's files, {name: bytes}; {} where there is no such file."""
    try:
        value = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{name}, beside the tokenizer: holds no object {{...}}: copy it again")
    return value


def drop_padding_ids(tokenizer: Tokenizer, ids: Iterable[int]) -> list[int]:
    """`ids` without those from vocab_size on, which only round a model's vocabulary up. An id that
    is not in 0 .. padded_size - 1 is a UserError."""
    ids = [int(i) for i in ids]
    for i in ids:
        if not 0 <= i < tokenizer.padded_size:
            raise UserError(f"token {i} is not in the vocabulary of {tokenizer.path} (0 to "
                            f"{tokenizer.vocab_size - 1}): take the tokenizer that was made with "
                            "this model or token file")
    return [i for i in ids if i < tokenizer.vocab_size]


def check_characters(text: str) -> str:
    """`text` itself. Half of a surrogate pair, as in broken JSON, is no character: a UserError."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the text holds half of a surrogate pair, U+{ord(text[error.start]):04X}, "
                        f"at {error.start}: read it as UTF-8") from None
    return text


def train_tokenizer(texts: Iterable[str], path: str | Path, vocab_size: int = 1024) -> Tokenizer:
    """Train a SentencePiece BPE model on `texts`, write it to `path`, and return its Tokenizer.

    The layout is LLaMA's: unk 0, BOS 1, EOS 2, the 256 bytes, then pieces. Digits are single
    tokens. White space is kept exactly: no normalisation; runs of spaces and newlines are pieces.
    The same texts give the same bytes: one thread, no shuffle.
    """
    if vocab_size < 360:
        raise UserError(f"--train-tokenizer {vocab_size}: 3 control pieces, 256 bytes and the "
                        "visible ASCII characters need 360; 1024 is a good small number")
    sentences = []
    for text in texts:
        check_characters(text)
        for start in range(0, len(text), 4096):  # SentencePiece skips long "sentences"
            sentences.append(text[start:start + 4096])
    if not any(sentence.strip() for sentence in sentences):
        raise UserError("there is no text to train a tokenizer on: name files with --text")
    model = io.BytesIO()
    try:
        # SentencePiece keeps tabs and NUL out of its pieces: they stay bytes.
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, model_type="bpe",
            vocab_size=vocab_size, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, byte_fallback=True,
            split_digits=True, allow_whitespace_only_pieces=True, add_dummy_prefix=False,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
            character_coverage=0.9995, required_chars="".join(map(chr, range(33, 127))),
            max_sentence_length=1 << 20, shuffle_input_sentence=False, num_threads=1, minloglevel=2)
    except (RuntimeError, ValueError) as error:  # "... Vocabulary size too high (1024). ..."
        reason = str(error).split("] ")[-1].strip(" .")
        raise UserError(f"a tokenizer of {vocab_size} pieces cannot be trained on this text: "
                        f"{reason}: give more text, or another number") from None
    with whole_file(path) as file:
        file.write(model.getvalue())
    return Tokenizer(path)
