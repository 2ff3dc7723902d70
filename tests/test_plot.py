"""plot.py: every result becomes a PNG of README size, whatever is infinite in it, and nothing of torch is needed for that."""
import json
import math
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib import pyplot

import plot

ROOT = Path(plot.__file__).parent
LENGTHS = [128, 256, 512, 1024]


def finetune(**perplexities):
    rows = [{"name": name, "perplexity": dict(zip(map(str, LENGTHS), values)),
             "passkey": dict(zip(map(str, LENGTHS), [1.0, 0.9, 0.1, 0.0]))} for name, values in perplexities.items()]
    return {"rows": rows, "lengths": LENGTHS, "original_window": 256, "window": 512}


FINETUNE = finetune(extrapolation=[6.4, 6.0, 20.4, 35.0], pi_zero_shot=[10.6, 10.3, 10.1, 31.0], pi_finetuned=[6.5, 6.1, 6.0, 25.0],
                    direct_finetuned=[6.4, 6.1, 6.2, 24.0])


def ppl(window, perplexity, model="data/tiny", **rope):
    return {"model": model, "rope": {"rope_type": "default", "rope_theta": 10000.0, **rope}, "window": window, "perplexity": perplexity}


def passkey(lengths=(128, 256), depths=5):
    return {"model": "data/tiny", "rope": {"rope_type": "linear", "factor": 2.0}, "lengths": list(lengths), "trials": 10, "k_max": 100,
            "depths": [d / max(1, depths - 1) for d in range(depths)], "accuracy": {str(n): 0.25 for n in lengths},
            "accuracy_by_depth": {str(n): [(d + i) % 2 / 2 for d in range(depths)] for i, n in enumerate(lengths)}}


def training(n=50):
    lines = [{"step": 10 * i + 1, "loss": 2 + 5 / (i + 1), "lr": 1e-3} for i in range(n)]
    return lines + [{"step": 10 * n, "val_loss": 2.1, "val_perplexity": 8.2}]


@pytest.fixture
def kept(monkeypatch):
    """The figures stay open when they have been saved, so that a test can read them. Yields the latest."""
    monkeypatch.setattr(plot.plt, "close", lambda figure: None)
    yield lambda: pyplot.figure(pyplot.get_fignums()[-1])
    monkeypatch.undo()
    pyplot.close("all")


def shown(axis):
    """{label: {x: y}} of the lines of an axis that have a name."""
    return {line.get_label(): dict(zip(*map(list, line.get_data()))) for line in axis.get_lines() if not line.get_label().startswith("_")}


def check_png(path, wide=(900, 1600), high=(150, 800)):
    """A PNG of a size to be read at a README's width, with something drawn on white, and nothing cut off at its edges."""
    assert path.read_bytes().startswith(b"\x89PNG")
    image = matplotlib.image.imread(path)[..., :3]
    assert wide[0] <= image.shape[1] <= wide[1] and high[0] <= image.shape[0] <= high[1], image.shape
    assert (image.min(axis=2) < 0.9).mean() > 0.01
    for edge in (image[0], image[-1], image[:, 0], image[:, -1]):
        assert edge.min() > 0.99
    return image


@pytest.mark.parametrize("figure, content", [
    (plot.plot_finetune, FINETUNE),
    (plot.plot_finetune, finetune(extrapolation=[6.4, 6.0, None, None], pi_finetuned=[None, None, None, None])),
    (plot.plot_finetune, finetune(extrapolation=[6.4, 6.0, 3e5, math.inf], pi_finetuned=[6.5, math.nan, 6.0, 25.0])),
    (plot.plot_finetune, finetune(extrapolation=[None] * 4)), (plot.plot_finetune, finetune(extrapolation=[6.01, 6.02, 6.03, 6.04])),
    (plot.plot_perplexity, [ppl(128, 6.4), ppl(256, 6.0), ppl(512, None), ppl(256, 7.0, rope_type="linear", factor=4.0)]),
    (plot.plot_perplexity, [ppl(256, 6.0)]), (plot.plot_perplexity, [ppl(256, None)]),
    (plot.plot_passkey, passkey()), (plot.plot_passkey, passkey([256], 1)), (plot.plot_passkey, passkey(LENGTHS, 32)),
    (plot.plot_training, training()), (plot.plot_training, training(1)), (plot.plot_training, training()[:-1])])
