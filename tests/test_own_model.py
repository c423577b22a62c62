"""Models of diffusers: read from folders, packed, unpacked, and refused where they cannot be handled."""

import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

import common
from common.choose.layers import check_groups, layer_of, layer_weights, layers_in_order, parse_groups
from common.choose.rules import below_group_mean
from common.ddpm.folder import is_held_out, load_folder
from common.errors import UserError, WriteError
from common.formats import diffusers_folder
from common.formats.diffusers_folder import read_folder, write_folder
from common.formats.packed import load_model, save_model, tensor_shapes
from common.metrics.features import load_features
from common.runtime.files import write_atomically

BLOCKS = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
SMALL = {"sample_size": 16, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1,
         "attention_head_dim": 4, **BLOCKS}  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One network as a pipeline, as a flat folder and alone."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    network = UNet2DModel(**SMALL)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
    )
    DDIMPipeline(network, scheduler).save_pretrained(folder / "pipeline")
    shutil.copytree(folder / "pipeline" / "unet", folder / "flat")
    for path in (folder / "pipeline" / "scheduler").iterdir():
        shutil.copy(path, folder / "flat")
    network.save_pretrained(folder / "bare")
    return folder


@pytest.fixture
def copied(folders, tmp_path):
    """A copy of the pipeline that a test may damage."""
    return Path(shutil.copytree(folders / "pipeline", tmp_path / "model"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(60):
        path = folder / ("sub" if i % 2 else ".") / f"{i}.{('png', 'jpg', 'webp')[i % 3]}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(path)
    return folder


def edit(path: Path, **entries) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_three_kinds_of_folder_hold_the_same_network(folders):
    models = {name: read_folder(folders / name, name) for name in ("pipeline", "flat", "bare")}
    inside = read_folder(folders / "pipeline" / "unet", "unet")  # the scheduler is beside it
    assert models["pipeline"].sha256 == models["flat"].sha256 == inside.sha256
    assert models["bare"].config.noise["prediction_type"] == "epsilon"  # of DDPMScheduler's defaults
    assert models["bare"].sha256 != models["pipeline"].sha256
    network = UNet2DModel.from_pretrained(folders / "bare").eval()
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0, 700])
    with torch.no_grad():
        assert torch.equal(models["pipeline"].network()(x, t), network(x, t).sample)


def test_names_of_attention_that_diffusers_had_before(copied):
    path = copied / "unet" / WEIGHTS
    expected, state = read_folder(copied, "a").sha256, load_file(path)
    renamed = {}
    for name, tensor in state.items():
        for now, former in (
            (".to_q.", ".query."),
            (".to_k.", ".key."),
            (".to_v.", ".value."),
            (".to_out.0.", ".proj_attn."),
        ):
            name = name.replace(now, former)
        renamed[name] = tensor
    assert renamed.keys() != state.keys()
    save_file(renamed, path)
    assert read_folder(copied, "a").sha256 == expected


@pytest.mark.parametrize("fmt", ["fp32", "int4"])
def test_a_packed_file_needs_nothing_else(folders, tmp_path, fmt):
    model = read_folder(folders / "pipeline", "mine")
    packed = model.quantize(layer_weights(model.state), fmt, {"label": "Uniform", "strategy": "Uniform"})
    save_model(tmp_path / "file.safetensors", packed)
    again = load_model(tmp_path / "file.safetensors")
    assert (again.config, again.sha256) == (model.config, packed.sha256)
    network = common.load(tmp_path / "file.safetensors")
    assert type(network) is UNet2DModel and not network.training
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([3])
    with torch.no_grad():
        assert torch.equal(network(x, t).sample, packed.network()(x, t))


def test_a_folder_that_could_not_be_written_is_left_empty(folders, tmp_path, monkeypatch):
    model, written = read_folder(folders / "pipeline", "mine"), []

    def full(path, content):
        if written:
            raise error
        written.append(write_atomically(path, content))

    monkeypatch.setattr(diffusers_folder, "write_atomically", full)
    (tmp_path / "there").mkdir()
    errors = (WriteError("cannot be written (No space left on device)"), KeyboardInterrupt())
    for error, (folder, left) in product(errors, ((tmp_path / "there", True), (tmp_path / "new", False))):
        written.clear()
        with pytest.raises(type(error)):
            write_folder(model, folder)
        assert written and folder.exists() == left and not list(folder.rglob("*"))


