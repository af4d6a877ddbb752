"""Device, precision and compile: what is picked, what happens where it is not there, and that it trains."""

import platform
import warnings

import pytest
import torch
from conftest import TINY
from torch import nn

import device as devices
import options
import train
from trainer import Trainer
from utils import Processes, Signals, UserError, load_checkpoint

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SMALL = ["--num-blocks", "1", "1", "--channels", "8", "--se-reduction", "4"]  # half precision is slow on many CPUs
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def set_up(data_dir, tmp_path):
    """Give a function that builds a run, and does not start it."""
    def build(*flags: str):
        places = ["--data-dir", str(data_dir), "--checkpoint-dir", str(tmp_path / "built")]
        settings = options.parse_args([*TINY, *SMALL, *places, "--overwrite", *flags])
        trainer, _ = train.set_up(*settings, Processes())
        trainer.folder.close()
        return trainer
    yield build
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("capability", "expected"), [
    ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((8, 9), "bf16"), ((9, 0), "bf16"), ((10, 0), "bf16")])
def test_precision_on_cuda_follows_the_capability(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert devices.pick_precision("auto", CUDA) == expected


@pytest.mark.parametrize(("avx512", "amx", "expected"), [
    (False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16"), (True, True, "bf16")])
def test_precision_on_a_cpu_follows_its_instructions(monkeypatch, avx512, amx, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert devices.pick_precision("auto", CPU) == expected


def test_precision_where_torch_cannot_tell_is_fp32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert devices.pick_precision("auto", CPU) == "fp32"
    assert devices.pick_precision("auto", torch.device("mps")) == "fp32"


@pytest.mark.parametrize("name", devices.PRECISIONS)
def test_precision_asked_for_is_taken(name):
    assert devices.pick_precision(name, CPU) == devices.pick_precision(name, CUDA) == name


def test_autocast_computes_in_the_precision_and_keeps_parameters_float32():
    layer = nn.Linear(2, 2)
    for name, dtype in devices.PRECISIONS.items():
        with devices.autocast(CPU, name):
            assert layer(torch.ones(1, 2)).dtype == dtype
    assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize(("cuda", "mps", "expected"), [
    (False, False, "cpu"), (False, True, "mps"), (True, False, "cuda:1"), (True, True, "cuda:1")])
def test_auto_picks_the_fastest_device_that_is_there(monkeypatch, cuda, mps, expected):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert str(devices.pick_device("auto", local_rank=1)) == expected
    assert chosen == ([1] if cuda else [])  # NCCL needs one device for each process


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(monkeypatch, run_train, capsys, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"--device {name}.*--device auto or cpu"):
        devices.pick_device(name)
    assert run_train("--device", name) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="there are 2; .*--nproc-per-node"):
        devices.pick_device("cuda", local_rank=2)


@needs_cuda
def test_training_on_cuda_to_the_last_picture(run_train, tmp_path):
    assert run_train("--device", "cuda", "--precision", "auto", "--no-compile", "--epochs", "1") == 0
    folder = tmp_path / "runs" / "se-resnet"
    assert (folder / "mistakes.png").exists() and (folder / "results.json").exists()
    environment = load_checkpoint(folder / "last.pt")["environment"]
    assert environment["device"] == "cuda" and environment["precision"] in ("bf16", "fp16")


def test_deterministic_asks_torch_for_it(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    try:
        devices.set_up_backend(CUDA, deterministic=True)
        assert torch._inductor.config.deterministic
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert devices.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        devices.set_up_backend(CUDA, deterministic=False)
    assert not torch._inductor.config.deterministic
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, the C library of most Linux systems")
def test_memory_that_a_step_frees_is_there_for_the_next_one():
    import resource
    devices.keep_freed_memory()
    size, faults = 40 * 2**20, []  # above 32 MiB glibc would never keep it
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(size, dtype=torch.uint8).fill_(1)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert sum(faults[10:]) < size / resource.getpagesize()  # or ten times that


# --- compile ---------------------------------------------------------------------------------------------------------


def test_compile_is_the_default_on_cuda_with_triton_alone(monkeypatch):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: object())
    assert devices.can_compile(CUDA)
    assert not devices.can_compile(CPU) and not devices.can_compile(torch.device("mps"))
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    assert not devices.can_compile(CUDA)


def fail(*_, **__):
    raise RuntimeError("no C compiler\nand forty more lines")


def wrapped(function, **_):
    return lambda *args: function(*args)


def failing_after_the_forward_pass(function, **_):
    return lambda *args: fail(function(*args))


@pytest.mark.parametrize("broken", [fail, lambda *_, **__: fail], ids=["at once", "when called"])
def test_a_compiler_that_fails_costs_one_line(monkeypatch, capsys, broken):
    monkeypatch.setattr(torch, "compile", broken)
    assert devices.compile_or_warn(abs, CPU, lambda function: function(-1)) is abs
    assert capsys.readouterr().err == ("warning: torch.compile failed (RuntimeError: no C compiler); "
                                       "going on without it\n")


@pytest.mark.parametrize(("device", "mode"), [(CPU, None), (CUDA, "reduce-overhead")])
def test_compile_records_cuda_graphs_on_cuda_alone(monkeypatch, capsys, device, mode):
    calls, probes = [], []
    monkeypatch.setattr(torch, "compile", lambda function, **settings: calls.append(settings) or wrapped(function))
    assert devices.compile_or_warn(abs, device, probes.append)(-1) == 1
    assert calls == [{"dynamic": False, "mode": mode}] and len(probes) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("compiler", "compiled"), [(wrapped, True), (failing_after_the_forward_pass, False)])
def test_the_trial_of_compile_leaves_no_trace(monkeypatch, set_up, compiler, compiled):
    plain = set_up("--dropout", "0.5", "--no-compile")
    expected, state = {k: v.clone() for k, v in plain.model.state_dict().items()}, torch.get_rng_state()
    plain.folder.close()
    monkeypatch.setattr(torch, "compile", compiler)
    trainer = set_up("--dropout", "0.5", "--compile")
    assert trainer.environment()["compile"] == compiled
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, expected[name]) for name, value in trainer.model.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.parameters)
    assert not any(value.any() for state in trainer.optimizer.state.values() for value in state.values())
    assert trainer.totals.tolist() == [0, 0] and trainer.step == 0


@pytest.mark.parametrize("flags", [[], ["--mixup", "1"], ["--cutmix", "1"]])
def test_compile_is_tried_on_what_a_step_has(monkeypatch, set_up, flags):
    """Or a compiler that fails at it would end the run, and one that does not would be asked twice."""
    calls = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *args: calls.append(args) or function(*args))
    trainer = set_up(*flags, "--compile")
    trainer.train_step(*next(trainer.loader.epoch(0)))
    assert all(call[1] is not call[-2] for call in calls if flags)  # one tensor twice would be another program
    tried, done = ([(value.shape, value.dtype, value.stride()) for value in call] for call in calls)
    assert tried == done and len(done) == (4 if flags else 2)


