"""tools/export.py: the ONNX file gives the logits of the trained network."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint import load_checkpoint
from evaluate import load_checkpoint_model, predict_logits
from predict import load_model
from tools import export


@pytest.mark.slow
def test_onnx_gives_the_logits_of_the_network(trained, test_set, tmp_path, recwarn):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    output = tmp_path / "new" / "net.onnx"
    export.main([str(trained), "--output", str(output)])
    assert not [w for w in recwarn if issubclass(w.category, (DeprecationWarning, FutureWarning, UserWarning))]
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    model, classes, _ = load_checkpoint_model(trained)
    for count in (1, 5):
        images = test_set.images[:count]
        expected = predict_logits(model, images, "cpu").numpy()
        logits, = session.run(["logits"], {"images": (images.permute(0, 3, 1, 2).float() / 255).numpy()})
        assert logits.shape == (count, 10) and np.ptp(expected) > 0.1  # so that the tolerance means something
        np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert session.get_inputs()[0].shape == ["N", 3, 32, 32]
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == classes
    assert str(Path(__file__).parent.parent).encode() not in output.read_bytes()  # no local paths
    assert [path.name for path in output.parent.iterdir()] == ["net.onnx"]


def test_a_shared_checkpoint_holds_the_averaged_weights_in_half_the_space(run, tmp_path, refused):
    assert run("--ema", "0.5") == 0
    source, shared = tmp_path / "run" / "last.pt", tmp_path / "shared.pth"
    assert export.main([str(source), "--output", str(shared)]) == 0
    saved, found = load_checkpoint(source), load_checkpoint(shared)
    assert {*found} == {"version", "model", "args", "epoch", "classes"} and found["epoch"] == 2
    assert str(tmp_path).encode() not in shared.read_bytes()  # no folders of this machine
    for name, value in saved["ema"].items():
        is_half = found["model"][name].dtype == torch.float16
        assert is_half == (value.is_floating_point() and "running_" not in name)
        torch.testing.assert_close(found["model"][name].float(), value.float(), rtol=1e-3 * is_half,
                                   atol=1e-7 * is_half)
    images = torch.rand(4, 3, 32, 32)
    (model, classes), (other, _) = load_model(shared), load_model(source)
    assert all(p.dtype == torch.float32 for p in model.parameters()) and classes == saved["classes"]
    torch.testing.assert_close(model(images), other(images), rtol=0.01, atol=0.01)
    before = source.read_bytes()
    error = refused(export.main, [str(source), "--output", f"{source.parent}/../run/last.pt"])
    assert "last.pt is an input or another output" in error and source.read_bytes() == before


@pytest.mark.parametrize("checkpoint, output, message", [
    ("missing.pt", "new/net.onnx", "missing.pt"), ("last.pt", "net.pb", "ends in .onnx, .pt or .pth"),
    ("last.pt", "file/net.onnx", "file"), ("last.pt", "net.onnx", "pip install onnxscript")])
def test_mistakes_are_one_line_and_leave_nothing(trained, tmp_path, monkeypatch, refused, checkpoint, output, message):
    missing = "onnxscript" if output == "net.onnx" else None
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == missing else object())
    monkeypatch.setattr(export, "to_onnx", None)  # found before anything is computed
    (tmp_path / "file").touch()
    assert message in refused(export.main, [str(trained.with_name(checkpoint)), "--output", str(tmp_path / output)])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
