"""The documents: every command is accepted by its program, every link and every named file exists."""

import argparse
import importlib
import json
import re
import shlex

import pytest
from runs import ROOT

import options

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


@pytest.mark.parametrize("name", ["forty", "fast", "sixteen", "four"])
def test_recipes_are_those_of_the_measured_runs(name):
    settings = vars(options.parse_args([f"@{ROOT}/recipes/{name}.txt"])[0])
    measured = json.loads((ROOT / "results" / name / "args.json").read_text())
    for key in measured.keys() & settings.keys() - options.FREE_ON_RESUME:
        assert settings[key] == measured[key], key


def test_every_recipe_and_tool_is_in_the_readme():
    files = [*(ROOT / "recipes").glob("*.txt"), *(ROOT / "tools").glob("*.py")]
    pages = "".join(page.read_text("utf-8") for page in PAGES)
    assert [path.name for path in files if f"{path.parent.name}/{path.name}" not in pages
            and path.name != "corruption_ops.py"] == []