def test_each_figure_is_a_png_of_readme_size(tmp_path, figure, content):
    before = pyplot.get_fignums()  # what another test of the session left open is not this figure's doing
    path = figure(content, tmp_path / "new" / "figure.png")
    assert path == tmp_path / "new" / "figure.png" and list(path.parent.iterdir()) == [path]
    check_png(path)
    assert pyplot.get_fignums() == before, "figures that stay open add up"


def test_finetune_draws_each_row_in_both_panels(tmp_path, kept):
    plot.plot_finetune(FINETUNE, tmp_path / "figure.png")
    left, right = kept().axes
    assert shown(left)["PI, fine-tuned"] == {128: 6.5, 256: 6.1, 512: 6.0, 1024: 25.0}
    assert shown(left)["no change (extrapolation)"] == {128: 6.4, 256: 6.0, 512: 20.4, 1024: 35.0}
    assert shown(right)["fine-tuned directly"] == {128: 1.0, 256: 0.9, 512: 0.1, 1024: 0.0}
    assert len(shown(left)) == len(shown(right)) == 4
    for axis in (left, right):
        assert [text.get_text() for text in axis.get_xticklabels()] == ["128", "256", "512", "1024"]
        assert {text.get_text(): text.xy[0] for text in axis.texts} == {"L": 256, "L'": 512}
    assert left.get_yscale() == left.get_xscale() == right.get_xscale() == "log" and right.get_yscale() == "linear"
    assert "perplexity" in left.get_ylabel() and "passkey" in right.get_ylabel()
    assert [text.get_text() for text in left.get_yticklabels()] == ["6", "8", "10", "15", "20", "30"]
    styles = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in left.get_lines()[:4]]
    assert all(len(set(part)) == 4 for part in zip(*styles)), "told apart without colour, too"
    legend, = kept().legends
    assert legend.get_window_extent().y0 >= max(axis.get_tightbbox().y1 for axis in (left, right)) - 1, "the legend covers something"


def test_what_finetune_hands_over_and_what_its_file_says_are_one_figure(tmp_path):
    """Lengths are numbers in the program and text in JSON, infinities are null there."""
    rows = [{**row, "perplexity": {int(n): math.inf if n == "512" else v for n, v in row["perplexity"].items()},
             "passkey": {int(n): v for n, v in row["passkey"].items()}} for row in FINETUNE["rows"]]
    null = [{**row, "perplexity": {**row["perplexity"], "512": None}} for row in FINETUNE["rows"]]
    one = plot.plot_finetune({**FINETUNE, "rows": rows}, tmp_path / "one.png").read_bytes()
    two = plot.plot_finetune({**FINETUNE, "rows": null}, tmp_path / "two.png").read_bytes()
    assert one == two != plot.plot_finetune(FINETUNE, tmp_path / "three.png").read_bytes()


@pytest.mark.parametrize("low, high, ticks", [
    (5.5, 40, ["6", "8", "10", "15", "20", "30", "40"]), (2, 900, ["2", "5", "10", "20", "50", "100", "200", "500"]),
    (5, 2e6, ["10", "100", "1,000", "10,000", "100,000", "1,000,000"]), (6.09, 6.36, ["6.1", "6.15", "6.2", "6.25", "6.3", "6.35"]),
    (8.9, 11.1, ["9", "9.5", "10", "10.5", "11"])])
def test_perplexity_ticks_are_round_numbers_and_few(low, high, ticks):
    figure, axis = pyplot.subplots()
    axis.plot([1, 2], [low, high])
    axis.set_ylim(low, high)
    plot.perplexity_axis(axis)
    assert [text.get_text() for text in axis.get_yticklabels()] == ticks
    pyplot.close(figure)


def test_where_all_is_infinite_the_axis_is_still_one_of_perplexities(tmp_path, kept):
    plot.plot_finetune(finetune(extrapolation=[None] * 4), tmp_path / "figure.png")
    assert [text.get_text() for text in kept().axes[0].get_yticklabels()] == ["1", "2", "5", "10", "20", "50", "100", "200", "500", "1,000"]


