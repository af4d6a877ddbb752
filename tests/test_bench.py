"""The benchmark: what it counts, what it divides, and that all of it comes out of a tiny run."""

import copy
import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import nn

import data
import device as devices
import models
from tools import bench

FLAGS = ["--num-blocks", "1", "1", "--channels", "16", "--device", "cpu", "--precision", "fp32", "--no-download"]
LIMITS = ["--limit-train", "80", "--limit-test", "10", "--batch-size", "32"]  # batches of 32, 32 and 16
COUNTS = bench.Counts(repeats=2, warm_ups=1, steps=2, loader_steps=2, train_images=80, test_images=10, batch_size=32,
                      product=64)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[Path, dict[str, str], bench.Rows, set]:
    """Measure a tiny network, but no start; give the folder, what was returned, and the processes left running."""
    folder, before = tmp_path_factory.mktemp("bench"), set(multiprocessing.active_children())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "start_seconds", lambda flags, folder: 5.0)
        found = bench.measure(FLAGS, COUNTS, folder)
    return folder, *found, set(multiprocessing.active_children()) - before


def test_flops_are_those_of_a_hand_count():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 1, groups=2),
                          nn.Flatten(), nn.Linear(8 * 16 * 16, 10))
    first = 4 * 16 * 16 * (3 * 3 * 3)  # multiply-adds: values of the output, times what each one sums
    second = 8 * 16 * 16 * 2  # two channels in each group
    assert bench.count_flops(model) == 3 * 2 * (first + second + 8 * 16 * 16 * 10)


def test_counting_leaves_the_model_as_it_was():
    model = models.build_model(num_blocks=(1,), channels=16).train()
    before = copy.deepcopy(model.state_dict())
    bench.count_flops(model)
    assert model.training and not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_published_network_takes_4_8_gflop():
    assert bench.count_flops(models.build_model()) / 1e9 == pytest.approx(4.8, abs=0.05)


def test_measurements_are_taken_in_turns_and_warm_ups_left_out():
    order, rows = [], bench.Rows()
    rows.measure(COUNTS, {name: (lambda name=name: order.append(name) or len(order)) for name in ("a", "b")})
    assert order == ["a", "b"] * 3
    assert rows["a"] == {"median": 4, "min": 3, "max": 5, "samples": [3, 5]}


def test_ratios_are_taken_round_by_round():
    rows = bench.Rows()
    rows.add("fast", 10.0, 40.0, 30.0)
    rows.add("slow", 5.0, 10.0, 15.0)
    rows.divide("fast : slow", "fast", "slow")
    assert rows["fast : slow"] == {"median": 2.0, "min": 2.0, "max": 4.0, "samples": [2.0, 4.0, 2.0]}
    rows.divide("share, %", "slow", "fast", 100)
    assert rows["share, %"]["median"] == 50


def test_table_shows_spread_only_where_there_is_one():
    rows = bench.Rows()
    rows.add("once, s", 1234.4)
    rows.add("twice, images/s", 2.0, 4.0)
    head, once, twice = str(rows).splitlines()
    assert head.split() == ["median", "min", "max"]
    assert once.split() == ["once,", "s", "1,234"]
    assert twice.split() == ["twice,", "images/s", "3", "2", "4"]
    assert len(head) == len(twice)


def test_a_run_measures_all_that_is_claimed(measured):
    _, head, rows, _ = measured
    ways = bench.PROGRAM, bench.PAPER
    names = {f"{way}: {what}" for way in ways for what in (
        "bare step, images/s", "whole training, images/s", "matrix product, GFLOP/s", "whole training : bare step",
        "arithmetic, GFLOP/s", "share of the product's rate, %")}
    names |= {"device loader, images/s", "torchvision in one process, images/s", "peak memory, MB", "save, s",
              "device loader : torchvision in one process", "ten times the images : images once",
              "memory growth : bytes of these images", "GFLOP of training per image", "epoch of 50,000 images, s",
              "evaluation of 10,000 images (from 10), % of an epoch",
              "command to the end of the first step, without compile, s", "time of an epoch with these : without",
              f"whole training, {bench.PROGRAM} : {bench.PAPER}"}
    assert names <= rows.keys()
    assert all(0 < row["min"] <= row["median"] <= row["max"] for name, row in rows.items() if "growth" not in name)
    assert {"device", "torch", "date", "counts", *ways} == head.keys()
    assert json.loads(json.dumps(rows)) == rows


