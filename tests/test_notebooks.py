"""The notebooks: they run from top to bottom and write nothing into the repository, and what is
committed of the tour is what the code says today.

    python tests/test_notebooks.py      runs both and writes their outputs, after a change
"""
import argparse
import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
NAMES = ["tour", "solutions"]
# (absolute, relative) tolerance of the numbers in cells with a tag. Formulas are exact up to their
# rounding in print. A loss moves with the text, which is this repository's own source. Of 10 or 20
# keys one or two may flip on another machine. Training adds up the rounding of many steps.
TOLERANCES = {"key-numbers": (0.011, 0.01), "key-losses": (0.2, 0.0),
              "key-accuracies": (0.101, 0.0), "trained-losses": (0.3, 0.0)}


def read(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def code_cells(notebook):
    """(source, cell) of each code cell; the file may hold its source as lines."""
    return [("".join(cell["source"]), cell) for cell in notebook["cells"]
            if cell["cell_type"] == "code"]


def markdown(name):
    return "\n".join("".join(cell["source"]) for cell in read(name)["cells"]
                     if cell["cell_type"] == "markdown")


def printed(cell):
    return "".join("".join(output["text"]) for output in cell["outputs"]
                   if output["output_type"] == "stream" and output["name"] == "stdout")


def tag_of(cell):
    tags = cell["metadata"].get("tags", [])
    assert len(tags) < 2 and set(tags) <= set(TOLERANCES), tags
    return tags[0] if tags else None


# ---- What is committed ---------------------------------------------------------------------------


def problems_of_a_cell(source, cell):
    found = []
    lines = source.splitlines()
    if len(lines) >= 15:
        found.append(f"{len(lines)} lines")
    if max(map(len, lines)) > 100:
        found.append("a line of more than 100 columns")
    if any(output["output_type"] == "error" or output.get("name") == "stderr"
           for output in cell["outputs"]):
        found.append("an error or a warning among its outputs")
    if re.search(r"(/(work|home|root|tmp|usr|Users)/\w)|[A-Z]:\\\\", json.dumps(cell["outputs"])):
        found.append("a path of a machine in its outputs")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_short_and_were_run_in_order(name):
    cells = code_cells(read(name))
    assert [cell["execution_count"] for _, cell in cells] == list(range(1, len(cells) + 1))
    for source, cell in cells:
        assert problems_of_a_cell(source, cell) == [], source
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 1.5e6


def test_a_bad_cell_is_noticed():
    output = {"output_type": "stream", "name": "stderr", "text": ["in /home/me/x.py\n"]}
    found = problems_of_a_cell("x = 1\n" * 15 + "#" * 101, {"outputs": [output]})
    assert len(found) == 4
    assert problems_of_a_cell("x = 1", {"outputs": []}) == []


def test_the_tour_is_told_in_figures_and_numbers():
    cells = [cell for _, cell in code_cells(read("tour"))]
    outputs = [output for cell in cells for output in cell["outputs"]]
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    assert kinds.count("image/png") == 10
    assert {tag_of(cell) for cell in cells} == {*TOLERANCES, None}
    assert all(numbers(printed(cell)) for cell in cells if tag_of(cell))


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_as_nbformat_writes_it(name):
    """So that a change of one cell is a diff of one cell."""
    nbformat = pytest.importorskip("nbformat")
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert nbformat.writes(notebook) + "\n" == text
    assert notebook.metadata == {"language_info": {"name": "python"}, "kernelspec": {
        "display_name": "Python 3", "language": "python", "name": "python3"}}
    for _, cell in code_cells(notebook):
        assert set(cell["metadata"]) <= {"tags"}


def functions_of_the_repository():
    folders = [ROOT, *(ROOT / name for name in ("common", "data", "extras", "methods", "weights"))]
    files = [file for folder in folders for file in folder.glob("*.py")]
    return {node.name for file in files for node in ast.walk(ast.parse(file.read_text("utf-8")))
            if isinstance(node, ast.FunctionDef)}


def defined_in(source):
    """Names of the functions in a cell. Lines for the shell and for IPython are no Python."""
    return set(re.findall(r"^ *def (\w+)", source, re.M))


@pytest.mark.parametrize("name", NAMES)
def test_the_notebooks_call_the_repository_and_copy_nothing(name):
    ours = functions_of_the_repository()
    assert {"apply_rope", "perplexity", "fit"} <= ours
    assert defined_in("x = 1\n\ndef fit(model):\n    pass") & ours == {"fit"}
    for source, _ in code_cells(read(name)):
        assert not defined_in(source) & ours


@pytest.mark.parametrize("name", NAMES)
def test_links_and_names_of_files_exist(name):
    text = markdown(name)
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (FOLDER / link).exists(), link


def test_each_exercise_has_a_solution():
    asked = re.findall(r"\*\*Exercise (\d+)\.\*\*", markdown("tour"))
    solved = re.findall(r"^## (\d+)\. ", markdown("solutions"), re.M)
    assert asked == solved == [str(n) for n in range(1, 12)]


# ---- They run ------------------------------------------------------------------------------------


def begin(folder):
    """conftest.py calls it before the first test of all: they run for a minute, into `folder`."""
    if not all(map(importlib.util.find_spec, ("nbclient", "ipykernel"))):
        return None
    places = dict.fromkeys(("TMPDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"), str(folder))
    environment = {**os.environ, **places, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    with open(folder / "errors", "wb") as errors:
        return subprocess.Popen([sys.executable, __file__, folder], env=environment, stderr=errors,
                                start_new_session=True)


@pytest.fixture(scope="module")
def finish(begun):
    """finish(name): the notebook as it ran today."""
    process, folder = begun
    if process is None:
        pytest.skip("the notebooks need packages: pip install nbclient ipykernel")
    assert process.wait(timeout=900) == 0, (folder / "errors").read_text(encoding="utf-8")
    return lambda name: json.loads((folder / f"{name}.ipynb").read_text(encoding="utf-8"))


def execute(name, cwd):
    """The notebook, run in a kernel that begins in `cwd`, without a trace of when and where."""
    import nbclient
    import nbformat
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    metadata = notebook.metadata.copy()
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False,
                            coalesce_streams=True,
                            resources={"metadata": {"path": str(cwd)}}).execute()
    notebook.metadata = metadata
    return nbformat.writes(notebook) + "\n"


def execute_all(folder):
    """Both into `folder`. The tour begins where it lies, the solutions in the root: either way the
    first cell finds the repository, where nothing may be written."""
    for name, cwd in (("tour", FOLDER), ("solutions", ROOT)):
        before = files_of_the_repository()
        executed = execute(name, cwd)
        assert files_of_the_repository() == before
        (folder / f"{name}.ipynb").write_text(executed, encoding="utf-8")


def files_of_the_repository():
    """Each file that git would see, with the time at which it was written. (Tests that run beside
    write none.)"""
    found = {}
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [f for f in folders if f[0] != "." and f not in ("__pycache__", "out")]
        for file in files:
            path = Path(folder, file)
            found[path] = path.stat().st_mtime_ns
    return found


def numbers(text):
    """All numbers in a text: 'L is 256, loss 3.04' -> [256.0, 3.04]."""
    return [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", text)]


def differences(committed, fresh, tag):
    """Lines of `committed` whose numbers are others in `fresh`, or that are not there."""
    absolute, relative = TOLERANCES[tag]
    old, new = committed.splitlines(), fresh.splitlines()
    if len(old) != len(new):
        return [f"{len(old)} lines, now {len(new)}"]
    return [f"{a}  ->  {b}" for a, b in zip(old, new)
            if numbers(b) != pytest.approx(numbers(a), abs=absolute, rel=relative)]


@pytest.mark.slow
def test_the_tour_runs_and_prints_the_numbers_that_are_committed(finish):
    fresh = finish("tour")
    changed = []
    for (_, old), (_, new) in zip(code_cells(read("tour")), code_cells(fresh)):
        if tag_of(old):
            changed += differences(printed(old), printed(new), tag_of(old))
        assert figures(old) == figures(new)
    assert changed == [], "if the code is right: python tests/test_notebooks.py"


def figures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell["outputs"])


@pytest.mark.slow
def test_the_solutions_pass_their_own_checks(finish):
    finish("solutions")
    checks = sum(source.count("assert") for source, _ in code_cells(read("solutions")))
    assert checks >= 11


def test_another_number_is_noticed():
    line = "loss at 128 .. 256 tokens of context  3.04\n"
    assert differences(line, line.replace("3.04", "3.20"), "key-losses") == []
    assert differences(line, line.replace("3.04", "3.30"), "key-losses") != []
    assert differences(line, line.replace("256", "512"), "key-losses") != []
    assert differences(line, line * 2, "key-losses") != []
    assert differences("score -7.536", "score 7.536", "key-numbers") != []
    assert differences("beyond 1193.6", "beyond 1190.0", "key-numbers") == []
    assert differences("0.90 of the keys", "0.80 of the keys", "key-accuracies") == []
    assert differences("0.90 of the keys", "0.75 of the keys", "key-accuracies") != []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    execute_all(parser.parse_args().folder)
