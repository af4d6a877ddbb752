"""Device, precision and torch.compile: what is selected, what happens where it is missing, and that it trains."""

import contextlib
import platform
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import torch

import augment
import data
import gradient_check
import hardware
import models
import options
import train
from distributed import World
from utils import UserError

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")
STRONG = [f"@{runs.ROOT}/recipes/strong.txt", "--epochs", "7", "--warmup-epochs", "1", "--mixup", "0.2"]


@pytest.fixture(autouse=True)
def restore_settings(monkeypatch):
    yield
    hardware.set_up_backend(CPU)
    torch._dynamo.reset()


@pytest.fixture
def gpus(monkeypatch):
    """Two old GPUs, for which tensors are made on the CPU; the list of those that are selected."""
    selected, ones = [], torch.ones
    for name, value in {"is_available": True, "device_count": 2, "get_device_name": "Tesla P100",
                        "get_device_capability": (6, 0), "get_arch_list": ["sm_75", "sm_90"]}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: selected.append(str(device)))
    monkeypatch.setattr(torch, "ones", lambda *size, device=None: ones(*size))
    return selected


# --- selection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_precision_on_cuda_follows_the_capability(monkeypatch, gpus, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert hardware.select_precision("auto", CUDA) == expected
    assert [hardware.select_precision(name, CUDA) for name in ("fp32", "fp16")] == ["fp32", "fp16"]
    with contextlib.nullcontext() if expected == "bf16" else pytest.raises(UserError, match="P100 does not .*fp16"):
        assert hardware.select_precision("bf16", CUDA) == "bf16"


@pytest.mark.parametrize(("architecture", "expected"), [
    ("gfx906:sramecc+:xnack-", "fp16"), ("gfx1032", "fp16"), ("gfx90a:sramecc+", "bf16"), ("gfx1100", "bf16")])
def test_precision_on_an_amd_gpu_follows_its_architecture(monkeypatch, gpus, architecture, expected):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 3))  # of gfx1032
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(gcnArchName=architecture))
    assert hardware.select_precision("auto", CUDA) == expected


def test_several_apple_gpus_are_one_line(monkeypatch):
    monkeypatch.setattr(hardware, "select_device", lambda *_: MPS)
    with pytest.raises(UserError, match="between Apple GPUs; use one process, or --device cpu"):
        hardware.select(options.parse_args([])[0], World(size=2))


