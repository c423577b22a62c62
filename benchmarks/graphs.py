"""OpenVINO's graphs of a network for each precision, with activations calibrated on random images."""

from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from common.ddpm.sampling import Sampling
from common.ddpm.unet import UNet
from common.engines.calibration import BATCH as CALIBRATION_BATCH
from common.engines.engine import OpenVINO
from common.presets import PRECISIONS


def graphs_of(network: UNet, batch: int) -> dict:
    """{precision: openvino.Model}; timesteps and batches as when `batch` images are sampled."""
    images = torch.randint(0, 256, (4 * CALIBRATION_BATCH, 32, 32), dtype=torch.uint8)
    graphs = {}
    with TemporaryDirectory() as folder:  # mixed finds there what int8 has calibrated
        engine = OpenVINO(images, "noise", Path(folder))
        for precision in PRECISIONS:
            sampling = Sampling(batch, "ddim", 2, 1.0, batch, 0, "cpu", precision)
            graphs[precision] = engine.graph(deepcopy(network), "", {}, sampling)
    return graphs
