"""The house: imports run one way, the root shows the paper's contents, files stay readable."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EXTRAS

ROOT = Path(__file__).resolve().parent.parent
ROOT_FILES = {"rope", "model", "train", "finetune", "eval", "theory", "plot", "bench"}
FOLDERS = ["common", "methods", "data", "weights", "training", "evaluation", "extras"]
LIMITS = {"rope.py": 300, "model.py": 470, "train.py": 320, "finetune.py": 200, "eval.py": 330}
LAYERS = {  # what each room may import
    "common": set(),
    "rope": set(),
    "methods": {"common", "rope"},
    "model": {"common", "rope", "methods"},
    "data": {"common"},
    "weights": {"common", "rope", "methods", "model", "data"},
    "training": {"common", "rope", "methods", "model", "data", "weights"},
    "train": {"common", "rope", "methods", "model", "data", "weights", "training"},
    "evaluation": {"common", "rope", "methods", "model", "data", "weights"},
    "eval": {"common", "rope", "methods", "model", "data", "weights", "evaluation"},
    "plot": {"common"},
    "theory": {"common", "rope", "methods"},
    "finetune": {"common", "rope", "methods", "model", "data", "weights", "training", "train",
                 "eval", "plot"},
    "bench": {"common", "rope", "methods", "model", "data", "weights", "eval"},
    "extras": {"common", "rope", "methods", "model", "data", "weights", "training", "train",
               "evaluation", "eval", "finetune", "plot", "theory"},
}


def product_files():
    files = [ROOT / f"{name}.py" for name in sorted(ROOT_FILES)]
    for folder in FOLDERS:
        files += sorted((ROOT / folder).rglob("*.py"))
    return [file for file in files if "corpora" not in file.parts]


def module_of(file):
    """weights/load.py -> weights.load, weights/__init__.py -> weights"""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree, modules):
    """Modules of ours that a file imports anywhere, in its functions too; not for types only."""
    found = set()
    for_types = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            for_types.update(ast.walk(node))
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found & modules


def graph():
    modules = {module_of(file) for file in product_files()}
    return {module_of(file): imported_modules(ast.parse(file.read_text("utf-8")), modules)
            for file in product_files()}


def against_the_order(imports):
    """[(module, imported)] of every import that LAYERS does not allow."""
    wrong = []
    for module, imported in imports.items():
        room = module.split(".")[0]
        for other in sorted(imported):
            other_room = other.split(".")[0]
            if other_room != room and other_room not in LAYERS[room]:
                wrong.append((module, other))
    return wrong


def circles(imports):
    """Modules that import themselves by way of others, their own package's __init__ left out."""
    imports = {module: {other for other in imported if not module.startswith(other + ".")}
               for module, imported in imports.items()}
    found = []
    for start in imports:
        reached, waiting = set(), [start]
        while waiting:
            for other in imports[waiting.pop()]:
                if other not in reached:
                    reached.add(other)
                    waiting.append(other)
        if start in reached:
            found.append(start)
    return found


def test_imports_run_one_way():
    assert against_the_order(graph()) == []


def test_there_is_no_circle_of_imports():
    assert circles(graph()) == []


def test_the_two_tests_above_can_fail():
    imports = graph()
    imports["rope"] = {"methods.table"}  # which imports rope
    assert ("rope", "methods.table") in against_the_order(imports)
    assert "rope" in circles(imports)
    tree = ast.parse("def late():\n    from weights.load import load_model\n")
    assert imported_modules(tree, {"weights.load"}) == {"weights.load"}


def begin(folder):
    """conftest.py calls it before the first test of all: a process that imports each file first. It
    also fails where one brings PyTorch's compiler, which takes as long as PyTorch itself."""
    modules = [module_of(file) for file in product_files()]
    code = f"""if True:
        import functools, importlib.machinery, sys, torch
        there = "torch._dynamo" in sys.modules
        loader = importlib.machinery.SourceFileLoader
        loader.get_code = functools.cache(loader.get_code)  # each file is compiled once
        for first in {modules}:
            for name in set(sys.modules) & set({modules}):
                del sys.modules[name]
            importlib.import_module(first)
            if "torch._dynamo" in sys.modules and not there:
                sys.exit("importing " + first + " brings PyTorch's compiler")
    """
    with open(folder / "errors", "wb") as errors:
        return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=errors,
                                start_new_session=True)


def test_every_file_can_be_imported_first(begun):
    """What no circle means: any module may be the first that Python meets."""
    process, folder = begun
    assert process.wait(timeout=900) == 0, (folder / "errors").read_text(encoding="utf-8")


def test_plot_needs_no_torch():
    code = "import plot, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_root_shows_the_papers_contents():
    assert {file.stem for file in ROOT.glob("*.py")} == ROOT_FILES


