"""The commands of eval.py: what they print and write, which text they measure, and a model's own
words. The last tests measure the trained model in data/tiny."""
import json
import math
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
from common.cli import run_command
from common.device import matmul_precision
from common.errors import UserError
from data.corpus import validation_documents
from data.decoding import decoded_pieces
from eval import four_lengths, main, measure_lengths, passkey, perplexity
from methods import RopeConfig
from small_models import random_documents, small_model, write_corpus
from weights import load_model, save_model

ROOT = Path(evaluation.__file__).parent
TINY = ROOT / "data" / "tiny"
# What every result says.
CONDITIONS = {"model", "rope", "seed", "dtype", "matmul", "attention", "device", "versions",
              "command"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model folder, a text and a corpus for it, and the same model said to be extended twofold by
    PI."""
    place = tmp_path_factory.mktemp("eval")
    model = small_model(vocab_size=tokenizer.vocab_size, max_seq_len=64)
    save_model(model, place / "model", tokenizer)
    model.config.rope = RopeConfig("linear", 2.0, original_max_position_embeddings=64)
    model.config.max_seq_len = 128
    save_model(model, place / "extended", tokenizer)
    text = "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(60))
    (place / "text.py").write_text(text, encoding="utf-8")
    ids = np.array(tokenizer.encode(text, bos=True))
    write_corpus(place / "corpus", [ids[:600], ids[:590], ids[:20]], tokenizer)
    return place


@pytest.fixture
def cli(capsys, tmp_path, folder):
    """cli(*argv) -> (the result file, what was printed). @x is the file or folder x of `folder`."""
    def call(*argv):
        out = tmp_path / "new" / "result.json"
        main([str(a).replace("@", f"{folder}/") for a in argv] + ["--out", str(out)])
        return json.loads(out.read_text(encoding="utf-8")), capsys.readouterr().out
    return call


@pytest.fixture(scope="module")
def text_ids(folder, tokenizer):
    text = (folder / "text.py").read_text(encoding="utf-8")
    return np.array(tokenizer.encode(text, bos=True))


# ---- Results -------------------------------------------------------------------------------------


def test_ppl_writes_what_the_contract_says(cli, folder, tokenizer, text_ids):
    measured, printed = cli("ppl", "--model", "@model", "--text", "@text.py", "@text.py",
                            "--window", 48, "--stride", 16, "--seed", 5)
    wanted = {"perplexity", "tokens", "documents", "window", "stride", "seconds", "bos"}
    assert CONDITIONS | wanted <= set(measured)
    assert text_ids[0] == tokenizer.bos_id
    model = load_model(folder / "model")
    expected = perplexity(model, [text_ids], 48, 16, progress=False)["perplexity"]
    assert measured["perplexity"] == pytest.approx(expected, rel=1e-6)
    assert measured["tokens"] == 2 * len(text_ids) - 2
    assert measured["documents"] == 2
    assert (measured["window"], measured["stride"]) == (48, 16)
    assert measured["model"] == str(folder / "model")
    assert measured["seed"] == 5
    assert measured["device"].startswith("cpu")
    assert measured["rope"]["rope_type"] == "default"
    assert measured["versions"]["torch"] == torch.__version__
    assert measured["command"]
    for words in (f"{measured['perplexity']:.4f}", "window 48, stride 16, BOS once",
                  f"{measured['tokens']:,} tokens of 2 documents"):
        assert words in printed


def test_passkey_writes_what_the_contract_says(cli, folder):
    measured, printed = cli("passkey", "--model", "@model", "--lengths", 120, 90, "--depths", 2,
                            "--trials", 3)
    wanted = {"accuracy", "lengths", "trials", "k_max", "accuracy_by_depth"}
    assert CONDITIONS | wanted <= set(measured)
    assert measured["lengths"] == [90, 120]
    assert measured["trials"] == 3
    assert measured["k_max"] == 0
    assert set(measured["accuracy"]) == {"90", "120"}
    assert all(isinstance(a, float) for a in measured["accuracy"].values())
    assert [len(row) for row in measured["accuracy_by_depth"].values()] == [2, 2]
    assert measured["model"] == str(folder / "model")
    assert "k_max 0 at length 120" in printed
    assert "2 depths x 3 keys, greedy" in printed


def test_bins_are_printed_and_the_windows_then_do_not_overlap(cli):
    measured, printed = cli("ppl", "--model", "@model", "--text", "@text.py", "--bins", 4)
    assert (measured["window"], measured["stride"]) == (64, 64)
    assert measured["context"] == [1, 17, 33, 49]
    assert sum(measured["tokens_by_context"]) == measured["tokens"]
    for context, nll in zip(measured["context"], measured["nll_by_context"]):
        assert f"\n{context:<10} {nll:.4f}\n" in printed
    measured, _ = cli("ppl", "--model", "@model", "--text", "@text.py", "--bins", 4,
                      "--stride", 16)
    assert measured["stride"] == 16


@pytest.mark.parametrize("argv", ["ppl --model @model --corpus @corpus",
                                  "passkey --model @model --lengths 100 --depths 2 --trials 2"])
def test_the_same_command_gives_the_same_numbers(cli, argv):
    one, two = cli(*argv.split())[0], cli(*argv.split())[0]
    assert one.pop("seconds") > 0
    assert two.pop("seconds") > 0
    assert one == two


def test_the_command_is_recorded_as_typed(folder, tmp_path, monkeypatch):
    out = tmp_path / "a b.json"
    argv = f"passkey --model {folder}/model --lengths 90 --depths 1 --trials 1 --out".split()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "eval.py"), *argv, str(out)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path("eval.py", run_name="__main__")
    assert stop.value.code == 0
    measured = json.loads(out.read_text(encoding="utf-8"))
    assert measured["command"] == f"python eval.py {' '.join(argv)} '{out}'"


@pytest.mark.parametrize("argv, words", [
    ("ppl --model @model --text @text.py --max-tokens 64",
     "--max-tokens 64 is below the window 64 and the token after it: give at least 65"),
    ("ppl --model @model --text @text.py --rope linear --factor 64",
     "give a longer text or a shorter --window"),
    ("ppl --model @model --corpus @corpus --window 310", "no validation document has 620 tokens"),
    # Half of this model's window of 64. test_cli.py has many more.
    ("passkey --model @model", "too short")])
def test_a_mistake_is_one_line_and_exit_code_2(folder, tmp_path, capsys, argv, words):
    argv = argv.replace("@", f"{folder}/").split() + ["--out", str(tmp_path / "result.json")]
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main(argv))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert list(tmp_path.iterdir()) == []


# ---- Documents -----------------------------------------------------------------------------------


def test_validation_documents_have_one_length_and_fit_the_tokenizer(tmp_path, tokenizer):
    documents = random_documents(50, 7, 90, 30, 64, vocab_size=1024)
    corpus = write_corpus(tmp_path / "corpus", documents, tokenizer)
    chosen = validation_documents(corpus, 30, 65, tokenizer)
    assert [d.tolist() for d in chosen] == [documents[0][:30].tolist(), documents[2][:30].tolist()]
    assert len(validation_documents(corpus, 30, 10**9, tokenizer)) == 4
    assert len(validation_documents(corpus, 30, 1, tokenizer)) == 1
    with pytest.raises(UserError, match="no validation document has 91 tokens"):
        validation_documents(corpus, 91, 100, tokenizer)
    other = types.SimpleNamespace(sha256="other", path="other.model")
    with pytest.raises(UserError, match="another tokenizer"):
        validation_documents(corpus, 30, 100, other)


def test_ppl_without_text_reads_the_validation_documents(cli):
    measured, _ = cli("ppl", "--model", "@model", "--corpus", "@corpus")
    assert (measured["window"], measured["stride"]) == (64, 16)
    assert (measured["documents"], measured["tokens"]) == (2, 2 * 511)


@pytest.mark.parametrize("window, limit, documents, tokens", [
    # The same documents, eight original windows long, for every window up to four: the perplexities
    # compare.
    (32, 1024, 2, 1022), (256, 1024, 2, 1022), (64, 64, 1, 511),
    (300, 1024, 1, 599)])  # then longer ones
def test_documents_are_the_same_for_windows_up_to_four_originals(cli, window, limit, documents,
                                                                 tokens):
    measured, _ = cli("ppl", "--model", "@model", "--corpus", "@corpus", "--window", window,
                      "--max-tokens", limit)
    assert measured["window"] == window
    assert (measured["documents"], measured["tokens"]) == (documents, tokens)


def test_max_tokens_cuts_the_text_and_zero_does_not(cli, text_ids):
    everything = len(text_ids) - 1
    for limit, tokens in ((100, 99), (0, everything), (10**6, everything)):
        measured, _ = cli("ppl", "--model", "@model", "--text", "@text.py", "--max-tokens", limit)
        assert measured["tokens"] == tokens


def test_help_points_to_the_flags_of_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["-h"])
    assert "python eval.py ppl -h lists the flags of ppl" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["ppl", "-h"])
    assert "--max-tokens" in capsys.readouterr().out


# ---- Precision and positions ---------------------------------------------------------------------


def test_how_float32_is_multiplied_is_said_and_not_kept_for_the_next_command(cli):
    """On a CPU without units for bfloat16 PyTorch multiplies in float32 all the same."""
    ppl = "ppl", "--model", "@model", "--text", "@text.py"
    exact, printed = cli(*ppl)
    assert exact["matmul"] == "highest"
    assert "matmul" not in printed
    medium, printed = cli(*ppl, "--matmul", "medium")
    assert medium["matmul"] == torch.get_float32_matmul_precision() == "medium"
    assert "float32 (matmul medium)" in printed
    assert medium["perplexity"] == pytest.approx(exact["perplexity"], rel=1e-2)
    again, _ = cli(*ppl)
    assert again["perplexity"] == exact["perplexity"]
    assert torch.get_float32_matmul_precision() == "highest"
    half, printed = cli(*ppl, "--matmul", "medium", "--dtype", "bfloat16")
    assert half["matmul"] is None, "there is no float32 matrix"
    assert "matmul" not in printed


def test_pytorchs_newer_switches_do_no_harm():
    """get_float32_matmul_precision raises where they and the older one were mixed."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        measured = perplexity(small_model(), random_documents(30), 8, progress=False)
        assert measured["matmul"] == "by backend"
        with matmul_precision("highest"):
            pass
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16", "they stay"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def test_rope_flags_replace_the_folders_positions(cli, folder, text_ids):
    """Position Interpolation is position m / s: so says a model without scaling whose positions are
    divided by hand."""
    ppl = "ppl", "--model", "@model", "--text", "@text.py"
    plain, _ = cli(*ppl, "--window", 128)
    linear, printed = cli(*ppl, "--rope", "pi", "--factor", 2)
    assert linear["rope"]["rope_type"] == "linear"
    assert linear["rope"]["factor"] == 2
    assert linear["original_window"] == 64
    assert linear["window"] == 128, "the window follows the factor"
    assert "window 64 -> 128" in printed
    model = load_model(folder / "model")
    hidden = model.hidden
    model.hidden = lambda ids, last: hidden(ids, torch.arange(ids.shape[1]) / 2, last=last)
    by_hand = perplexity(model, [text_ids], 128, progress=False)["perplexity"]
    assert by_hand == pytest.approx(linear["perplexity"], rel=1e-6)
    assert abs(linear["perplexity"] / plain["perplexity"] - 1) > 1e-3


def test_a_fine_tuned_folder_needs_no_flag(cli):
    text = "--text", "@text.py"
    flags, _ = cli("ppl", "--model", "@model", *text, "--rope", "linear", "--factor", 2)
    folder, _ = cli("ppl", "--model", "@extended", *text)
    assert folder["perplexity"] == flags["perplexity"]
    assert folder["window"] == flags["window"] == 128
    assert folder["rope"] == flags["rope"]
    assert folder["original_window"] == 64
    four, _ = cli("ppl", "--model", "@extended", *text, "--rope", "linear", "--factor", 4)
    assert four["window"] == 256, "a factor counts from the original window, also of a folder " \
                                  "that has one already"


# ---- Several lengths -----------------------------------------------------------------------------


def test_measure_lengths_is_a_row_of_both(tokenizer):
    model = small_model(vocab_size=tokenizer.vocab_size, max_seq_len=100)
    documents = random_documents(300, vocab_size=tokenizer.vocab_size)
    row = measure_lengths(model, tokenizer, documents, [90, 120], depths=2, trials=1)
    for n in (90, 120):
        expected = perplexity(model, documents, n, progress=False)["perplexity"]
        assert row["perplexity"][n] == expected
        keys = passkey(model, tokenizer, [n], 2, 1, progress=False)
        assert row["passkey"][n] == keys["accuracy"][n]
        assert row["k_max"][n] == keys["k_max"]
    without = measure_lengths(model, tokenizer, documents, [90], depths=2, trials=0)
    assert without["perplexity"][90] == row["perplexity"][90]
    assert math.isnan(without["passkey"][90])
    assert without["k_max"] == {90: None}


def test_four_lengths_count_from_the_original_window():
    rope = RopeConfig("linear", 4.0, original_max_position_embeddings=64)
    assert four_lengths(small_model(rope=rope, max_seq_len=256).config) == [32, 64, 128, 256]
    assert four_lengths(small_model(max_seq_len=1).config) == [1, 1, 2, 4]


# ---- A model's own words -------------------------------------------------------------------------


def test_generate_prints_and_writes_the_same_words(cli, folder, tokenizer):
    measured, printed = cli("generate", "--model", "@model", "--prompt", "def f", "--seed", 3,
                            "--max-new-tokens", 12, "--temperature", 1.5, "--top-p", 0.9)
    assert CONDITIONS <= set(measured)
    prompt = tokenizer.encode("def f", bos=True)
    assert measured["prompt_tokens"] == len(prompt)
    assert measured["new_tokens"] <= 12
    assert measured["prompt"] == "def f"
    assert (measured["temperature"], measured["top_p"]) == (1.5, 0.9)
    assert f"prompt     {len(prompt)} tokens, BOS ({tokenizer.bos_id}) in front" in printed
    assert f"\n\ndef f{measured['text']}\n\n{measured['new_tokens']} tokens: the first" in printed
    assert "beyond the window" not in printed
    again, _ = cli("generate", "--model", "@model", "--prompt", "def f", "--seed", 3,
                   "--max-new-tokens", 12, "--temperature", 1.5, "--top-p", 0.9)
    assert again["text"] == measured["text"]
    _, printed = cli("generate", "--model", "@model", "--prompt", "@text.py", "--max-new-tokens", 1)
    assert "beyond the window" not in printed, "a path without @ is a text"


def test_a_prompt_may_be_a_file(folder, capsys, text_ids):
    """The text has more tokens than the window."""
    main(["generate", "--model", str(folder / "model"), "--max-new-tokens", "1", "--prompt",
          f"@{folder / 'text.py'}"])
    printed = capsys.readouterr().out
    assert f"prompt     {len(text_ids)} tokens" in printed
    assert f"up to {len(text_ids) + 1} with the answer, beyond the window" in printed
    assert (folder / "text.py").read_text(encoding="utf-8") in printed


@pytest.mark.parametrize("flags, words", [
    ([], "--prompt is empty"), (["--prompt", "a", "--max-new-tokens", "0"], "at least 1"),
    (["--prompt", "@missing.txt"], "no such file")])
def test_generate_refuses(folder, flags, words):
    with pytest.raises(UserError, match=words):
        main(["generate", "--model", str(folder / "model"), *flags])


def test_characters_are_shown_when_all_their_bytes_are_there(tokenizer):
    """A character outside the vocabulary is one token a byte. EOS is silent."""
    prompt = tokenizer.encode("x = ", bos=True)
    tokens = tokenizer.encode("x = é€!", bos=True)[len(prompt):]
    assert len(tokens) > 4, "this test needs characters of several tokens"
    pieces = list(decoded_pieces(tokenizer, prompt, [*tokens, tokenizer.eos_id]))
    assert len(pieces) == len(tokens) + 1
    assert "".join(pieces) == "é€!"
    assert "" in pieces[:2]
    assert pieces[-1] == ""
    cut = list(decoded_pieces(tokenizer, prompt, tokens[:1]))
    assert cut[0] == "" and cut[1].endswith("\ufffd"), "what there is of it, at the end"


def test_eos_is_not_shown_although_a_tokenizer_has_a_word_for_it():
    words = types.SimpleNamespace(eos_id=2, decode=lambda ids: "".join("ab|"[i] for i in ids))
    assert list(decoded_pieces(words, [0], [1, 0, 2])) == ["b", "a", ""]


# ---- The model in data/tiny, which train.py made -------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return load_model(TINY)


def test_tiny_finds_the_key_inside_its_window_and_not_far_beyond(tiny, tokenizer):
    L = tiny.config.max_seq_len
    measured = passkey(tiny, tokenizer, [L // 2, L, 4 * L], depths=5, trials=4, progress=False)
    assert min(measured["accuracy"][L // 2], measured["accuracy"][L]) >= 0.95
    assert measured["accuracy"][4 * L] <= 0.2


def test_tiny_fails_beyond_its_window_and_interpolation_helps(tiny, tokenizer):
    L = tiny.config.max_seq_len
    documents = []
    for name in ("model.py", "weights/meta.py"):
        text = (ROOT / name).read_text(encoding="utf-8")
        documents.append(tokenizer.encode(text, bos=True)[:6 * L])
    inside = perplexity(tiny, documents, L, L // 2, progress=False)["perplexity"]
    beyond = perplexity(tiny, documents, 4 * L, 2 * L, progress=False)["perplexity"]
    assert beyond >= 1.5 * inside
    stretched = load_model(TINY, rope={"rope_type": "linear", "factor": 4.0})
    interpolated = perplexity(stretched, documents, 4 * L, 2 * L, progress=False)["perplexity"]
    assert interpolated < beyond


def test_tiny_gives_the_same_verdicts_by_generation(tiny, tokenizer):
    L = tiny.config.max_seq_len
    given = tiny, tokenizer, [L, L + L // 4, 2 * L]
    by_pass = passkey(*given, depths=5, trials=1, progress=False)
    generated = passkey(*given, depths=5, trials=1, generation=True, progress=False)
    assert by_pass["accuracy_by_depth"] == generated["accuracy_by_depth"]


def test_tiny_completes_python(capsys):
    main(["generate", "--model", str(TINY), "--prompt", "for i in", "--max-new-tokens", "4"])
    assert "for i in range(" in capsys.readouterr().out
