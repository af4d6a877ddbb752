"""Device, precision and torch.compile: what is selected, what happens where it is missing, and that it trains."""

import inspect
import platform
import warnings
from pathlib import Path

import pytest
import runs
import torch
from torch import nn

import augment
import data
import evaluate
import hardware
import train

small_data, run = runs.small_data, runs.run
ROOT = Path(__file__).resolve().parent.parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
STRONG = [f"@{ROOT}/recipes/strong.txt", "--epochs", "7", "--warmup-epochs", "1", "--mixup", "0.2"]


@pytest.fixture(autouse=True)
def restore_settings(monkeypatch):
    yield
    hardware.set_up_backend(CPU)
    torch._dynamo.reset()


# --- selection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_precision_on_cuda_follows_the_capability(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert hardware.select_precision("auto", CUDA) == expected
    assert [hardware.select_precision(name, CUDA) for name in hardware.PRECISIONS] == ["fp32", "bf16", "fp16"]


@pytest.mark.parametrize(("avx512", "amx", "expected"), [
    (False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16"), (None, None, "fp32")])
def test_precision_on_a_cpu_follows_its_instructions(monkeypatch, avx512, amx, expected):
    for name, found in (("_is_avx512_bf16_supported", avx512), ("_is_amx_tile_supported", amx)):
        if found is None:  # as in a torch version without these functions
            monkeypatch.delattr(torch.cpu, name, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda found=found: found, raising=False)
    assert hardware.select_precision("auto", CPU) == expected
    assert hardware.select_precision("auto", torch.device("mps")) == "fp32"


def test_autocast_computes_in_the_precision_and_keeps_parameters_float32():
    layer = nn.Linear(2, 2)
    for name, dtype in hardware.PRECISIONS.items():
        with hardware.autocast(CPU, name):
            assert layer(torch.ones(1, 2)).dtype == dtype
    assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize(("cuda", "mps", "expected"), [
    (False, False, "cpu"), (False, True, "mps"), (True, False, "cuda:1"), (True, True, "cuda:1")])
def test_auto_selects_the_fastest_device(monkeypatch, cuda, mps, expected):
    selected = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", selected.append)
    assert str(hardware.select_device("auto", local_rank=1)) == expected
    assert selected == ([1] if cuda else [])  # NCCL needs a device of its own for each rank


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_missing_device_is_one_line(monkeypatch, run, capsys, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert run("--device", name) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train.py: error: --device {name}: ") and error.endswith("use --device auto or cpu\n")
    assert error.count("\n") == 1


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(hardware.UserError, match="there are 2, .*--nproc-per-node"):
        hardware.select_device("cuda", local_rank=2)


def test_devices_may_be_strings(trained, test_set, expected):
    model, _ = evaluate.load_checkpoint_model(trained, "cpu")
    logits = evaluate.predict_logits(model, test_set.to("cpu").images, device="cpu")
    torch.testing.assert_close(logits.softmax(1), expected)


def test_deterministic_algorithms(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    for deterministic in (True, False):
        hardware.set_up_backend(CUDA, deterministic)
        assert torch._inductor.config.deterministic == torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.backends.cudnn.benchmark == (not deterministic)
        assert hardware.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, the C library of most Linux systems")
def test_freed_memory_is_kept_for_the_next_step():
    import resource
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
@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])  # one is fused and one is not
def test_an_overflow_in_fp16_skips_the_step_and_lowers_the_scale(run, monkeypatch, optimizer, clip):
    train_step, scales = train.train_step, []

    def overflow_first(run, state, *batch):
        before = [parameter.detach().clone() for parameter in state.model.parameters()]
        if not scales:
            state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch might complain about the schedule, which does not skip
            train_step(run, state, *batch)
        after = list(state.model.parameters())
        same = [torch.equal(a, b) for a, b in zip(after, before, strict=True)]
        assert all(same) if not scales else not any(same) and all(p.isfinite().all() for p in after)
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


@pytest.mark.parametrize("frees_gradients", [True, False])
def test_gradients_of_a_cuda_graph_do_not_outlive_the_next_call(monkeypatch, run, capsys, frees_gradients):
    """A replayed CUDA graph writes over the gradients of its last call; torch refuses to touch them after that."""
    modes = []

    def compiler(function, *, mode, **_):
        modes.append(mode)
        parameters = list(inspect.getclosurevars(function).nonlocals["model"].parameters())

        def compiled(*args):
            if any(parameter.grad is not None for parameter in parameters):
                raise RuntimeError("accessing tensor output of CUDAGraphs that has been overwritten")
            return function(*args)
        return compiled
    compile_or_warn, calls = hardware.compile_or_warn, []
    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(hardware, "compile_or_warn", lambda forward, _, probe: compile_or_warn(
        forward, CUDA, lambda compiled: calls.append(probe(compiled))))
    if not frees_gradients:
        monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", lambda *_, **__: None)
    assert run("--compile", "--epochs", "1") == 0
    assert ("torch.compile failed" in capsys.readouterr().err) == (not frees_gradients)
    assert modes == ["reduce-overhead"] and len(calls) == (3 if frees_gradients else 1)


# --- compile, for real -----------------------------------------------------------------------------------------------


@pytest.fixture
def train_and_record(run, monkeypatch, tmp_path):
    """A function that trains and returns the loss of each step; on CUDA a step that synchronizes is an error."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    train_step, losses = train.train_step, []

    def step(run, state, *batch):
        before = state.totals.clone()
        if run.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            train_step(run, state, *batch)
        finally:
            if run.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
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
    flags = [*flags, "--num-blocks", "1"]
    found, expected = train_and_record(*flags, "--compile"), train_and_record(*flags, "--no-compile")
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
def test_pixels_on_cuda_are_those_on_the_cpu():
    images = torch.randint(0, 256, (64, 32, 32, 3), dtype=torch.uint8)
    params = augment.random_params(64, 0, 0)
    found, expected = (augment.to_input(augment.crop_and_flip(data.Split(images, params.index, []).to(device).images,
                                        augment.Params(*(field.to(device) for field in params))))
                       for device in ("cuda", "cpu"))
    assert torch.equal(found.cpu(), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_training_on_cuda_to_the_last_picture(run_train, tmp_path):
    assert run_train("--device", "cuda", "--precision", "auto", "--no-compile", "--epochs", "1") == 0
    assert (tmp_path / "run" / "mistakes.png").exists() and (tmp_path / "run" / "results.json").exists()
    environment = runs.read(tmp_path / "run")["environment"]
    assert environment["device"] == "cuda" and environment["precision"] in ("bf16", "fp16")