def test_perplexity_has_a_line_for_each_model_and_scaling(tmp_path, kept):
    namesakes = [ppl(256, 5.0, model="/somewhere/out/pi-x2"), ppl(256, 4.0, model="/elsewhere/out/pi-x2")]
    plot.plot_perplexity([ppl(512, None), ppl(256, 6.0), ppl(128, 6.4), ppl(512, 7.0, rope_type="linear", factor=2.0), *namesakes],
                         tmp_path / "figure.png")
    axis, = kept().axes
    assert list(shown(axis)["data/tiny, plain RoPE"].items()) == [(128, 6.4), (256, 6.0)]  # sorted; what is infinite is left out
    assert shown(axis)["data/tiny, linear x2"] == {512: 7.0}
    assert [line.get_label() for line in axis.get_lines()].count("out/pi-x2, plain RoPE") == 2
    assert [text.get_text() for text in axis.get_xticklabels()] == ["128", "256", "512"]


def test_passkey_map_has_lengths_downwards_and_depths_to_the_right(tmp_path, kept):
    result = passkey([128, 256], 3)
    result["accuracy_by_depth"], result["accuracy"] = {"128": [1.0, 0.5, 0.25], "256": [0.0, 0.1, 1 / 3]}, {"128": 0.583, "256": 0.144}
    plot.plot_passkey(result, tmp_path / "figure.png")
    axis = kept().axes[0]
    assert axis.images[0].get_array().tolist() == [[1.0, 0.5, 0.25], [0.0, 0.1, 1 / 3]]
    assert [text.get_text() for text in axis.texts] == ["1", "0.5", "0.25", "0", "0.1", "0.33"]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["0", "50", "100"]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["128", "256"] and axis.yaxis_inverted()
    assert [text.get_text() for text in axis.child_axes[0].get_yticklabels()] == ["mean 0.58", "mean 0.14"]
    assert "data/tiny, linear x2, k_max 100" in axis.get_title()


def test_training_mean_does_not_lag(tmp_path, kept):
    """On a straight line the mean of the surroundings is the line itself, but for the end, where there is nothing ahead."""
    plot.plot_training([{"step": i, "loss": 10 - 0.01 * i} for i in range(500)] + [{"step": 499, "val_loss": 5.5}], tmp_path / "figure.png")
    lines = shown(kept().axes[0])
    assert [lines["training"][i] for i in (0, 5, 250, 480)] == pytest.approx([10, 9.95, 7.5, 5.2])
    assert lines["validation (text only)"] == {499: 5.5}


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """plot.main() with arguments, in an empty folder: (what it returns, what it prints)."""
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, argv)])
        return plot.main(), capsys.readouterr().out
    return call


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps(each) for each in content] if path.suffix == ".jsonl" else [json.dumps(content)]
    path.write_text("".join(each + "\n" for each in lines), encoding="utf-8")


def test_each_file_becomes_its_figure_and_ppl_results_become_one(command, tmp_path):
    for name, content in (("finetune.json", FINETUNE), ("keys.json", passkey()), ("a.json", ppl(128, 6.4)), ("b.json", ppl(256, 6.0))):
        write(tmp_path / "results" / name, content)
    problem, out = command()
    assert problem is None and len(out.splitlines()) == 3
    assert {p.name for p in (tmp_path / "results").glob("*.png")} == {"finetune.png", "keys.png", "perplexity.png"}
    write(tmp_path / "metrics.jsonl", training())
    problem, out = command("results/keys.json", "results/a.json", "metrics.jsonl", "--out", "figures")
    assert problem is None and out.split() == "wrote figures/keys.png wrote figures/metrics.png wrote figures/perplexity.png".split()
    for figure in tmp_path.rglob("*.png"):
        check_png(figure)


def test_files_that_are_no_results_are_passed_over_if_others_are_drawn(command, tmp_path, capsys):
    write(tmp_path / "bench.json", {"speed": 3})
    write(tmp_path / "keys.json", passkey())
    assert command("bench.json", "keys.json")[0] is None
    assert "nothing to draw" in command("bench.json")[0]
    assert "no result files" in command()[0]


def test_no_torch_is_imported_and_a_wrong_file_is_one_line(tmp_path):
    (tmp_path / "wrong.json").write_text('{"rows": 3}', encoding="utf-8")
    program = ("import runpy, sys; sys.argv = ['plot.py', sys.argv[1]]\n"
               "try:\n    runpy.run_path('plot.py', run_name='__main__')\n"
               "finally:\n    assert 'torch' not in sys.modules")
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path / "wrong.json")], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1 and "wrong.json: not a result of eval.py" in ended.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "wrong.json"]
