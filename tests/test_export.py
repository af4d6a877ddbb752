"""The exported network says what the trained one says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import models
from synthetic import NAMES
from tools import export
from utils import save_checkpoint

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
DEVICE = torch.device("cpu")


def make_checkpoint(path, normalize=True):
    torch.manual_seed(0)
    args = {"num_blocks": [1, 1, 1], "channels": 16, "se_reduction": 4, "block": "preact", "dropout": 0.5}
    model = models.build_model(**args).train()
    model(torch.randn(8, 3, 32, 32))  # batch norm gets statistics other than 0 and 1
    save_checkpoint({"model": model.state_dict(), "args": {**args, "normalize": normalize}, "classes": list(NAMES)},
                    path)
    return path


def test_onnx_gives_the_models_own_logits(tmp_path, recwarn):
    checkpoint, output = make_checkpoint(tmp_path / "best.pt"), tmp_path / "net.onnx"
    output.write_bytes(b"an older file")
    export.main(["--checkpoint", str(checkpoint), "--output", str(output)])
    assert not [w for w in recwarn if issubclass(w.category, (DeprecationWarning, FutureWarning, UserWarning))]
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    model, _ = evaluate.load_model(checkpoint, DEVICE)
    for count in (1, 5):
        images = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8)
        expected = evaluate.predict_logits(model, images, DEVICE).numpy()
        found, = session.run(["logits"], {"images": (images.permute(0, 3, 1, 2).float() / 255).numpy()})
        assert found.shape == (count, 10)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert np.ptp(expected) > 0.1  # so that the tolerance means something
    assert session.get_inputs()[0].shape == ["N", 3, 32, 32]
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(NAMES)
    assert str(Path(__file__).parent.parent).encode() not in output.read_bytes()  # nor any other path of this machine
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "net.onnx"]


def test_network_trained_without_normalisation_is_exported_without(tmp_path):
    model, info = evaluate.load_model(make_checkpoint(tmp_path / "best.pt", normalize=False), DEVICE)
    images = torch.randint(256, (3, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        found = export.FromUnitRange(model, info["normalize"])(images.permute(0, 3, 1, 2) / 255)
    torch.testing.assert_close(found, evaluate.predict_logits(model, images, DEVICE, normalize=False))


@pytest.mark.parametrize("checkpoint, output, message", [
    ("missing.pt", "net.onnx", "missing.pt is not there"),
    ("best.pt", "nowhere/net.onnx", "nowhere"),
    ("broken.pt", "net.onnx", "broken.pt is damaged"),
])
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys, checkpoint, output, message):
    make_checkpoint(tmp_path / "best.pt")
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    with pytest.raises(SystemExit) as stop:
        export.main(["--checkpoint", str(tmp_path / checkpoint), "--output", str(tmp_path / output)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "broken.pt"]


def test_missing_package_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(SystemExit):
        export.main(["--checkpoint", str(make_checkpoint(tmp_path / "best.pt")), "--output", str(tmp_path / "a.onnx")])
    assert "pip install onnxscript" in capsys.readouterr().err
