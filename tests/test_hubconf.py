"""torch.hub: needs only three files of the repository, and leaves a caller's own modules alone."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from runs import ROOT

from predict import load_model

SCRIPT = """
import json, sys, torch

def import_own_modules():
    import data, models, utils
    assert data.mine == models.mine == utils.mine == 1

if sys.argv[2] == "before":
    import_own_modules()
path, images = list(sys.path), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
for kwargs in ({"num_blocks": [1, 1]}, {}, {"pretrained": True}):
    model = torch.hub.load(sys.argv[1], "se_resnet", source="local", **kwargs)
    print(json.dumps([sum(p.numel() for p in model.parameters()), model.training, model.eval()(images).tolist()]))
files = [str(getattr(module, "__file__", "")) for module in sys.modules.values()]
assert sys.path == path and not [file for file in files if file.startswith(sys.argv[1])]
assert sys.argv[2] == "before" or not sys.modules.keys() & {"data", "models", "utils"}
import_own_modules()
"""


@pytest.mark.parametrize("order", ["before", "after"])
def test_hub_loads_networks_beside_modules_of_the_same_names(order, tmp_path):
    for name in ("hubconf.py", "models/se_resnet.py", "checkpoints/pretrained.pt"):
        (tmp_path / "repo" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "repo" / name)
    for name in ("utils.py", "data.py", "models/__init__.py"):
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).write_text("mine = 1\n")
    done = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / "repo", order], cwd=tmp_path / "own", text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    (small, *_), (size, training, _), (_, trained_training, logits) = map(json.loads, done.stdout.splitlines())
    assert small < size == 4_697_742 and training and not trained_training
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = load_model(ROOT / "checkpoints/pretrained.pt")[0](images)
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-4, atol=1e-4)
