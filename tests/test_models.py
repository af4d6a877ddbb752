"""The network: parameter counts, the published table and names, the blocks by hand, and what is refused."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import train
from models import SEResNet, count_parameters
from models.se_resnet import SEBlock


@pytest.mark.parametrize(("arguments", "count"), [
    ({}, 4_697_742), ({"se": "none"}, 4_697_162), ({"se": "block"}, 4_733_610), ({"block": "preact"}, 4_696_974),
    ({"num_blocks": (2, 2, 2, 2), "channels": 32}, 2_797_772), ({"num_blocks": (1, 1, 1), "channels": 160}, 7_649_620),
    ({"num_blocks": (1,) * 5, "channels": 8, "se_reduction": 8}, 308_811),
    ({"kernel_sizes": (5, 3, 1), "shortcut_kernel_sizes": (1, 3, 5)}, 3_190_414)])  # one for each stage
def test_parameter_counts(arguments, count):
    assert count_parameters(SEResNet(**arguments)) == count


def test_summary_equals_the_published_table(capsys):
    assert train.main(["--summary"]) == 0
    printed, table = capsys.readouterr().out, Path(__file__).with_name("figure2.tsv").read_text().splitlines()
    rows = re.findall(r"^ *(\w+-\d+) +(\[.*\]) +([\d,]+)$", printed, re.M)
    assert ["\t".join(row) for row in rows] == table and len(rows) == 68
    assert {"Total params: 4,697,742", "Non-trainable params: 0", "Input size (MB): 0.01", "Params size (MB): 17.92",
            "Forward/backward pass size (MB): 19.13", "Estimated Total Size (MB): 37.06"} <= {*printed.splitlines()}
    assert train.main(["--summary", "--channels", "8"]) == 0  # which lowers the default of --se-reduction
    assert "Total params: 74,667" in capsys.readouterr().out


@pytest.mark.parametrize("block", ["basic", "preact"])
def test_dropout_after_each_block_and_before_the_linear_layer(block):
    model, found = SEResNet((2, 1), 8, dropout=0.2, block=block, se_reduction=2), []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda layer, _, output: found.append((layer.p, tuple(output.shape))))
    model(torch.zeros(2, 3, 32, 32))
    assert found == [(0.2, (2, 8, 32, 32))] * 2 + [(0.2, (2, 16, 16, 16)), (0.2, (2, 16))]


def squeeze_and_excite(se: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if not isinstance(se, SEBlock):
        return x
    (w1, b1), (w2, b2) = ((conv.weight[:, :, 0, 0], conv.bias) for conv in (se.conv1, se.conv2))
    gate = torch.sigmoid(torch.relu(x.mean((2, 3)) @ w1.T + b1) @ w2.T + b2)
    return x * gate[:, :, None, None]


def basic_by_hand(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    shortcut = block.shortcut[1](block.shortcut[0](x)) if len(block.shortcut) else x
    return torch.relu(squeeze_and_excite(block.seblock, out) + shortcut)


def preact_by_hand(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    activated = torch.relu(block.bn1(x))
    out = block.conv2(torch.relu(block.bn2(block.conv1(activated))))
    shortcut = x if block.shortcut is None else F.conv2d(activated, block.shortcut.weight, stride=2)
    return squeeze_and_excite(block.seblock, out) + shortcut


@pytest.mark.parametrize("se", ["stem", "block", "none"])
@pytest.mark.parametrize(("block", "by_hand"), [("basic", basic_by_hand), ("preact", preact_by_hand)])
def test_forward_by_hand(block, by_hand, se):
    torch.manual_seed(0)
    model, x = SEResNet((1, 2), 8, block=block, se=se, se_reduction=2), torch.randn(3, 3, 32, 32)
    model(x)  # moves the statistics of batch norm away from 0 and 1
    model.eval()
    assert isinstance(model.seblock, SEBlock) == (se == "stem")
    out = F.conv2d(x, model.conv1.weight, padding=1)
    out = squeeze_and_excite(model.seblock, torch.relu(model.bn1(out)) if block == "basic" else out)
    for residual_block in (*model.residual_layers[0], *model.residual_layers[1]):
        assert isinstance(residual_block.seblock, SEBlock) == (se == "block")
        out = by_hand(residual_block, out)
    out = out if block == "basic" else torch.relu(model.bn_last(out))
    torch.testing.assert_close(model(x), model.linear(out.mean((2, 3))))
