"""data/batches.py and data/passkey.py: rows are a function of (seed, step, row); prompts have
exactly the length, key and place asked for."""
import io
import json
import re
import shutil

import numpy as np
import pytest
import sentencepiece
import torch

from common.errors import UserError
from data.batches import Batches
from data.corpus import TokenFile
from data.passkey import (DIGITS, GARBAGE, INFORMATION, INTRODUCTION, QUESTION, PasskeyPrompts,
                          random_key)
from data.tokenizer import Tokenizer, train_tokenizer

T = 160


@pytest.fixture(scope="module")
def corpus(corpus_folder):
    return TokenFile(corpus_folder, "train")


# --------------------------------------------------------------------------------------------------
# Rows


def test_rows_are_a_function_of_seed_step_and_row(corpus, tokenizer):
    def made(seed=0, steps=(0, 1, 2), **settings):
        batches = Batches(corpus, tokenizer, 4, T, passkey_share=0.5, seed=seed, **settings)
        return {step: torch.stack(batches(step)) for step in steps}
    first, again = made(), made(steps=(2, 0, 1, 0))
    for step in first:
        assert torch.equal(first[step], again[step]), "a row depends on what was asked before it"
    batches = [*first.values(), *made(seed=1).values()]
    rows = [tuple(row.tolist()) for batch in batches for row in batch[0]]
    assert len(set(rows)) == len(rows) == 24, "steps, rows or seeds share a row"


def test_more_rows_leave_the_rows_of_text_as_they_are(corpus, tokenizer):
    few, many = Batches(corpus, tokenizer, 2, T)(7)[0], Batches(corpus, tokenizer, 6, T)(7)[0]
    assert torch.equal(few, many[:2])


def test_shares_of_the_ranks_are_the_whole(corpus, tokenizer):
    batches = Batches(corpus, tokenizer, 7, T, passkey_share=0.4, seed=3)
    for step in range(3):
        shares_of_ranks = [batches(step, *share) for share in ((0, 2), (2, 3), (3, 7))]
        for whole, shares in zip(batches(step), zip(*shares_of_ranks)):
            assert whole.shape == (7, T) and whole.dtype == torch.int64
            assert torch.equal(whole, torch.cat(shares))


def test_targets_are_the_next_tokens_of_the_corpus(corpus, tokenizer):
    tokens, targets = Batches(corpus, tokenizer, 8, T, seed=1)(0)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    text = np.asarray(corpus.tokens).astype(np.uint16).tobytes()
    starts = []
    for row in torch.cat([tokens, targets[:, -1:]], dim=1).numpy():
        at = text.find(row.astype(np.uint16).tobytes())
        assert at >= 0, "a row of text is no piece of the corpus"
        starts.append(at)
    assert len(set(starts)) == 8


def test_every_place_of_the_corpus_can_be_a_row(tokenizer, corpus):
    """A corpus of exactly one row is enough, and the last token is used."""
    class Short:
        tokens, tokenizer_sha256 = np.arange(T + 2, dtype=np.uint16), tokenizer.sha256
        read = TokenFile.read

        def __len__(self):
            return len(self.tokens)

    starts = {Batches(Short(), tokenizer, 1, T, seed=seed)(0)[0][0, 0].item() for seed in range(30)}
    assert starts == {0, 1}
    Short.tokens = Short.tokens[:T + 1]
    assert Batches(Short(), tokenizer, 1, T)(0)[1][0, -1] == T


def whole_rows(batches, step):
    """The T + 1 ids of each row of a step."""
    tokens, targets = batches(step)
    return torch.cat([tokens, targets[:, -1:]], dim=1).tolist()


def prompts_of(row, tokenizer):
    """Split a row into its passkey documents and the text behind them."""
    row, documents = list(row), []
    while row and row[0] == tokenizer.bos_id and tokenizer.eos_id in row:
        end = row.index(tokenizer.eos_id) + 1
        if not tokenizer.decode(row[:end]).startswith("There is an important info"):
            break
        documents.append(row[:end])
        row = row[end:]
    return documents, row