def test_no_worker_outlives_the_measurement(measured):
    assert measured[3] == set()


def test_figures_follow_from_each_other(measured):
    rows = measured[2]
    ours, theirs = (rows[f"{way}: whole training, images/s"] for way in (bench.PROGRAM, bench.PAPER))
    ratios = rows[f"whole training, {bench.PROGRAM} : {bench.PAPER}"]["samples"]
    assert ratios == pytest.approx([a / b for a, b in zip(ours["samples"], theirs["samples"], strict=True)])
    harder = next(row for name, row in rows.items() if name.startswith(f"{bench.PROGRAM} with --trivial-augment"))
    assert rows["time of an epoch with these : without"]["samples"] == pytest.approx(
        [a / b for a, b in zip(ours["samples"], harder["samples"], strict=True)])
    assert rows["epoch of 50,000 images, s"]["median"] == pytest.approx(50_000 / ours["median"])
    gflop = rows["GFLOP of training per image"]["median"]
    assert rows[f"{bench.PAPER}: arithmetic, GFLOP/s"]["median"] == pytest.approx(gflop * theirs["median"])


def test_rates_count_the_images_of_their_steps(measured, monkeypatch):
    trainer = bench.build([*FLAGS, *LIMITS], measured[0], "rates")
    monkeypatch.setattr(bench, "seconds", lambda device, action: action() and None or 2.0)
    assert bench.whole_rate(trainer, 2) == (32 + 16) / 2
    assert bench.loader_rate(trainer.loader, 1) == 16 / 2
    assert bench.bare_rate(trainer, 3) == 3 * 32 / 2


def test_the_papers_way_is_what_it_says(measured, monkeypatch):
    kept = []
    monkeypatch.setattr(devices, "keep_freed_memory", lambda: kept.append(True))
    trainer = bench.build_paper((*FLAGS, *LIMITS), measured[0])
    assert not kept and bench.build([*FLAGS, *LIMITS], measured[0], "kept") and kept
    seen, waits, item = [], [], torch.Tensor.item
    trainer.model.residual_layers[0].register_forward_hook(lambda *values: seen.append(values[2]))
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: waits.append(item(tensor)) or waits[-1])
    inputs = torch.randn(32, 3, 32, 32).to(memory_format=torch.channels_last)
    trainer.train_step(inputs, torch.zeros(32, dtype=torch.int64))
    assert seen[0].is_contiguous() and seen[0].dtype == torch.float32
    loss, hits = trainer.totals.tolist()
    assert waits[-3:] == [loss, hits, loss]
    assert isinstance(trainer.loader, data.WorkersLoader) and trainer.step == 1


def test_what_the_recipes_add_is_in_the_figure(measured):
    trainer = bench.build([*FLAGS, *LIMITS, *bench.ADDED], measured[0], "added")
    assert trainer.eval_model is not trainer.model
    assert trainer.loader.trivial and trainer.loader.mixup and trainer.loader.cutmix


def test_mistakes_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(["--json", str(tmp_path / "no" / "such.json")])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("bench.py: error: --json") and message.count("\n") == 1


def test_command_line_prints_the_table_and_writes_the_data(tmp_path, monkeypatch, capsys):
    rows = bench.Rows()
    rows.add("save, s", 0.1, 0.2)
    monkeypatch.setattr(bench, "measure", lambda flags, counts, folder: ({"device": "CPU"}, rows))
    bench.main(["--device", "cpu", "--json", str(tmp_path / "cpu.json")])
    assert str(rows) in capsys.readouterr().out
    written = json.loads((tmp_path / "cpu.json").read_text())
    assert written["head"]["device"] == "CPU" and written["rows"] == rows


@pytest.mark.slow
def test_start_is_timed_to_the_first_step(measured):
    assert bench.start_seconds([*FLAGS, *LIMITS], measured[0]) > 0.5  # torch alone takes that long
    with pytest.raises(bench.RunError, match="before its first step"):
        bench.start_seconds([*FLAGS, *LIMITS, "--batch-size", "1000"], measured[0])
