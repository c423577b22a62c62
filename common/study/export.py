"""Writes a model as a file that runs without this project and without torch, and a script that samples from it.

    python -m common export checkpoints/quick.safetensors --to openvino --out exported
    python -m common export checkpoints/quick.safetensors --to onnx --precision int8 --out exported
    cd exported && python sample.py        # needs numpy, pillow, and openvino or onnxruntime; makes images.png

DIR gets model.xml and model.bin, or model.onnx, and sample.py, which makes the images of --sampler ddim --eta 0 --seed
0. --precision int8 exports the graph that --engine openvino --precision int8 samples from: weights keep the codes of
FILE, activations are calibrated on training digits. In ONNX, each layer's input passes through QuantizeLinear and
DequantizeLinear. --precision mixed leaves in floating point the layers where 8 bits cost most. The command prints how
far the exported model's output is from torch's.
"""

import tempfile
from pathlib import Path

import torch

from common.errors import UserError
from common.options import Parser, file_name, positive_int
from common.presets import PRESETS, UNetConfig

MOST = 50  # images on which the exported model is compared


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("file", type=file_name, metavar="FILE", help="a baseline or a packed model")
    parser.add_argument("--to", choices=("openvino", "onnx"), required=True, help="the format")
    parser.add_argument("--out", type=file_name, required=True, metavar="DIR", help="where to write")
    parser.add_argument("--precision", choices=("fp32", "int8", "mixed"), default="fp32", help="of the products")
    parser.add_argument("--steps", type=positive_int, metavar="N", help="of sampling; default: the preset's")
    parser.add_argument("--data", choices=("mnist", "mnist5k"), help="to calibrate on; default: the preset's")
    parser.add_argument("--data-dir", type=file_name, default=Path("data"), metavar="DIR", help="holds MNIST/raw")
    options = parser.parse_args()
    export(options.file, options.to, options.out, options.precision, options.steps, options.data, options.data_dir)


def export(file: Path, target: str, out: Path, precision: str, steps: int | None, data: str | None, data_dir: Path):
    """What the command does. Raises UserError where a package or a file is missing."""
    from common.ddpm.digits import load_digits
    from common.ddpm.sampling import Sampling
    from common.ddpm.schedule import Schedule
    from common.engines.calibration import noised_images
    from common.engines.engine import OpenVINO, is_integer
    from common.engines.export import sampling_script, save_onnx, save_openvino
    from common.engines.integers import decoding_note, stored_integers
    from common.engines.openvino import require_installed
    from common.runtime.device import set_up_torch
    from common.runtime.files import write_atomically
    from common.study.run import read_checkpoint, require_writable

    needed = [
        "openvino",
        *(["nncf"] if is_integer(precision) else []),
        *(["onnx", "onnxruntime"] if target == "onnx" else []),
    ]
    require_installed(*needed, option=f"--to {target}")
    model = read_checkpoint(file, "FILE")
    if not isinstance(model.config, UNetConfig):
        raise UserError(f"FILE {file}: holds a network of diffusers; python -m common unpack writes its own folder")
    preset = PRESETS.get(model.metadata.get("preset"))
    if preset is None and not (steps and data):
        raise UserError(f"FILE {file}: does not say the preset that it is of; give --steps and --data")
    steps, timesteps = steps or preset.steps, model.config.timesteps
    if steps > timesteps:
        raise UserError(f"--steps {steps}: there are {timesteps} timesteps; give at most as many")
    require_writable(f"--out {out}", out, needed_mib=3 * sum(t.nbytes for t in model.state.values()) / 2**20)
    set_up_torch()
    if note := decoding_note(model):
        print(f"{file} {note}")
    data = data or preset.training.data
    images = load_digits(data, "train", data_dir)
    sampling = Sampling(MOST, "ddim", steps, 0.0, MOST, 0, "cpu", precision)
    out.mkdir(parents=True, exist_ok=True)
    network = model.network()
    with tempfile.TemporaryDirectory() as folder:
        graph = OpenVINO(images, data, Path(folder)).graph(network, model.sha256, stored_integers(model), sampling)
    probes = noised_images(images, Schedule(timesteps), steps, data)
    x, t = probes.x[:MOST], probes.t[:MOST]
    with tempfile.TemporaryDirectory(dir=out) as folder:
        if target == "openvino":
            unfinished = save_openvino(Path(folder), graph)
        else:
            unfinished = save_onnx(Path(folder), network, x, t, graph if is_integer(precision) else None)
        for made in sorted(Path(folder).iterdir()):  # model.bin before the model.xml that names it
            made.replace(out / made.name)
    path = out / unfinished.name
    script = sampling_script(target, timesteps, tuple(x.shape[1:]), steps, precision)
    write_atomically(out / "sample.py", script.encode())
    with torch.inference_mode():
        expected = network(x, t)
    difference = run_exported(target, path, x, t, precision) - expected
    relative = float(difference.square().mean().sqrt() / expected.square().mean().sqrt())
    files = [path, *path.parent.glob("model.bin")] if target == "openvino" else [path]
    size = sum(file.stat().st_size for file in files) / 2**20
    print(
        f"{', '.join(map(str, files))}: {size:.2f} MiB; predicted noise of {len(x)} noised digits against torch FP32: "
        f"relative error {relative:.1e}, largest difference {float(difference.abs().max()):.1e}"
    )
    print(f"images.png: cd {out} && python sample.py")


def run_exported(target: str, path: Path, x: torch.Tensor, t: torch.Tensor, precision: str = "fp32") -> torch.Tensor:
    """What the exported file predicts, as its own runtime reads it, and as the script beside it runs it."""
    if target == "openvino":
        import openvino

        from common.engines.openvino import HINTS

        compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": HINTS[precision]})
        return torch.from_numpy(compiled([x.numpy(), t.numpy()])[0])
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy(), "t": t.numpy()})[0])