def losses(trainer: Trainer, epochs: int) -> list[float]:
    """Train, and give the training loss of each epoch."""
    for _ in range(epochs):
        assert trainer.train_epoch(Signals()) is None
        trainer.finish_epoch()
    trainer.folder.close()
    return [row["train_loss"] for row in trainer.history]


@pytest.mark.slow
def test_inductor_on_the_cpu_gives_the_eager_losses(monkeypatch, set_up, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    flags = ["--num-blocks", "1", "--channels", "8", "--limit-train", "72"]  # the last batch is a smaller one
    compiled = set_up(*flags, "--compile")
    assert compiled.environment()["compile"]  # it has not fallen back
    assert losses(compiled, 2) == pytest.approx(losses(set_up(*flags, "--no-compile"), 2), rel=1e-4)


# --- half precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_what_float32_learns(set_up, precision):
    flags = ["--limit-train", "48", "--batch-size", "16", "--limit-test", "10", "--no-augment"]
    expected = losses(set_up(*flags), 3)
    trainer = set_up(*flags, "--precision", precision)
    found = losses(trainer, 3)
    assert found[-1] < 0.97 * found[0]
    assert found == pytest.approx(expected, rel=0.02) and found != expected
    state = trainer.state()
    assert state["environment"]["precision"] == precision
    assert all(value.dtype in (torch.float32, torch.int64) for value in state["model"].values())
    assert bool(state["scaler"]) == (precision == "fp16")


@pytest.mark.parametrize("clip", ["0", "0.1"])
@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])  # one is fused and one is not
def test_an_overflow_in_fp16_skips_the_step_and_lowers_the_scale(set_up, optimizer, clip):
    # --deterministic fills memory that nobody has written with NaN
    trainer = set_up("--precision", "fp16", "--optimizer", optimizer, "--grad-clip", clip, "--deterministic")
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    batch = next(trainer.loader.epoch(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch could complain of the schedule, which goes on
        trainer.train_step(*batch)
    assert all(torch.equal(a, b) for a, b in zip(trainer.parameters, before, strict=True))
    assert trainer.scaler.get_scale() == 2.0**39 and trainer.step == 1
    trainer.scaler.update(1024.0)
    trainer.train_step(*batch)
    assert all(parameter.isfinite().all() for parameter in trainer.parameters)
    assert not any(torch.equal(a, b) for a, b in zip(trainer.parameters, before, strict=True))
