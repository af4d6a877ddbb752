"""ResNet with squeeze-and-excitation for 32x32 images.

Deep Residual Learning for Image Recognition, arXiv 1512.03385 (basic block);
Identity Mappings in Deep Residual Networks, arXiv 1603.05027 (pre-activation block);
Squeeze-and-Excitation Networks, arXiv 1709.01507 (SE block).
"""

import contextlib
import io
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# The published constants. STD is a mean of per-image deviations; per pixel it would be 0.2470, 0.2435, 0.2616.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)
# Below, an empty nn.Sequential() returns its input. Unlike nn.Identity, it is not listed in torchsummary's table.


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """Build a convolution without bias that preserves height and width at stride 1."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)


class SEBlock(nn.Module):
    """Scale each channel by a gate computed from the means of all channels (arXiv 1709.01507)."""

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.conv1 = nn.Conv2d(channels, channels // reduction, 1)
        self.relu = nn.ReLU(inplace=True)  # a module, because the published table lists it
        self.conv2 = nn.Conv2d(channels // reduction, channels, 1)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        gate = self.pool(x)  # (N, C, 1, 1)
        gate = self.conv2(self.relu(self.conv1(gate)))
        return x * self.sigmoid(gate)


class BasicBlock(nn.Module):
    """Two convolutions with batch norm, and a shortcut; ReLU after the addition (arXiv 1512.03385)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, kernel_size: int,
                 shortcut_kernel_size: int, se_reduction: int | None, dropout: float):
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, kernel_size, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, kernel_size)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.seblock = SEBlock(out_channels, se_reduction) if se_reduction else nn.Sequential()
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(conv(in_channels, out_channels, shortcut_kernel_size, stride),
                                          nn.BatchNorm2d(out_channels))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.seblock(self.bn2(self.conv2(out)))
        out = F.relu(out + self.shortcut(x), inplace=True)
        return self.dropout(out)


class PreActBlock(nn.Module):
    """Batch norm and ReLU before each convolution; nothing after the addition (arXiv 1603.05027)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, kernel_size: int,
                 shortcut_kernel_size: int, se_reduction: int | None, dropout: float):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, out_channels, kernel_size, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, kernel_size)
        self.seblock = SEBlock(out_channels, se_reduction) if se_reduction else nn.Sequential()
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = conv(in_channels, out_channels, shortcut_kernel_size, stride)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        activated = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        out = self.conv1(activated)
        out = self.conv2(F.relu(self.bn2(out), inplace=True))
        return self.dropout(self.seblock(out) + shortcut)


BLOCKS = {"basic": BasicBlock, "preact": PreActBlock}
SE_PLACES = ("stem", "block", "none")


class SEResNet(nn.Module):
    """Stem, stages of residual blocks with doubling width and halving size, average pool, linear classifier.

    The defaults are the published [4, 4, 3] network with 4,697,742 parameters. Attributes are named as in the published
    code. A ValueError names an argument that no network can be built from.

    Args:
        num_blocks: Residual blocks of each stage; the first stage keeps 32x32, each further one halves it.
        channels: Channels of the first stage, doubled in each further one.
        kernel_sizes: Kernel size of the blocks' convolutions, one for all stages or one per stage.
        shortcut_kernel_sizes: Kernel size of the shortcuts that change the shape, likewise.
        dropout: Probability after each block and before the linear layer.
        block: "basic" (arXiv 1512.03385) or "preact" (arXiv 1603.05027).
        se: SE after the "stem", in every residual "block", or "none".
        se_reduction: Reduction ratio; the bottleneck has channels // se_reduction channels.
    """

    def __init__(self, num_blocks: Sequence[int] = (4, 4, 3), channels: int = 64,
                 kernel_sizes: int | Sequence[int] = 3, shortcut_kernel_sizes: int | Sequence[int] = 1,
                 dropout: float = 0.0, block: str = "basic", se: str = "stem", se_reduction: int = 16):
        super().__init__()
        check_arguments(num_blocks, channels, block, se, se_reduction)
        kernels = per_stage("kernel_sizes", kernel_sizes, len(num_blocks))
        shortcut_kernels = per_stage("shortcut_kernel_sizes", shortcut_kernel_sizes, len(num_blocks))
        preact = block == "preact"
        self.conv1 = conv(3, channels, 3)
        self.bn1 = None if preact else nn.BatchNorm2d(channels)
        self.seblock = SEBlock(channels, se_reduction) if se == "stem" else nn.Sequential()
        self.residual_layers = nn.ModuleList()
        in_channels = channels
        for stage, blocks in enumerate(num_blocks):
            layer = []
            for i in range(blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                layer.append(BLOCKS[block](in_channels, channels * 2**stage, stride, kernels[stage],
                                           shortcut_kernels[stage], se_reduction if se == "block" else None, dropout))
                in_channels = channels * 2**stage
            self.residual_layers.append(nn.Sequential(*layer))
        self.bn_last = nn.BatchNorm2d(in_channels) if preact else None
        self.dropout = nn.Dropout(dropout) if dropout else nn.Sequential()
        self.linear = nn.Linear(in_channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalized images (N, 3, 32, 32) to logits (N, 10)."""
        out = self.conv1(x)
        if self.bn1 is not None:
            out = F.relu(self.bn1(out), inplace=True)
        out = self.seblock(out)
        for layer in self.residual_layers:
            out = layer(out)
        if self.bn_last is not None:
            out = F.relu(self.bn_last(out), inplace=True)
        out = F.avg_pool2d(out, out.shape[-1]).flatten(1)  # (N, C)
        return self.linear(self.dropout(out))


