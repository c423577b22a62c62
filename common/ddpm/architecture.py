"""Networks of either kind from their configs: this project's own U-Net, or a UNet2DModel of diffusers."""

import json
from dataclasses import asdict
from typing import TypeAlias

import torch
from torch import nn

from common.ddpm.betas import betas_of
from common.ddpm.pipelines import DiffusersConfig
from common.ddpm.schedule import Schedule
from common.ddpm.unet import UNet
from common.errors import UserError, one_line
from common.presets import UNetConfig

Architecture: TypeAlias = UNetConfig | DiffusersConfig


def described(config: Architecture) -> dict:
    """What a file says of the network, for JSON; what is off is not said, so that files of before it was there fit."""
    if isinstance(config, UNetConfig):
        off = ("output_bias", 0), ("output_contrast", False)
        return {key: value for key, value in asdict(config).items() if (key, value) not in off}
    return {"unet": config.unet, "scheduler": json.loads(config.scheduler_json), "pipeline": config.pipeline}


def build(config: Architecture) -> nn.Module:
    """A network of random weights, forward(x, t) as of `UNet`. Raises UserError where diffusers is wanted and absent,
    ValueError where the config makes no network."""
    if isinstance(config, UNetConfig):
        return UNet(config)
    try:
        from common.ddpm.diffusers_unet import DiffusersUNet
    except ImportError as error:
        raise UserError(f"this model needs diffusers ({error}): pip install -r requirements-diffusers.txt") from None
    try:
        return DiffusersUNet(config)
    except Exception as error:  # of many kinds, of whatever block cannot be made
        raise ValueError(f"diffusers makes no UNet2DModel of its config: {one_line(error)}") from None


def build_plain(config: Architecture) -> nn.Module:
    """The same network; of diffusers a UNet2DModel itself, whose call returns an object with the prediction in it."""
    network = build(config)
    if isinstance(config, UNetConfig):
        return network
    from diffusers import UNet2DModel

    return UNet2DModel(**config.unet)


def schedule_of(config: Architecture, device: torch.device | str = "cpu") -> Schedule:
    """The noise schedule that the network was trained on, and what it predicts."""
    if isinstance(config, UNetConfig):
        return Schedule(config.timesteps, device)
    noise = config.noise
    clip = noise["clip_sample_range"] if noise["clip_sample"] else None
    return Schedule(config.timesteps, device, betas_of(noise), noise["prediction_type"], clip)
