"""Exported models predict what the network does, and their script makes the same images without torch."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.ddpm.sampling import Sampling, generate
from common.ddpm.unet import UNet
from common.engines.export import sampling_script
from common.errors import UserError
from common.formats.packed import full_precision, save_model
from common.study.export import export

openvino = pytest.importorskip("openvino")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

STEPS = 3
DIGITS = 60


@pytest.fixture
def file(tiny_preset, tiny_network, tmp_path, monkeypatch):
    """A baseline's file; calibration takes a few digits."""
    from common.engines import calibration, costs

    monkeypatch.setattr(calibration, "IMAGES", 20)
    monkeypatch.setattr(costs, "IMAGES", 16)
    path = tmp_path / "model.safetensors"
    metadata = {"label": "Baseline (FP32)", "preset": "quick", "digits_seen": 0, "training": {}}
    save_model(path, full_precision(tiny_network.config, tiny_network.state_dict(), metadata))
    return path


def with_output_bias(network, maps):
    biased = UNet(replace(network.config, output_bias=maps, output_contrast=True)).eval()
    biased.load_state_dict(network.state_dict(), strict=False)
    for parameter in biased.output_bias.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    return biased


def images_of(folder) -> np.ndarray:
    """(10, 32, 32): what sample.py makes, in a process that has no torch."""
    without = "import sys; sys.modules['torch'] = None; exec(open('sample.py').read())"
    subprocess.run([sys.executable, "-I", "-c", without], cwd=folder, check=True, timeout=120)
    row = np.asarray(Image.open(folder / "images.png"))
    return np.stack(np.split(row, 10, axis=1))


@pytest.mark.parametrize(("target", "maps"), [("openvino", 0), ("openvino", 2), ("onnx", 0), ("onnx", 2)])
def test_fp32_makes_the_same_images(file, tiny_network, tmp_path, capsys, target, maps):
    if maps:
        tiny_network = with_output_bias(tiny_network, maps)
        metadata = {"label": "Budget", "preset": "quick", "digits_seen": 0, "training": {}}
        save_model(file, full_precision(tiny_network.config, tiny_network.state_dict(), metadata))
    export(file, target, tmp_path / "out", "fp32", STEPS, None, tmp_path)
    assert "relative error" in capsys.readouterr().out
    sampling = Sampling(10, "ddim", STEPS, 0.0, 10, 0, "cpu", "fp32")
    expected = generate(tiny_network, "w", sampling, torch.device("cpu"), tmp_path, "torch").numpy()
    made = images_of(tmp_path / "out")
    assert np.abs(made.astype(int) - expected).max() <= 1  # of 255, where rounding falls otherwise
    assert len(np.unique(expected)) > 50


def test_8_bits_of_both_formats_are_the_same_integers(file, tiny_network, tmp_path):
    """ONNX's file between QuantizeLinear and DequantizeLinear, OpenVINO's with its own operations."""
    import onnxruntime

    for target in ("openvino", "onnx"):
        export(file, target, tmp_path / target, "int8", STEPS, None, tmp_path)
    x = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0)).numpy()
    t = np.array([3, 250, 700, 999])
    compiled = openvino.Core().compile_model(
        tmp_path / "openvino/model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx/model.onnx"), providers=["CPUExecutionProvider"])
    by_openvino, by_onnx = compiled([x, t])[0], session.run(None, {"x": x, "t": t})[0]
    with torch.inference_mode():
        exact = tiny_network(torch.from_numpy(x), torch.from_numpy(t)).numpy()
    error = np.square(by_openvino - exact).mean()
    assert 0 < np.square(by_onnx - by_openvino).mean() < 0.1 * error < 1e-3 * np.square(exact).mean()
    graph = onnx.load(tmp_path / "onnx/model.onnx").graph
    products = sum(isinstance(m, torch.nn.Conv2d | torch.nn.ConvTranspose2d | torch.nn.Linear)
                   for m in tiny_network.modules())  # fmt: skip
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QuantizeLinear") == products and kinds.count("DequantizeLinear") == 2 * products
    codes = {tensor.name: tensor for tensor in graph.initializer if tensor.name.endswith(".weight_codes")}
    assert len(codes) == products and {tensor.data_type for tensor in codes.values()} == {onnx.TensorProto.INT8}
    assert images_of(tmp_path / "onnx").shape == images_of(tmp_path / "openvino").shape == (10, 32, 32)


def test_a_package_that_is_missing_and_a_file_that_is_none_are_said_before_any_work(file, tmp_path, monkeypatch):
    from common.engines import openvino as engine

    with pytest.raises(UserError, match=r"^FILE .*absent"):
        export(tmp_path / "absent", "openvino", tmp_path / "out", "fp32", None, None, tmp_path)
    with pytest.raises(UserError, match=r"^--steps 1001"):
        export(file, "openvino", tmp_path / "out", "fp32", 1001, None, tmp_path)
    monkeypatch.setattr(engine, "installed_version", lambda package: None if package == "onnxruntime" else "1")
    with pytest.raises(UserError, match=r"^--to onnx: onnxruntime cannot be found; pip install -r requirements-"):
        export(file, "onnx", tmp_path / "out", "fp32", None, None, tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_script_in_the_docs_is_the_one_that_is_written():
    page = (Path(__file__).parent.parent / "docs/export.md").read_text()
    assert f"```python\n{sampling_script('openvino', 1000, (1, 32, 32), 20, 'fp32')}```" in page
