"""Train a narrow network with one idea or several, at equal compute, and append its accuracy to a file.

    OMP_NUM_THREADS=1 taskset -c 0 python results/recipe/screen.py NAME --data-dir DIR --log runs.jsonl [ideas]

`--budget E` is the compute of E * 50,000 forward and backward passes of 32x32 images. Smaller images count by their
area, a forward pass alone as a third; the number of steps follows. 5,000 held-out training images are scored, never the
test set.
"""

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import augment
import cifar10
import data
import evaluate
import hardware
import models
from optim import orthogonalize

CPU = torch.device("cpu")


def parse_args() -> argparse.Namespace:
    """Parse the command line; the defaults are those of results/fast-sgd."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("name")
    flag("--data-dir", default="data")
    flag("--log", type=Path, required=True)
    flag("--channels", type=int, default=16)
    flag("--budget", type=float, default=2.0)
    flag("--seed", type=int, default=0)
    flag("--steps", type=int, help="stop after so many, to try the program")
    flag("--batch-size", type=int, default=128)
    flag("--lr", type=float, default=0.1, help="of SGD")
    flag("--muon", type=float, default=0.0, help="learning rate of Muon for the convolutions; 0: SGD for all")
    flag("--muon-momentum", type=float, default=0.95)
    flag("--muon-decay", type=float, default=0.0, help="weight decay; 0: keep the length of the weights instead")
    flag("--muon-stem", action="store_true", help="Muon for the first convolution, too")
    flag("--schedule", choices=("cosine", "linear"), default="cosine")
    flag("--ema", type=float, default=0.995)
    flag("--label-smoothing", type=float, default=0.1)
    flag("--bias-lr", type=float, default=1.0, help="factor of the learning rate of batch norm's biases")
    flag("--no-vector-decay", action="store_true", help="no weight decay on vectors (arXiv 1812.01187)")
    flag("--zero-init", action="store_true", help="start each block's last batch norm with scale 0 (arXiv 1706.02677)")
    flag("--whiten", action="store_true", help="start the first convolution as whitening directions (arXiv 2404.00498)")
    flag("--lookahead", action="store_true", help="continue from averages of the weights (arXiv 1907.08610)")
    flag("--norm-momentum", type=float, default=0.1, help="of batch norm's running statistics")
    flag("--alternating-flip", action="store_true", help="flip every image in every second epoch (arXiv 2404.00498)")
    flag("--shift", type=int, default=4, help="largest shift of the random crops, in pixels")
    flag("--cutout", type=int, default=0, help="side of a square set to zero, in pixels (arXiv 1708.04552)")
    flag("--small", type=int, default=32, help="side of the images at first, in pixels")
    flag("--small-fraction", type=float, default=0.5, help="fraction of the steps with small images")
    flag("--hard", type=float, default=1.0, help="train on this fraction of larger batches, with the largest loss")
    flag("--hard-size", type=int, default=16, help="side of the images that select it")
    return parser.parse_args()


def build(args: argparse.Namespace, images: Tensor) -> nn.Module:
    """Build and initialize the network."""
    torch.manual_seed(args.seed)
    model = models.SEResNet(channels=args.channels, se_reduction=min(16, args.channels))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = args.norm_momentum
        if isinstance(module, models.BLOCKS["basic"]) and args.zero_init:
            nn.init.zeros_(module.bn2.weight)
    if args.whiten:
        patches = augment.to_input(images[:5000]).unfold(2, 3, 1).unfold(3, 3, 1)
        patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 27)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        directions = (vectors / (values + 5e-4).sqrt()).T.flip(0).view(27, 3, 3, 3)[:args.channels // 2]
        filters = torch.cat((directions, -directions))
        weight = model.conv1.weight.data
        weight[:len(filters)] = filters * (weight.norm() / filters.norm() * (len(filters) / args.channels)**0.5)
    return model.to(memory_format=torch.channels_last)


class Muon:
    """Muon with the options of the flags."""

    def __init__(self, weights: list[nn.Parameter], args: argparse.Namespace):
        self.weights, self.args, self.buffers = weights, args, [torch.zeros_like(w) for w in weights]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the weights."""
        for weight, buffer in zip(self.weights, self.buffers, strict=True):
            buffer.lerp_(weight.grad, 1 - self.args.muon_momentum)
            matrix = weight.grad.lerp(buffer, self.args.muon_momentum).flatten(1)
            update = orthogonalize(matrix[None], torch.float32)[0] * max(1, len(matrix) / matrix.shape[1])**0.5
            if self.args.muon_decay:
                weight.mul_(1 - lr * self.args.muon_decay)
            else:
                weight.mul_(len(weight)**0.5 / weight.norm())
            weight.add_(update.view_as(weight), alpha=-lr)


def build_optimizers(model: nn.Module, args: argparse.Namespace) -> tuple[torch.optim.SGD, Muon]:
    """Build the two optimizers; each group of SGD remembers its highest learning rate as "peak"."""
    convolutions = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m.bias is None]
    muon = convolutions[0 if args.muon_stem else 1:] if args.muon else []
    biases = [m.bias for m in model.modules() if isinstance(m, nn.BatchNorm2d)] if args.bias_lr != 1 else []
    taken = {id(parameter) for parameter in (*muon, *biases)}
    others = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    vectors = [parameter for parameter in others if parameter.ndim == 1 and args.no_vector_decay]
    taken |= {id(parameter) for parameter in vectors}
    groups = [([p for p in others if id(p) not in taken], 1.0, 5e-4), (vectors, 1.0, 0.0),
              (biases, args.bias_lr, 0.0 if args.no_vector_decay else 5e-4 / args.bias_lr)]
    groups = [{"params": parameters, "peak": args.lr * factor, "weight_decay": decay}
              for parameters, factor, decay in groups if parameters]
    return torch.optim.SGD(groups, args.lr, momentum=0.9, nesterov=True, fused=True), Muon(muon, args)


