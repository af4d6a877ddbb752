"""ResNet with squeeze-and-excitation for 32x32 images.

Deep Residual Learning for Image Recognition, arXiv 1512.03385 (basic block);
Identity Mappings in Deep Residual Networks, arXiv 1603.05027 (pre-activation block);
Squeeze-and-Excitation Networks, arXiv 1709.01507 (SE block).

Parameters of the variants, each with num_blocks 4 4 3 and 64 channels:

    basic block, SE after the stem (published)    4,697,742
    basic block, no SE                            4,697,162
    basic block, SE in every residual block       4,733,610
    pre-activation block, SE after the stem       4,696,974
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE_SIZE = 32


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """Make a convolution without bias that keeps the size of the map at stride 1."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)


class SEBlock(nn.Module):
    """Scale every channel by a gate computed from all channels' means (arXiv 1709.01507)."""

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.conv1 = nn.Conv2d(channels, channels // reduction, 1)
        self.relu = nn.ReLU(inplace=True)  # a module, since the published table lists it
        self.conv2 = nn.Conv2d(channels // reduction, channels, 1)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        gate = self.pool(x)  # (N, C, 1, 1)
        gate = self.conv2(self.relu(self.conv1(gate)))
        return x * self.sigmoid(gate)


class BasicBlock(nn.Module):
    """Two convolutions, each with batch norm, and a shortcut; ReLU after the addition (arXiv 1512.03385)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, kernel_size: int,
                 shortcut_kernel_size: int, se_reduction: int | None, dropout: float):
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, kernel_size, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, kernel_size)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.seblock = SEBlock(out_channels, se_reduction) if se_reduction else None
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(conv(in_channels, out_channels, shortcut_kernel_size, stride),
                                          nn.BatchNorm2d(out_channels))
        self.dropout = nn.Dropout(dropout) if dropout else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        if self.seblock is not None:
            out = self.seblock(out)
        out = F.relu(out + self.shortcut(x), inplace=True)
        return out if self.dropout is None else self.dropout(out)


class PreActBlock(nn.Module):
    """Batch norm and ReLU before each convolution, and an addition that nothing follows (arXiv 1603.05027)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, kernel_size: int,
                 shortcut_kernel_size: int, se_reduction: int | None, dropout: float):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, out_channels, kernel_size, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, kernel_size)
        self.seblock = SEBlock(out_channels, se_reduction) if se_reduction else None
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = conv(in_channels, out_channels, shortcut_kernel_size, stride)
        self.dropout = nn.Dropout(dropout) if dropout else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        activated = F.relu(self.bn1(x), inplace=True)
        identity = x if self.shortcut is None else self.shortcut(activated)
        out = self.conv1(activated)
        out = self.conv2(F.relu(self.bn2(out), inplace=True))
        if self.seblock is not None:
            out = self.seblock(out)
        out = out + identity
        return out if self.dropout is None else self.dropout(out)


BLOCKS = {"basic": BasicBlock, "preact": PreActBlock}
SE_PLACES = ("stem", "block", "none")