def test_an_unpacked_folder_makes_the_images_of_the_packed_model(folders, tmp_path):
    model = read_folder(folders / "pipeline", "mine")
    packed = model.quantize(layer_weights(model.state), "int8", {"label": "Uniform", "strategy": "Uniform"})
    write_folder(packed, tmp_path / "out")
    pipe = DDIMPipeline.from_pretrained(tmp_path / "out")
    original = DDIMPipeline.from_pretrained(folders / "pipeline")
    assert type(pipe.scheduler) is DDIMScheduler and dict(pipe.scheduler.config) == dict(original.scheduler.config)
    for name, tensor in pipe.unet.state_dict().items():
        assert torch.equal(tensor, packed.state[name])
    draw = {"batch_size": 2, "num_inference_steps": 4, "output_type": "np"}
    images = [p(generator=torch.Generator().manual_seed(0), **draw).images for p in (pipe, original)]
    assert not np.array_equal(*images) and 10 * np.log10(1 / np.square(images[0] - images[1]).mean()) > 20
    write_folder(packed, tmp_path / "half", torch.float16)
    halved = DDIMPipeline.from_pretrained(tmp_path / "half").unet.state_dict()
    assert all(torch.equal(tensor, packed.state[name].half().float()) for name, tensor in halved.items())
    with pytest.raises(UserError, match="not an empty folder"):
        write_folder(packed, tmp_path / "half")


def test_without_diffusers_one_line_says_so(folders, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "common.ddpm.diffusers_unet")
    tensor_shapes.cache_clear()
    with pytest.raises(UserError, match=r"needs diffusers .*: pip install -r requirements-diffusers"):
        read_folder(folders / "bare", "a")


