"""tools/compare.py: the numbers of the table, the picture, and unreadable run folders."""

import json
import subprocess
import sys

import pytest
from matplotlib.image import imread

from checkpoint import COLUMNS
from tools import compare


def make_run(parent, name, accuracies, finished=True, results=None, **settings):
    """Write a run folder with one evaluation accuracy per epoch."""
    folder = parent / name
    folder.mkdir()
    args = {"data_dir": "data", "num_blocks": [4, 4, 3], "epochs": len(accuracies), "optimizer": "sgd", "lr": 0.1,
            "seed": 0, "val_size": 0, "device": None, "precision": "auto", "compile": None, "workers": 0,
            "output_dir": f"checkpoints/{name}"} | settings
    (folder / "args.json").write_text(json.dumps(args))
    split = "val" if args["val_size"] else "test"
    lines = [",".join(COLUMNS)]
    for epoch, accuracy in enumerate(accuracies, start=1):
        row = {"epoch": epoch, "step": epoch * 10, "lr": args["lr"], "train_loss": 1 / epoch, "train_accuracy": 50.0,
               f"{split}_loss": 2 / epoch, f"{split}_accuracy": accuracy, "seconds": 300.0, "images_per_second": 100.0}
        lines.append(",".join(str(row.get(column, "")) for column in COLUMNS))
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    if finished:
        found = {"last_accuracy": accuracies[-1], "best_accuracy": max(accuracies), "test_accuracy": accuracies[-1],
                 "selected_on": "validation" if split == "val" else "test", "seconds": 120.0, "device": "some GPU",
                 "images_per_second": 1000.0, "precision": "bf16", "compile": True, "ranks": 1,
                 "versions": {"torch": "2.10.0"}}
        (folder / "results.json").write_text(json.dumps(found | (results or {})))
    return folder


def read_groups(*folders):
    return compare.group_runs([compare.read_run(folder) for folder in folders])


def read_table(*folders):
    """Return the rows of the table as dicts."""
    head, *rows = compare.build_table(read_groups(*folders))
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_table_shows_the_settings_that_differ_and_the_results_best_first(tmp_path):
    rows = read_table(make_run(tmp_path, "adam", [40.0, 60.0, 91.0], optimizer="adam", num_blocks=[1, 1], bias_lr=8.0),
                      make_run(tmp_path, "sgd", [50.0, 94.126, 93.0]))  # from before --bias-lr, whose default is 1
    results = {"epochs": "3/3", "selected on": "test", "minutes": "2.0", "images/s": "1000"}
    assert rows == [
        {"run": "sgd", "num-blocks": "4 4 3", "optimizer": "sgd", "bias-lr": "1", "last (%)": "93.00",
         "best (%)": "94.13", "test (%)": "93.00", **results},
        {"run": "adam", "num-blocks": "1 1", "optimizer": "adam", "bias-lr": "8", "last (%)": "91.00",
         "best (%)": "91.00", "test (%)": "91.00", **results}]


def test_runs_that_differ_only_by_seed_become_mean_and_sample_std(tmp_path):
    folders = [make_run(tmp_path, f"sgd-{seed}", values, seed=seed, results={"seconds": 60 * (seed + 1)})
               for seed, values in ((0, [91.0, 90.0]), (1, [93.0, 92.0]), (2, [98.0, 94.0]))]
    rows = read_table(make_run(tmp_path, "single", [80.0, 81.0], lr=0.5, seed=1), *folders)
    assert rows[0] == {"run": "sgd-*", "lr": "0.1", "seed": "0 1 2", "epochs": "2/2", "selected on": "test",
                       "last (%)": "92.00 ± 2.00",  # of 90, 92, 94; 1.63 would be the population's
                       "best (%)": "94.00 ± 3.61",  # of 91, 93, 98: sqrt((9 + 1 + 16) / 2)
                       "test (%)": "92.00 ± 2.00", "minutes": "2.0 ± 1.0", "images/s": "1000 ± 0"}
    assert (rows[1]["run"], rows[1]["seed"], rows[1]["last (%)"]) == ("single", "1", "81.00")


def test_only_different_seeds_of_equal_runs_on_the_same_hardware_are_averaged(tmp_path):
    rows = read_table(make_run(tmp_path, "a", [60.0]),
                      make_run(tmp_path, "b", [60.0], seed=1, data_dir="/other", workers=3, save_minutes=9),
                      make_run(tmp_path, "same-seed", [50.0]), make_run(tmp_path, "longer", [20.0, 40.0], seed=1),
                      make_run(tmp_path, "other-gpu", [30.0], seed=2, results={"device": "another GPU"}))
    assert [row["run"] for row in rows] == ["a, b", "same-seed", "longer", "other-gpu"]
    assert [row["device"] for row in rows] == ["some GPU"] * 3 + ["another GPU"]
    assert list(rows[0])[:4] == ["run", "seed", "device", "epochs"]  # no places among them