class SEResNet(nn.Module):
    """Stem, residual layers of doubling width and halving size, average pool, linear classifier.

    Attributes carry the names of the published code, so that its checkpoints load.

    Args:
        num_blocks: Residual blocks of each layer; the first layer keeps 32x32, every other one halves it.
        channels: Channels of the first layer; doubled in every further one.
        kernel_sizes: Of the blocks' convolutions, one for all layers or one for each.
        shortcut_kernel_sizes: Of the shortcuts that change the shape, likewise.
        pool_size: Of the last average pooling; None is the whole map.
        dropout: Probability after each block and before the linear layer.
        block: "basic" (arXiv 1512.03385) or "preact" (arXiv 1603.05027).
        se: Squeeze and excitation after the "stem", in every residual "block", or "none".
        se_reduction: Channels per squeezed channel.
        num_classes: Length of the logits.

    Raises:
        ValueError: A choice is impossible; the message names its flag.
    """

    def __init__(self, num_blocks: Sequence[int] = (4, 4, 3), channels: int = 64,
                 kernel_sizes: int | Sequence[int] = 3, shortcut_kernel_sizes: int | Sequence[int] = 1,
                 pool_size: int | None = None, dropout: float = 0.0, block: str = "basic", se: str = "stem",
                 se_reduction: int = 16, num_classes: int = 10):
        super().__init__()
        check_choices(num_blocks, channels, dropout, block, se, se_reduction)
        kernels = per_layer("--kernel-sizes", kernel_sizes, len(num_blocks))
        shortcut_kernels = per_layer("--shortcut-kernel-sizes", shortcut_kernel_sizes, len(num_blocks))
        preact = block == "preact"
        self.conv1 = conv(3, channels, 3)
        self.bn1 = None if preact else nn.BatchNorm2d(channels)
        self.seblock = SEBlock(channels, se_reduction) if se == "stem" else None
        self.residual_layers = nn.ModuleList()
        size, in_channels = IMAGE_SIZE, channels
        for i, blocks in enumerate(num_blocks):
            make_block = partial(BLOCKS[block], out_channels=channels * 2**i, kernel_size=kernels[i],
                                 shortcut_kernel_size=shortcut_kernels[i], dropout=dropout,
                                 se_reduction=se_reduction if se == "block" else None)
            stride = 1 if i == 0 else 2
            layer = [make_block(in_channels, stride=stride)]
            layer += [make_block(channels * 2**i, stride=1) for _ in range(blocks - 1)]
            self.residual_layers.append(nn.Sequential(*layer))
            size, in_channels = -(-size // stride), channels * 2**i
        self.pool_size = size if pool_size is None else pool_size
        if not 1 <= self.pool_size <= size:
            raise ValueError(f"--pool-size {pool_size}: the last map is {size}x{size}; choose 1 to {size}")
        self.bn_last = nn.BatchNorm2d(in_channels) if preact else None
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.linear = nn.Linear(in_channels * (size // self.pool_size) ** 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (N, 3, 32, 32) to logits (N, num_classes)."""
        out = self.conv1(x)
        if self.bn1 is not None:
            out = F.relu(self.bn1(out), inplace=True)
        if self.seblock is not None:
            out = self.seblock(out)
        for layer in self.residual_layers:
            out = layer(out)
        if self.bn_last is not None:
            out = F.relu(self.bn_last(out), inplace=True)
        out = F.avg_pool2d(out, self.pool_size).flatten(1)
        return self.linear(out if self.dropout is None else self.dropout(out))


def per_layer(flag: str, values: int | Sequence[int], layers: int) -> list[int]:
    """Repeat a single kernel size for every layer; raise ValueError for sizes that cannot be."""
    values = [values] if isinstance(values, int) else list(values)
    if len(values) not in (1, layers):
        raise ValueError(f"{flag} has {len(values)} values, expected 1, or {layers} as --num-blocks has layers")
    for value in values:
        if value < 1 or value % 2 == 0:
            raise ValueError(f"{flag} {value}: a kernel size must be odd (1, 3, 5, ...), or maps change their size")
    return values if len(values) == layers else values * layers


def check_choices(num_blocks: Sequence[int], channels: int, dropout: float, block: str, se: str,
                  se_reduction: int) -> None:
    """Raise ValueError for what no network can be built from."""
    if not num_blocks or min(num_blocks) < 1:
        raise ValueError(f"--num-blocks {' '.join(map(str, num_blocks))}: every layer needs at least one block")
    # On CPUs with AVX2 and no more, oneDNN's strided backward pass corrupts memory below 8 input channels (torch 2.14).
    if channels < 8:
        raise ValueError(f"--channels {channels}: at least 8 are needed")
    if len(num_blocks) > 16 or sum(num_blocks) > 1000 or channels > 65_536:
        raise ValueError("--num-blocks, --channels: no more than 16 layers, 1,000 blocks and 65,536 channels are built")
    if not 0 <= dropout < 1:
        raise ValueError(f"--dropout {dropout}: a probability of at least 0 and below 1 is needed")
    if block not in BLOCKS:
        raise ValueError(f"--block {block}: choose from {', '.join(BLOCKS)}")
    if se not in SE_PLACES:
        raise ValueError(f"--se {se}: choose from {', '.join(SE_PLACES)}")
    if se != "none" and not 1 <= se_reduction <= channels:
        raise ValueError(f"--se-reduction {se_reduction} leaves no channel of {channels}; choose 1 to {channels}")


def build_model(*choices: Any, max_params: int = 5_000_000, **more_choices: Any) -> SEResNet:
    """Build the published SE-ResNet [4, 4, 3] of 4,697,742 parameters, or by `SEResNet`'s arguments a relative of it.

    Raises:
        ValueError: A choice is impossible, or the model has more than `max_params` parameters (0 is no limit).
    """
    with torch.device("meta"):  # counts without memory, so that a typing error does not fill the machine
        count = count_parameters(SEResNet(*choices, **more_choices))
    if max_params and count > max_params:
        raise ValueError(f"--max-params {max_params:,}: the model has {count:,} parameters; "
                         "make it smaller, or raise the limit (0 is none)")
    return SEResNet(*choices, **more_choices)


def count_parameters(model: nn.Module) -> int:
    """Count the trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
