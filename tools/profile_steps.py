"""Profile 20 training steps: `python tools/profile_steps.py [--variants base strong] [flags of train.py]`.

Not named profile.py, which would shadow the standard module that torch.compile imports.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from process import program, set_up_process
from utils import print_line

if __name__ == "__main__":
    set_up_process()  # before torch is imported

import torch
import torch._inductor.config
from torch.autograd import DeviceType

import options
from tools import bench

STEPS, VARIANTS = 20, ("base", "combo_kernels", "cudnn_benchmark_limit_0", "strong")


def profile(variant: str, flags: Sequence[str], folder: str) -> int:
    """Print a variant's speed, its milliseconds per step, and the 25 longest kernels or, on a CPU, operators."""
    torch.compiler.reset()
    torch._inductor.config.combo_kernels = variant == "combo_kernels"
    torch.backends.cudnn.benchmark_limit = 0 if variant == "cudnn_benchmark_limit_0" else 10  # PyTorch's default
    flags = ["@recipes/strong.txt"] * (variant == "strong") + [*flags]
    images = bench.EPOCH - bench.EPOCH % options.parse_args(flags)[0].batch_size  # only full batches are compiled
    run, state = bench.build(flags, images, 1, Path(folder))
    # on a GPU, TrivialAugment launches as many kernels for an epoch as for a few steps
    steps = len(run.loader) if run.args.trivial_augment and run.device.type != "cpu" else min(STEPS, len(run.loader))
    _, rate = (bench.whole_rate(run, state, steps) for _ in range(2))  # the first one warms up
    with torch.profiler.profile() as profiler:
        bench.whole_rate(run, state, steps)
    run.loader.close()
    events = [event for event in profiler.key_averages() if "Synchronize" not in event.key]  # which is waiting
    cpu = [(event.self_cpu_time_total / 1000 / steps, event.count / steps, event.key) for event in events
           if event.device_type == DeviceType.CPU]
    gpu = [(event.self_device_time_total / 1000 / steps, event.count / steps, event.key) for event in events
           if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    line = f"{variant}: {rate:.0f} images/s; per step: CPU {sum(ms for ms, *_ in cpu):.2f} ms"
    if gpu:
        kernels = sum(count for _, count, key in gpu if not key.startswith("Mem"))  # not copies
        line += f", GPU {sum(ms for ms, *_ in gpu):.2f} ms in {kernels:.0f} kernels"
    longest = sorted(gpu or cpu, reverse=True)[:25]
    print_line("\n".join([line, *(f"{ms:10.3f} ms {count:7.1f} x  {key:.95}" for ms, count, key in longest), ""]))
    return 0


@program("profile_steps.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Profile the variants that a command line names; return the exit status."""
    parser = options.Parser("profile_steps.py", "[--variants NAME ...] [flags of train.py]",
                            f"Profile {STEPS} training steps.")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="NAME",
                        help=", ".join(VARIANTS))
    own, flags = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    options.parse_args(flags)  # report a mistake once
    if len(own.variants) > 1:  # a process each: cuDNN keeps the algorithms that it has selected
        command = [sys.executable, __file__, *flags, "--variants"]
        return int(any([subprocess.call([*command, name]) for name in own.variants]))
    with tempfile.TemporaryDirectory(prefix="profile-") as folder:
        return profile(own.variants[0], flags, folder)


if __name__ == "__main__":
    sys.exit(main())
