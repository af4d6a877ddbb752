"""The command line: what the help shows, what argument files hold, and one clear line for each mistake."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import runs
import torch

import options
import train
from checkpoint import load_checkpoint

OUTPUT = "--tta/--no-tta off\n"
DATA = "data: --data-dir data; --synthetic/--no-synthetic off; "
HARDWARE = "hardware: --device auto; --precision auto"
HELP = {
    "train": ("[@FILE] [flags]", """run: --output-dir checkpoints/se-resnet; --resume; --init-from; \
--overwrite/--no-overwrite off; --save-minutes 1; --log-interval 50; --summary/--no-summary off
""" + DATA + """--val-size 0; --limit-train all; --limit-test all
model: --num-blocks 4 4 3; --channels 64; --kernel-sizes 3; --shortcut-kernel-sizes 1; --dropout 0; --block basic; \
--se stem; --se-reduction 16; --max-params 5000000
optimization: --epochs 200; --batch-size 128; --optimizer sgd; --lr 0.1 for sgd, 0.001 for adam, 0.001 for adamw, \
0.0001 for rmsprop, 0.01 for adagrad, 1 for adadelta, 0.05 for muon; --momentum 0.9; --nesterov/--no-nesterov off; \
--weight-decay 0.0005; --bias-lr 1; --scheduler cosine; --warmup-epochs 0; --grad-clip 0.1; --label-smoothing 0; \
--ema 0; --seed 0
augmentation: --augment/--no-augment on; --normalize/--no-normalize on; \
--trivial-augment/--no-trivial-augment off; --mixup 0; --cutmix 0; --plain-epochs 0; \
--alternating-flip/--no-alternating-flip off; --small-epochs 0
""" + HARDWARE + """; --workers 0; --compile/--no-compile on for CUDA with Triton; \
--deterministic/--no-deterministic off"""),
    "evaluate": ("CHECKPOINT [flags]", f"output: --output-dir; {OUTPUT}{DATA}--limit-test all\n{HARDWARE}"),
    "predict": ("CHECKPOINT IMAGES... [flags]", f"output: --output -; --picture; {OUTPUT}{HARDWARE}")}


def outline(text: str) -> str:
    """Reduce a help text to its groups, flags and defaults."""
    lines = []
    for title, body in re.findall(r"^(\w+):\n((?:  .*\n)+)", text, re.M):
        entries = re.split(r"^  (?=-)", body, flags=re.M)[1:]
        flags = ["/".join(re.findall(r"(?<!\S)--?[a-z-]+", re.split(r"  |\n", entry)[0])) for entry in entries]
        defaults = [re.search(r"( [^(]*)\)$|$", " ".join(entry.split()).replace("(default:", "("))[1] or ""
                    for entry in entries]
        lines += [f"{title}: " + "; ".join(map("".join, zip(flags, defaults, strict=True)))] if entries else []
    return "\n".join(lines)


@pytest.mark.parametrize("program", HELP)
def test_help_shows_every_flag_with_its_default_and_examples_that_work(program, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "150")
    with pytest.raises(SystemExit, match="^0$"):
        importlib.import_module(program).main(["--help"])
    text = capsys.readouterr().out
    usage, flags = HELP[program]
    assert text.startswith(f"usage: {program}.py {usage}\n\n")
    text, examples = text.split("\nexamples:\n")
    assert outline(text + "\n") == f"options: -h/--help\n{flags}"
    monkeypatch.chdir(runs.ROOT)
    parse = options.parse_args if program == "train" else importlib.import_module(program).build_parser().parse
    for line in examples.splitlines():
        python, name, *words = shlex.split(line)
        assert (python, name) == ("python", f"{program}.py") and parse(words)[1]
    assert len(examples.splitlines()) >= 2


@pytest.mark.parametrize("flag, status", [("--help", 0), ("--epoch", 2), ("--warmup-epochs=200", 2)])
def test_help_and_mistakes_do_not_wait_for_torch(flag, status, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit(99)")
    done = subprocess.run([sys.executable, runs.ROOT / "train.py", flag], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == status and (done.stdout + done.stderr).startswith(("usage: ", "train.py: error: ")), done


@pytest.mark.parametrize("path", sorted((runs.ROOT / "recipes").glob("*.txt")), ids=lambda path: path.stem)
def test_recipes_are_taken(path):
    args, given = options.parse_args([f"@{path}"])
    assert given and options.build_model(args)


def test_argument_files_hold_comments_quotes_and_other_files(tmp_path, monkeypatch):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/flags.txt").write_text("""# --epochs 1\n--epochs 3  # three
        --output-dir "my runs/it's # one" @b/more.txt\n--data-dir=~/data --init-from ~/x.pt""")
    (tmp_path / "a/b/more.txt").write_text("--seed 7\n@../last.txt", encoding="utf-8-sig")  # as Windows writes it
    (tmp_path / "a/last.txt").write_text("--num-blocks 2 2\n--ema 0.5")
    monkeypatch.chdir(tmp_path / "a/b")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    assert options.parse_args(["@../flags.txt", "--ema", "0.9"])[1] == {
        "epochs": 3, "output_dir": "my runs/it's # one", "seed": 7, "num_blocks": [2, 2], "ema": 0.9,
        "data_dir": "/home/me/data", "init_from": "/home/me/x.pt"}
    assert options.parse_args(["@recipes/fast.txt"])[1]["epochs"] == 27  # from any folder


@pytest.mark.parametrize("content, words", [
    (None, ["No such file", "@recipes/paper.txt"]),
    ("folder", ["Is a directory"]),
    (b"\x80\x04\xff\x00", ["can't decode"]),
    (b"--output-dir bob's", ["quotation"]),
    (b"--epochs 2\n@nowhere.txt", ["@nowhere.txt", "No such file"]),
])
def test_bad_argument_files(content, words, tmp_path, refused):
    path = tmp_path / "flags.txt"
    if content == "folder":
        path.mkdir()
    elif content:
        path.write_bytes(content)
    line = refused(train.main, [f"@{path}"])
    assert all(word in line for word in [str(tmp_path), "not an argument file", *words]), line


@pytest.mark.parametrize("command, words", [tuple(part.strip() for part in case.split(":")) for case in """
    --optimizer sdg: 'sdg' choose sgd adadelta | --scheduler step: 'step' cosine onecycle constant
    --device cuda: finds no such device --device auto | --block resnext: (resnext) one of basic, preact
    --se head: (head) one of stem, block, none | --epochs 0: 0 at least 1 | --epochs many: 'many' int
    --epoch 5: unrecognized --epoch train.py --help | --frobnicate: unrecognized | stray: unrecognized stray
    --augment off: * unrecognized off | --output-dir: expected one argument | --batch-size 0: 0 at least 1
    --lr nan: nan at least 0 | --lr inf: inf at least 0 | --lr -1: -1 at least 0 | --ema 1: 1 at least 0 below 1
    --seed -1: -1 at least 0 | --seed 9999999999999999999: below 4611686018427387904 | --cutmix nan: nan at least 0
    --workers -1: -1 at least 0 | --limit-train 0: 0 at least 1 | --save-minutes -1: -1 at least 0
    --num-blocks: expected at least one argument | --num-blocks 4 x: 'x' int
    --num-blocks 4 0: (4 0) stages of at least one block | --num-blocks 1 1 1 1 1 1: --num-blocks (1 1 1 1 1 1)
    --num-blocks 9 9 9: * 13,628,814 --max-params (5,000,000) raise the limit
    --channels 4: --channels (4) at least 8 | --kernel-sizes 4: --kernel-sizes (4) odd
    --kernel-sizes 3 3: --kernel-sizes has 2 values expected 1, or 3 like --num-blocks
    --shortcut-kernel-sizes 2: --shortcut-kernel-sizes (2) odd | --dropout 2: * dropout between 0 and 1, but got 2
    --se-reduction 100: --se-reduction (100) from 1 to 64 | --se-reduction 0: --se-reduction (0)
    --resume: no run in --resume auto | --resume --summary: leave out --summary
    --resume nowhere: nowhere not a run folder --init-from | --init-from nowhere.pt: * nowhere.pt not found expected
    --resume --overwrite: leave out --overwrite | --nesterov --optimizer adam: --nesterov needs --optimizer sgd
    --momentum 0.5 --optimizer adam: --optimizer adam has none
    --optimizer muon --block preact --synthetic: * muon preact use another optimizer
    --momentum 0.9 --scheduler onecycle: --scheduler onecycle leave out --momentum
    --warmup-epochs 1 --scheduler onecycle: onecycle leave out --warmup-epochs
    --warmup-epochs 200: --warmup-epochs (200) --epochs (200) try --warmup-epochs 20
    --epochs 9 --small-epochs 9: --small-epochs (9) must be less than --epochs (9)
    --plain-epochs 3: --plain-epochs needs --trivial-augment, --mixup or --cutmix
    --plain-epochs 9 --epochs 9 --cutmix 1: --plain-epochs (9) must be less than --epochs (9)
    --alternating-flip --no-augment: --alternating-flip needs --augment
    --resume auto --warmup-epochs 200: * try --warmup-epochs 20
    """.replace("\n", "|").strip("| ").split("|")])
def test_mistakes(command, words, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    folders = [] if command == "--output-dir" else ["--output-dir", "run", "--data-dir", "no data is read"]
    line = refused(train.main, [*folders, *command.split()])
    expected = [command.split()[0], *words.split()] if words[0] != "*" else words[1:].split()  # *: not the flag itself
    assert all(word in line for word in expected), line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", [["--output-dir="], ["--data-dir", ""], ["--resume", ""]])
def test_empty_arguments_are_refused(argv, refused, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # alone it means nothing: only the ranks of torchrun leave the message to the first
    assert "is empty; is a shell variable not set?" in refused(train.main, argv)


def test_resume_takes_what_leaves_the_result_alone_and_refuses_the_rest(small_data, no_pictures, tmp_path, refused):
    argv = runs.command_line(small_data, tmp_path / "run", "--resume", "auto")
    argv.remove("--lr")
    argv.remove("0.01")
    assert train.main(argv) == 0  # starts a run
    saved = json.loads((tmp_path / "run/args.json").read_text())
    assert saved["lr"] == 0.1 and saved["num_blocks"] == [1, 1] and not {"resume", "summary"} & saved.keys()
    for command, values in {"--epochs 3": "3 differs from the checkpoint's 2", "--lr 0.05": "0.05 0.1",
                            "--num-blocks 1 2": "1 2 1 1", "--no-augment": "off on", "--val-size 20": "20 0",
                            "--limit-test 10": "10 20", "--seed 1": "1 0"}.items():
        line = refused(train.main, ["--output-dir", str(tmp_path / "run"), "--resume", *command.split()])
        flag = command.split()[0].replace("--no-", "--")
        assert re.search(rf"{flag} {'.*'.join(values.split())}\b", line) and "--init-from" in line, line
    saved = torch.load(tmp_path / "run/last.pt")
    del saved["args"]["bias_lr"], saved["args"]["small_epochs"]  # flags that are newer than the run
    torch.save(saved, tmp_path / "run/last.pt")
    for command, value in {"--bias-lr 8": "1", "--small-epochs 1": "0"}.items():
        line = refused(train.main, ["--output-dir", str(tmp_path / "run"), "--resume", *command.split()])
        assert f"{command} differs from the checkpoint's {value};" in line
    (tmp_path / "run/results.json").unlink()  # as if it had been stopped before the end
    assert train.main([*argv, *"--lr 0.1 --log-interval 7 --save-minutes 3 --workers 1 --no-compile".split()]) == 0
    args = load_checkpoint(tmp_path / "run/last.pt")["args"]
    assert (args["log_interval"], args["save_minutes"], args["workers"], args["compile"]) == (7, 3, 1, False)