def batches(args: argparse.Namespace, split: data.Split, total: int):
    """Yield the inputs (N, 3, 32, 32) and targets (N,) of `total` steps."""
    count, size, epoch, step = len(split.targets), round(args.batch_size / args.hard), 0, 0
    flips = torch.from_numpy(np.random.default_rng([args.seed, 3]).random(count) < 0.5)
    generator = torch.Generator().manual_seed(args.seed)
    place = torch.arange(augment.SIZE)
    while True:
        table = augment.random_params(count, args.seed, epoch)
        if args.alternating_flip:
            table = table._replace(flip=flips[table.index] ^ bool(epoch % 2))
        if args.shift != 4:
            top, left = (offset * (2 * args.shift + 1) // 9 + 4 - args.shift for offset in (table.top, table.left))
            table = table._replace(top=top, left=left)
        for start in range(0, count - count % size, size):
            if step == total:
                return
            rows = table.rows(slice(start, start + size))
            inputs = augment.to_input(augment.crop_and_flip(split.images, rows))
            if args.cutout:
                corners = torch.randint(0, 33 - args.cutout, (2, len(inputs), 1), generator=generator)
                row, column = ((place >= corner) & (place < corner + args.cutout) for corner in corners)
                inputs = inputs.masked_fill((row[:, :, None] & column[:, None, :])[:, None], 0)
            yield inputs, split.targets[rows.index]
            step += 1
        epoch += 1


def resize(inputs: Tensor, size: int) -> Tensor:
    """Shrink images to size x size pixels."""
    if size == augment.SIZE:
        return inputs
    inputs = F.interpolate(inputs, size=size, mode="bilinear", antialias=True)
    return inputs.contiguous(memory_format=torch.channels_last)


def run(args: argparse.Namespace) -> dict:
    """Train; return the result."""
    torch.set_num_threads(1)
    hardware.set_up_backend(CPU)
    began = time.time()
    split, val = data.hold_out(data.load_split(args.data_dir, cifar10.TRAIN_FILES), 5000)
    model = build(args, split.images)
    averaged = copy.deepcopy(model)
    sgd, muon = build_optimizers(model, args)
    area = 1 - args.small_fraction * (1 - (args.small / 32)**2)
    passes = args.hard + ((args.hard_size / 32)**2 / 3 if args.hard < 1 else 0)  # of each image
    steps_per_epoch = math.ceil(len(split.targets) / round(args.batch_size / args.hard))
    total = round(args.budget * 50000 / len(split.targets) / (passes * area) * steps_per_epoch)
    warmup = round(0.1 * total)
    parameters = list(model.parameters())
    tensors, averages = ([t for t in (*net.parameters(), *net.buffers()) if t.is_floating_point()]
                         for net in (model, averaged))
    slow = [parameter.detach().clone() for parameter in parameters] if args.lookahead else []
    sum_of_losses = 0.0
    model.train()
    for step, (inputs, targets) in enumerate(batches(args, split, min(total, args.steps or total))):
        inputs = resize(inputs, args.small if step < args.small_fraction * total else 32)
        left = (total - step) / max(1, total - warmup)
        factor = (step + 1) / (warmup + 1) if step < warmup else (
            left if args.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)
        if args.hard < 1:
            model.eval()
            with torch.no_grad():
                losses = F.cross_entropy(model(resize(inputs, args.hard_size)), targets, reduction="none",
                                         label_smoothing=args.label_smoothing)
            model.train()
            chosen = losses.topk(args.batch_size).indices
            inputs, targets = inputs[chosen].contiguous(memory_format=torch.channels_last), targets[chosen]
        model.zero_grad()
        loss = F.cross_entropy(model(inputs), targets, label_smoothing=args.label_smoothing)
        loss.backward()
        for group in sgd.param_groups:
            group["lr"] = group["peak"] * factor
        sgd.step()
        muon.step(args.muon * factor)
        with torch.no_grad():
            if slow and step % 5 == 4:
                torch._foreach_lerp_(slow, parameters, 1 - 0.95**5 * (step / total)**3)
                torch._foreach_copy_(parameters, slow)
            torch._foreach_lerp_(averages, tensors, 1 - min(args.ema, (1 + step) / (10 + step)))
        sum_of_losses += loss.item()
    (val_loss, accuracy), (_, without_average) = (
        evaluate.score(evaluate.predict_logits(net, val.images, CPU), val.targets) for net in (averaged, model))
    return {"name": args.name, "accuracy": round(accuracy, 2), "without_average": round(without_average, 2),
            "val_loss": round(val_loss, 4), "train_loss": round(sum_of_losses / (step + 1), 4), "steps": step + 1,
            "seconds": round(time.time() - began)}


def main() -> None:
    """Run the program."""
    args = parse_args()
    result = run(args)
    with open(args.log, "a") as file:
        file.write(json.dumps(result | {"flags": " ".join(sys.argv[2:])}) + "\n")


if __name__ == "__main__":
    main()
