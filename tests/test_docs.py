"""README.md, docs/ and the scripts' own manuals: every command and flag exists, every link leads
somewhere, every function that is named is there."""
import ast
import contextlib
import functools
import importlib
import io
import re
import runpy
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest
from conftest import EXTRAS

from methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {path.name: path.read_text(encoding="utf-8") for path in DOCUMENTS}
SCRIPTS = [*ROOT.glob("*.py"), *(ROOT / "extras").glob("*.py"), ROOT / "data" / "prepare.py",
           ROOT / "weights" / "__main__.py"]
MANUALS = {path.relative_to(ROOT).as_posix(): ast.get_docstring(ast.parse(path.read_text("utf-8")))
           for path in sorted(SCRIPTS)}
COMMAND = re.compile(r"(?:python3?|torchrun --nproc-per-node \d+) +((?:[\w/]+\.py|-m weights)\b.*)")


# ---- Commands ------------------------------------------------------------------------------------


def code_lines(text):
    """The lines of a Markdown text's fenced blocks, and its code in backticks."""
    fenced = re.findall(r"```(?:bash|python)?\n(.*?)```", text, re.S)
    inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    return "\n".join([*fenced, *inline])


def commands():
    """(document, words) of every `python SCRIPT ...`, of the documents and of the manuals."""
    sources = {name: code_lines(text) for name, text in TEXT.items()}
    for name, text in {**sources, **MANUALS}.items():
        for line in text.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                found = COMMAND.match(part.strip())
                if found:
                    yield name, shlex.split(found[1].replace("...", ""), comments=True)


def script_and_arguments(words):
    """["-m", "weights", "info", "--model", "m"] -> (["-m", "weights", "info"], ["--model", "m"])"""
    size = 2 if words[0] == "-m" else 1
    if words[0] in ("-m", "eval.py"):
        size += 1  # their first argument is a command of its own
    return words[:size], words[size:]


@functools.cache
def manual(script):
    """What `python SCRIPT -h` prints. script: ("eval.py", "ppl"), say."""
    printed = io.StringIO()
    argv = [*script[1:], "-h"]
    with mock.patch.object(sys, "path", list(sys.path)), contextlib.redirect_stdout(printed), \
            pytest.raises(SystemExit) as stop:
        if script[0] == "-m":
            with mock.patch.object(sys, "argv", argv):
                runpy.run_module(script[1], run_name="__main__")
        else:
            with mock.patch.object(sys, "argv", [str(ROOT / script[0]), *argv]):
                runpy.run_path(str(ROOT / script[0]), run_name="__main__")
    assert stop.value.code == 0, script
    return printed.getvalue()


def flags_of(script):
    """The flags of its usage, which ends at the first empty line."""
    return set(re.findall(r"--[a-z][a-z0-9-]*", manual(tuple(script)).split("\n\n")[0])) | {"-h"}


@pytest.mark.parametrize("name, words", [
    pytest.param(name, words, id=f"{name}: {' '.join(words)[:60]}") for name, words in commands()])
def test_commands_exist_as_printed(name, words):
    script, arguments = script_and_arguments(words)
    if script[0] != "-m":
        assert (ROOT / script[0]).is_file()
    for last in script[-1].split("|"):  # ppl|passkey|generate is three commands
        known = flags_of([*script[:-1], last])
        for word in arguments:
            if re.match(r"--?[a-z]", word):
                assert word.split("=")[0] in known


def test_there_are_commands_to_look_at():
    named = [name for name, _ in commands()]
    assert named.count("README.md") > 12
    assert named.count("recipes.md") > 12
    assert named.count("harness.md") > 3
    assert {"train.py", "finetune.py", "eval.py", "extras/compare.py",
            "weights/__main__.py"} <= set(named)
    assert len(named) > 60


def test_flags_that_do_not_exist_are_noticed():
    assert "--window" in flags_of(["eval.py", "ppl"])
    assert "--window" not in flags_of(["eval.py", "passkey"])
    assert flags_of(["-m", "weights", "info"]) == {"-h", "--model"}
    assert {"--to", "--dtype"} <= flags_of(["-m", "weights", "export"])
    assert {"--rope", "--factors"} <= flags_of(["extras/compare.py"]), "its own, and ModelFlags"
    assert "--no-baseline" in flags_of(["finetune.py"])
    assert "--mirror" in flags_of(["data/prepare.py"])