@pytest.mark.parametrize("longest", [None, 150, 80])
def test_no_training_prompt_is_longer_than_allowed(corpus, tokenizer, longest):
    """Every prompt is complete with its answer, and retrieval over more than `longest` tokens
    occurs nowhere."""
    length = 2 * T
    batches = Batches(corpus, tokenizer, 8, length, passkey_share=1.0, passkey_longest=longest,
                      seed=5)
    prompts = PasskeyPrompts(tokenizer)
    lengths, keys = [], []
    for step in range(12):
        for row in whole_rows(batches, step):
            documents, text = prompts_of(row, tokenizer)
            assert documents and len(text) <= prompts.shortest, "there is room for another prompt"
            assert "pass key" not in tokenizer.decode(text), "a prompt was cut off"
            for document in documents:
                lengths.append(len(document) - 1)  # EOS is not part of the prompt
                decoded = tokenizer.decode(document)
                found = re.findall(r"\d+", decoded)
                assert len(found) == 3 and len(set(found)) == 1 and len(found[0]) == 5, decoded
                assert decoded.endswith(f"{QUESTION} {found[0]}")
                keys.append(found[0])
    assert max(lengths) <= (longest or length)
    assert min(lengths) == prompts.shortest, "the shortest do not occur"
    assert max(lengths) > (longest or length) - 15, "the longest do not occur"
    assert len(set(keys)) > 0.95 * len(keys)


@pytest.mark.parametrize("longest", [None, 120])
def test_an_unpacked_row_is_text_with_one_prompt_in_it(corpus, tokenizer, longest):
    length = 2 * T
    batches = Batches(corpus, tokenizer, 8, length, passkey_share=1.0, passkey_longest=longest,
                      packed=False, seed=5)
    plain = Batches(corpus, tokenizer, 8, length, seed=5)
    begins, prompt_lengths, intro = set(), set(), PasskeyPrompts(tokenizer).introduction
    for step in range(6):
        for row, text in zip(whole_rows(batches, step), whole_rows(plain, step)):
            places = [i for i in range(len(row)) if row[i:i + len(intro)] == intro]
            assert len(places) == 1 and len(row) == length + 1
            begin = places[0]
            end = row.index(tokenizer.eos_id, begin) + 1
            key = re.findall(r"\d+", tokenizer.decode(row[begin:end]))
            assert len(key) == 3 and len(set(key)) == 1
            # The rest of the row is the corpus, in its place.
            assert row[:begin] == text[:begin] and row[end:] == text[end:]
            begins.add(begin)
            prompt_lengths.add(end - begin - 1)
    assert max(prompt_lengths) <= (longest or length)
    assert len(prompt_lengths) > 15 and len(begins) > 15


def test_a_corpus_without_validation_says_what_it_lacks(tokenizer, tmp_path):
    from data.prepare import PrepareConfig, prepare
    (tmp_path / "book.txt").write_text("one book\n" * 300, encoding="utf-8")
    folder = prepare(PrepareConfig(text=[str(tmp_path / "book.txt")],
                                   tokenizer=str(tokenizer.path), out=str(tmp_path / "tokens"),
                                   val_fraction=0))
    assert len(TokenFile(folder, "train")) > 300
    with pytest.raises(UserError, match="no document is in the val split.*--val-fraction"):
        TokenFile(folder, "val")


def test_the_longest_prompt_fills_the_row(corpus, tokenizer):
    shortest = PasskeyPrompts(tokenizer).shortest
    batches = Batches(corpus, tokenizer, 60, shortest + 2, passkey_share=1.0)
    lengths = [len(prompts_of(row, tokenizer)[0][0]) - 1 for row in whole_rows(batches, 0)]
    assert set(lengths) == {shortest, shortest + 1, shortest + 2}


@pytest.mark.parametrize("rows, share", [(16, 0.5), (1, 0.3), (3, 0.1), (2, 0.0), (2, 1.0),
                                         (5, 0.29)])
