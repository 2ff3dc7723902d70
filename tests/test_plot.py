"""plot.py: every result becomes a PNG of README size, whatever is infinite in it, and nothing of
torch is needed for that."""
import json
import math
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.text import Text

import plot
from common.errors import UserError

ROOT = Path(plot.__file__).parent
LENGTHS = [128, 256, 512, 1024]


def finetune(**perplexities):
    passkeys = dict(zip(map(str, LENGTHS), [1.0, 0.9, 0.1, 0.0]))
    rows = [{"name": name, "perplexity": dict(zip(map(str, LENGTHS), values)), "passkey": passkeys}
            for name, values in perplexities.items()]
    return {"rows": rows, "lengths": LENGTHS, "original_window": 256, "window": 512}


FINETUNE = finetune(extrapolation=[6.4, 6.0, 20.4, 35.0], pi_zero_shot=[10.6, 10.3, 10.1, 31.0],
                    pi_finetuned=[6.5, 6.1, 6.0, 25.0], direct_finetuned=[6.4, 6.1, 6.2, 24.0])


def ppl(window, perplexity, model="data/tiny", **rope):
    return {"model": model, "rope": {"rope_type": "default", "rope_theta": 10000.0, **rope},
            "window": window, "perplexity": perplexity}


def passkey(lengths=(128, 256), depths=5):
    grid = {str(n): [(d + i) % 2 / 2 for d in range(depths)] for i, n in enumerate(lengths)}
    return {"model": "data/tiny", "rope": {"rope_type": "linear", "factor": 2.0},
            "lengths": list(lengths), "trials": 10, "k_max": 100,
            "depths": [d / max(1, depths - 1) for d in range(depths)],
            "accuracy": {str(n): 0.25 for n in lengths}, "accuracy_by_depth": grid}


def training(n=50):
    lines = [{"step": 10 * i + 1, "loss": 2 + 5 / (i + 1), "lr": 1e-3} for i in range(n)]
    return lines + [{"step": 10 * n, "val_loss": 2.1, "val_perplexity": 8.2}]


def compare(perplexities=(6.0, 20.0, None), passkeys=(1.0, 0.5, 0.0)):
    lengths = ["256", "512", "1024"]
    rows = [{"name": name, "perplexity": dict(zip(lengths, perplexities)),
             "passkey": dict(zip(lengths, passkeys))} for name in ("default", "linear x2")]
    return {"methods": rows, "lengths": [256, 512, 1024], "original_window": 256,
            "model": "data/tiny"}


