"""Entry points for torch.hub: `torch.hub.load(REPO, "se_resnet", pretrained=True)`."""

import importlib.util
import pathlib

import torch

dependencies = ["torch"]


def se_resnet(pretrained: bool = False, **kwargs) -> torch.nn.Module:
    """Build the SE-ResNet [4, 4, 3] with its normalization, from (N, 3, 32, 32) floats in [0, 1] to logits (N, 10).

    `pretrained` loads the weights of this repository. The other arguments are those of `SEResNet` in `models/`.
    """
    folder = pathlib.Path(__file__).parent
    # By its path and not into sys.modules: the caller may have a utils.py, data.py or models/ of its own.
    spec = importlib.util.spec_from_file_location("_se_resnet", folder / "models" / "se_resnet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.SEResNet(**kwargs)
    if pretrained:
        checkpoint = torch.load(folder / "checkpoints" / "pretrained.pt", map_location="cpu", weights_only=True)
        network.load_state_dict(checkpoint["model"])
    return module.Normalized(network).train(not pretrained)
