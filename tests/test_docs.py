"""The documents: every command is accepted by its program, every link and every named file exists."""

import argparse
import csv
import hashlib
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

import options
from checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "results").rglob("*.md"))]
COMMANDS = sorted({line for page in PAGES
                   for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
                   for line in block.replace("\\\n", " ").splitlines()})


class Parsed(Exception):
    """The parser has accepted a command."""


@pytest.mark.parametrize("line", [line for line in COMMANDS if ".py" in line and "pytest" not in line])
def test_commands_are_accepted(line, monkeypatch):
    def parse(parser, argv):
        argparse.ArgumentParser.parse_args(parser, argv)
        raise Parsed
    monkeypatch.setattr(options.Parser, "parse_args", parse)
    monkeypatch.chdir(ROOT)
    program, rest = re.search(r"((?:tools/)?\w+)\.py([^;&]*)", line).groups()
    values = {'"$optimizer"': "sgd", '"$lr"': "0.1", "$seed": "0"}
    values |= {f"${name}": value for name, value in re.findall(r'^(\w+)="(.*)"$', "\n".join(COMMANDS), re.M)}
    for name, value in values.items():
        rest = rest.replace(name, value)
    with pytest.raises(Parsed):
        importlib.import_module(program.replace("/", ".")).main(shlex.split(rest, comments=True))


def test_results_are_those_of_the_run():
    run = ROOT / "results/fast"
    *_, last = csv.DictReader((run / "metrics.csv").open())
    results = json.loads((run / "results.json").read_text())
    assert float(last["test_accuracy"]) == results["last_accuracy"] == results["test_accuracy"]
    row = next(line for line in README.splitlines() if line.startswith("| `@recipes/fast.txt`"))
    assert [cell.strip(" *") for cell in row.split("|")[2:5]] == [
        f"{results['parameters']:,}", str(results["epochs"]), f"{results['last_accuracy']:.2f}%"]
    assert f"{results['best_accuracy']:.2f}% (test)" in row
    card = (ROOT / "docs/model-card.md").read_text()
    tta, = re.findall(r"\| `pretrained.pt`, bf16 \| [\d.]+% \| ([\d.]+%) \|", card)
    assert row.split("|")[5].strip() == tta
    assert f"| the run's `last.pt`, bf16 | {results['last_accuracy']:.2f}% |" in card
    corruptions = json.loads((run / "corruptions.json").read_text())
    assert f"**{corruptions['mean']:.2f}%**" in card
    file = ROOT / "checkpoints/pretrained.pt"
    assert corruptions["settings"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    shipped = load_checkpoint(file)
    assert shipped["epoch"] == results["epochs"]  # the last epoch, not one that the test set has selected
    settings = json.loads((run / "args.json").read_text())
    assert shipped["args"] == {name: settings[name] for name in shipped["args"]}


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {target for line in COMMANDS for target in re.findall(r"\bmake ([a-z-]+)", line)}
    assert named and named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    links = re.findall(r"\]\(([^)#:\s]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_tests_that_are_named_exist():
    named = set(re.findall(r"`(?:tests/)?(test_\w+\.py)`", "".join(page.read_text("utf-8") for page in PAGES)))
    assert named and [name for name in named if not (ROOT / "tests" / name).exists()] == []


def test_every_recipe_and_tool_is_in_the_readme():
    files = [*(ROOT / "recipes").glob("*.txt"), *(ROOT / "tools").glob("*.py")]
    pages = "".join(page.read_text("utf-8") for page in PAGES)
    assert [path.name for path in files if f"{path.parent.name}/{path.name}" not in pages
            and path.name != "corruption_ops.py"] == []