def test_share_of_passkey_rows_is_exact_over_the_steps(corpus, tokenizer, rows, share):
    batches, seen = Batches(corpus, tokenizer, rows, T, passkey_share=share), 0
    for step in range(20):
        seen += sum(bool(prompts_of(row, tokenizer)[0]) for row in whole_rows(batches, step))
        assert abs(seen - (step + 1) * rows * share) < 1
    assert share not in (0.0, 1.0) or seen == 20 * rows * share


def test_documents(corpus, tokenizer):
    documents = list(corpus.documents())
    assert sum(map(len, documents)) == len(corpus) and len(documents) == len(corpus.offsets) - 1
    for document in documents:
        assert document[0] == tokenizer.bos_id and document[-1] == tokenizer.eos_id
        assert tokenizer.bos_id not in document[1:]
    lengths = [len(document) for document in documents]
    longest = max(lengths)
    of_these = [len(document) for document in corpus.documents(longest)]
    assert of_these == [n for n in lengths if n == longest]
    assert not list(corpus.documents(longest + 1))


def change_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    (folder / "meta.json").write_text(json.dumps(meta | changes), encoding="utf-8")


def cut_off(file, n):
    """Take the last n bytes of a file away."""
    file.write_bytes(file.read_bytes()[:-n])


def offsets_of(folder):
    return np.load(folder / "train.docs.npy")


DAMAGE = {
    "bin cut off": lambda folder: cut_off(folder / "train.bin", 2),
    "bin cut inside a token": lambda folder: cut_off(folder / "train.bin", 1),
    "bin empty": lambda folder: (folder / "train.bin").write_bytes(b""),
    "bin missing": lambda folder: (folder / "train.bin").unlink(),
    "offsets missing": lambda folder: (folder / "train.docs.npy").unlink(),
    "offsets empty": lambda folder: (folder / "train.docs.npy").write_bytes(b""),
    "offsets cut off": lambda folder: cut_off(folder / "train.docs.npy", 8),
    "offsets of nothing": lambda folder: np.save(folder / "train.docs.npy", np.array([], np.int64)),
    "offsets are no array": lambda folder: (folder / "train.docs.npy").write_bytes(b"hello"),
    "offsets would run code":
        lambda folder: np.save(folder / "train.docs.npy", np.array([print], object)),
    "offsets are a number": lambda folder: np.save(folder / "train.docs.npy", np.int64(3)),
    "offsets with fractions":
        lambda folder: np.save(folder / "train.docs.npy", offsets_of(folder) + 0.0),
    "offsets of two rows":
        lambda folder: np.save(folder / "train.docs.npy", np.stack(2 * [offsets_of(folder)])),
    "offsets that fall":
        lambda folder: np.save(folder / "train.docs.npy", offsets_of(folder)[[0, 2, 1, -1]]),
    "offsets that begin late":
        lambda folder: np.save(folder / "train.docs.npy", offsets_of(folder)[1:]),
    "meta with a dtype of fractions": lambda folder: change_meta(folder, dtype="float16"),
    "meta with a signed dtype": lambda folder: change_meta(folder, dtype="int16"),
    "meta missing": lambda folder: (folder / "meta.json").unlink(),
    "meta is no JSON": lambda folder: (folder / "meta.json").write_text("{", encoding="utf-8"),
    "meta is a list": lambda folder: (folder / "meta.json").write_text("[1]", encoding="utf-8"),
    "meta is a number": lambda folder: (folder / "meta.json").write_text("3", encoding="utf-8"),
    "meta lacks a key":
        lambda folder: (folder / "meta.json").write_text('{"dtype": "uint16"}', encoding="utf-8"),
    "meta with an odd dtype": lambda folder: change_meta(folder, dtype="tokens"),
    "meta with a dtype that is no name": lambda folder: change_meta(folder, dtype=7),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_token_folder_is_one_line(corpus_folder, tmp_path, damage):
    for file in ("meta.json", "train.bin", "train.docs.npy"):
        shutil.copy(corpus_folder / file, tmp_path)
    DAMAGE[damage](tmp_path)
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        TokenFile(tmp_path, "train")


def test_a_token_that_the_tokenizer_lacks_is_one_line(corpus_folder, tokenizer, tmp_path):
    for file in ("meta.json", "train.bin", "train.docs.npy"):
        shutil.copy(corpus_folder / file, tmp_path)
    tokens = np.memmap(tmp_path / "train.bin", np.uint16, mode="r+")
    tokens[:] = tokenizer.vocab_size
    tokens.flush()
    corpus = TokenFile(tmp_path, "train")
    batches = Batches(corpus, tokenizer, 1, T)
    for work in (lambda: batches(0), lambda: next(corpus.documents())):
        with pytest.raises(UserError, match=f"train.bin: holds the token {tokenizer.vocab_size}, "
                                            f"the tokenizer has {tokenizer.vocab_size}: prepare"):
            work()


def test_what_does_not_fit_is_one_line(corpus, tokenizer, tmp_path):
    with pytest.raises(UserError, match=f"fewer than one row of {len(corpus) + 1}"):
        Batches(corpus, tokenizer, 1, len(corpus))
    Batches(corpus, tokenizer, 1, len(corpus) - 1)
    other = train_tokenizer(["some other words " * 50], tmp_path / "other.model", 370)
    with pytest.raises(UserError, match="another tokenizer"):
        Batches(corpus, other, 1, T)
    shortest = PasskeyPrompts(tokenizer).shortest
    with pytest.raises(UserError, match=f"a passkey prompt needs {shortest} tokens"):
        Batches(corpus, tokenizer, 1, T, passkey_share=0.5, passkey_longest=shortest - 1)
    Batches(corpus, tokenizer, 1, shortest, passkey_share=0.5)(0)
    Batches(corpus, tokenizer, 1, shortest - 1, passkey_share=0.0)(0)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="passkey"):
            Batches(corpus, tokenizer, 1, T, passkey_share=share)


