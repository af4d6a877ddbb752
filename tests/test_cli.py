"""The command line end to end: what a person types and sees, and one clear line for each mistake."""

import csv
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY

import options
import train

ROOT = Path(__file__).resolve().parent.parent


def mistake(capsys, *argv: str) -> str:
    """Run the program on a mistake, and return its one line."""
    try:
        status = train.main(list(map(str, argv)))
    except SystemExit as exit:  # argparse's own way out
        status = exit.code
    captured = capsys.readouterr()
    assert status == 2, captured
    (line,) = captured.err.splitlines()
    assert line.startswith("train.py: error: ")
    return line


def test_train_resume_evaluate_predict_summary_as_commands(data_dir, tmp_path):
    def command(*flags: str) -> str:
        done = subprocess.run([sys.executable, "train.py", *map(str, flags)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "%|" not in done.stderr  # no progress bar into a pipe
        return done.stdout
    runs, images = tmp_path / "runs", ["--synthetic", "--limit-test", "50"]
    out = command(*TINY, "--data-dir", data_dir, "--checkpoint-dir", runs, "--epochs", "2", "--name", "one")
    assert re.findall(r"^epoch (\d/2)", out, re.M) == ["1/2", "2/2"]
    assert "the test set picked the best epoch" in out
    folder = runs / "one"
    assert {path.name for path in folder.iterdir()} - {".lock"} == {
        "last.pt", "best.pt", "args.json", "metrics.csv", "results.json", "curves.png", "confusion.png", "mistakes.png"}
    results = json.loads((folder / "results.json").read_text())
    assert f"last test accuracy {results['last_accuracy']:.2f} %" in command("--resume", folder)
    out = command("--evaluate", "--checkpoint", folder / "last.pt", "--data-dir", data_dir, *images,
                  "--precision", "fp32")
    assert f"test accuracy {results['test_accuracy']:.2f} %" in out
    hidden = tmp_path / "hidden.pkl"
    hidden.write_bytes(pickle.dumps({b"data": np.zeros((3, 3072), np.uint8), b"ids": np.array([5, 6, 7])}, protocol=5))
    command("--predict", hidden, "--checkpoint", folder / "best.pt", "--output", tmp_path / "labels.csv")
    assert (tmp_path / "labels.csv").read_text().splitlines()[0] == "ID,Labels"
    assert "Total params: 4,697,742" in command("--summary")


def test_metrics_have_a_row_per_epoch(run_train, tmp_path):
    assert run_train("--epochs", "3", "--val-size", "20", "--name", "v") == 0
    rows = list(csv.DictReader((tmp_path / "runs/v/metrics.csv").open()))
    assert ",".join(rows[0]) == ("epoch,step,lr,train_loss,train_accuracy,val_loss,val_accuracy,test_loss,"
                                 "test_accuracy,seconds,images_per_second")
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "3"), ("2", "6"), ("3", "9")]
    assert all(row["test_loss"] == row["test_accuracy"] == "" and float(row["val_accuracy"]) >= 0 for row in rows)


def test_validation_picks_the_best_and_the_test_set_is_touched_once(run_train, tmp_path, capsys, monkeypatch):
    looks, predict = [], train.Trainer.predict
    monkeypatch.setattr(train.Trainer, "predict",
                        lambda self, split: looks.append(len(split.images)) or predict(self, split))
    assert run_train("--epochs", "3", "--val-size", "20", "--name", "v") == 0
    assert looks == [20, 20, 20, 50]
    results = json.loads((tmp_path / "runs/v/results.json").read_text())
    rows = list(csv.DictReader((tmp_path / "runs/v/metrics.csv").open()))
    accuracies = [float(row["val_accuracy"]) for row in rows]
    assert results["picked_by"] == "validation" and results["best_epoch"] == 1 + accuracies.index(max(accuracies))
    best = torch.load(tmp_path / "runs/v/best.pt", weights_only=True)
    assert best["epoch"] == results["best_epoch"] and best["picked_by"] == "val"
    assert "the test set was looked at this once" in capsys.readouterr().out


def test_a_run_is_never_written_over(run_train, tmp_path, capsys):
    assert run_train("--epochs", "1", "--name", "a") == 0
    before = (tmp_path / "runs/a/last.pt").read_bytes()
    assert run_train("--epochs", "1", "--name", "a", "--seed", "1") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "runs/a/last.pt").read_bytes() == before
    assert run_train("--epochs", "1", "--name", "a", "--seed", "1", "--overwrite") == 0
    assert (tmp_path / "runs/a/last.pt").read_bytes() != before


def test_resume_refuses_what_would_change_the_result(run_train, capsys):
    assert run_train("--epochs", "1", "--name", "a") == 0
    assert run_train("--resume", "--name", "a", "--epochs", "2") == 2
    line = capsys.readouterr().err
    assert "--epochs 2 differs from the checkpoint's 1" in line and "--init" in line
    assert run_train("--resume", "--name", "a", "--lr", "0.05", "--log-interval", "1") == 0  # equal, and free


def test_resume_auto_starts_or_goes_on(run_train, tmp_path):
    flags = ["--resume", "auto", "--name", "q", "--epochs", "1", *TINY]
    assert run_train(*flags) == 0
    before = (tmp_path / "runs/q/metrics.csv").read_text()
    assert run_train(*flags) == 0
    assert (tmp_path / "runs/q/metrics.csv").read_text() == before


