"""The network: counts, the published table, names, shapes, gradients, and what is refused."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import train
from models import build_model, count_parameters

TABLE = Path(__file__).parent / "figure2.tsv"


@pytest.mark.parametrize(("choices", "count"), [
    ({}, 4_697_742),
    ({"se": "none"}, 4_697_162),
    ({"se": "block"}, 4_733_610),
    ({"block": "preact"}, 4_696_974),
    ({"num_blocks": (2, 2, 2, 2), "channels": 32}, 2_797_772),
    ({"dropout": 0.1}, 4_697_742),
])
def test_parameter_counts(choices, count):
    assert count_parameters(build_model(**choices)) == count


def test_count_of_four_layers_by_hand():
    def block(c_in, c_out):
        shortcut = c_in * c_out + 2 * c_out if c_in != c_out else 0
        return 9 * c_in * c_out + 2 * c_out + 9 * c_out * c_out + 2 * c_out + shortcut
    stem = 3 * 32 * 9 + 2 * 32 + (32 * 2 + 2) + (2 * 32 + 32)
    layers = block(32, 32) + block(32, 64) + block(64, 128) + block(128, 256)
    layers += sum(block(c, c) for c in (32, 64, 128, 256))
    assert stem + layers + 256 * 10 + 10 == 2_797_772 == count_parameters(build_model((2, 2, 2, 2), 32))


def test_summary_equals_the_published_table(capsys):
    assert train.main(["--summary"]) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^ *(\w+-\d+) +(\[.*\]) +([\d,]+)$", printed, re.M)
    assert ["\t".join(row) for row in rows] == TABLE.read_text().splitlines()
    assert len(rows) == 68
    for line in ("Total params: 4,697,742", "Non-trainable params: 0", "Input size (MB): 0.01",
                 "Forward/backward pass size (MB): 19.13", "Params size (MB): 17.92",
                 "Estimated Total Size (MB): 37.06"):
        assert line in printed.splitlines()


def test_dropout_is_in_the_table_only_where_used(capsys):
    train.main(["--summary", "--dropout", "0.2"])
    assert len(re.findall(r"^ +Dropout-\d+", capsys.readouterr().out, re.M)) == 11 + 1


def test_published_names():
    names = {name.rsplit(".", 1)[0] for name in build_model().state_dict()}
    expected = {"conv1", "bn1", "seblock.conv1", "seblock.conv2", "linear"}
    for layer, blocks in enumerate((4, 4, 3)):
        for block in range(blocks):
            parts = ["conv1", "bn1", "conv2", "bn2"] + (["shortcut.0", "shortcut.1"] if layer and not block else [])
            expected |= {f"residual_layers.{layer}.{block}.{part}" for part in parts}
    assert names == expected


@pytest.mark.parametrize("choices", [
    {}, {"se": "block"}, {"se": "none"}, {"block": "preact"}, {"block": "preact", "se": "block", "dropout": 0.3},
    {"kernel_sizes": (5, 3, 1), "shortcut_kernel_sizes": (1, 3, 5)}, {"pool_size": 4}, {"dropout": 0.5},
    {"num_blocks": (1, 1, 1, 1, 1, 1), "channels": 8, "se": "none"},
])
def test_every_parameter_gets_a_gradient(choices):
    torch.manual_seed(0)
    model = build_model(**{"num_blocks": (1, 2, 1), "channels": 16, "se_reduction": 4, **choices})
    logits = model(torch.randn(4, 3, 32, 32))
    assert logits.shape == (4, 10)
    logits.logsumexp(1).sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


def test_basic_block_computes_what_the_paper_says():
    torch.manual_seed(0)
    block = build_model((1, 1), 8, se="none").residual_layers[1][0].eval()
    x = torch.randn(2, 8, 32, 32)
    out = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    expected = torch.relu(out + block.shortcut[1](block.shortcut[0](x)))
    torch.testing.assert_close(block(x), expected)


def test_preact_block_computes_what_the_paper_says():
    torch.manual_seed(0)
    block = build_model((1, 1), 8, block="preact", se="none").residual_layers[1][0].eval()
    x = torch.randn(2, 8, 32, 32)
    activated = torch.relu(block.bn1(x))
    expected = block.conv2(torch.relu(block.bn2(block.conv1(activated)))) + block.shortcut(activated)
    torch.testing.assert_close(block(x), expected)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in block.shortcut.modules())


def test_se_in_blocks_acts_before_the_addition():
    torch.manual_seed(0)
    model = build_model((1,), 16, se="block").eval()
    assert model.seblock is None
    block, x = model.residual_layers[0][0], torch.randn(2, 16, 32, 32)
    out = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    gate = block.seblock.conv2(torch.relu(block.seblock.conv1(out.mean((2, 3), keepdim=True)))).sigmoid()
    torch.testing.assert_close(block(x), torch.relu(out * gate + x))


def test_pool_size_widens_the_linear_layer():
    assert build_model(pool_size=4).linear.in_features == 256 * 4
    assert build_model(pool_size=3).linear.in_features == 256 * 4  # 8 // 3 windows a side


@pytest.mark.parametrize(("choices", "message"), [
    ({"kernel_sizes": 4}, "--kernel-sizes 4"),
    ({"kernel_sizes": (3, 3)}, "--kernel-sizes has 2 values"),
    ({"shortcut_kernel_sizes": 2}, "--shortcut-kernel-sizes 2"),
    ({"se_reduction": 65}, "--se-reduction 65"),
    ({"se_reduction": 0}, "--se-reduction 0"),
    ({"pool_size": 9}, "--pool-size 9"),
    ({"num_blocks": (4, 0)}, "--num-blocks 4 0"),
    ({"num_blocks": ()}, "--num-blocks"),
    ({"channels": 7}, "--channels 7"),
    ({"dropout": 1.0}, "--dropout 1.0"),
    ({"block": "bottleneck"}, "--block bottleneck"),
    ({"se": "everywhere"}, "--se everywhere"),
    ({"num_blocks": (5, 5, 5)}, "--max-params 5,000,000"),
])
def test_impossible_choices_are_refused_by_name(choices, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_model(**choices)


def test_no_limit_on_parameters():
    assert count_parameters(build_model((1, 1, 1), 160, max_params=0)) > 5_000_000