@pytest.fixture
def kept(monkeypatch):
    """The figures are laid out, and stay open instead of being saved, so that a test can read them.
    Yields the latest."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figure.draw_without_rendering())
    monkeypatch.setattr(plot.plt, "close", lambda figure: None)
    yield lambda: pyplot.figure(pyplot.get_fignums()[-1])
    monkeypatch.undo()
    pyplot.close("all")


def shown(axis):
    """{label: {x: y}} of the lines of an axis that have a name."""
    return {line.get_label(): dict(zip(*map(list, line.get_data())))
            for line in axis.get_lines() if not line.get_label().startswith("_")}


def words(texts):
    return [text.get_text() for text in texts]


def check_png(path, wide=(900, 1600), high=(150, 800)):
    """A PNG of a size to be read at a README's width, with something drawn on white, and nothing
    cut off at its edges."""
    assert path.read_bytes().startswith(b"\x89PNG")
    image = matplotlib.image.imread(path)[..., :3]
    assert wide[0] <= image.shape[1] <= wide[1], image.shape
    assert high[0] <= image.shape[0] <= high[1], image.shape
    assert (image.min(axis=2) < 0.9).mean() > 0.01
    for edge in (image[0], image[-1], image[:, 0], image[:, -1]):
        assert edge.min() > 0.99
    return image


@pytest.mark.parametrize("figure, content", [
    (plot.plot_finetune, FINETUNE),
    (plot.plot_finetune, finetune(extrapolation=[6.4, 6.0, None, None],
                                  pi_finetuned=[None, None, None, None])),
    (plot.plot_finetune, finetune(extrapolation=[6.4, 6.0, 3e5, math.inf],
                                  pi_finetuned=[6.5, math.nan, 6.0, 25.0])),
    (plot.plot_finetune, finetune(extrapolation=[None] * 4)),
    (plot.plot_finetune, finetune(extrapolation=[6.01, 6.02, 6.03, 6.04])),
    (plot.plot_perplexity, [ppl(128, 6.4), ppl(256, 6.0), ppl(512, None),
                            ppl(256, 7.0, rope_type="linear", factor=4.0)]),
    (plot.plot_perplexity, [ppl(256, 6.0)]), (plot.plot_perplexity, [ppl(256, None)]),
    (plot.plot_passkey, passkey()), (plot.plot_passkey, passkey([256], 1)),
    (plot.plot_passkey, passkey(LENGTHS, 32)),
    (plot.plot_training, training()), (plot.plot_training, training(1)),
    (plot.plot_training, training()[:-1])])
def test_each_figure_is_a_png_of_readme_size(tmp_path, figure, content):
    before = pyplot.get_fignums()  # another test of the session may have left a figure open
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
        assert words(axis.get_xticklabels()) == ["128", "256", "512", "1024"]
        assert {text.get_text(): text.xy[0] for text in axis.texts} == {"L": 256, "L'": 512}
    assert left.get_yscale() == left.get_xscale() == right.get_xscale() == "log"
    assert right.get_yscale() == "linear"
    assert "perplexity" in left.get_ylabel() and "passkey" in right.get_ylabel()
    assert words(left.get_yticklabels()) == ["6", "8", "10", "15", "20", "30"]
    styles = [(line.get_linestyle(), line.get_marker()) for line in left.get_lines()[:4]]
    assert len(set(styles)) == 4, "told apart without colour, too"
    legend, = kept().legends
    top = max(axis.get_tightbbox().y1 for axis in (left, right))
    assert legend.get_window_extent().y0 >= top - 1, "the legend covers something"


def test_what_finetune_hands_over_and_what_its_file_says_are_one_figure(tmp_path):
    """Lengths are numbers in the program and text in JSON, infinities are null there."""
    rows = []
    null = []
    for row in FINETUNE["rows"]:
        perplexity = {int(n): math.inf if n == "512" else v for n, v in row["perplexity"].items()}
        passkeys = {int(n): v for n, v in row["passkey"].items()}
        rows.append({**row, "perplexity": perplexity, "passkey": passkeys})
        null.append({**row, "perplexity": {**row["perplexity"], "512": None}})
    one = plot.plot_finetune({**FINETUNE, "rows": rows}, tmp_path / "one.png")
    two = plot.plot_finetune({**FINETUNE, "rows": null}, tmp_path / "two.png")
    three = plot.plot_finetune(FINETUNE, tmp_path / "three.png")
    assert one.read_bytes() == two.read_bytes() != three.read_bytes()


@pytest.mark.parametrize("low, high, ticks", [
    (5.5, 40, ["6", "8", "10", "15", "20", "30", "40"]),
    (2, 900, ["2", "5", "10", "20", "50", "100", "200", "500"]),
    (5, 2e6, ["10", "100", "1,000", "10,000", "100,000", "1,000,000"]),
    (6.09, 6.36, ["6.1", "6.15", "6.2", "6.25", "6.3", "6.35"]),
    (8.9, 11.1, ["9", "9.5", "10", "10.5", "11"])])
def test_perplexity_ticks_are_round_numbers_and_few(low, high, ticks):
    figure, axis = pyplot.subplots()
    axis.plot([1, 2], [low, high])
    axis.set_ylim(low, high)
    plot.perplexity_axis(axis)
    assert words(axis.get_yticklabels()) == ticks
    pyplot.close(figure)


def test_where_all_is_infinite_the_axis_is_still_one_of_perplexities(tmp_path, kept):
    plot.plot_finetune(finetune(extrapolation=[None] * 4), tmp_path / "figure.png")
    ticks = ["1", "2", "5", "10", "20", "50", "100", "200", "500", "1,000"]
    assert words(kept().axes[0].get_yticklabels()) == ticks


def test_perplexity_has_a_line_for_each_model_and_scaling(tmp_path, kept):
    namesakes = [ppl(256, 5.0, model="/somewhere/out/pi-x2"),
                 ppl(256, 4.0, model="/elsewhere/out/pi-x2")]
    plot.plot_perplexity([ppl(512, None), ppl(256, 6.0), ppl(128, 6.4),
                          ppl(512, 7.0, rope_type="linear", factor=2.0), *namesakes],
                         tmp_path / "figure.png")
    axis, = kept().axes
    plain = shown(axis)["data/tiny, plain RoPE"]
    assert list(plain.items()) == [(128, 6.4), (256, 6.0)]  # sorted; infinite values are left out
    assert shown(axis)["data/tiny, linear x2"] == {512: 7.0}
    labels = [line.get_label() for line in axis.get_lines()]
    assert labels.count("out/pi-x2, plain RoPE") == 2
    assert words(axis.get_xticklabels()) == ["128", "256", "512"]


def test_passkey_map_has_lengths_downwards_and_depths_to_the_right(tmp_path, kept):
    result = passkey([128, 256], 3)
    result["accuracy_by_depth"] = {"128": [1.0, 0.5, 0.25], "256": [0.0, 0.1, 1 / 3]}
    result["accuracy"] = {"128": 0.583, "256": 0.144}
    plot.plot_passkey(result, tmp_path / "figure.png")
    axis = kept().axes[0]
    assert axis.images[0].get_array().tolist() == [[1.0, 0.5, 0.25], [0.0, 0.1, 1 / 3]]
    assert words(axis.texts) == ["1", "0.5", "0.25", "0", "0.1", "0.33"]
    assert words(axis.get_xticklabels()) == ["0", "50", "100"]
    assert words(axis.get_yticklabels()) == ["128", "256"] and axis.yaxis_inverted()
    assert words(axis.child_axes[0].get_yticklabels()) == ["mean 0.58", "mean 0.14"]
    assert "data/tiny, linear x2, k_max 100" in axis.get_title()


def test_compare_is_dark_where_a_method_is_good(tmp_path, kept):
    plot.plot_compare(compare(), tmp_path / "figure.png")
    left, right = kept().axes
    assert left.images[0].get_array().filled(-1).tolist() == [[0, 1, -1]] * 2  # 6, 20, infinite
    assert right.images[0].get_array().tolist() == [[0, 0.5, 1]] * 2
    assert words(left.texts) == ["6.00", "20.00", "inf"] * 2
    assert words(left.get_xticklabels()) == ["256\n(L)", "512", "1024"]
    assert words(left.get_yticklabels()) == ["default", "linear x2"]
    plot.plot_compare(compare(passkeys=[None] * 3), tmp_path / "figure.png")
    assert len(kept().axes) == 1  # passkeys were not measured
    plot.plot_compare(compare(perplexities=(6.04, 123.4, 1.2e6)), tmp_path / "figure.png")
    assert words(kept().axes[0].texts)[:3] == ["6.04", "123", "1e+06"]


def test_context_is_drawn_at_the_middle_of_each_bin(tmp_path, kept):
    result = {**ppl(8, 6.0), "context": [1, 4, 6], "nll_by_context": [3.0, 2.0, None],
              "tokens_by_context": [5, 3, 0]}
    plot.plot_context([result], tmp_path / "figure.png")
    values = shown(kept().axes[0])["data/tiny, plain RoPE, window 8"]
    assert values == pytest.approx({math.sqrt(1 * 3): 3.0, math.sqrt(4 * 5): 2.0})


def test_training_mean_does_not_lag(tmp_path, kept):
    """On a straight line the mean of the surroundings is the line itself, but for the end, where
    there is nothing ahead."""
    lines = [{"step": i, "loss": 10 - 0.01 * i} for i in range(500)]
    plot.plot_training(lines + [{"step": 499, "val_loss": 5.5}], tmp_path / "figure.png")
    lines = shown(kept().axes[0])
    means = [lines["training"][i] for i in (0, 5, 250, 480)]
    assert means == pytest.approx([10, 9.95, 7.5, 5.2])
    assert lines["validation (text only)"] == {499: 5.5}


# ---- extras/sweep.py -----------------------------------------------------------------------------


def sweep_row(method, seed, steps, value, **more):
    return {"method": method, "factor": 2.0, "seed": seed, "steps": steps, "window": 200,
            "rope": {"rope_type": method}, "passkey": {}, "perplexity":
            {"Python": {"100": 5.0, "200": value}, "prose": {"100": 7.0, "200": 8.0}}, **more}


STARTS = {"linear": {"perplexity": 30.0, "factors": [4.0, 4.0]},
          "yarn": {"perplexity": 9.8, "factors": [1.0, 4.0]}}
SEARCH = {"generations": [9.7, 9.6, 9.5], "starts": STARTS, "found": {"long_factor": [1.2, 4.5]},
          "methods": []}


def test_the_search_is_drawn(tmp_path):
    check_png(plot.plot_longrope(SEARCH, tmp_path / "longrope.png"))


def test_the_factors_that_were_found_beside_those_of_formulas(tmp_path, kept):
    assert plot.kind_of(SEARCH) == "generations", "and not a table of methods"
    plot.plot_longrope(SEARCH, tmp_path / "longrope.png")
    left, right = kept().axes
    assert shown(left) == {"PI": {0: 4.0, 1: 4.0}, "YaRN": {0: 1.0, 1: 4.0},
                           "found by the search": {0: 1.2, 1: 4.5}}
    formula, search = ([*line.get_ydata()] for line in right.get_lines())
    assert formula == [9.8, 9.8] and search == [9.7, 9.6, 9.5], "of the formulas only the best"


def test_sweep_shows_the_means_over_the_seeds(tmp_path, kept):
    rows = []
    for seed in (0, 1):
        rows += [sweep_row("default", seed, 0, 50.0, disturbance=0.3, k_max=0),
                 sweep_row("linear", seed, 0, 17.0, disturbance=0.02, k_max=100),
                 sweep_row("default", seed, 10, 11.0 + seed, k_max=40 + 20 * seed),
                 sweep_row("linear", seed, 10, [9.0, None][seed], k_max=200)]
    result = {"rows": rows, "lengths": [100, 200], "original_window": 100, "plan": "methods"}
    plot.plot_sweep(result, tmp_path / "sweep.png")
    perplexity, k_max, disturbance = kept().axes
    assert shown(perplexity) == {"plain RoPE": {0: 50.0, 10: 11.5}, "PI": {0: 17.0}}
    assert shown(k_max) == {"plain RoPE": {0: 0, 10: 50}, "PI": {0: 100, 10: 200}}
    assert shown(disturbance) == {"plain RoPE": {0.3: 50.0}, "PI": {0.02: 17.0}}
    assert perplexity.get_title() == "s = 2, L' = 200"
    legend, = kept().legends
    assert words(legend.get_texts()) == ["plain RoPE", "PI"]


def test_sweep_by_dimensions_and_from_scratch(tmp_path, kept):
    rows = [sweep_row("linear", 0, 10, 7.0)]
    for dims in (8, 40):
        rope = {"rope_type": "dprope", "interpolated_dims": dims}
        rows += [sweep_row(f"dprope {dims}", 0, steps, dims - steps, rope=rope)
                 for steps in (0, 5, 10)]
    result = {"rows": rows, "lengths": [100, 200], "original_window": 100, "plan": "methods"}
    plot.plot_sweep(result, tmp_path / "sweep.png")
    axis, = kept().axes
    assert shown(axis) == {"untrained": {8: 8, 40: 40}, "fine-tuned": {8: -2, 40: 30}}
    untrained = [row for row in rows if row["steps"] == 0]
    plot.plot_sweep({**result, "rows": [rows[0], *untrained]}, tmp_path / "sweep.png")
    axis, = kept().axes
    assert shown(axis) == {"untrained": {8: 8, 40: 40}}
    scratch = [{**sweep_row("alibi", 0, 10, 6.0), "factor": 1, "passkey": {"100": 0.5, "200": 0.0}}]
    plot.plot_sweep({**result, "rows": scratch}, tmp_path / "sweep.png")
    left, right = kept().axes
    assert shown(left) == {"alibi": {100: 5.0, 200: 6.0}}
    assert shown(right) == {"alibi": {100: 0.5, 200: 0.0}}


@pytest.mark.parametrize("method, label", [
    ("linear", "PI"), ("yarn", "yarn"), ('{"rope_type": "default", "rope_theta": 5e5}',
                                         "RoPE rope theta 500000.0"),
    ('{"rope_type": "dprope", "interpolated_dims": 8}', "dprope interpolated dims 8")])
def test_names_of_sweeps_in_the_legend(method, label):
    assert plot.method_label(method) == label


# ---- The command ---------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """plot.main() with arguments, in an empty folder: what it prints."""
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        plot.main(list(map(str, argv)))
        return capsys.readouterr().out
    return call


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    lines = [content]
    if path.suffix == ".jsonl":
        lines = content
    path.write_text("".join(json.dumps(each) + "\n" for each in lines), encoding="utf-8")


BLACK, BLUE, VERMILION = "#000000", "#0072B2", "#D55E00"


def looks(axis):
    """{label: (colour, is it solid, is its marker filled)}"""
    return {line.get_label(): (line.get_color(), line.get_linestyle() == "-",
                               line.get_markerfacecolor() == line.get_color())
            for line in axis.get_lines() if not line.get_label().startswith("_")}


def test_a_method_has_one_colour_in_all_figures(tmp_path, kept):
    """Solid and filled is what was trained, dotted and hollow what was not."""
    plot.plot_finetune(FINETUNE, tmp_path / "figure.png")
    assert looks(kept().axes[0]) == {
        "no change (extrapolation)": (BLACK, False, False), "PI, no training": (BLUE, False, False),
        "PI, fine-tuned": (BLUE, True, True), "fine-tuned directly": (BLACK, True, True)}
    plot.plot_finetune(finetune(yarn_finetuned=[1, 2, 3, 4]), tmp_path / "figure.png")
    assert looks(kept().axes[0]) == {"yarn finetuned": (VERMILION, True, True)}

    rows = [sweep_row(method, 0, steps, 9.0, disturbance=0.1)
            for method in ("mine", "yarn", "linear") for steps in (0, 10)]
    result = {"rows": rows, "lengths": [100, 200], "original_window": 100, "plan": "methods"}
    plot.plot_sweep(result, tmp_path / "figure.png")
    trained, _, untrained = kept().axes
    assert looks(trained)["PI"] == (BLUE, True, True)
    assert looks(trained)["yarn"] == (VERMILION, True, True)
    assert looks(trained)["mine"][0] not in plot.COLOURS[:len(plot.METHOD_ORDER)]
    assert looks(untrained)["PI"] == (BLUE, False, False)

    rows = [{"method": method, "seed": 0, "steps": steps, "nll_by_position": {"prose": [2.0] * 8}}
            for method in ("default", "linear") for steps in (0, 10)]
    plot.plot_real_model({"rows": rows, "window": 512, "original_window": 256, "seed": 0},
                         tmp_path / "figure.png")
    left, right = kept().axes
    assert looks(left) == {
        "plain RoPE, no steps": (BLACK, False, False), "plain RoPE, 10 steps": (BLACK, True, True),
        "PI, no steps": (BLUE, False, False), "PI, 10 steps": (BLUE, True, True)}
    assert looks(right) == {"plain RoPE": (BLACK, True, True), "PI": (BLUE, True, True)}

    tried = ppl(256, 7.0, rope_type="linear", factor=2.0)
    tried["command"] = "python eval.py ppl --rope=linear --factor 2"
    assert not plot.method_of_result(tried)[1]
    tried["command"] = "python eval.py ppl --rope linear --factor 2"
    plot.plot_perplexity([tried, ppl(256, 6.0, "out/pi", rope_type="linear", factor=2.0),
                          ppl(256, 5.0), ppl(256, 6.0, "out/direct")], tmp_path / "figure.png")
    found = looks(kept().axes[0])
    assert found["data/tiny, linear x2"] == (BLUE, False, False)
    assert found["out/pi, linear x2"] == (BLUE, True, True)
    # Two models with one method: the same colour, other dashes.
    assert found["data/tiny, plain RoPE"] == (BLACK, True, True)
    assert found["out/direct, plain RoPE"] == (BLACK, False, True)


def test_methods_without_a_colour_of_their_own_take_those_that_follow():
    names = [f"method {i}" for i in range(30)]
    numbers = plot.method_numbers(["yarn", *names])
    assert numbers["yarn"] == plot.METHOD_ORDER.index("yarn")
    styles = [plot.line_style(numbers[name]) for name in names]
    assert styles[0]["color"] == plot.COLOURS[len(plot.METHOD_ORDER)]
    assert len({(style["color"], style["marker"]) for style in styles}) == 30


def test_every_kind_of_text_has_a_line_of_panels_where_models_were_trained(tmp_path, kept):
    rows = [{"method": "linear", "seed": 0, "steps": steps,
             "nll_by_position": {"prose": [2.0] * 8, "code": [1.0] * 8}} for steps in (0, 10)]
    plot.plot_real_model({"rows": rows, "window": 512, "original_window": 256, "seed": 0},
                         tmp_path / "figure.png")
    prose, prose_steps, code, code_steps = kept().axes
    assert [axis.get_title(loc="left") for axis in (prose, code)] == ["prose", "code"]
    assert "prose" in prose_steps.get_title() and "code" in code_steps.get_title()
    assert prose.get_position().y0 == prose_steps.get_position().y0 > code.get_position().y0


def test_texts_read_by_untrained_models_stand_side_by_side_under_a_legend_that_fits(tmp_path, kept):
    hot = '{"rope_type": "rerope", "temperature": "log_n"}'
    other = hot.replace("rerope", "dca")
    for kinds in (["prose", "code"], ["prose"]):
        rows = [{"method": method, "seed": 0, "steps": 0,
                 "nll_by_position": {kind: [2.0] * 8 for kind in kinds}}
                for method in ("default", "linear", "yarn", hot, other)]
        plot.plot_real_model({"rows": rows, "window": 512, "original_window": 256, "seed": 0},
                             tmp_path / "figure.png")
        figure = kept()
        axes = figure.axes
        assert [axis.get_title(loc="left") for axis in axes] == kinds
        assert len({axis.get_position().y0 for axis in axes}) == 1
        assert list(looks(axes[0])) == ["plain RoPE", "PI", "yarn", "rerope temperature log_n",
                                        "dca temperature log_n"]
        legend = figure.legends[0].get_window_extent()
        assert figure.bbox.x0 <= legend.x0 and legend.x1 <= figure.bbox.x1


@pytest.mark.parametrize("window", [384, 512, 1024])
def test_the_kind_of_text_and_the_window_of_pre_training_stand_side_by_side(tmp_path, kept, window):
    rows = [{"method": "default", "seed": 0, "steps": 0,
             "nll_by_position": {"some long text": [2.0] * 8}}]
    plot.plot_real_model({"rows": rows, "window": window, "original_window": 256, "seed": 0},
                         tmp_path / "figure.png")
    axis = kept().axes[0]
    titles = [text for text in axis.get_children()
              if isinstance(text, Text) and text.get_text() == "some long text"]
    marks = [text for text in axis.texts if text.get_text() == "L"]
    assert len(titles) == len(marks) == 1
    assert not titles[0].get_window_extent().overlaps(marks[0].get_window_extent())


def test_with_a_temperature_a_method_has_its_colour_unless_it_stands_beside_itself():
    hot = '{"rope_type": "rerope", "temperature": "log_n"}'
    cold = hot.replace("log_n", "llama4")
    own = plot.METHOD_ORDER.index("rerope")
    assert plot.method_numbers(["default", hot])[hot] == own
    both = plot.method_numbers(["rerope", hot, cold])
    assert both["rerope"] == own
    assert len({both["rerope"], both[hot], both[cold]}) == 3
    two = plot.method_numbers([hot, cold])
    assert two[hot] != two[cold]


def test_settings_of_a_method_make_lines_of_their_own(tmp_path, kept):
    rope = {"rope_type": "dprope", "factor": 2.0}
    plot.plot_perplexity([ppl(256, 6.0, **rope, interpolated_dims=8),
                          ppl(512, 7.0, **rope, interpolated_dims=40)], tmp_path / "figure.png")
    assert shown(kept().axes[0]) == {"data/tiny, dprope interpolated dims 8 x2": {256: 6.0},
                                     "data/tiny, dprope interpolated dims 40 x2": {512: 7.0}}


def test_perplexities_of_other_texts_and_base_models_are_other_figures(command, tmp_path, capsys):
    tiny = {"tokens": 100, "documents": 1, "bytes": 300, "original_window": 256}
    smol = {**tiny, "tokens": 80, "model": "out/smol.gguf", "original_window": 8192}
    prose = {**smol, "tokens": 70, "bytes": 200}
    contents = [{**ppl(n, 6.0), **text} for text in (tiny, smol, prose) for n in (128, 256)]
    contents.append({**ppl(256, 6.0), **tiny, "dtype": "bfloat16"})
    for i, content in enumerate(contents):
        write(tmp_path / f"{i}.json", content)
    main = [f"{i}.json" for i in range(len(contents))]
    plot.main(main)
    printed = capsys.readouterr()
    assert printed.out.split() == ["wrote", "perplexity.png", "wrote", "perplexity-smol.png",
                                   "wrote", "perplexity-smol-2.png"]
    assert printed.err.startswith("6.json: one perplexity makes no line: name others")
    with pytest.raises(UserError, match="6.json: one perplexity makes no line"):
        plot.main(["6.json"])
    groups = plot.shared_figures(dict(enumerate(contents[:6])), "perplexity", "perplexity.png")
    assert list(groups.values()) == [[0, 1], [2, 3], [4, 5]]


def test_each_file_becomes_its_figure_and_ppl_results_become_one(command, tmp_path):
    for name, content in (("finetune.json", FINETUNE), ("keys.json", passkey()),
                          ("a.json", ppl(128, 6.4)), ("b.json", ppl(256, 6.0))):
        write(tmp_path / "results" / name, content)
    assert len(command().splitlines()) == 3
    figures = {p.name for p in (tmp_path / "results").glob("*.png")}
    assert figures == {"finetune.png", "keys.png", "perplexity.png"}
    write(tmp_path / "metrics.jsonl", training())
    out = command("results/keys.json", "results/a.json", "results/b.json", "metrics.jsonl",
                  "--out", "figures")
    figures = "wrote figures/keys.png wrote figures/metrics.png wrote figures/perplexity.png"
    assert out.split() == figures.split()
    for figure in tmp_path.rglob("*.png"):
        check_png(figure)


def test_files_that_are_no_results_are_passed_over_if_others_are_drawn(command, tmp_path):
    write(tmp_path / "bench.json", {"speed": 3})
    write(tmp_path / "keys.json", passkey())
    command("bench.json", "keys.json")
    with pytest.raises(UserError, match="nothing to draw"):
        command("bench.json")
    with pytest.raises(UserError, match="no result files"):
        command()


def test_no_torch_is_imported_and_a_wrong_file_is_one_line(tmp_path):
    (tmp_path / "wrong.json").write_text('{"rows": 3}', encoding="utf-8")
    program = ("import runpy, sys; sys.argv = ['plot.py', sys.argv[1]]\n"
               "try:\n    runpy.run_path('plot.py', run_name='__main__')\n"
               "finally:\n    assert 'torch' not in sys.modules")
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path / "wrong.json")], cwd=ROOT,
                           capture_output=True, encoding="utf-8")
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    assert "wrong.json: not a result of eval.py" in ended.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "wrong.json"]


def test_every_method_in_the_committed_results_has_a_colour_of_its_own():
    """So that no figure gives it another one."""
    named = set()
    for path in (ROOT / "results").glob("*.json"):
        rows = json.loads(path.read_text(encoding="utf-8")).get("rows", [])
        named |= {row.get("method", row["rope"]["rope_type"]) for row in rows}
    named = {name if "temperature" not in name else plot.map_name(name) for name in named}
    variants = {name for name in named if "bins" in name or "interpolated_dims" in name}
    assert {"default", "linear", "clex", "alibi"} < named
    assert named - variants <= set(plot.METHOD_ORDER)
    assert len(set(plot.COLOURS)) > len(plot.METHOD_ORDER)


def test_a_panel_without_passkeys_says_so(tmp_path, monkeypatch):
    texts = []
    monkeypatch.setattr(plot, "save_figure", lambda figure, path: texts.extend(
        text.get_text() for text in figure.axes[1].texts))
    plot.plot_finetune(FINETUNE, tmp_path / "x.png")
    assert "not measured" not in texts
    rows = [row | {"passkey": dict.fromkeys(row["passkey"])} for row in FINETUNE["rows"]]
    plot.plot_finetune(FINETUNE | {"rows": rows}, tmp_path / "x.png")
    assert "not measured" in texts
