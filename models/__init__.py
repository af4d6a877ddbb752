"""Networks for CIFAR-10."""

from models.se_resnet import BLOCKS, SE_PLACES, SEResNet, build_model, count_parameters, summarize

__all__ = ["BLOCKS", "SE_PLACES", "SEResNet", "build_model", "count_parameters", "summarize"]
