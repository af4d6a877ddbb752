"""The network for CIFAR-10, with its normalization. It needs nothing else of the project."""

from .se_resnet import BLOCKS, MEAN, SE_PLACES, STD, Normalized, SEResNet, count_parameters, summarize

__all__ = ["BLOCKS", "MEAN", "SE_PLACES", "STD", "Normalized", "SEResNet", "count_parameters", "summarize"]