def test_init_starts_a_new_run_from_weights(run_train, tmp_path):
    assert run_train("--epochs", "1", "--name", "a") == 0
    assert run_train("--epochs", "1", "--name", "b", "--init", str(tmp_path / "runs/a/last.pt"), "--lr", "0",
                     "--weight-decay", "0") == 0
    a, b = (torch.load(tmp_path / f"runs/{name}/last.pt", weights_only=True)["model"] for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a if "running" not in name and "tracked" not in name)


def test_args_json_holds_the_settings(run_train, tmp_path):
    run_train("--epochs", "1", "--name", "a", "--optimizer", "adam", "--lr", "0.002")
    args = json.loads((tmp_path / "runs/a/args.json").read_text())
    assert args["optimizer"] == "adam" and args["lr"] == 0.002 and args["num_blocks"] == [1, 1, 1]
    assert "resume" not in args and "summary" not in args


def test_recipe_files_are_read_with_comments():
    args, given = options.parse_args(["@" + str(ROOT / "recipes/paper.txt")])
    assert (args.loader, args.workers, args.precision, args.compile) == ("workers", 16, "fp32", False)
    assert set(given) == {"loader", "workers", "precision", "compile"}


@pytest.mark.parametrize(("argv", "words"), [
    (["--optimizer", "sdg"], ["--optimizer", "'sdg'", "sgd"]),
    (["--epochs", "0"], ["--epochs", "at least 1"]),
    (["--epochs", "many"], ["--epochs", "many"]),
    (["--lr", "nan"], ["--lr", "nan"]),
    (["--frobnicate"], ["--frobnicate"]),
    (["--evaluate"], ["--checkpoint FILE"]),
    (["--predict", "x", "--checkpoint", "y"], ["--output"]),
    (["--evaluate", "--predict", "x", "--checkpoint", "y"], ["--evaluate", "--predict"]),
    (["--summary", "--resume"], ["--resume", "--summary"]),
    (["--resume", "--overwrite"], ["--resume", "--overwrite"]),
    (["--checkpoint", "x"], ["--checkpoint", "--init"]),
    (["--tta"], ["--tta"]),
    (["--nesterov", "--optimizer", "adam"], ["--nesterov", "sgd"]),
    (["--momentum", "0.5", "--optimizer", "adam"], ["--momentum", "adam"]),
    (["--scheduler", "onecycle", "--warmup-epochs", "1"], ["--warmup-epochs", "onecycle"]),
    (["--warmup-epochs", "200"], ["--warmup-epochs 200", "--epochs 200"]),
    (["--workers", "4"], ["--workers", "--loader workers"]),
    (["--label-smoothing", "1"], ["--label-smoothing"]),
    (["--name", "a/b"], ["--name", "--checkpoint-dir"]),
    (["@nowhere.txt"], ["nowhere.txt"]),
    (["--kernel-sizes", "4"], ["--kernel-sizes 4", "odd"]),
    (["--se-reduction", "100"], ["--se-reduction 100"]),
    (["--pool-size", "9"], ["--pool-size 9"]),
    (["--num-blocks", "9", "9", "9"], ["--max-params"]),
    (["--resume", "nowhere"], ["nowhere"]),
])
def test_mistakes_in_flags(argv, words, capsys, tmp_path):
    line = mistake(capsys, *argv, *([] if "--name" in argv else ["--checkpoint-dir", tmp_path]),
                   "--data-dir", tmp_path / "no data is read")
    assert all(word in line for word in words), line
    assert list(tmp_path.iterdir()) == []


def test_mistakes_in_files(data_dir, capsys, tmp_path):
    runs = ["--checkpoint-dir", tmp_path / "runs", *TINY, "--data-dir", data_dir]
    assert "no CIFAR-10 in" in mistake(capsys, "--no-download", "--data-dir", tmp_path, *runs[:2])
    assert "there is no run in" in mistake(capsys, "--resume", *runs)
    assert not (tmp_path / "runs").exists()
    assert "--batch-size 97" in mistake(capsys, *runs, "--batch-size", "97")
    deep = [*runs, "--num-blocks", *"111111", "--channels", "8", "--se-reduction", "4"]
    assert "batch norm" in mistake(capsys, *deep, "--batch-size", "95")  # of 96
    assert "--val-size 90" in mistake(capsys, *runs, "--val-size", "90")
    (tmp_path / "file").write_text("no folder")
    assert "cannot be written" in mistake(capsys, *runs, "--checkpoint-dir", tmp_path / "file")
    assert "not a checkpoint" in mistake(capsys, "--evaluate", "--checkpoint", tmp_path / "file")
    assert "is not there, or no file" in mistake(capsys, "--evaluate", "--checkpoint", tmp_path / "nothing.pt")
    assert "not a checkpoint" in mistake(capsys, *runs, "--init", tmp_path / "file", "--name", "b")
    assert "choose another --data-dir" in mistake(capsys, *runs, "--data-dir", tmp_path / "file", "--name", "b")
    assert "File name too long" in mistake(capsys, *runs, "--name", "b" * 300)
    for content in (b"--name bob's\n", b"\x80\x04\xff", f"@{tmp_path / 'flags'}".encode()):
        (tmp_path / "flags").write_bytes(content)
        assert "@FILE holds no flags" in mistake(capsys, f"@{tmp_path / 'flags'}")


def test_closed_output_is_no_mistake(run_train, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert run_train("--epochs", "1") == 0


def test_a_reader_that_leaves_early_is_no_error():
    with subprocess.Popen([sys.executable, "train.py", "--summary", "--num-blocks", "1", "--channels", "16"], cwd=ROOT,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # as `| head -n 0` does
        assert (process.stderr.read(), process.wait()) == (b"", 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there(capsys, tmp_path):
    assert "--device cuda" in mistake(capsys, "--device", "cuda", "--checkpoint-dir", tmp_path)
