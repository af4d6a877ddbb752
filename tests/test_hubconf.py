"""torch.hub, from another folder and without this repository on Python's path."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from predict import load_model

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import json, sys, torch
images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
for kwargs in ({"pretrained": False}, {"pretrained": False, "num_blocks": [1, 1]}, {"pretrained": True}):
    model = torch.hub.load(sys.argv[1], "se_resnet", source="local", **kwargs).eval()
    print(json.dumps([sum(p.numel() for p in model.parameters()), model(images).tolist()]))
"""


def test_hub_loads_new_and_trained_networks(trained, tmp_path):
    copy = shutil.copytree(ROOT, tmp_path / "copy", ignore=lambda _, names: {*names} & {  # of the program alone
        ".git", ".venv", ".hypothesis", "data", "checkpoints", "docs", "results", "tests", "tools", "shared"})
    (copy / "checkpoints").mkdir()
    shutil.copy(trained, copy / "checkpoints/pretrained.pt")
    out = subprocess.run([sys.executable, "-c", SCRIPT, copy], cwd=tmp_path, check=True, stdout=subprocess.PIPE).stdout
    (size, logits), (small, _), (_, found) = map(json.loads, out.splitlines())
    assert size == 4_697_742 and small < size and torch.tensor(logits).shape == (2, 10)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.tensor(found), load_model(trained)[0](images), rtol=1e-4, atol=1e-4)


def test_hub_loads_the_pretrained_network():
    model = torch.hub.load(str(ROOT), "se_resnet", source="local", pretrained=True)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ValueError, match="leave out num_blocks"):
        torch.hub.load(str(ROOT), "se_resnet", source="local", pretrained=True, num_blocks=[1, 1])