def test_unfinished_runs_show_the_results_so_far_and_are_not_averaged_with_finished_ones(tmp_path):
    """With validation images, whose accuracy is not the test accuracy."""
    rows = read_table(make_run(tmp_path, "done", [50.0, 60.0, 70.0], val_size=9, results={"test_accuracy": 58.5}),
                      make_run(tmp_path, "busy", [62.0, 71.5, 65.25], finished=False, seed=1, val_size=9),
                      make_run(tmp_path, "new", [], finished=False, seed=2, val_size=9, epochs=3))
    assert [rows[0][name] for name in ("selected on", "last (%)", "test (%)")] == ["validation", "70.00", "58.50"]
    assert rows[1] == {"run": "busy", "seed": "1", "epochs": "3/3", "selected on": "validation", "last (%)": "65.25",
                       "best (%)": "71.50", "test (%)": "-", "minutes": "-", "images/s": "-"}
    assert (rows[2]["run"], rows[2]["epochs"], rows[2]["last (%)"], rows[2]["best (%)"]) == ("new", "0/3", "-", "-")
    assert compare.build_notes(read_groups(tmp_path / "busy")) == []  # none of them applies


def test_the_table_is_printed_and_written_with_notes_and_a_relative_link_to_the_picture(tmp_path, refused, capsys):
    folder, picture, markdown = make_run(tmp_path, "a|b-0", [90.0]), tmp_path / "a/b/all.png", tmp_path / "a/c/runs.md"
    argv = [str(folder), f"{folder}/../a|b-0", str(make_run(tmp_path, "a|b-1", [92.0], seed=1))]  # one of them twice
    assert compare.main([*argv, "--picture", str(picture), "--markdown", str(markdown)]) == 0
    written = markdown.read_text(encoding="utf-8")
    assert written == capsys.readouterr().out + "\n![Curves of the runs](../b/all.png)\n"
    assert written.splitlines()[:-2] == [
        "| run    | seed | epochs | selected on |     last (%) |     best (%) |     test (%) |   minutes | images/s |",
        "| ------ | ---: | -----: | ----------: | -----------: | -----------: | -----------: | --------: | -------: |",
        "| a\\|b-* |  0 1 |    1/1 |        test | 91.00 ± 1.41 | 91.00 ± 1.41 | 91.00 ± 1.41 | 2.0 ± 0.0 | 1000 ± 0 |",
        "", "Runs that differ only by seed share a row: mean ± sample standard deviation.",
        "", "Where the best epoch was selected on the test set, its accuracy is optimistic; compare the last.",
        "", "Measured on: some GPU, bf16, torch 2.10.0."]
    assert imread(picture).shape[:2] == (960, 1500)
    for flag in ("--picture", "--markdown"):
        assert "cannot write" in refused(compare.main, [str(folder), flag, str(markdown / "file")])


def test_picture_shows_training_beside_evaluation_with_one_color_and_label_per_group(tmp_path):
    groups = read_groups(make_run(tmp_path, "sgd-0", [50.0, 60.0]), make_run(tmp_path, "sgd-1", [51.0, 61.0], seed=1),
                         make_run(tmp_path, "_$val$", [70.0, 75.0], val_size=500),
                         make_run(tmp_path, "new", [], finished=False))
    figure = compare.draw_runs(groups, tmp_path / "all.png")
    axes = {axes.get_title(loc="left"): axes for axes in figure.axes}
    values = {title: [line.get_ydata().tolist() for line in axes.lines] for title, axes in axes.items()}
    assert values == {"Training accuracy (%)": [[50, 50]] * 3, "Training loss": [[1, 0.5]] * 3,
                      "Test or validation accuracy (%)": [[70, 75], [50, 60], [51, 61]],
                      "Test or validation loss": [[2, 1]] * 3}
    accuracy = axes["Test or validation accuracy (%)"]
    first, *colors = [line.get_color() for line in accuracy.lines]
    assert colors[0] == colors[1] != first
    labels = figure.legends[0].get_texts()
    assert [(text.get_text(), text.get_color()) for text in labels] == [
        (r"\$val\$", first), ("sgd-*", colors[0])]  # which matplotlib would hide, and read as math


@pytest.mark.parametrize("file, text, reason", [
    ("", "a checkpoint", "Not a directory"),  # as `checkpoints/*` also names checkpoints/pretrained.pt
    ("args.json", "{", "JSONDecodeError"),
    ("args.json", "{}", "val_size"),
    ("metrics.csv", None, "No such file"),
    ("metrics.csv", "epoch,step\n1,2\n", "test_accuracy"),
    ("metrics.csv", ",".join(COLUMNS) + "\n1,x" + "," * 9 + "\n", "'x'"),
    ("results.json", '{"seconds": 1, "last_accuracy": "good"}', "good"),
])
def test_unreadable_folders_are_skipped(tmp_path, refused, capsys, file, text, reason):
    folder = make_run(tmp_path, "a", [50.0])
    if not file:
        folder = tmp_path / "pretrained.pt"
    (folder / file).unlink(missing_ok=True)
    if text is not None:
        (folder / file).write_text(text)
    error = refused(compare.main, [str(folder)])
    assert error.startswith(f"compare.py: error: {folder / (file or 'args.json')}: ") and reason in error
    assert compare.main([str(folder), str(make_run(tmp_path, "good", [50.0]).with_name("g*"))]) == 0
    printed = capsys.readouterr()
    assert printed.err == error.replace("compare.py: error:", "warning: skipped") and "| good " in printed.out


def test_it_starts_in_any_folder(tmp_path):
    done = subprocess.run([sys.executable, compare.__file__, make_run(tmp_path, "a", [50.0])], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "| a " in done.stdout and done.stderr == ""
