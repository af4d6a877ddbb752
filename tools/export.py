"""Write a trained network as ONNX, normalisation included: images in [0, 1] go in, logits come out.

python tools/export.py --checkpoint checkpoints/se-resnet/best.pt --output se-resnet.onnx
"""

import importlib.util
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import augment
import evaluate
from options import Parser
from utils import UserError, say, write_atomically


class FromUnitRange(nn.Module):
    """A network behind its normalisation: takes (N, 3, 32, 32) float32 in [0, 1], gives (N, 10) logits."""

    def __init__(self, model: nn.Module, normalize: bool):
        super().__init__()
        self.model = model
        mean, std = (augment.MEAN, augment.STD) if normalize else ((0.0,) * 3, (1.0,) * 3)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images - self.mean) / self.std)


def to_onnx(model: nn.Module, classes: Sequence[str]) -> bytes:
    """Translate a network in evaluation mode; N stays free, and the file's metadata hold `classes` as JSON.

    The exporter built on torch.export needs onnxscript; the older one, which does not, warns that it will be removed.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # torch 2.10 warns of its own code
        program = torch.onnx.export(model, (torch.zeros(2, 3, 32, 32),), input_names=["images"],
                                    output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("N")},),
                                    dynamo=True, verbose=False)
    program.model.graph.metadata_props.clear()
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    program.model.metadata_props["classes"] = json.dumps(list(classes))
    return program.model_proto.SerializeToString()


def export(checkpoint: Path, output: Path) -> None:
    """Write the network of a checkpoint to an ONNX file.

    Raises:
        UserError: The checkpoint is none, the folder is not there, or a package is missing.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"no package {' and '.join(missing)} here; run python -m pip install {' '.join(missing)}")
    if not output.parent.is_dir() or output.is_dir():
        raise UserError(f"--output {output}: a file in a folder that exists is needed")
    model, info = evaluate.load_model(checkpoint, torch.device("cpu"))
    content = to_onnx(FromUnitRange(model, info["normalize"]).eval(), info["classes"])
    write_atomically(output, lambda temporary: temporary.write_bytes(content))
    say(f"{output}: images (N, 3, 32, 32) float32 in [0, 1] -> logits of {', '.join(info['classes'])}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program; a mistake is one line and status 2."""
    parser = Parser(prog="export.py", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="such as RUN/best.pt")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.onnx", help="file to write, or replace")
    args = parser.parse_args(argv)
    try:
        export(args.checkpoint, args.output)
    except (UserError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
