"""README.md and docs/: every method is in the table, every command and flag exists, every link leads somewhere."""
import dataclasses
import re
import shlex
from pathlib import Path

import pytest

import eval as evaluation
from finetune import FinetuneConfig
from rope import METHODS
from train import TrainConfig

ROOT = Path(evaluation.__file__).parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {path.name: path.read_text(encoding="utf-8") for path in DOCUMENTS}


def flags_of(settings):
    return {"--" + f.name.replace("_", "-") for f in dataclasses.fields(settings)} | {"-h"}


def known_flags(words):
    """The flags that a script takes; None where any will do. words: a command line from the script's name on."""
    script = words[0]
    if script == "train.py":
        return flags_of(TrainConfig)
    if script == "finetune.py":
        return flags_of(FinetuneConfig)
    if script == "eval.py":
        return flags_of(evaluation.COMMANDS[words[1]][0])
    source = (ROOT / script).read_text(encoding="utf-8")
    common = flags_of(evaluation.Common) if "(Common)" in source else set()
    named = {"--" + n.replace("_", "-") for n in re.findall(r"^    (\w+): .* = field\(", source, re.M)}
    return common | named | set(re.findall(r"--[a-z][a-z-]*", source))


def commands():
    """(document, words) of every `python SCRIPT ...` in a fenced block."""
    for name, text in TEXT.items():
        for block in re.findall(r"```(?:bash)?\n(.*?)```", text, re.S):
            for line in block.replace("\\\n", " ").splitlines():
                for part in line.split("&&"):
                    if match := re.match(r"\s*python3? +([\w/]+\.py.*)", part):
                        yield name, shlex.split(match[1], comments=True)


@pytest.mark.parametrize("name, words", [pytest.param(n, w, id=f"{n}: {' '.join(w)[:60]}") for n, w in commands()])
def test_commands_exist_as_printed(name, words):
    assert (ROOT / words[0]).is_file(), words
    for word in words[1:]:
        if re.match(r"--\w", word):
            assert word.split("=")[0].replace("--no-", "--") in known_flags(words), f"{name}: {' '.join(words)}"


def test_there_are_commands_to_look_at():
    assert len(list(commands())) > 20


def test_every_method_has_one_row_in_the_closing_table():
    rows = [line.split("|")[3] for line in TEXT["maths.md"].split("## 14.")[1].splitlines() if line.startswith("| ")][1:]
    named = [re.match(r" `(\w+)`", cell)[1] for cell in rows if re.match(r" `(\w+)`", cell)]
    assert sorted(named) == sorted(METHODS)


@pytest.mark.parametrize("name", TEXT)
def test_formulas_use_what_github_renders(name):
    assert not re.findall(r"\\(?:operatorname|mbox|phantom)\b", TEXT[name])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_to_files(path):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8"))
    assert links
    for link in links:
        if not re.match(r"[a-z]+://", link):
            assert (path.parent / link).exists(), f"{path.name}: {link}"
