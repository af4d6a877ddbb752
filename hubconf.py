"""Entry points for torch.hub: `torch.hub.load(REPO, "se_resnet", pretrained=True)`."""

from pathlib import Path

from torch import nn

dependencies = ["torch", "torchvision", "numpy", "tqdm", "PIL"]


def se_resnet(pretrained: bool = False, **kwargs) -> nn.Module:
    """Build the SE-ResNet [4, 4, 3] with its normalization, from (N, 3, 32, 32) floats in [0, 1] to logits (N, 10).

    Args:
        pretrained: Load checkpoints/pretrained.pt of this repository.
        **kwargs: Arguments of `models.build_model`, for a network without trained weights.
    """
    from models import build_model
    from predict import FromUnitRange, load_model

    if not pretrained:
        return FromUnitRange(build_model(**kwargs))
    if kwargs:
        raise ValueError(f"the pretrained network is the default one; leave out {', '.join(kwargs)}")
    return load_model(Path(__file__).parent / "checkpoints" / "pretrained.pt")[0]