# --------------------------------------------------------------------------------------------------
# Prompts. `metas` puts a space in front of every text, as Meta's tokenizers do.


@pytest.fixture(scope="module")
def metas(tmp_path_factory):
    words = f"{INTRODUCTION}{GARBAGE}{INFORMATION}{QUESTION}".split()
    model, rng = io.BytesIO(), np.random.default_rng(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(rng.choice(words, 12)) for _ in range(300)),
        model_writer=model, model_type="bpe", vocab_size=450, byte_fallback=True,
        split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=True, num_threads=1, minloglevel=2)
    path = tmp_path_factory.mktemp("metas") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return Tokenizer(path)


@pytest.fixture(params=["ours", "metas"])
def prompts(request, tokenizer):
    ours = request.param == "ours"
    made = PasskeyPrompts(tokenizer if ours else request.getfixturevalue("metas"))
    assert made.tokenizer.dummy_prefix == (request.param == "metas")
    return made


def check_prompt(prompts, prompt, answer, key, length):
    """The protocol (methods of the landmark and PI papers), word for word, around garbage that may
    be cut anywhere."""
    tokenizer = prompts.tokenizer
    assert len(prompt) + len(answer) == length and prompt.dtype == answer.dtype == np.int64
    control = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.model.unk_id()}
    assert prompt[0] == tokenizer.bos_id and not control & {*prompt[1:], *answer}
    text = tokenizer.decode(prompt)
    assert re.findall(r"\d+", text) == [key, key] and text.count("The pass key is") == 2
    introduction = ("There is an important info hidden inside a lot of irrelevant text. "
                    "Find it and memorize them. I will quiz you about the important information "
                    "there.\n")
    question = "\nWhat is the pass key? The pass key is"
    assert text.startswith(introduction) and text.endswith(question)
    before, sentence, after = text.partition(
        f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n")
    assert sentence
    garbage = ("The grass is green. The sky is blue. The sun is yellow. Here we go. "
               "There and back again. ") * (length // 10)
    assert garbage.startswith(before.removeprefix(introduction))
    assert garbage.startswith(after.removesuffix(question))
    assert tokenizer.decode([*prompt, *answer]).endswith(f"The pass key is {key}")


@pytest.mark.parametrize("key", ["12345", "00000", "00712", "99999"])
def test_prompt_has_exactly_the_length_and_one_key(prompts, key):
    parts = [prompts.introduction, prompts.information(key), prompts.question, prompts.answer(key)]
    shortest = sum(len(part) for part in parts)
    assert shortest <= prompts.shortest
    for length in (shortest, shortest + 1, shortest + 7, 128, 200, 333):
        for depth in (0, 0.1, 1 / 3, 0.5, 0.77, 1):
            prompt, answer = prompts.build(key, length, depth=depth)
            check_prompt(prompts, prompt, answer, key, length)
            before = prompts.position(prompt, key) - len(prompts.introduction)
            assert before == round(depth * (length - shortest))
    with pytest.raises(UserError, match="too short"):
        prompts.build(key, shortest - 1, depth=0.5)


def test_depth_0_and_1_are_the_ends(prompts):
    key, tokenizer = "04711", prompts.tokenizer
    for depth in (0, 1):
        prompt, _ = prompts.build(key, 180, depth=depth)
        at = prompts.position(prompt, key)
        front, back = tokenizer.decode(prompt[:at]), tokenizer.decode(prompt[at:])
        sentence = INFORMATION.format(key=key)
        if depth == 0:
            assert front == INTRODUCTION and back.startswith(sentence + "The grass")
        else:
            assert back == sentence + QUESTION and front.startswith(INTRODUCTION + "The grass")


def test_distance_is_exact(prompts):
    key, length = "31415", 190
    nearest = len(prompts.information(key)) + len(prompts.question)
    farthest = length - len(prompts.answer(key)) - len(prompts.introduction)
    for distance in range(nearest, farthest + 1):
        prompt, answer = prompts.build(key, length, distance=distance)
        assert len(prompt) - prompts.position(prompt, key) == distance
        assert len(prompt) + len(answer) == length
        if distance in (nearest, nearest + 13, farthest):
            check_prompt(prompts, prompt, answer, key, length)
    for beyond, place in ((0, nearest), (length, farthest)):  # beyond the ends: the end itself
        prompt, _ = prompts.build(key, length, distance=beyond)
        assert len(prompt) - prompts.position(prompt, key) == place


def test_position_is_where_the_sentence_begins(prompts):
    for key in ("00001", "10000", "55555"):
        prompt, _ = prompts.build(key, 170, depth=0.6)
        at = prompts.position(prompt, key)
        assert prompts.tokenizer.decode(prompt[at:]).startswith(INFORMATION.format(key=key))
        assert not prompts.tokenizer.decode(prompt[at + 1:]).startswith(INFORMATION.format(key=key))


def test_keys_are_five_digits_of_equal_worth():
    keys = [random_key(np.random.default_rng(seed)) for seed in range(2000)]
    assert all(re.fullmatch(r"\d{5}", key) for key in keys) and DIGITS == 5
    for place in range(5):
        counts = [sum(key[place] == digit for key in keys) for digit in "0123456789"]
        assert min(counts) > 140 and max(counts) < 260, "4 standard deviations of 200"


def test_documents_for_training(prompts):
    rng, lengths = np.random.default_rng(0), []
    for _ in range(300):
        document = prompts.document(rng, prompts.shortest + 9)
        assert document[-1] == prompts.tokenizer.eos_id
        text = prompts.tokenizer.decode(document)
        key = re.search(r"\d+", text).group()
        answer = prompts.answer(key)
        assert document[-1 - len(answer):-1].tolist() == list(answer)
        check_prompt(prompts, document[:-1 - len(answer)], np.array(answer), key, len(document) - 1)
        lengths.append(len(document) - 1)
    assert set(lengths) == set(range(prompts.shortest, prompts.shortest + 10))


def test_training_hides_the_key_at_all_depths(prompts):
    rng, tenths = np.random.default_rng(0), set()
    for _ in range(200):
        document = prompts.document(rng, 500)
        key = re.search(r"\d+", prompts.tokenizer.decode(document)).group()
        before = prompts.position(document, key) - len(prompts.introduction)
        fill = len(document) - 1 - prompts.shortest
        tenths.add(min(9, 10 * before // max(fill, 1)))
    assert tenths == set(range(10))