def test_our_own_network_unpacks_too(tiny_network, tmp_path):
    from common.formats.packed import full_precision

    model = full_precision(tiny_network.config, tiny_network.state_dict(), {"label": "mine"})
    write_folder(model, tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["channels"] == list(tiny_network.config.channels)


def test_layers_are_numbered_in_the_order_of_the_forward_pass(folders):
    names = layer_weights(tensor_shapes(read_folder(folders / "bare", "a").config))
    layers = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert layers_in_order(names) == layers
    assert not any(name.startswith(("conv_", "time_")) for name in names)
    values = {name: float(layers.index(layer_of(name))) for name in names}
    below = below_group_mean(values, "12/345")
    for group in (("down_blocks.0", "down_blocks.1"), ("mid_block", "up_blocks.0", "up_blocks.1")):
        members = [name for name in names if layer_of(name) in group]
        mean = sum(values[name] for name in members) / len(members)
        assert {name for name in members if values[name] < mean} == below & set(members) != set()
    many = {f"up_blocks.{i}.a.weight": float(i) for i in range(12)}
    assert layers_in_order(many)[9:] == ["up_blocks.9", "up_blocks.10", "up_blocks.11"]
    assert below_group_mean(many, "1,2,3,4,5,6,7,8,9,10/11,12") == {
        f"up_blocks.{i}.a.weight" for i in (0, 1, 2, 3, 4, 10)
    }


def test_groups():
    assert parse_groups("12/3") == [[1, 2], [3]] and parse_groups("1,2/3,10") == [[1, 2], [3, 10]]
    for text in ("1,2//3", "/1", "1,,2", "1a", "11", "1,1", ""):
        with pytest.raises(ValueError):
            parse_groups(text)
    for text in ("12", "1234", "0123"):
        with pytest.raises(ValueError):
            check_groups(text, 3)


def test_a_hash_of_the_name_splits_the_images(pictures):
    train, test = (load_folder(pictures, split, (3, 16, 16)) for split in ("train", "test"))
    assert train.shape[1:] == (3, 16, 16) and len(train) + len(test) == 60
    names = [path.relative_to(pictures).as_posix() for path in pictures.rglob("*.*") if path.is_file()]
    assert len(test) == sum(map(is_held_out, names)) > 5
    first = next(name for name in sorted(names) if not is_held_out(name) and name.endswith(".png"))
    place = [name for name in sorted(names) if not is_held_out(name)].index(first)
    pixels = np.array(Image.open(pictures / first))[2:18]  # the middle 16 of its 20 rows
    assert np.array_equal(train[place].permute(1, 2, 0).numpy(), pixels)
    assert load_folder(pictures, "test", (1, 8, 8)).shape[1:] == (8, 8)


def test_random_features_are_the_same_everywhere():
    network = load_features("random", torch.device("cpu"), channels=3)
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features, probabilities = network.extract(images)
    assert features.shape == (5, network.dimensions) and probabilities is None
    assert network.sha256.startswith("8f65434d")  # that of the rows in reference/coloured
    assert not torch.equal(features[0], features[1])


CONFIGS = {
    "another class": ("unet", {"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
    "classes": ("unet", {"num_class_embeds": 10}, "num_class_embeds"),
    "learned variance": ("unet", {"out_channels": 6}, "out_channels of 6"),
    "no size": ("unet", {"sample_size": None}, "sample_size"),
    "a text for a number": ("unet", {"layers_per_block": "two"}, "layers_per_block of two"),
    "a huge number": ("unet", {"layers_per_block": 10**9}, "layers_per_block"),
    "a number that no float holds": ("scheduler", {"beta_end": 10**400}, "beta_end"),
    "one timestep": ("scheduler", {"num_train_timesteps": 1}, "num_train_timesteps of 1"),
    "an unknown entry": ("unet", {"addition_embed_type": "text"}, "addition_embed_type"),
    "an unknown block": ("unet", {"down_block_types": ["DownBlock2D", "KDownBlock2D"]}, "down_block_types"),
    "lists of two lengths": ("unet", {"block_out_channels": [8, 16, 16]}, "not of one length"),
    "groups that do not divide": ("unet", {"norm_num_groups": 5}, "diffusers makes no UNet2DModel"),
    "another shape": ("unet", {"block_out_channels": [8, 8]}, "tensor"),
    "Fourier embedding": ("unet", {"time_embedding_type": "fourier"}, "time_embedding_type"),
    "flow matching": ("scheduler", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEuler"),
    "a prediction": ("scheduler", {"prediction_type": "flow"}, "prediction_type of flow"),
    "a schedule": ("scheduler", {"beta_schedule": "quadratic"}, "beta_schedule of quadratic"),
    "thresholding": ("scheduler", {"thresholding": True}, "thresholding"),
    "no noise at the end": ("scheduler", {"rescale_betas_zero_snr": True, "prediction_type": "epsilon"}, "zero_snr"),
    "betas of another number": ("scheduler", {"trained_betas": [0.1, 0.2]}, "trained_betas"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_are_refused(copied, case):
    part, entries, said = CONFIGS[case]
    edit(copied / part / ("config.json" if part == "unet" else "scheduler_config.json"), **entries)
    _refused(copied, said)


def _refused(folder: Path, said: str) -> None:
    with pytest.raises(UserError) as raised:
        read_folder(folder, "a")
    message = str(raised.value)
    assert message.startswith(f"--model {folder}") and said in message and "\n" not in message, message


def _only_bin(folder: Path) -> None:
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.bin")


def _two_files(folder: Path) -> None:
    shutil.copy(folder / "unet" / WEIGHTS, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")


def _not_finite(folder: Path) -> None:
    state = load_file(folder / "unet" / WEIGHTS)
    save_file(state | {"conv_in.bias": state["conv_in.bias"] * float("nan")}, folder / "unet" / WEIGHTS)


def _one_tensor_less(folder: Path) -> None:
    state = load_file(folder / "unet" / WEIGHTS)
    del state["conv_in.bias"]
    save_file(state, folder / "unet" / WEIGHTS)


def _truncated(folder: Path) -> None:
    path = folder / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-9])


FOLDERS = {
    "no config": (lambda folder: (folder / "unet" / "config.json").unlink(), "no config.json"),
    "a config that is not JSON": (lambda folder: (folder / "unet" / "config.json").write_text("{"), "config.json"),
    "no weights": (lambda folder: (folder / "unet" / WEIGHTS).unlink(), WEIGHTS),
    "a pickle": (_only_bin, "pickle"),
    "two files of weights": (_two_files, "2 files of weights"),
    "numbers that are not finite": (_not_finite, "not finite"),
    "a tensor is missing": (_one_tensor_less, "conv_in.bias is missing"),
    "truncated weights": (_truncated, "cannot be read"),
    "latents": (lambda folder: edit(folder / "model_index.json", vae=["diffusers", "AutoencoderKL"]), "vae"),
    "nothing": (shutil.rmtree, "no such folder"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_are_refused(copied, case):
    damage, said = FOLDERS[case]
    damage(copied)
    _refused(copied, said)


def _grey(folder: Path) -> None:
    Image.open(next(folder.glob("*.png"))).convert("L").save(next(folder.glob("*.png")))


def _broken(folder: Path) -> None:
    path = next(folder.glob("*.png"))
    path.write_bytes(path.read_bytes()[:100])


def _transparent(folder: Path) -> None:
    image = Image.open(next(folder.glob("*.png"))).convert("RGBA")
    image.putalpha(100)
    image.save(next(folder.glob("*.png")))


PICTURES = {
    "none": (lambda folder: [path.unlink() for path in folder.rglob("*.*") if path.is_file()], "no images"),
    "few": (lambda folder: [path.unlink() for path in sorted(folder.rglob("*.*"))[6:] if path.is_file()], "only"),
    "grey": (_grey, "is grey"),
    "broken": (_broken, "not a readable image"),
    "transparent": (_transparent, "transparent"),
    "no folder": (shutil.rmtree, "no such folder"),
}


@pytest.mark.parametrize("case", PICTURES)
def test_images_that_are_refused(pictures, tmp_path, case):
    folder = Path(shutil.copytree(pictures, tmp_path / "copy"))
    damage, said = PICTURES[case]
    damage(folder)
    with pytest.raises(UserError) as raised:
        for split in ("train", "test"):
            load_folder(folder, split, (3, 16, 16))
    assert said in str(raised.value) and str(folder) in str(raised.value) and "\n" not in str(raised.value)


def test_a_script_takes_a_model_and_images(folders, pictures, tiny_preset, tmp_path, monkeypatch, capsys):
    """Rows, packed files and a report, without a word of digits; the packed file is all that its row needs."""
    import layer_budget
    import simplediffusion
    from common.study import report, sensitivity, timesteps
    from common.study.rows import ResultStore

    def run(module, *arguments):
        monkeypatch.setattr("sys.argv", [module.__name__, *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    given = ("--data", pictures, "--images", 257, "--steps", 2, "--device", "cpu")
    model = ("--model", folders / "pipeline")
    text = run(layer_budget, *model, *given, "--times", 3, "--finetune", 2)
    assert "random features" in text and "held-out" in text and "layers 1 to 6" not in text
    rows = ResultStore(Path("results/pipeline/results.jsonl")).rows()
    by_label = {row.label: row for row in rows}
    budget, tuned = by_label["Budget 3x (entropy)"], by_label["Budget 3x, 2 updates (entropy)"]
    assert tuned.file_mib <= by_label["Baseline (FP32)"].size_mib / 3 and tuned.loss_increase
    assert budget.psnr and budget.inception_score is None and budget.settings.metric.startswith("random")
    again = run(simplediffusion, "--checkpoint", budget.file, *given, "--out", "again")
    assert "--model DIR names it" in again
    (alone,) = ResultStore(Path("again/results.jsonl")).rows()[-1:]
    assert (alone.weights, alone.fid_unbiased) == (budget.weights, budget.fid_unbiased)
    assert "Budget 3x (entropy)" in run(report, *model)
    fed = run(simplediffusion, *model, *given, "--format", "int4", "--rounding", "feedback")
    assert "Uniform (INT4, feedback)" in fed
    assert "INT4 at timesteps" in run(timesteps, *model, *given, "--format", "int4")
    measured = run(sensitivity, *model, "--data", pictures, "--formats", "int4", "--digits", 4, "--device", "cpu")
    assert "up_blocks.1" in measured and "Model pipeline" in measured
    with pytest.raises(UserError, match="--retrain: is not needed"):
        run(simplediffusion, *model, *given, "--retrain")
    with pytest.raises(UserError, match="--metric mnist"):
        run(simplediffusion, *model, *given, "--metric", "mnist")
    with pytest.raises(UserError, match="name a folder"):
        run(simplediffusion, *model, "--data", "mnist5k")
    with pytest.raises(UserError, match="--preset quick"):
        run(simplediffusion, *model, *given, "--preset", "quick")
    with pytest.raises(UserError, match="goes with --model"):
        run(simplediffusion, "--preset", "quick", "--data", pictures)