def per_stage(name: str, values: int | Sequence[int], stages: int) -> list[int]:
    """Return a kernel size for each stage."""
    values = [values] if isinstance(values, int) else list(values)
    if len(values) not in (1, stages):
        raise ValueError(f"{name} has {len(values)} values; expected 1, or {stages} like num_blocks")
    if any(value < 1 or value % 2 == 0 for value in values):
        raise ValueError(f"{name} ({' '.join(map(str, values))}) must be odd to preserve height and width")
    return values if len(values) == stages else values * stages


def check_arguments(num_blocks: Sequence[int], channels: int, block: str, se: str, se_reduction: int) -> None:
    """Raise ValueError for arguments that no network can be built from."""
    if not 1 <= len(num_blocks) <= 5 or min(num_blocks) < 1:  # a sixth stage leaves one pixel, too few for batch norm
        raise ValueError(f"num_blocks ({' '.join(map(str, num_blocks))}) must have 1 to 5 stages of at least one block")
    # On CPUs with AVX2 but not AVX-512, oneDNN's strided convolutions corrupt memory in the backward pass below 8
    # input channels (brgconv_strided:avx2, seen with torch 2.10 to 2.15).
    if channels < 8:
        raise ValueError(f"channels ({channels}) must be at least 8")
    if block not in BLOCKS:
        raise ValueError(f"block ({block}) must be one of {', '.join(BLOCKS)}")
    if se not in SE_PLACES:
        raise ValueError(f"se ({se}) must be one of {', '.join(SE_PLACES)}")
    if se != "none" and not 1 <= se_reduction <= channels:
        raise ValueError(f"se_reduction ({se_reduction}) must be from 1 to {channels}, the channels")


class Normalized(nn.Module):
    """A network with its normalization: takes (N, 3, 32, 32) floats in [0, 1], returns logits (N, 10)."""

    def __init__(self, model: nn.Module, normalize: bool = True):
        super().__init__()
        self.model = model
        mean, std = (MEAN, STD) if normalize else ((0.0,) * 3, (1.0,) * 3)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images - self.mean) / self.std)


def count_parameters(model: nn.Module) -> int:
    """Count the trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def summarize(model: nn.Module) -> str:
    """Return torchsummary's table of layers and parameters."""
    from torchsummary import summary  # not needed on machines that only train

    with contextlib.redirect_stdout(io.StringIO()) as table:
        summary(model.eval(), (3, 32, 32), device="cpu")
    return table.getvalue().rstrip()