def planned_commands():
    """(command, what it prints) of every --dry-run in scale.md."""
    blocks = re.findall(r"```bash\n(python finetune.py --dry-run .*?)```\n\n```\n(.*?)```",
                        TEXT["scale.md"], re.S)
    return [(shlex.split(command.replace("\\\n", " "))[2:], output) for command, output in blocks]


@pytest.mark.parametrize("arguments, output", [
    pytest.param(*plan, id=" ".join(plan[0][1:])[:60]) for plan in planned_commands()])
def test_dry_runs_print_what_scale_says(arguments, output, capsys):
    """All but the first line, which names the reader's own device."""
    importlib.import_module("finetune").main(arguments)
    device, printed = capsys.readouterr().out.split("\n", 1)
    assert device.startswith("device ")
    assert printed == output


def test_no_dry_run_of_scale_is_left_out():
    assert len(planned_commands()) == TEXT["scale.md"].count("finetune.py --dry-run") > 10


# ---- Names ---------------------------------------------------------------------------------------


def test_every_method_has_one_row_in_the_closing_table():
    table = TEXT["maths.md"].split("## 15.")[1]
    cells = [line.split("|")[3] for line in table.splitlines() if line.startswith("| ")][1:]
    found = [re.match(r" `(\w+)`", cell) for cell in cells]
    assert sorted(match[1] for match in found if match) == sorted(METHODS)


def defined_names(path):
    """Functions, classes and constants of a Python file."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return names


def functions_in_tables():
    """(document, function, file) of every table cell like `cos_sin`, `apply_rope` in [rope.py]."""
    for path in DOCUMENTS:
        for line in path.read_text(encoding="utf-8").splitlines():
            for cell in line.split("|")[1:-1] if line.startswith("|") else []:
                for names, link in re.findall(r"((?:`\w+`[, and.]*)+) in \[[^]]*\]\(([^)]*\.py)\)",
                                              cell):
                    for function in re.findall(r"`(\w+)`", names):
                        yield path, function, link


def test_functions_named_beside_a_file_are_in_it():
    named = list(functions_in_tables())
    assert len(named) >= 15
    for path, function, link in named:
        assert function in defined_names(path.parent / link), f"{path.name}: {function} in {link}"


def python_blocks():
    for name, text in TEXT.items():
        for n, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.S)):
            if "import " in block:
                yield pytest.param(block, id=f"{name} {n}")


@pytest.mark.parametrize("block", list(python_blocks()))
def test_python_in_the_documents_imports_names_that_exist(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            package = node.module.split(".")[0]
            if package in EXTRAS:
                pytest.importorskip(package)
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


def test_the_first_python_of_the_readme_is_position_interpolation():
    block = re.search(r"```python\n(.*?)```", TEXT["README.md"], re.S)[1]
    names = {}
    exec(block, names)
    plain = importlib.import_module("rope").linear(64, 10000.0, 2.0)[0]
    assert (names["inv_freq"] == plain).all()
    assert names["cos"].shape[-1] in (32, 64)


def test_the_readme_lists_the_files():
    tree = re.search(r"```\n(rope\.py .*?)```", TEXT["README.md"], re.S)[1]
    entries = [line.split()[0] for line in tree.splitlines()]
    assert set(path.name for path in ROOT.glob("*.py")) <= set(entries)
    for entry in entries:
        assert (ROOT / entry).exists(), entry


# ---- What GitHub shows ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXT)
def test_formulas_use_what_github_renders(name):
    assert not re.findall(r"\\(?:operatorname|mbox|phantom)\b", TEXT[name])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(path):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8"))
    assert links
    for link in links:
        if not re.match(r"[a-z]+://", link):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


def heading_anchors(path):
    """The anchors that GitHub gives to the headings of a document."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    anchors = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
        anchors.add(kept.replace(" ", "-"))
    return anchors


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_into_a_document_lead_to_a_heading(path):
    text = path.read_text(encoding="utf-8")
    for file, anchor in re.findall(r"\]\(([\w./-]*)#([^)\s]+)\)", text):
        target = path.parent / file if file else path
        assert anchor in heading_anchors(target), f"{path.name}: {file}#{anchor}"