@pytest.mark.parametrize(("avx512", "amx", "expected"), [
    (False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16"), (None, None, "fp32")])
def test_precision_on_a_cpu_follows_its_instructions(monkeypatch, avx512, amx, expected):
    for name, found in (("_is_avx512_bf16_supported", avx512), ("_is_amx_tile_supported", amx)):
        if found is None:  # as in a torch version without these functions
            monkeypatch.delattr(torch.cpu, name, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda found=found: found, raising=False)
    assert hardware.select_precision("auto", CPU) == expected


def test_mps_gets_what_torch_computes_right_there():
    assert hardware.select_precision("auto", MPS) == "fp32" and hardware.select_precision("bf16", MPS) == "bf16"
    with pytest.raises(UserError, match="use bf16 or fp32"):
        hardware.select_precision("fp16", MPS)
    assert [hardware.memory_format(device) for device in ("mps", MPS, "cpu", CUDA)] == [
        torch.contiguous_format, torch.contiguous_format, torch.channels_last, torch.channels_last]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_network_and_images_have_the_memory_format_of_the_device(run, monkeypatch, workers):
    for module in (hardware, augment, data, gradient_check):
        monkeypatch.setattr(module, "memory_format", lambda _: torch.contiguous_format)
    forward, seen = models.SEResNet.forward, set()

    def note(model, images):
        seen.add((images.is_contiguous(), model.residual_layers[0][0].conv1.weight.is_contiguous()))
        return forward(model, images)
    monkeypatch.setattr(models.SEResNet, "forward", note)
    assert run("--workers", workers, "--precision", "bf16", "--epochs", "1") == 0 and seen == {(True, True)}


@pytest.mark.parametrize(("cuda", "mps", "expected"), [
    (False, False, "cpu"), (False, True, "mps"), (True, False, "cuda:1"), (True, True, "cuda:1")])
def test_auto_selects_the_fastest_device(monkeypatch, gpus, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert str(hardware.select_device("auto", local_rank=1)) == expected
    assert gpus == (["cuda:1"] if cuda else [])  # NCCL needs a device of its own for each rank
    with pytest.raises(UserError, match="there are 2, .*--nproc-per-node") if cuda else contextlib.nullcontext():
        hardware.select_device("auto", local_rank=2)


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_missing_device_is_one_line(monkeypatch, run, refused, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    error = refused(run, "--device", name)
    assert error.startswith(f"train.py: error: --device {name}: ") and error.endswith("use --device auto or cpu\n")


def test_a_gpu_that_does_not_work_is_one_line(monkeypatch, gpus, run, refused):
    def fail(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available\nSearch for it in the documentation")
    monkeypatch.setattr(torch, "ones", fail)
    assert refused(run, "--device", "auto") == (
        "train.py: error: Tesla P100 cannot be used (CUDA error: no kernel image is available); torch "
        f"{torch.__version__} has kernels for sm_75 sm_90, its cu126 build also for older GPUs; or use --device cpu\n")


@pytest.mark.parametrize("present", [True, False])
def test_a_gpu_that_the_driver_hides_is_one_warning(monkeypatch, tmp_path, capsys, present):
    (tmp_path / "nvidia0").write_text("")
    monkeypatch.setattr(hardware, "NVIDIA_FILES", (tmp_path / ("nvidia0" if present else "none"),))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(name, "is_available", lambda: False)
    for local_rank in (0, 1):  # which prints it once
        assert hardware.select_device("auto", local_rank) == CPU
    assert hardware.select_device("cpu") == CPU
    error = capsys.readouterr().err
    assert error.count("\n") == present and ("CUDA 13.0 may need a newer driver" in error) == present


@pytest.mark.parametrize(("system", "text", "expected"), [
    ("linux", "cpu family\t: 6\nmodel name\t: Intel Xeon  CPU @ 2.20GHz\nflags", "Intel Xeon CPU @ 2.20GHz"),
    ("linux", "processor\t: 0\n", "arm"), ("darwin", "Apple M2 Pro\n", "Apple M2 Pro"), ("win32", "", "AMD64 Family")])
def test_the_name_of_the_processor(monkeypatch, system, text, expected):
    monkeypatch.setattr(hardware.sys, "platform", system)
    monkeypatch.setattr(hardware.Path, "read_text", lambda _: text)
    monkeypatch.setattr(hardware.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=text))
    monkeypatch.setattr(platform, "processor", lambda: "AMD64 Family")
    monkeypatch.setattr(platform, "machine", lambda: "arm")
    assert hardware.processor.__wrapped__() == expected


@pytest.mark.parametrize(("kind", "expected"), [("cuda", True), ("cpu", None)])
def test_only_cuda_depends_on_deterministic_algorithms(kind, expected, monkeypatch):
    monkeypatch.setattr(hardware, "describe", str)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert hardware.environment(torch.device(kind), "fp32", False, 1)["deterministic"] is expected


@pytest.mark.parametrize(("changes", "cores", "threads", "warning"), [
    ({"hardware": "Intel", "threads": 2}, 2, "1 thread", "hardware Intel -> {}, threads 2 -> 1"),
    ({"threads": 2, "ranks": 4, "torch": "2.10"}, 2, "1 thread", "ranks 4 -> 1, threads 2 -> 1, torch 2.10 -> {1}"),
    ({"hardware": None, "torch": None, "cudnn": None}, 2, "1 thread", ""),  # an old checkpoint lacks them
    ({"threads": 2, "deterministic": True}, 1, "1 thread", "threads 2 -> 1, deterministic True -> None"),
    ({"threads": 2}, 2, "2 threads", "")])
def test_resume_restores_the_threads_and_names_another_machine(run, tmp_path, monkeypatch, capsys, changes, cores,
                                                               threads, warning):
    monkeypatch.setattr(hardware, "count_cores", lambda: cores)
    runs.stop(run, "first")
    assert f"device  {hardware.describe(CPU)}, fp32" in capsys.readouterr().out
    saved = runs.read(tmp_path / "run")
    assert saved["environment"]["threads"] == 1
    before = {name: value for name, value in (saved["environment"] | changes).items() if name not in changes or value}
    torch.save(saved | {"environment": before}, tmp_path / "run" / "last.pt")
    try:
        assert run("--resume") == 0
    finally:
        torch.set_num_threads(1)
    warning = warning.format(hardware.describe(CPU), torch.__version__)
    printed = capsys.readouterr()
    assert printed.err == (f"warning: resuming, but not bitwise-identically: {warning}\n" if warning else "")
    assert f", {threads}," in printed.out


def test_deterministic_algorithms(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    for deterministic in (True, False):
        hardware.set_up_backend(CUDA, deterministic)
        hardware.compile_or_warn(print, CPU, lambda compiled: None)
        assert torch._inductor.config.deterministic == torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.backends.cudnn.benchmark == (not deterministic)
        assert hardware.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, the C library of most Linux systems")
def test_freed_memory_is_kept_for_the_next_step():
    import resource
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if huge_pages.exists() and "[always]" in huge_pages.read_text():
        pytest.skip("with huge pages there are few page faults in any case")
    hardware.set_up_backend(CPU)
    size, faults = 40 * 2**20, []  # glibc itself never keeps blocks above 32 MiB
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(size, dtype=torch.uint8).fill_(1)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert sum(faults[10:]) < size / resource.getpagesize()  # otherwise ten times as many


# --- half precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_what_float32_learns(run, tmp_path, precision):
    for name in ("fp32", precision):
        assert run("--precision", name, "--epochs", "3", "--no-augment", "--lr", "0.05", folder=name) == 0
    expected, found = ([row["train_loss"] for row in runs.read(tmp_path / name)["history"]]
                       for name in ("fp32", precision))
    assert found[-1] < 0.97 * found[0] and found == pytest.approx(expected, rel=0.02) and found != expected
    saved = runs.read(tmp_path / precision)
    assert saved["environment"]["precision"] == precision and bool(saved["scaler"]) == (precision == "fp16")
    assert all(value.dtype in (torch.float32, torch.int64) for value in saved["model"].values())


@pytest.mark.parametrize("clip", ["0", "0.1"])
@pytest.mark.parametrize("optimizer", ["sgd", "muon"])  # one is fused and one is not
def test_an_overflow_in_fp16_skips_the_step_and_lowers_the_scale(run, monkeypatch, recwarn, optimizer, clip):
    train_step, scales = train.train_step, []

    def overflow_first(run, state, *batch):
        before = [parameter.detach().clone() for parameter in state.parameters]
        if not scales:
            state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        recwarn.clear()
        train_step(run, state, *batch)
        assert not list(recwarn)  # torch might complain about the schedule, which does not skip
        same = [torch.equal(a, b) for a, b in zip(state.parameters, before, strict=True)]
        assert all(same) if not scales else not any(same) and all(p.isfinite().all() for p in state.parameters)
        scales.append(state.scaler.get_scale())
        state.scaler.update(1024.0)
    monkeypatch.setattr(train, "train_step", overflow_first)
    # --deterministic fills uninitialized memory with NaN
    assert run("--precision", "fp16", "--optimizer", optimizer, "--grad-clip", clip, "--deterministic",
               "--epochs", "1") == 0
    assert scales == [2.0**39, 1024, 1024, 1024]


# --- compile, with a stand-in for the compiler -----------------------------------------------------------------------


def test_compile_is_the_default_on_cuda_with_triton_only(monkeypatch):
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: object())
    assert hardware.should_compile(None, CUDA) and not hardware.should_compile(False, CUDA)
    assert hardware.should_compile(True, CPU)
    assert not any(hardware.should_compile(None, device) for device in (CPU, torch.device("mps")))
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
    assert not hardware.should_compile(None, CUDA)


@pytest.mark.parametrize(("hip", "skipped", "fails"), [
    (None, 0, False), (None, 1, False), ("7.0", 0, False), (None, 0, True)])
def test_cuda_graphs_are_for_nvidia_gpus_and_their_loss_is_reported(monkeypatch, capsys, hip, skipped, fails):
    def probe(compiled):
        if fails:
            raise RuntimeError("broken\nmore")
        probes.append(compiled)
        torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] += skipped
    probes, modes, freed = [], [], []
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch, "compile", lambda function, *, mode, **_: modes.append(mode) or function)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append("cache"))
    monkeypatch.setattr(torch.compiler, "reset", lambda: freed.append("graphs"))
    assert hardware.compile_or_warn(print, CUDA, probe) is (None if fails else print)
    assert modes == [None if hip else "reduce-overhead"] and len(probes) == (0 if fails else 1 if hip else 3)
    assert freed == (["graphs", "cache"] if fails else [])
    error = capsys.readouterr().err
    assert error.count("\n") == int(fails or skipped) and ("without CUDA graphs" in error) == bool(skipped)


# --- compile, for real -----------------------------------------------------------------------------------------------


@pytest.fixture
def train_and_record(run, monkeypatch, tmp_path):
    """A function that trains and returns the loss of each step; on CUDA a step that synchronizes is an error."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    train_step, losses = train.train_step, []

    def step(run, state, *batch):
        before = state.totals.clone()
        set_mode = torch.cuda.set_sync_debug_mode if run.device.type == "cuda" else str  # which does nothing
        set_mode("error")
        try:
            train_step(run, state, *batch)
        finally:
            set_mode("default")
        losses.append((state.totals - before)[0].item() / len(batch[1]))

    def record(*flags: str) -> list[float]:
        losses.clear()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        assert run("--overwrite", *flags) == 0
        compiles = "--compile" in flags
        assert runs.read(tmp_path / "run")["environment"]["compile"] == compiles  # it has not fallen back
        # one graph: neither the smaller last batch nor an evaluation is compiled, too
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == int(compiles)
        return list(losses)
    monkeypatch.setattr(train, "train_step", step)
    return record


@pytest.mark.slow  # and needs g++
@pytest.mark.parametrize("flags", [[], ["--mixup", "0.2", "--cutmix", "1", "--label-smoothing", "0.1"]])
def test_compiled_losses_on_a_cpu_are_the_eager_ones(train_and_record, flags):
    found, expected = (train_and_record("--num-blocks", "1", *flags, mode) for mode in ("--compile", "--no-compile"))
    assert len(found) == 8 and found == pytest.approx(expected, rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("batch_size", ["6", "8"])
@pytest.mark.parametrize("flags", [["--epochs", "7"], STRONG], ids=["default", "strong"])
def test_compiled_losses_on_cuda_are_the_eager_ones(train_and_record, flags, batch_size):
    precision = hardware.select_precision("auto", torch.device("cuda"))
    flags = [*flags, "--device", "cuda", "--precision", precision, "--batch-size", batch_size, "--lr", "0.01"]
    found = train_and_record(*flags, "--compile")
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    expected = train_and_record(*flags, "--no-compile")
    assert len(found) >= 20 and found == pytest.approx(expected, rel=0.01)  # bf16 and fp32 differ by 0.2% on a CPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_training_on_cuda_to_the_last_picture(small_data, tmp_path):
    flags = ["--device", "cuda", "--precision", "auto", "--no-compile", "--epochs", "1"]
    assert train.main(runs.command_line(small_data, tmp_path / "run", *flags)) == 0
    assert (tmp_path / "run" / "mistakes.png").exists() and (tmp_path / "run" / "results.json").exists()
    environment = runs.read(tmp_path / "run")["environment"]
    assert environment["device"] == "cuda" and environment["precision"] in ("bf16", "fp16")
