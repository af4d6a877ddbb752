"""tools/compare.py: the table's numbers by hand, runs in every state, and what becomes of bad folders."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import options
from tools import compare
from utils import UserError

COLUMNS = ("epoch", "step", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "test_loss",
           "test_accuracy", "seconds", "images_per_second")


def make_run(parent, name, accuracies, finished=True, results=None, **settings):
    """Write a run folder whose held-out accuracies are given, one an epoch."""
    folder = parent / name
    folder.mkdir()
    args = {"data_dir": "data", "num_blocks": [4, 4, 3], "epochs": len(accuracies), "optimizer": "sgd", "lr": 0.1,
            "seed": 0, "val_size": 0, "device": "auto", "precision": "auto", "loader": "device", "compile": None,
            "checkpoint_dir": "checkpoints", "name": name} | settings
    (folder / "args.json").write_text(json.dumps(args))
    split = "val" if args["val_size"] else "test"
    lines = [",".join(COLUMNS)]
    for epoch, accuracy in enumerate(accuracies, start=1):
        row = {"epoch": epoch, "step": epoch * 10, "lr": args["lr"], "train_loss": 1 / epoch, "train_accuracy": 50.0,
               f"{split}_loss": 2 / epoch, f"{split}_accuracy": accuracy, "seconds": 300.0,
               "images_per_second": 100.0 if epoch % 2 else 50.0}
        lines.append(",".join(str(row.get(column, "")) for column in COLUMNS))
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    if finished:
        found = {"last_accuracy": accuracies[-1], "best_accuracy": max(accuracies), "best_epoch": 1,
                 "picked_by": "validation" if split == "val" else "test", "test_accuracy": accuracies[-1],
                 "epochs": len(accuracies), "seconds": 120.0, "images_per_second": 1000.0, "device": "some GPU",
                 "precision": "bf16", "compile": True, "processes": 1, "versions": {"torch": "2.10.0"}}
        (folder / "results.json").write_text(json.dumps(found | (results or {})))
    return folder


def read_table(*folders):
    """Return the rows of the table as dicts."""
    head, *rows = compare.build_table([compare.read_run(folder) for folder in folders])
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_single_runs_show_what_differs_and_what_came_out(tmp_path):
    rows = read_table(make_run(tmp_path, "sgd", [50.0, 94.126, 93.0], momentum=0.9),
                      make_run(tmp_path, "adam", [40.0, 60.0, 91.0], optimizer="adam", lr=0.001, num_blocks=[1, 1]))
    assert rows == [
        {"run": "sgd", "num-blocks": "4 4 3", "optimizer": "sgd", "lr": "0.1", "momentum": "0.9", "epochs": "3",
         "picked by": "test", "last (%)": "93.00", "best (%)": "94.13", "minutes": "2.0", "images/s": "1000"},
        {"run": "adam", "num-blocks": "1 1", "optimizer": "adam", "lr": "0.001", "momentum": "-", "epochs": "3",
         "picked by": "test", "last (%)": "91.00", "best (%)": "91.00", "minutes": "2.0", "images/s": "1000"}]


def test_runs_that_differ_only_by_seed_become_mean_and_sample_std(tmp_path):
    folders = [make_run(tmp_path, f"sgd-{seed}", values, seed=seed, results={"seconds": 60 * minutes})
               for seed, values, minutes in ((0, [91.0, 90.0], 1.0), (1, [93.0, 92.0], 2.0), (2, [98.0, 94.0], 3.0))]
    (row,) = read_table(*folders)
    assert row == {"run": "sgd-*", "seed": "0 1 2", "n": "3", "epochs": "2", "picked by": "test",
                   "last (%)": "92.00 ± 2.00",  # of 90, 92, 94; the population's would be 1.63
                   "best (%)": "94.00 ± 3.61",  # of 91, 93, 98: sqrt((9 + 1 + 16) / 2)
                   "minutes": "2.0 ± 1.0", "images/s": "1000 ± 0"}
    rows = read_table(*folders, make_run(tmp_path, "lone", [80.0, 81.0], lr=0.5, seed=1))
    assert [(row["n"], row["seed"], row["last (%)"]) for row in rows] == [("3", "0 1 2", "92.00 ± 2.00"),
                                                                          ("1", "1", "81.00")]


def test_places_and_modes_are_no_difference_but_loader_and_precision_are(tmp_path):
    first = make_run(tmp_path, "a-0", [50.0])
    same = make_run(tmp_path, "a-1", [60.0], seed=1, data_dir="/else", workers=3, save_minutes=9, checkpoint_dir="x")
    loader = make_run(tmp_path, "b", [70.0], loader="workers")
    precision = make_run(tmp_path, "c", [70.0], results={"precision": "fp32"})
    rows = read_table(first, same, loader, precision)
    assert [row["run"] for row in rows] == ["a-*", "b", "c"]
    assert list(rows[0]) == ["run", "precision", "loader", "seed", "n", "epochs", "picked by", "last (%)", "best (%)",
                             "minutes", "images/s"]
    assert [row["precision"] for row in rows] == ["bf16", "bf16", "fp32"]


def test_two_runs_of_one_seed_are_no_sample(tmp_path):
    rows = read_table(make_run(tmp_path, "a", [50.0]), make_run(tmp_path, "b", [60.0]))
    assert [(row["run"], row["last (%)"]) for row in rows] == [("a", "50.00"), ("b", "60.00")]
    assert "seed" not in rows[0] and "n" not in rows[0]


def test_longer_runs_and_other_hardware_are_not_averaged(tmp_path):
    rows = read_table(make_run(tmp_path, "a", [50.0], seed=0), make_run(tmp_path, "b", [50.0, 60.0], seed=1),
                      make_run(tmp_path, "c", [70.0], seed=2, results={"device": "another GPU"}))
    assert [row["epochs"] for row in rows] == ["1", "2", "1"]
    assert [row["device"] for row in rows] == ["some GPU", "some GPU", "another GPU"]
    assert list(rows[0])[:4] == ["run", "device", "seed", "epochs"]


def test_an_unfinished_run_is_shown_so_and_not_averaged(tmp_path):
    rows = read_table(make_run(tmp_path, "done-0", [50.0, 60.0], seed=0),
                      make_run(tmp_path, "done-1", [50.0, 62.0], seed=1),
                      make_run(tmp_path, "busy", [70.0, 71.5, 65.25], finished=False, seed=2, epochs=30, device="cuda"),
                      make_run(tmp_path, "late", [71.0], finished=False, seed=3, epochs=30, device="cuda"))
    assert rows[0]["n"] == "2" and rows[0]["epochs"] == "2"
    assert rows[1] == {"run": "busy", "seed": "2", "n": "1", "epochs": "3 of 30, unfinished", "picked by": "test",
                       "last (%)": "65.25", "best (%)": "71.50", "minutes": "15.0",
                       "images/s": "75"}  # of 100, 50 and 100: the slow epoch takes as long as the other two
    assert [row["run"] for row in rows] == ["done-*", "busy", "late"]


def test_a_run_without_a_finished_epoch_is_shown(tmp_path):
    (row,) = read_table(make_run(tmp_path, "new", [], finished=False, epochs=30))
    assert row == {"run": "new", "epochs": "0 of 30, unfinished", "picked by": "test", "last (%)": "-",
                   "best (%)": "-", "minutes": "0.0", "images/s": "-"}


def test_validation_runs_bring_a_column_for_the_test_set(tmp_path):
    rows = read_table(make_run(tmp_path, "a", [50.0, 60.0], val_size=500, results={"test_accuracy": 58.5}),
                      make_run(tmp_path, "b", [55.0], val_size=500, finished=False))
    assert [(row["picked by"], row["last (%)"], row["test (%)"]) for row in rows] == [
        ("validation", "60.00", "58.50"), ("validation", "55.00", "-")]


def test_the_program_prints_table_and_notes_and_takes_each_folder_once(tmp_path, capsys):
    folder = make_run(tmp_path, "sgd-0", [90.0])
    compare.main([str(folder), f"{folder}/../sgd-0", str(make_run(tmp_path, "sgd-1", [92.0], seed=1))])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "seed", "n", "epochs", "picked", "by", "last", "(%)", "best", "(%)", "minutes",
                                "images/s"]
    assert lines[1].startswith("sgd-*   0 1  2") and "91.00 ± 1.41" in lines[1] and len(lines[0]) == len(lines[1])
    assert lines[3:] == ["Runs that differ only by seed: mean ± sample standard deviation over n of them.",
                         "Where the test images picked the best epoch, it flatters: compare the last.",
                         "Measured on: some GPU, bf16, torch 2.10.0."]


def test_notes_are_left_out_where_they_do_not_apply(tmp_path):
    runs = [compare.read_run(make_run(tmp_path, "a", [50.0], val_size=500, finished=False))]
    assert compare.build_notes(runs) == []


def test_markdown_holds_the_table_and_a_relative_link(tmp_path):
    folder = make_run(tmp_path, "a|b", [90.0])
    (tmp_path / "docs").mkdir()
    (tmp_path / "pictures").mkdir()
    compare.main([str(folder), "--picture", str(tmp_path / "pictures" / "all.png"),
                  "--markdown", str(tmp_path / "docs" / "runs.md")])
    lines = (tmp_path / "docs" / "runs.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "| run | epochs | picked by | last (%) | best (%) | minutes | images/s |"
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert lines[2] == "| a\\|b | 1 | test | 90.00 | 90.00 | 2.0 | 1000 |"
    assert lines[3] == "" and lines[-1] == "![Curves of the runs](../pictures/all.png)"
    data = (tmp_path / "pictures" / "all.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", data[16:24]) == (1500, 1050)


def test_picture_has_training_beside_held_out_and_one_colour_per_group(tmp_path):
    runs = [compare.read_run(folder) for folder in (
        make_run(tmp_path, "sgd-0", [50.0, 60.0]), make_run(tmp_path, "sgd-1", [51.0, 61.0], seed=1),
        make_run(tmp_path, "val", [70.0, 75.0], val_size=500))]
    figure = compare.draw_runs(runs, tmp_path / "all.png")
    train_accuracy, accuracy, train_loss, loss = figure.axes
    assert [line.get_ydata().tolist() for line in accuracy.lines] == [[50, 60], [51, 61], [70, 75]]
    assert [line.get_ydata().tolist() for line in train_accuracy.lines] == [[50, 50]] * 3
    assert loss.lines[2].get_ydata().tolist() == [2, 1] and train_loss.lines[2].get_ydata().tolist() == [1, 0.5]
    colors = [line.get_color() for line in accuracy.lines]
    assert colors[0] == colors[1] != colors[2]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["sgd-*", "val"]
    assert [axes.get_title() for axes in (train_accuracy, accuracy)] == ["training", "test or validation"]
    assert (train_accuracy.get_ylabel(), train_loss.get_ylabel()) == ("accuracy (%)", "cross-entropy loss (nats)")


def test_names_without_a_common_start_are_listed(tmp_path):
    rows = read_table(make_run(tmp_path, "first", [50.0]), make_run(tmp_path, "second", [60.0], seed=1))
    assert rows[0]["run"] == "first, second"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=8), st.integers(0, 8)), min_size=1,
                      max_size=4))
def test_a_mutated_csv_is_read_or_refused(tmp_path, edits):
    folder = tmp_path / "run"
    if not folder.exists():
        make_run(tmp_path, "run", [50.0, 60.0])
        shutil.copy(folder / "metrics.csv", tmp_path / "whole.csv")
    content = (tmp_path / "whole.csv").read_bytes()
    for place, inserted, removed in edits:
        place %= len(content) + 1
        content = content[:place] + inserted + content[place + removed:]
    (folder / "metrics.csv").write_bytes(content)
    try:
        run = compare.read_run(folder)
    except UserError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
    else:
        assert all(value is None or isinstance(value, float) for row in run.history for value in row.values())


@pytest.mark.parametrize("file, text, reason", [
    ("args.json", None, "No such file"),
    ("args.json", "{", "JSONDecodeError"),
    ("args.json", "7", "TypeError"),
    ("metrics.csv", None, "No such file"),
    ("metrics.csv", "epoch,step\n1,2\n", "val_accuracy"),
    ("metrics.csv", ",".join(COLUMNS) + "\n1,x" + "," * 9 + "\n", "'x'"),
    ("metrics.csv", ",".join(COLUMNS) + "\n1,1,1,1,1,1,1,1,1,1,1,1\n", "TypeError"),
    ("metrics.csv", '"' + 200_000 * "1", "field larger"),
    ("results.json", "[]", "last_accuracy"),
    ("results.json", json.dumps({name: 1 for name, _ in compare.FIGURES.values()}), "epochs"),
    ("results.json", '{"last_accuracy": "good"}', "good"),
])
def test_a_bad_folder_is_one_line_and_status_2(tmp_path, capsys, file, text, reason):
    folder = make_run(tmp_path, "a", [50.0])
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    with pytest.raises(SystemExit) as stop:
        compare.main([str(make_run(tmp_path, "good", [50.0])), str(folder)])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith(f"compare.py: error: {folder / file} cannot be read (") and reason in err


def test_a_file_that_cannot_be_written_is_one_line_and_status_2(tmp_path, capsys):
    for flag, name in (("--picture", "all.png"), ("--markdown", "runs.md")):
        with pytest.raises(SystemExit) as stop:
            folder = tmp_path / "a" if (tmp_path / "a").exists() else make_run(tmp_path, "a", [50.0])
            compare.main([str(folder), flag, str(tmp_path / "missing" / name)])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and name in err


def test_the_names_left_out_are_flags_of_train():
    flags = {action.dest for action in options.get_parser()._actions}
    assert compare.PLACES | compare.OWN_COLUMN <= flags
    assert compare.FOUND_OUT - {"processes"} <= flags


def test_it_runs_as_a_program_from_another_folder(tmp_path):
    make_run(tmp_path, "a", [50.0])
    program = Path(compare.__file__).resolve()
    done = subprocess.run([sys.executable, str(program), "a", "b"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == ("compare.py: error: b/args.json cannot be read (No such file or directory); "
                           "is b the folder of a run?\n")
