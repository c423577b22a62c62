"""Folders of diffusers as models, and models as folders that its from_pretrained loads."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_save

from common.ddpm.architecture import described
from common.ddpm.pipelines import DiffusersConfig
from common.errors import UserError
from common.formats.packed import Model, full_precision, tensor_shapes
from common.runtime.files import write_atomically
from common.runtime.sealed import shorten

WEIGHTS = "diffusion_pytorch_model.safetensors"
LONGEST_CONFIG = 2**20  # bytes
# Names that attention had before version 0.17 of diffusers.
_FORMER = ((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0."))


def read_folder(folder: Path, name: str) -> Model:
    """The model of a folder of diffusers, all FP32, which calls itself `name`; weights from safetensors alone.

    folder: of a pipeline (unet/ and scheduler/), one that holds all files itself, or that of a UNet2DModel alone.
    Raises UserError, which names the folder or the file, the fault and the remedy.
    """
    config, place = read_configs(folder)
    if _scheduler_folder(folder, place) is None:
        print(f"{folder} has no scheduler_config.json: its noise is taken for DDPMScheduler's (linear, epsilon)")
    path = _weights_file(place)
    try:
        state = _read_weights(path, config)
    except ValueError as error:
        raise UserError(f"--model {folder}: {path.name} does not fit its config.json: {error}; get it anew") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"--model {folder}: {path} cannot be read ({shorten(error)}); get it anew") from None
    return full_precision(config, state, {"label": "Baseline (FP32)", "preset": name})


def read_configs(folder: Path) -> tuple[DiffusersConfig, Path]:
    """What the folder's configs say, and the folder that holds the weights. Raises UserError."""
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "no such folder"
        raise UserError(f"--model {folder}: {what}; name the folder of a diffusers model")
    place = next((path for path in (folder / "unet", folder) if (path / "config.json").is_file()), None)
    if place is None:
        raise UserError(
            f"--model {folder}: no config.json there or in unet/; name a folder that save_pretrained has written"
        )
    index = _read_json(folder, next((p for p in (folder, place.parent) if _is_index(p)), folder) / "model_index.json")
    others = {key for key in index or {} if not key.startswith("_")} - {"unet", "scheduler"}
    if others:
        raise UserError(
            f"--model {folder}: its pipeline has other parts, {', '.join(sorted(map(shorten, others)))}; models that "
            "make images from noise alone are supported"
        )
    scheduler = _scheduler_folder(folder, place)
    try:
        config = DiffusersConfig.of(
            _read_json(folder, place / "config.json"),
            None if scheduler is None else _read_json(folder, scheduler / "scheduler_config.json"),
            (index or {}).get("_class_name"),
        )
        tensor_shapes(config)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"--model {folder}: {error}; name another model, or mend its config") from None
    return config, place


def _scheduler_folder(folder: Path, place: Path) -> Path | None:
    """The one that holds the scheduler's config, where `place` holds that of the network; None where there is none."""
    paths = [folder / "scheduler", folder, *([place.parent / "scheduler"] if _is_index(place.parent) else [])]
    return next((path for path in paths if (path / "scheduler_config.json").is_file()), None)


def _is_index(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def _read_json(folder: Path, path: Path) -> dict | None:
    """The object in a file; None where it is absent. Raises UserError."""
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > LONGEST_CONFIG:
            raise ValueError("larger than a config is")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object of JSON")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--model {folder}: {path} cannot be read ({shorten(error)}); get it anew") from None
    return content


def _weights_file(place: Path) -> Path:
    """The one file of weights in a folder. Raises UserError where there is none, or more than one."""
    found = sorted(path for path in place.iterdir() if path.suffix == ".safetensors" and path.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found[:3])
        raise UserError(f"--model {place}: has {len(found)} files of weights ({names}); leave the one that is meant")
    if list(place.glob("*.bin")) or list(place.glob("*.pt")):
        raise UserError(
            f"--model {place}: its weights are a pickle, which can run code and is not read; save them as safetensors: "
            "UNet2DModel.from_pretrained(DIR).save_pretrained(DIR)"
        )
    raise UserError(f"--model {place}: no weights there; {WEIGHTS} is missing")


def _read_weights(path: Path, config: DiffusersConfig) -> dict[str, torch.Tensor]:
    """{name: float32}, checked by its header before it is read. Raises ValueError where the file does not fit."""
    expected = tensor_shapes(config)
    with safe_open(path, "pt") as file:
        names = {_renamed(name): name for name in file.keys()}  # noqa: SIM118, it is not a dict
        for name in expected.keys() - names.keys():
            raise ValueError(f"tensor {name} is missing")
        for name in names.keys() - expected.keys():
            raise ValueError(f"tensor {shorten(name)} is unknown to this architecture")
        for name, (shape, _) in expected.items():
            found = tuple(file.get_slice(names[name]).get_shape())
            if found != tuple(shape):
                raise ValueError(f"tensor {name} is {found}, the network has {tuple(shape)}")
        state = {name: file.get_tensor(names[name]) for name in expected}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise ValueError(f"tensor {name} is no tensor of real numbers")
        if not tensor.isfinite().all():
            raise ValueError(f"tensor {name} holds numbers that are not finite")
    return {name: tensor.float() for name, tensor in state.items()}


def _renamed(name: str) -> str:
    for former, now in _FORMER if ".attentions." in name else ():
        name = name.replace(former, now)
    return name


def write_folder(model: Model, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes the model as a folder that is new or empty: of diffusers a whole pipeline, of this project's own network
    config.json and model.safetensors. Raises UserError, and then leaves nothing behind."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {folder}: is there and not an empty folder; name a new one")
    large = [name for name, tensor in model.state.items() if not tensor.to(dtype).isfinite().all()]
    if large:
        raise UserError(f"--dtype fp16: {large[0]} has weights too large for it; use --dtype fp32")
    weights = safetensors_save({k: v.to(dtype).contiguous() for k, v in model.state.items()}, {"format": "pt"})
    made = not folder.exists()
    try:
        for name, content in _files(model, weights).items():
            write_atomically(folder / name, content)
    except BaseException:  # Ctrl-C too: the same command has to find the folder as it was
        for part in [folder] if made else folder.iterdir():
            shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
        raise


def _files(model: Model, weights: bytes) -> dict[str, bytes]:
    def text(content: dict) -> bytes:
        return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()

    if not isinstance(model.config, DiffusersConfig):
        config = {"_class_name": "simplediffusion UNet", **described(model.config)}
        return {"config.json": text(config), "model.safetensors": weights}
    from diffusers import __version__

    made_by = {"_diffusers_version": __version__}
    scheduler = json.loads(model.config.scheduler_json)
    name = scheduler.get("_class_name", "DDPMScheduler")
    index = {
        "_class_name": model.config.pipeline,
        "scheduler": ["diffusers", name],
        "unet": ["diffusers", "UNet2DModel"],
    }
    return {
        "model_index.json": text(index | made_by),
        "scheduler/scheduler_config.json": text(scheduler | {"_class_name": name} | made_by),
        "unet/config.json": text({"_class_name": "UNet2DModel", **model.config.unet} | made_by),
        f"unet/{WEIGHTS}": weights,
    }
