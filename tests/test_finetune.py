"""finetune.py on a random model of one layer: its folders reproduce its table, and the baseline
gets the same steps and rows."""
import dataclasses
import json
import math
import re
import shutil
import weakref

import numpy as np
import pytest
import torch

import finetune
from common.errors import UserError
from common.progress import Progress
from common.tables import format_table
from data.corpus import TokenFile, evaluation_documents, validation_documents
from data.passkey import PasskeyPrompts
from eval import passkey, perplexity, sliding_windows
from finetune import FinetuneConfig
from methods import RopeConfig, inv_freq
from model import LLaMA, ModelConfig
from training.extension import complete_flags
from weights import load_config, load_model, load_tokenizer, save_model
from weights.size import evaluation_flops, flops_per_token

NAMES = ["extrapolation", "pi_zero_shot", "pi_finetuned", "direct_finetuned"]
TOKENS = 1300  # of held-out text


@pytest.fixture(scope="module")
def L(tokenizer):
    """A window of which half still holds a passkey prompt."""
    return 2 * PasskeyPrompts(tokenizer).shortest


def random_llama(tokenizer, L, **changes):
    torch.manual_seed(0)
    return LLaMA(ModelConfig(dim=16, n_layers=1, n_heads=2, vocab_size=tokenizer.vocab_size,
                             multiple_of=16, max_seq_len=L, **changes))


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer, L):
    folder = tmp_path_factory.mktemp("base")
    model = random_llama(tokenizer, L)
    attention = model.layers[0].attention
    torch.nn.init.normal_(attention.wq.weight, std=0.5)  # so that positions matter
    torch.nn.init.normal_(attention.wk.weight, std=0.5)
    save_model(model, folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def run_finetune(corpus_folder):
    """run_finetune(model, folder, *flags) runs the command with few steps and small measurements.
    Returns the content of the results file. figure=True draws it, too, which takes as long."""
    def command(model, folder, *flags, results="r/f.json", figure=False):
        flags = [*f"--corpus {corpus_folder} --steps 3 --warmup 1 --depths 2 --trials 1 "
                  f"--max-tokens {TOKENS} --device cpu".split(),
                 "--model", str(model), "--out", str(folder / "out"),
                 "--results", str(folder / results), *map(str, flags)]
        with pytest.MonkeyPatch.context() as patch:
            if not figure:
                patch.setattr(finetune, "plot_finetune", lambda result, path: path)
            finetune.main(flags)
        return json.loads((folder / results).read_text(encoding="utf-8"))
    return command


@pytest.fixture(scope="module")
def done(base, run_finetune, tmp_path_factory):
    """A real run: its folder and its results."""
    folder = tmp_path_factory.mktemp("done")
    return folder, run_finetune(base, folder, figure=True)


# ---- A real run ----------------------------------------------------------------------------------


def test_results_have_what_the_contract_says(done, base, L):
    folder, result = done
    rows = result["rows"]
    assert [row["name"] for row in rows] == NAMES
    assert [row["steps"] for row in rows] == [0, 0, 3, 3]
    ropes = [row["rope"] for row in rows]
    assert [rope["rope_type"] for rope in ropes] == ["default", "linear", "linear", "default"]
    assert [rope.get("factor", 1) for rope in ropes] == [1, 2, 2, 1]
    assert [row["training_seconds"] > 0 for row in rows] == [False, False, True, True]
    lengths = [L // 2, L, 2 * L, 4 * L]  # L' is 2L
    assert (result["original_window"], result["window"], result["lengths"]) == (L, 2 * L, lengths)
    for row in rows:
        for name in ("perplexity", "passkey", "k_max"):
            assert list(row[name]) == list(map(str, lengths))
        assert all(1 < value < 1e5 for value in row["perplexity"].values())
        assert all(0 <= value <= 1 for value in row["passkey"].values())
    assert {"model", "rope", "seed", "device", "versions", "command", "settings", "documents",
            "tokens_scored"} <= set(result)
    assert result["model"] == str(base)
    assert result["rope"]["factor"] == 2
    figure = (folder / "r" / "f.png").read_bytes()
    assert figure.startswith(b"\x89PNG")
    assert len(figure) > 10_000
    assert not (folder / "r" / "f.json.partial").exists()


def test_folders_reproduce_their_rows(done, base, corpus_folder, tokenizer, L):
    """No RoPE flag: the scaling and the original window travel with the weights."""
    folder, result = done
    documents = validation_documents(corpus_folder, 8 * L, TOKENS, tokenizer)
    assert result["tokens_scored"] == sum(len(d) - 1 for d in documents)
    models = {"extrapolation": load_model(base),
              "pi_zero_shot": load_model(base, rope={"rope_type": "linear", "factor": 2}),
              "pi_finetuned": load_model(folder / "out"),
              "direct_finetuned": load_model(folder / "out-direct")}
    for row in result["rows"]:
        model = models[row["name"]]
        for n, value in row["perplexity"].items():
            measured = perplexity(model, documents, window=int(n), progress=False)
            assert measured["perplexity"] == value, (row["name"], n)
        keys = passkey(model, tokenizer, [2 * L], 2, 1, progress=False)
        assert keys["accuracy"][2 * L] == row["passkey"][str(2 * L)]
    for name, scaling in (("pi_finetuned", ("linear", 2)), ("direct_finetuned", ("default", 1))):
        config = models[name].config
        assert (config.rope.rope_type, config.rope.factor) == scaling
        assert config.rope.original_max_position_embeddings == L
        assert config.max_seq_len == 2 * L
    values = {tuple(row["perplexity"].values()) for row in result["rows"]}
    assert len(values) == 4, "two rows are the same model"
    assert load_tokenizer(folder / "out").sha256 == tokenizer.sha256


def state_times(folder):
    return [(folder / name / "state.pt").stat().st_mtime_ns for name in ("out", "out-direct")]


def test_same_command_again_takes_up_finished_runs(done, base, run_finetune):
    folder, result = done
    before = state_times(folder)
    again = run_finetune(base, folder, "--eval-every", 7, results="again.json")
    assert state_times(folder) == before
    assert again["rows"] == result["rows"], "also the seconds of training are those of the run"


def test_measuring_more_does_not_need_another_training(done, base, run_finetune):
    folder, _ = done
    before = state_times(folder)
    more = run_finetune(base, folder, "--depths", 3, "--no-baseline", results="more.json")
    assert [row["name"] for row in more["rows"]] == NAMES[:3]
    assert more["settings"]["depths"] == 3
    assert state_times(folder) == before


def test_an_interrupted_table_goes_on(done, base, run_finetune, monkeypatch):
    """Nothing is trained or measured twice; the table is the same."""
    folder, result = done
    measure, rows = finetune.measure_lengths, []

    def interrupted(*args, **kwargs):
        if len(rows) == 2:
            raise KeyboardInterrupt
        rows.append(0)
        return measure(*args, **kwargs)
    monkeypatch.setattr(finetune, "measure_lengths", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_finetune(base, folder, results="interrupted.json")
    partial = folder / "interrupted.json.partial"
    cached = len(partial.read_text(encoding="utf-8").splitlines())
    assert cached >= 2 * 2 * 4, "two rows, two measurements, four lengths"
    monkeypatch.setattr(finetune, "measure_lengths", measure)
    assert run_finetune(base, folder, results="interrupted.json")["rows"] == result["rows"]
    assert not partial.exists()


def test_models_are_in_memory_one_at_a_time(base, run_finetune, tmp_path, monkeypatch):
    """A 7B model and its gradients fill a GPU: the next one needs the memory of the one before."""
    loaded = []

    def noting(function):
        def load(*args, **kwargs):
            assert not [model for model in loaded if model() is not None], "two models at once"
            model = function(*args, **kwargs)
            loaded.append(weakref.ref(model))
            return model
        return load
    for name in ("load_extended", "load_saved"):
        monkeypatch.setattr(finetune, name, noting(getattr(finetune, name)))
    run_finetune(base, tmp_path)
    assert len(loaded) == 4 + 2, "four rows, of which two are loaded again after training"


def test_clex_learns_its_frequencies(base, run_finetune, tmp_path, L):
    """The network moves, is saved, and the measured model is the one with it."""
    run_finetune(base, tmp_path, "--rope", "clex", "--no-baseline", "--factor", 2)
    model = load_model(tmp_path / "out")
    assert model.clex.down.weight.abs().max() > 0
    untrained = RopeConfig("clex", original_max_position_embeddings=L)
    long = model.frequencies(torch.arange(3 * L))[0]
    assert not torch.allclose(long, inv_freq(untrained, 8, 3 * L)[0], rtol=1e-4)
    short = model.frequencies(torch.arange(L))[0]
    assert torch.equal(short, inv_freq(untrained, 8, L)[0]), "at t = 1 nothing has flowed yet"


# ---- What is asked for ---------------------------------------------------------------------------


@pytest.fixture
def recorded(monkeypatch):
    """Neither trains nor measures: the (model, config, batches) that fit() is given."""
    asked = []

    def fit(model, config, batches, evaluate, tokenizer):
        asked.append((model, config, batches))
        save_model(model, config.out, tokenizer)
        return 1.0

    def measure_lengths(model, tokenizer, documents, lengths, depths, trials, cache=None):
        return {key: {n: 1.0 for n in lengths} for key in ("perplexity", "passkey", "k_max")}
    monkeypatch.setattr(finetune, "fit", fit)
    monkeypatch.setattr(finetune, "measure_lengths", measure_lengths)
    monkeypatch.setattr(finetune, "plot_finetune", lambda *_: None)
    return asked


def row_names(result):
    return [row["name"] for row in result["rows"]]


def test_baseline_gets_the_same_steps_and_rows(recorded, base, run_finetune, tmp_path, L):
    run_finetune(base, tmp_path, "--factor", 3, "--seed", 5)
    (pi, pi_config, pi_batches), (direct, direct_config, direct_batches) = recorded
    differ = {f.name for f in dataclasses.fields(FinetuneConfig)
              if getattr(pi_config, f.name) != getattr(direct_config, f.name)}
    assert differ == {"out", "rope", "positions", "waits"}
    for step in range(4):
        tokens, targets = pi_batches(step)
        same_tokens, same_targets = direct_batches(step)
        assert tokens.shape == (pi_config.batch_size, 3 * L)
        assert torch.equal(tokens, same_tokens)
        assert torch.equal(targets, same_targets)
    for batches in (pi_batches, direct_batches):
        assert batches.passkey_longest == L, "retrieval beyond L is never trained"
    assert 0 < pi_batches.passkey_share == pi_config.passkey_share
    assert pi_batches.seed == 5
    for a, b in zip(pi.parameters(), direct.parameters()):
        assert torch.equal(a, b), "both begin with the pretrained weights"
    assert (pi.config.rope.factor, direct.config.rope.factor) == (3, 1)
    assert pi.config.max_seq_len == direct.config.max_seq_len == 3 * L


def test_recipe_is_the_papers():
    config = FinetuneConfig()
    assert (config.weight_decay, config.warmup, config.beta2) == (0.0, 20, 0.95)
    assert config.rope == "linear"


@pytest.mark.parametrize("flags, names, steps", [
    (["--rope", "default"], ["extrapolation", "direct_finetuned"], [0, 3]),
    (["--rope", "pi"], NAMES, [0, 0, 3, 3]),
    (["--rope", "ntk", "--no-baseline"], ["extrapolation", "ntk_zero_shot", "ntk_finetuned"],
     [0, 0, 3]),
    (["--rope", "linear", "--factor", "2.5"], NAMES, [0, 0, 3, 3])])
def test_rows_of_other_methods(recorded, base, run_finetune, tmp_path, L, flags, names, steps):
    result = run_finetune(base, tmp_path, *flags)
    assert row_names(result) == names
    assert [row["steps"] for row in result["rows"]] == steps
    window = round(float(flags[-1]) * L) if "--factor" in flags else 2 * L
    assert result["window"] == window
    assert result["lengths"] == sorted({L // 2, L, 2 * L, 4 * L, window})
    outs = [config.out for _, config, _ in recorded]
    assert len(set(outs)) == len(outs)
    assert outs[0] == str(tmp_path / "out")


RANDOM = '{"rope_type": "default", "random_positions": 5000}'


@pytest.mark.parametrize("flags, row, spread", [
    (["--positions", "pose"], "L", "skip"), (["--rope", "clex"], "L", "stretched"),
    (["--rope", "clex", "--positions", "contiguous"], "window", None),
    (["--rope", "drope"], "L", None), (["--rope", "yarn"], "window", None),
    (["--rope", RANDOM], "window", "random")],
    ids=["pose", "clex", "clex contiguous", "drope", "yarn", "random"])
def test_rows_and_positions_of_each_recipe(recorded, base, run_finetune, tmp_path, L, flags, row,
                                           spread):
    """PoSE, CLEX and DroPE train on rows of L tokens. Where positions are drawn, they are new for
    every row and the same for every call. The baseline always has whole rows and plain
    positions."""
    result = run_finetune(base, tmp_path, *flags, "--factor", 3, "--baseline")
    (model, config, batches), (_, direct_config, direct) = recorded
    assert len(result["rows"]) == 4
    assert row_names(result)[-1] == "direct_finetuned"
    assert batches.seq_len == (L if row == "L" else 3 * L)
    assert direct.seq_len == 3 * L
    assert direct.positions is None
    assert direct_config.positions == "contiguous"
    assert batches.passkey_longest == L
    for step in range(3):
        assert len(direct(step)) == 2
        if spread is None:
            assert len(batches(step)) == 2
        else:
            check_positions(batches, step, spread, L)
    if "drope" in flags:
        theta, factor = model.frequencies(torch.arange(2 * L))
        assert (theta == 0).all()
        assert factor > 1


def check_positions(batches, step, spread, L):
    tokens, _, positions = batches(step)
    jumps = positions.diff(dim=1)
    assert positions.shape == tokens.shape
    assert (jumps > 0).all()
    assert (positions >= 0).all()
    assert torch.equal(positions, batches(step)[2])
    assert not torch.equal(positions, batches(step + 1)[2])
    share = batches(step, 1, 3)[2]
    assert torch.equal(share, positions[1:3]), "a rank's share is a share of the same step"
    if spread == "skip":
        assert (positions[:, 0] == 0).all()
        assert positions.max() < 3 * L
        assert ((jumps > 1).sum(dim=1) <= 1).all()
    if spread == "stretched":
        assert (positions[:, 0] == 0).all()
        assert (positions[:, -1] == positions[0, -1]).all()
        assert (positions[0, -1] + 1) % L == 0
    if spread == "random":
        assert 3 * L < positions.max() < 5000


def test_no_baseline_unasked_that_takes_more_memory(recorded, base, run_finetune, tmp_path,
                                                    monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run_finetune(base, tmp_path, "--positions", "pose", "--results", "", "--out", "",
                          results="out/finetune-pi-pose.json")
    assert row_names(result) == ["extrapolation", "pi_zero_shot", "pi_finetuned"]
    assert [config.out for _, config, _ in recorded] == ["out/pi-pose-x2"]


def test_a_length_dependent_method_may_have_a_factor_of_its_own(recorded, base, run_finetune,
                                                                tmp_path, L, capsys):
    """--factor is the window; the parameter-free dynamic NTK has factor 1 all the same."""
    result = run_finetune(base, tmp_path, "--rope", '{"rope_type": "dynamic", "factor": 1}',
                          "--factor", 2, "--no-baseline")
    config = recorded[0][0].config
    assert (config.rope.factor, config.max_seq_len, result["window"]) == (1, 2 * L, 2 * L)
    assert f"window {L} -> {2 * L}, rope" in capsys.readouterr().out
    with pytest.raises(UserError, match="--factor 2 and factor 1"):
        run_finetune(base, tmp_path, "--rope", '{"rope_type": "yarn", "factor": 1}', "--factor", 2)


def test_a_model_without_rope_is_extended_in_its_own_way(recorded, run_finetune, tmp_path,
                                                         tokenizer, L):
    """ALiBi's baseline is ALiBi, not RoPE."""
    model = random_llama(tokenizer, L, rope=RopeConfig("alibi"))
    save_model(model, tmp_path / "alibi", tokenizer)
    result = run_finetune(tmp_path / "alibi", tmp_path, "--rope", "alibi")
    assert row_names(result) == ["extrapolation", "alibi_zero_shot", "alibi_finetuned",
                                 "direct_finetuned"]
    ropes = [row["rope"] for row in result["rows"]]
    assert [rope["rope_type"] for rope in ropes] == ["alibi"] * 4
    assert [rope.get("factor", 1) for rope in ropes] == [1, 2, 2, 1]


def test_folder_is_named_after_method_and_factor(recorded, base, run_finetune, tmp_path,
                                                 monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_finetune(base, tmp_path, "--out", "", "--factor", 4)
    assert [config.out for _, config, _ in recorded] == ["out/pi-x4", "out/direct-x4"]


@pytest.mark.parametrize("flags, method, baseline", [
    ([], "linear", "default"), (["--rope", "pi"], "linear", "default"),
    (["--rope", '{"rope_type": "yarn", "beta_fast": 16, "factor": 2}'],
     '{"rope_type": "yarn", "beta_fast": 16}', "default")])
def test_settings_name_the_method_as_the_flag_does(recorded, base, run_finetune, tmp_path, flags,
                                                   method, baseline):
    """They tell one run from another: written otherwise, an interrupted run would be refused."""
    run_finetune(base, tmp_path, *flags)
    (_, config, _), (_, direct, _) = recorded
    assert (config.rope, direct.rope) == (method, baseline)
    assert (config.positions, direct.positions) == ("own", "contiguous")


@pytest.mark.parametrize("model", ["out", "out-direct"])
def test_an_extended_model_is_extended_from_its_original_window(recorded, done, run_finetune,
                                                                tmp_path, L, model, recwarn):
    """Factors never compound: a model that was extended by 2 and is now by 4 has the window 4L, and
    fine-tuned directly it is plain RoPE. A line says that its own scaling is taken off."""
    folder, _ = done
    result = run_finetune(folder / model, tmp_path, "--factor", 4)
    assert (result["original_window"], result["window"]) == (L, 4 * L)
    (pi, _, batches), (direct, _, _) = recorded
    assert pi.config.rope.factor == 4
    assert pi.config.rope.original_max_position_embeddings == L
    assert pi.config.max_seq_len == 4 * L
    assert (direct.config.rope.rope_type, direct.config.rope.factor) == ("default", 1)
    assert direct.config.max_seq_len == 4 * L
    notes = [str(w.message) for w in recwarn if "are without it, with plain RoPE" in str(w.message)]
    assert [note.split()[1:3] for note in notes] == ([["has", "linear;"]] if model == "out" else [])
    assert batches.seq_len == 4 * L
    assert batches.passkey_longest == L
    with pytest.raises(UserError, match="--factor 1: the target window"):
        run_finetune(folder / model, tmp_path, "--factor", 1)


def test_a_large_model_needs_a_learning_rate(tmp_path, monkeypatch, capsys):
    """The small models' would damage it. A dry run needs none, and says what the 7B model takes."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--lr is needed for a model of this size"):
        finetune.main(["--model", "llama-2-7b"])
    finetune.main(["--model", "llama-2-7b", "--dry-run", "--factor", "4", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "6,738,415,616 parameters, window 4096 -> 16384" in printed
    assert "floating-point operations" in printed
    assert not list(tmp_path.iterdir())


def test_positions_skip_in_one_way(base, run_finetune, tmp_path):
    with pytest.raises(UserError, match="both say how positions skip"):
        run_finetune(base, tmp_path, "--rope", '{"random_positions": 5000}', "--positions", "pose")


def test_the_baselines_folder_is_not_the_pretrained_models(base, run_finetune, tmp_path):
    shutil.copytree(base, tmp_path / "out-direct")
    with pytest.raises(UserError, match="the pretrained model would be written over"):
        run_finetune(tmp_path / "out-direct", tmp_path)


@pytest.mark.parametrize("factor", ["1", "0.5", "0", "-2", "nan", "inf"])
def test_factor_has_to_lengthen_the_window(base, run_finetune, tmp_path, factor):
    with pytest.raises(UserError, match="--factor"):
        run_finetune(base, tmp_path, f"--factor={factor}")
    assert not list(tmp_path.iterdir())


# ---- The table -----------------------------------------------------------------------------------


def test_table_says_what_the_rows_hold(done, L):
    _, result = done
    rows = []
    for row in result["rows"]:
        numbers = {key: {int(n): value for n, value in row[key].items()}
                   for key in ("perplexity", "passkey")}
        rows.append({"name": row["name"], **numbers})
    rows[0]["perplexity"][4 * L] = math.inf
    lines = format_table(rows, result["lengths"], {"L": L, "L'": 2 * L}).splitlines()
    assert len(lines) == 6
    assert f"{L} L " in lines[1]
    assert f"{2 * L} L' " in lines[1]
    for row, line in zip(rows, lines[2:]):
        name, *numbers = line.split()
        assert name == row["name"]
        expected = [*row["perplexity"].values(), *row["passkey"].values()]
        assert np.allclose([float(n) for n in numbers], expected, atol=5e-3)


def test_table_without_passkeys_has_dashes():
    row = {"name": "base", "perplexity": {8: 2.0}, "passkey": {8: math.nan}}
    assert format_table([row], [8], {}).splitlines()[-1].split() == ["base", "2.000", "-"]


# ---- Text of one's own, and evaluation as asked for ----------------------------------------------


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A file of numbered sentences; the token folder made of it lies beside it."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "book.txt"
    path.write_text("\n".join(f"Sentence {i} of the book is here." for i in range(1500)))
    return path


def test_a_single_book_trains_and_its_end_is_held_out(base, run_finetune, book, tokenizer, L,
                                                      tmp_path, capsys):
    (tmp_path / "copy.txt").write_text(book.read_text().replace("\n", "\r\n"))
    flags = ["--corpus", "data/corpora/python", "--text", book, tmp_path / "copy.txt"]
    result = run_finetune(base, tmp_path, *flags)
    folder = result["settings"]["corpus"]
    printed = capsys.readouterr().out
    assert re.search(f"the last ..% of {book} are held out, .* tokens -> {folder}", printed)
    assert result["lengths"] == [L // 2, L, 2 * L, 4 * L]
    train, val = TokenFile(folder, "train"), TokenFile(folder, "val")
    (training,), (held_out,) = train.documents(), val.documents()
    for document in (training, held_out):
        assert (document[0], document[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    parts = [tokenizer.decode(document[1:-1].tolist()) for document in (training, held_out)]
    assert "".join(parts) == book.read_text()  # nothing lost, nothing in both
    assert 8 * L < len(val) < len(train) / 2  # twice the longest length, and at most a third
    run_finetune(base, tmp_path, *flags, "--lengths", L)  # resumes: --lengths changes no training
    assert "held out ->" not in capsys.readouterr().out, "made once"
    book.write_text("")
    with pytest.raises(UserError, match="the file is empty"):
        run_finetune(base, tmp_path, *flags)


def test_text_that_is_too_short_to_measure_all_lengths(base, run_finetune, book, L, tmp_path,
                                                       capsys):
    book.write_text(book.read_text()[:len(book.read_text()) // 20])
    result = run_finetune(base, tmp_path, "--corpus", "data/corpora/python", "--text", book,
                          "--passkey-share", 0)
    assert result["lengths"] == [n for n in (L // 2, L, 2 * L, 4 * L) if n < result["tokens_scored"]
                                 + 1]
    assert 4 * L not in result["lengths"]
    assert f"too few to measure {4 * L}" in capsys.readouterr().out


def test_short_documents_are_joined(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pieces = [np.array([tokenizer.bos_id, *range(5, 40 + i), tokenizer.eos_id]) for i in range(9)]
    np.concatenate(pieces).astype(np.uint16).tofile(tmp_path / "val.bin")
    np.save(tmp_path / "val.docs.npy", np.cumsum([0, *map(len, pieces)]))
    (tmp_path / "meta.json").write_text(json.dumps(
        {"dtype": "uint16", "tokenizer_sha256": tokenizer.sha256}))
    corpus = TokenFile(tmp_path, "val")
    documents, lengths = evaluation_documents(corpus, [40, 60], None, tokenizer)
    joined = np.concatenate([piece[1:] for piece in pieces])
    assert [len(document) for document in documents] == [120, 120, 120]
    for i, document in enumerate(documents):
        assert document[0] == tokenizer.bos_id, "and nowhere else"
        assert np.array_equal(document[1:], joined[119 * i:119 * i + 119])
    assert lengths == [40, 60]
    assert "shorter ones are joined" in capsys.readouterr().out
    documents, _ = evaluation_documents(corpus, [300], None, tokenizer)
    assert list(documents[0]) == [tokenizer.bos_id, *joined], "all that there is"
    documents, _ = evaluation_documents(corpus, [10, 20], None, tokenizer)
    assert np.array_equal(documents[0], pieces[3]), "a document that is long enough is whole"
    documents, lengths = evaluation_documents(corpus, [20, 43], None, tokenizer)
    assert [list(document) for document in documents] == [list(pieces[8])], "the longest serves"
    documents, lengths = evaluation_documents(corpus, [10, 20], 20, tokenizer)
    assert (len(documents[0]), lengths) == (21, [10, 20])
    documents, _ = evaluation_documents(corpus, [299], 299, tokenizer)
    assert len(documents[0]) == 300, "as long as was asked for"
    assert evaluation_documents(corpus, [20, 31], 30, tokenizer)[1] == [20], "31 tokens predict 30"
    with pytest.raises(UserError, match="31 held-out tokens are fewer than the shortest length"):
        evaluation_documents(corpus, [40, 60], 30, tokenizer)


def test_lengths_and_max_tokens_bound_the_evaluation(base, run_finetune, L, tmp_path):
    result = run_finetune(base, tmp_path, "--lengths", L, 3 * L, "--max-tokens", 2 * L,
                          "--steps", 1)
    assert result["lengths"] == [L], "3 L does not fit into 2 L tokens"
    assert result["tokens_scored"] == 2 * L
    assert {tuple(row["perplexity"]) for row in result["rows"]} == {(str(L),)}


def test_no_eval_only_trains(base, corpus_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "measure_lengths", None)  # measuring would fail
    finetune.main(f"--model {base} --corpus {corpus_folder} --steps 2 --device cpu --no-eval "
                  f"--out {tmp_path / 'out'} --results {tmp_path / 'r.json'}".split())
    assert load_model(tmp_path / "out").config.rope.factor == 2
    assert not (tmp_path / "r.json").exists()


def test_short_rows_skip_to_all_positions_for_both_sides(recorded, base, run_finetune, L, tmp_path):
    """Rows of 8 tokens whose positions reach L'; direct fine-tuning gets the very same."""
    run_finetune(base, tmp_path, "--row-length", 8, "--passkey-share", 0, "--batch-size", 50)
    (_, ours, our_batches), (_, direct, direct_batches) = recorded
    assert (ours.positions, direct.positions) == ("pose", "pose")
    for step in range(2):
        tokens, _, positions = our_batches(step)
        assert tokens.shape == (50, 8)
        assert L < positions.max() < 2 * L
        assert all(torch.equal(a, b) for a, b in zip(our_batches(step), direct_batches(step)))
    with pytest.raises(UserError, match=f"--row-length {2 * L + 1}: has to be from 1 to L'"):
        run_finetune(base, tmp_path, "--row-length", 2 * L + 1)


def test_contiguous_short_rows_are_so_for_both_sides(recorded, base, run_finetune, tmp_path):
    run_finetune(base, tmp_path, "--row-length", 8, "--passkey-share", 0, "--positions",
                 "contiguous")
    (_, ours, _), (_, direct, _) = recorded
    assert (ours.positions, direct.positions) == ("contiguous", "contiguous")
    base = load_config(base)
    folders = [complete_flags(FinetuneConfig(row_length=8, positions=positions), base)[2]
               for positions in ("own", "pose", "contiguous")]
    assert folders == ["out/direct-rows8-x2"] * 2 + ["out/direct-rows8-contiguous-x2"]


@pytest.mark.parametrize("rope", ["clex", "drope"])
def test_direct_fine_tuning_beside_methods_with_positions_of_their_own(recorded, base,
                                                                       run_finetune, tmp_path, rope,
                                                                       L):
    run_finetune(base, tmp_path, "--rope", rope, "--row-length", 80, "--passkey-share", 0)
    _, direct, batches = recorded[1]
    assert (direct.rope, direct.positions) == ("default", "pose")
    assert batches(0)[2].max() > L
    if rope == "clex":
        with pytest.raises(UserError, match=f"rows of at most L = {L}"):
            run_finetune(base, tmp_path, "--rope", rope, "--row-length", L + 1)


def test_validation_rows_are_those_of_training(recorded, base, run_finetune, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(finetune, "validation",
                        lambda corpus, tokenizer, rows, seq_len, positions: calls.append(
                            (seq_len, positions is not None)))
    run_finetune(base, tmp_path, "--row-length", 8, "--passkey-share", 0, "--no-baseline")
    assert calls == [(8, True)]


def test_dry_run_counts_the_evaluation(base, corpus_folder, tmp_path, capsys):
    def measuring(*flags):
        finetune.main(["--model", str(base), "--corpus", str(corpus_folder), "--dry-run", *flags])
        return re.search(r"in all +(\d+) phases, (\S+) .* (\d+)% measuring",
                         capsys.readouterr().out).groups()
    phases, flops, share = measuring()
    assert phases == "6"  # two trainings, four measurements
    assert 0 < int(share) < 100
    fewer_phases, fewer_flops, none = measuring("--no-eval")
    assert (fewer_phases, none) == ("2", "0")
    assert float(fewer_flops) == pytest.approx(float(flops) * (1 - int(share) / 100), rel=0.02)


def test_recomputing_takes_a_forward_pass_more(base, capsys):
    def flops(*flags):
        finetune.main(["--model", str(base), "--no-eval", "--dry-run", *flags])
        return float(re.search(r"in all .*, (\S+) floating", capsys.readouterr().out)[1])
    assert flops("--recompute") == pytest.approx(4 / 3 * flops(), rel=0.01)


def test_the_cost_of_measuring_is_that_of_the_windows_read(base):
    config = load_model(base).config
    for n, length in ((64, 1024), (64, 128), (64, 65), (512, 513)):
        read = sum(end - begin for begin, end, _ in sliding_windows(length, n, n // 4))
        flops = evaluation_flops(config, [n], 3, length, keys=2)
        expected = (3 * read + 2 * n) * flops_per_token(config, n, training=False)
        assert flops == pytest.approx(expected, rel=0.02), (n, length)


def test_a_phase_that_was_kept_tells_no_speed(monkeypatch, capsys):
    clock = iter([0.0, 0.5, 60.5])
    monkeypatch.setattr("common.progress.time.perf_counter", lambda: next(clock))
    progress = Progress([("training", 10.0), ("measuring", 10.0), ("again", 20.0)])
    for _ in range(3):
        progress.next()
    assert capsys.readouterr().out.splitlines() == [
        "1 of 3     training", "2 of 3     measuring",
        "3 of 3     again (the whole: about 2.0 minutes more)"]


def test_progress_tells_the_time_that_is_left(monkeypatch, capsys):
    clock = iter([0.0, 60.0, 180.0])
    monkeypatch.setattr("common.progress.time.perf_counter", lambda: next(clock))
    progress = Progress([("training", 10.0), ("measuring", 20.0), ("again", 5.0)])
    for _ in range(3):
        progress.next()
    assert capsys.readouterr().out.splitlines() == [
        "1 of 3     training",
        "2 of 3     measuring (the whole: about 2.5 minutes more)",
        "3 of 3     again (the whole: about 0.5 minutes more)"]


def test_defaults_write_beside_no_committed_result(recorded, base, corpus_folder, tmp_path,
                                                   monkeypatch):
    monkeypatch.chdir(tmp_path)
    finetune.main(f"--model {base} --corpus {corpus_folder} --steps 2 --device cpu --depths 1 "
                  "--trials 1".split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_target_below_what_the_model_can_do_is_a_warning(tokenizer, L, tmp_path):
    """As LLaMA 3.1: L = 8,192 and a window of 131,072. A factor counts from L."""
    rope = RopeConfig("yarn", factor=16.0, original_max_position_embeddings=L)
    model = random_llama(tokenizer, L, rope=rope)
    model.config.max_seq_len = 16 * L
    save_model(model, tmp_path / "model", tokenizer)
    with pytest.warns(UserWarning, match=f"target window {2 * L} is shorter than the model's own, "
                                         f"{16 * L}.*--factor above 16"):
        finetune.main(["--model", str(tmp_path / "model"), "--device", "cpu", "--dry-run"])


def test_another_original_window_than_the_models_is_refused(base, run_finetune, tmp_path, L):
    rope = json.dumps({"rope_type": "linear", "original_max_position_embeddings": 2 * L})
    with pytest.raises(UserError, match="original_max_position_embeddings"):
        run_finetune(base, tmp_path, "--rope", rope)
