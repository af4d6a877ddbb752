"""Export a trained network as ONNX, or as a small checkpoint to share.

python tools/export.py checkpoints/se-resnet/best.pt --output se-resnet.onnx
python tools/export.py checkpoints/fast/last.pt --output checkpoints/pretrained.pt
"""

import importlib.util
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from process import program, set_up_process
from utils import UserError, check_output, print_line, write_atomically

if __name__ == "__main__":
    set_up_process()  # before torch is imported

import torch
from torch import nn

from checkpoint import load_checkpoint, save_checkpoint
from options import Parser
from predict import load_model

PLACES = {"data_dir", "output_dir", "init_from"}  # folders of the machine that trained the network


def to_onnx(model: nn.Module, classes: Sequence[str]) -> bytes:
    """Convert a network in eval mode, normalization included; N is dynamic, and the metadata hold `classes` as JSON."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # torch 2.10 warns about its own code
        program = torch.onnx.export(model, (torch.zeros(2, 3, 32, 32),), input_names=["images"],
                                    output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("N")},),
                                    dynamo=True, verbose=False)
    for part in (program.model.graph, *program.model.graph):
        part.metadata_props.clear()  # stack traces with local paths
    program.model.metadata_props["classes"] = json.dumps(list(classes))
    return program.model_proto.SerializeToString()


def to_share(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Keep the weights, the averaged ones if there are any, in half precision, and what is needed to use them.

    They are loaded as float32. Running statistics stay float32, since small variances would lose digits.
    """
    weights = checkpoint.get("ema") or checkpoint["model"]
    weights = {name: value if "running_" in name or not value.is_floating_point() else value.half()
               for name, value in weights.items()}
    args = {name: value for name, value in checkpoint["args"].items() if name not in PLACES}
    return {"model": weights, "args": args, **{name: checkpoint[name] for name in ("epoch", "classes")
                                               if name in checkpoint}}


@program("export.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Export the checkpoint that a command line names."""
    parser = Parser("export.py", "CHECKPOINT --output FILE", "Export a trained network, as ONNX or to share it.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a trained network, such as RUN/best.pt")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="FILE.onnx, or FILE.pt to share the "
                        "weights in half precision")
    args, _ = parser.parse(argv)
    if args.output.suffix not in (".onnx", ".pt", ".pth"):
        raise UserError(f"--output {args.output}: expected a name that ends in .onnx, .pt or .pth")
    if args.output.suffix != ".onnx":
        content = to_share(load_checkpoint(args.checkpoint))
        check_output(args.output, [args.checkpoint])  # without its optimizer the run could no longer be resumed
        save_checkpoint(content, args.output)
        print_line(f"{args.output}: weights in half precision, {args.output.stat().st_size / 1e6:.1f} MB")
        return 0
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise UserError(f"missing packages; run: python -m pip install {' '.join(missing)}")
    model, classes = load_model(args.checkpoint)
    check_output(args.output, [args.checkpoint])
    content = to_onnx(model, classes)
    write_atomically(args.output, lambda temporary: temporary.write_bytes(content))
    print_line(f"{args.output}: images (N, 3, 32, 32) float32 in [0, 1] -> logits of {', '.join(classes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
