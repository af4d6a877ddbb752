"""The documents: every command in them is one that the program, or a tool, takes."""

import argparse
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

import options

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = README + (ROOT / "results" / "optimizers" / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```(?:bash|console)\n(.*?)```", DOCUMENTS, re.S)
            for line in block.replace("\\\n", " ").splitlines()]


def arguments(line: str) -> list[str]:
    """Give what follows `train.py` in a command of the README."""
    words = shlex.split(line.split("train.py", 1)[1], comments=True)
    return ["@" + str(ROOT / word[1:]) if word.startswith("@") else word for word in words]


@pytest.mark.parametrize("line", sorted({line for line in COMMANDS if "train.py" in line}))
def test_commands_are_parsed_by_the_real_parser(line, capsys):
    try:
        options.parse_args(arguments(line.replace('"$optimizer"', "sgd").replace('"$lr"', "0.1").replace("$seed", "0")))
    except SystemExit as exit:
        assert exit.code == 0, capsys.readouterr().err  # --help


class Parsed(Exception):
    """The parser has taken a command."""


@pytest.mark.parametrize("line", sorted({line for line in COMMANDS if "python tools/" in line}))
def test_commands_of_tools_are_parsed_by_theirs(line, monkeypatch):
    def parse(parser, argv):
        argparse.ArgumentParser.parse_args(parser, argv)
        raise Parsed
    monkeypatch.setattr(options.Parser, "parse_args", parse)
    _, program, *words = shlex.split(line, comments=True)
    tool = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    with pytest.raises(Parsed):
        tool.main(words)


def test_the_readme_names_every_flag():
    flags = {flag for action in options.get_parser()._actions for flag in action.option_strings}
    missing = sorted(flag for flag in flags if flag.startswith("--") and not flag.startswith(("--no-", "--help"))
                     and not re.search(re.escape(flag) + r"(?![\w-])", README))
    assert missing == []


def test_the_speed_table_has_the_benchmark_s_figures():
    rows = json.loads((ROOT / "results" / "bench" / "cpu.json").read_text(encoding="utf-8"))["rows"]
    medians = {name: row["median"] for name, row in rows.items()}
    ours, paper = "this program: whole training, images/s", "the paper's way: whole training, images/s"
    ratio = "whole training, this program : the paper's way"
    assert f"| {medians[ours]:.1f} images/s" in README and f"| {medians[paper]:.1f} images/s" in README
    assert f"| {medians[ratio]:.1f} ({rows[ratio]['min']:.1f} to {rows[ratio]['max']:.1f}) |" in README
    assert f"grows by {medians['memory growth : bytes of these images']:.2f} of their bytes" in README


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {target for line in COMMANDS for target in re.findall(r"\bmake ([a-z-]+)", line)}
    assert named and named <= targets


def test_links_and_pictures_exist():
    links = re.findall(r"\]\(([^)#:\s]+)\)", README) + re.findall(r'src="([^":]+)"', README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_tool_names_itself_in_the_readme():
    assert [path.name for path in (ROOT / "tools").glob("*.py")
            if "argparse" in path.read_text() and f"tools/{path.name}" not in README] == []


def test_help_shows_defaults_in_groups():
    text = options.get_parser().format_help()
    for group in ("data", "model", "optimisation", "augmentation", "speed", "output", "modes"):
        assert f"\n{group}:\n" in text
    assert "(default: 200)" in text and "--augment, --no-augment" in text and "default: None" not in text
