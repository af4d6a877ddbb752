"""The profiles of variants: what is printed on a CPU."""

import re

import torch
from test_bench import TINY

from tools import bench, profile_steps


def test_variants_are_profiled_with_their_settings(monkeypatch, capsys):
    built, build = [], bench.build

    def note(*args):
        run, state = build(*args)
        built.append((torch._inductor.config.combo_kernels, run.args.se, run.args.nesterov))
        return run, state
    monkeypatch.setattr(torch.backends.cudnn, "benchmark_limit", torch.backends.cudnn.benchmark_limit)
    monkeypatch.setattr(bench, "build", note)
    monkeypatch.setattr(bench, "EPOCH", 80)  # two full batches
    monkeypatch.setattr(profile_steps, "STEPS", 1)
    monkeypatch.setattr(profile_steps.subprocess, "call", lambda command: profile_steps.main(command[2:]))
    with torch._inductor.config.patch(combo_kernels=False):  # restores it; monkeypatch would delete it
        assert profile_steps.main(["--variants", "base", "combo_kernels", "strong", *TINY]) == 0
    assert built == [(False, "stem", False), (True, "stem", False), (False, "block", True)]
    parts = capsys.readouterr().out.strip().split("\n\n")
    for name, part in zip(("base", "combo_kernels", "strong"), parts, strict=True):
        head, *rows = part.splitlines()
        total = float(re.fullmatch(rf"{name}: \d+ images/s; per step: CPU ([\d.]+) ms", head)[1])  # nothing of a GPU
        times = [float(row.split()[0]) for row in rows]
        assert len(rows) == 25 and times == sorted(times, reverse=True) and 0 < sum(times) <= total + 0.1
        assert re.search(r" \d+\.0 x  aten::convolution_backward$", part, re.MULTILINE)
