"""Evaluate checkpoints/pretrained.pt in fp32; write tta.json, calibration.csv and the pictures beside this file.

python results/fast/measure.py [DATA_DIR]
"""

import csv
import hashlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

import torch

import cifar10
import data
from augment import to_input
from evaluate import (
    CALIBRATION_BINS,
    CPU_BATCH_SIZE,
    calibration_bins,
    draw_pictures,
    load_checkpoint_model,
    predict_logits,
    score,
    tta_views,
)


def write_calibration(logits: torch.Tensor, targets: torch.Tensor) -> None:
    """Write the bins of the expected calibration error that hold images, in percent."""
    with (HERE / "calibration.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["confidence_from", "confidence_to", "images", "mean_confidence", "accuracy"])
        for place, (count, confidence, correct) in enumerate(calibration_bins(logits, targets).T.tolist()):
            if count:
                edges = [f"{edge / CALIBRATION_BINS:.4f}" for edge in (place, place + 1)]
                percent = [f"{100 * total / count:.2f}" for total in (confidence, correct)]
                writer.writerow([*edges, int(count), *percent])


@torch.inference_mode()
def main() -> None:
    """Run the program."""
    path = ROOT / "checkpoints/pretrained.pt"
    model = load_checkpoint_model(path)[0]
    test = data.load_split(sys.argv[1] if len(sys.argv) > 1 else "data", cifar10.TEST_FILES)
    logits = predict_logits(model, test.images, "cpu")
    write_calibration(logits, test.targets)
    draw_pictures(HERE, logits, test)
    views = torch.cat([torch.stack([model(view).softmax(1) for view in tta_views(to_input(images))])
                       for images in test.images.split(CPU_BATCH_SIZE)], 1)
    means = {"plain": views[2], "flips": views[2:4].mean(0),  # those in place
             "flips and diagonal shifts by a pixel (--tta)": views.mean(0)}
    result = {"checkpoint": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "precision": "fp32",
              "images": len(test.targets),
              "accuracy": {name: score(mean, test.targets)[1] for name, mean in means.items()}}
    (HERE / "tta.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