@pytest.mark.parametrize("name", LIMITS)
def test_what_is_read_stays_short(name):
    assert len((ROOT / name).read_text("utf-8").splitlines()) <= LIMITS[name]


def lines_of_code(file):
    """Lines that are not blank, comments or docstrings."""
    text = file.read_text("utf-8")
    in_docstrings = set()
    for node in ast.walk(ast.parse(text)):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        if isinstance(node, documented) and ast.get_docstring(node):
            in_docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") and n not in in_docstrings
               for n, line in enumerate(text.splitlines(), start=1))


def test_the_product_does_not_grow_unnoticed():
    """Code alone, without docstrings, comments and blank lines. The bound was 8,000 when the house
    was built, and 8,790 when models went to llama.cpp and a real one was fine-tuned. Then came
    distance maps, LongRoPE's search, LongPPL and ranking (10,100), training on many GPUs (300, and
    45 for weights that no GPU ever holds whole), LoRA and its adapters (400), and the memory of
    many GPUs: its arithmetic, the plan of --dry-run, and the bench that measures whether it is
    right (330). Output to devices and pipes, locks, and a line for everything odd: 377; what a file
    says of itself and its checksums, streams that nobody reads, and leftovers of kills: 72. The
    page that runs in a browser: 127, and its JavaScript, which keeps to 100 columns, too. Weights
    in the computer's memory, and what training will take in a file of its own: 106. The bench's
    processes, compiled blocks, decoding and memory: 80; the meter, from the tests: 45; fewer passes
    over a tile: 5. What a review found: the blocks of flex_attention, rows of a sweep's methods,
    joined documents, and others: 50. Another one: numbers that are none, repeats of a sampled
    answer, keys of joined digits, and flags that were refused after the work: 42."""
    assert sum(map(lines_of_code, product_files())) <= 12074
    for file in (ROOT / "docs" / "playground").iterdir():
        assert max(map(len, file.read_text("utf-8").splitlines())) <= 100, file


# ---- Without the extras --------------------------------------------------------------------------


def extras_imported_at_once(source):
    """Packages that a test file imports at its top, without having asked for them before."""
    asked, found = set(), set()
    for node in ast.parse(source).body:
        value = getattr(node, "value", None)
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "pytest.importorskip":
            asked.add(value.args[0].value)
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        found |= {name.split(".")[0] for name in names} & EXTRAS - asked
    return found


@pytest.mark.parametrize("file", sorted((ROOT / "tests").glob("*.py")), ids=lambda f: f.name)
def test_no_test_file_needs_an_extra_to_be_collected(file):
    """One such import ends the collection of all tests."""
    assert extras_imported_at_once(file.read_text(encoding="utf-8")) == set()


def test_such_an_import_is_noticed():
    assert extras_imported_at_once("import torch, gguf.constants") == {"gguf"}
    assert extras_imported_at_once("from peft import PeftModel") == {"peft"}
    asked = 'peft = pytest.importorskip("peft")\n'
    assert extras_imported_at_once(asked + "from peft import PeftModel\nimport gguf") == {"gguf"}


@pytest.mark.parametrize("file", product_files(), ids=module_of)
def test_functions_and_lines_are_short_and_typed(file):
    text = file.read_text("utf-8")
    assert max(map(len, text.splitlines()), default=0) <= 100
    tree = ast.parse(text)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in functions:
        assert node.end_lineno - node.lineno < 60, f"{node.name} is long"
    methods = [n for c in tree.body if isinstance(c, ast.ClassDef) for n in c.body]
    for node in [*tree.body, *methods]:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            if node.name in ("forward", "backward") and node.args.args[0].arg == "ctx":
                continue  # PyTorch's own signature
            arguments = [a for a in [*node.args.posonlyargs, *node.args.args,
                                     *node.args.kwonlyargs] if a.arg not in ("self", "cls")]
            untyped = [a.arg for a in arguments if a.annotation is None]
            assert not untyped, f"{node.name}: {untyped}"
            assert node.returns is not None, f"{node.name}: no return type"


def defined_names(file):
    """Functions, classes and constants of a module."""
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                yield from (name.id for name in ast.walk(target) if isinstance(name, ast.Name))


def test_no_name_stands_for_two_things():
    """A name that one module defines is not that of another thing in a second module. Commands all
    have a main(), and the layouts of weights/ share one interface."""
    shared = {"main", "read_config", "read_tensors", "__all__"}
    places = {}
    for file in product_files():
        for name in set(defined_names(file)) - shared:
            places.setdefault(name, []).append(module_of(file))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_no_file_names_a_machine_or_its_paths():
    pattern = re.compile(r"/(work|home|root)/\w")
    for file in product_files():
        assert not pattern.search(file.read_text("utf-8")), file
