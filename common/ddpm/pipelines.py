"""What a diffusers model is: the configs of its UNet2DModel and its scheduler, checked; and what follows from them.

Without diffusers itself, which `common.ddpm.architecture` imports where a network is built.
"""

import json
from dataclasses import dataclass
from functools import cached_property

from common.ddpm.betas import BETA_SCHEDULES
from common.presets import LARGEST_TIMESTEPS
from common.runtime.sealed import shorten

PREDICTIONS = ("epsilon", "v_prediction", "sample")
PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")  # of images alone, from noise alone
# Schedulers that share one noise schedule, of betas; the others (flow matching, EDM, score SDEs) have noise of another
# kind.
SCHEDULERS = (
    "DDPMScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler", "PNDMScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "DEISMultistepScheduler",
    "UniPCMultistepScheduler", "SASolverScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
)  # fmt: skip
# Defaults of diffusers that are not those of DDPMScheduler.
_OTHER_DEFAULTS = {
    f"{name}Scheduler": {"beta_start": 0.00085, "beta_end": 0.012}
    for name in ("DPMSolverSDE", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete")
}
_OTHER_DEFAULTS["HeunDiscreteScheduler"]["clip_sample"] = False
MOST_BLOCKS, MOST_LAYERS, WIDEST, LARGEST_SIDE, LONGEST = 8, 16, 8192, 1024, 2**18  # of what a file may claim

_DOWN = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D")
_UP = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D")


@dataclass(frozen=True)
class DiffusersConfig:
    """The configs as JSON text with sorted keys, so that equal ones are equal, and the class of the pipeline; `of`
    checks them. All entries of the scheduler's are kept, for the folder that is written again."""

    unet_json: str
    scheduler_json: str
    pipeline: str = PIPELINES[0]

    @classmethod
    def of(cls, unet: dict, scheduler: dict | None = None, pipeline: str | None = None) -> "DiffusersConfig":
        """From what config.json and scheduler_config.json hold; without the latter the defaults of DDPMScheduler.

        Raises ValueError naming the entry that is unknown, out of range or cannot be handled.
        """
        unet, scheduler = checked_unet(unet), {"_class_name": "DDPMScheduler"} if scheduler is None else scheduler
        timesteps = checked_scheduler(scheduler)["num_train_timesteps"]
        if unet["num_train_timesteps"] not in (None, timesteps):
            raise ValueError(
                f"num_train_timesteps of {unet['num_train_timesteps']} is not {timesteps}, the scheduler's"
            )
        if pipeline not in (None, *PIPELINES):
            raise ValueError(f"pipeline {shorten(pipeline)}: known are {', '.join(PIPELINES)}")
        kept = {key: value for key, value in scheduler.items() if not key.startswith("_") or key == "_class_name"}
        try:
            texts = [json.dumps(entries, sort_keys=True, allow_nan=False) for entries in (unet, kept)]
        except (TypeError, ValueError, RecursionError):
            raise ValueError("an entry is not one of JSON") from None
        if sum(map(len, texts)) > LONGEST:
            raise ValueError(f"its configs are longer than {LONGEST} letters")
        return cls(*texts, pipeline or PIPELINES[0])

    @cached_property
    def unet(self) -> dict:
        """All entries of UNet2DModel."""
        return json.loads(self.unet_json)

    @cached_property
    def noise(self) -> dict:
        """The entries of the scheduler that say what noise the network has learned, with defaults."""
        return checked_scheduler(json.loads(self.scheduler_json))

    @property
    def timesteps(self) -> int:
        return self.noise["num_train_timesteps"]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)"""
        size = self.unet["sample_size"]
        height, width = size if isinstance(size, list) else (size, size)
        return self.unet["in_channels"], height, width


def checked_unet(config: dict) -> dict:
    """The entries of a UNet2DModel's config with its defaults, as JSON has them; those of diffusers' own ("_...") left
    out. Raises ValueError."""
    if not isinstance(config, dict):
        raise ValueError("the network's config is not an object of JSON")
    if (name := config.get("_class_name", "UNet2DModel")) != "UNet2DModel":
        raise ValueError(f"_class_name of {shorten(name)} is not UNet2DModel, the class that is read here")
    found = {key: value for key, value in config.items() if not key.startswith("_")}
    for key in found.keys() - _UNET.keys():
        raise ValueError(f"entry {shorten(key)} is unknown to UNet2DModel")
    whole = {key: found.get(key, default) for key, (default, _) in _UNET.items()}
    if whole["class_embed_type"] is not None or whole["num_class_embeds"] is not None:
        raise ValueError("it is conditioned on classes (class_embed_type, num_class_embeds), which is not supported")
    if whole["sample_size"] is None:
        raise ValueError("it lacks sample_size, the side of its images in pixels; add it to the file")
    for key, (_, valid) in _UNET.items():
        if not valid(whole[key]):
            raise ValueError(f"{key} of {shorten(whole[key])} is not supported")
    if whole["in_channels"] != whole["out_channels"]:
        raise ValueError(
            f"out_channels of {whole['out_channels']} with in_channels of {whole['in_channels']}: predicts more than "
            "the noise (a learned variance, or a condition), which is not supported"
        )
    blocks = len(whole["block_out_channels"])
    if len(whole["down_block_types"]) != blocks or len(whole["up_block_types"]) != blocks:
        raise ValueError("down_block_types, up_block_types and block_out_channels are not of one length")
    if whole["time_embedding_type"] == "learned" and whole["num_train_timesteps"] is None:
        raise ValueError("time_embedding_type of learned needs num_train_timesteps")
    return whole


def checked_scheduler(config: dict) -> dict:
    """The entries of a scheduler's config that say what noise its network has learned, with the defaults of its class,
    and of DDPMScheduler for entries that the class does not have. Raises ValueError."""
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise ValueError("the scheduler's config is not an object of JSON")
    name = config.get("_class_name", "DDPMScheduler")
    if name not in SCHEDULERS:
        raise ValueError(
            f"scheduler {shorten(name)}: its noise is not known to be that of a DDPM; known are "
            f"{', '.join(SCHEDULERS[:2])} and others of their kind"
        )
    if config.get("use_flow_sigmas"):
        raise ValueError("scheduler entry use_flow_sigmas: flow matching is not supported")
    given = _OTHER_DEFAULTS.get(name, {}) | config
    whole = {key: given.get(key, default) for key, (default, _) in _SCHEDULER.items()}
    for key, (_, valid) in _SCHEDULER.items():
        if not valid(whole[key]):
            raise ValueError(f"scheduler entry {key} of {shorten(whole[key])} is not supported")
    betas = whole["trained_betas"]
    if betas is not None and len(betas) != whole["num_train_timesteps"]:
        raise ValueError("scheduler entry trained_betas has not num_train_timesteps numbers")
    if whole["rescale_betas_zero_snr"] and whole["prediction_type"] == "epsilon":
        raise ValueError(
            "scheduler entry rescale_betas_zero_snr: with prediction_type epsilon nothing is predicted at the last "
            "timestep, which holds noise alone"
        )
    return whole


def _number(low: float, high: float):
    return lambda v: type(v) in (int, float) and low <= v <= high


def _whole(low: int, high: int):
    return lambda v: type(v) is int and low <= v <= high


def _or_none(valid):
    return lambda v: v is None or valid(v)


def _one_of(*values):
    return lambda v: any(v is value or (v == value and type(v) is type(value)) for value in values)


def _list_of(valid, most: int):
    return lambda v: type(v) in (list, tuple) and 0 < len(v) <= most and all(map(valid, v))


def _side(v) -> bool:
    pair = type(v) in (list, tuple) and len(v) == 2 and all(map(_whole(1, LARGEST_SIDE), v))
    return pair or _whole(1, LARGEST_SIDE)(v)


_flag = _one_of(True, False)
_UNET = {  # entry: (default of UNet2DModel, what is valid)
    "sample_size": (None, _side),
    "in_channels": (3, _whole(1, 64)),
    "out_channels": (3, _whole(1, 128)),
    "center_input_sample": (False, _flag),
    "time_embedding_type": ("positional", _one_of("positional", "learned")),
    "time_embedding_dim": (None, _or_none(_whole(1, WIDEST))),
    "freq_shift": (0, _number(-1, 1)),
    "flip_sin_to_cos": (True, _flag),
    "down_block_types": (["DownBlock2D", *["AttnDownBlock2D"] * 3], _list_of(_one_of(*_DOWN), MOST_BLOCKS)),
    "mid_block_type": ("UNetMidBlock2D", _one_of("UNetMidBlock2D", None)),
    "up_block_types": ([*["AttnUpBlock2D"] * 3, "UpBlock2D"], _list_of(_one_of(*_UP), MOST_BLOCKS)),
    "block_out_channels": ([224, 448, 672, 896], _list_of(_whole(1, WIDEST), MOST_BLOCKS)),
    "layers_per_block": (2, _whole(1, MOST_LAYERS)),
    "mid_block_scale_factor": (1, _number(1e-3, 1e3)),
    "downsample_padding": (1, _whole(0, 1)),
    "downsample_type": ("conv", _one_of("conv", "resnet")),
    "upsample_type": ("conv", _one_of("conv", "resnet")),
    "dropout": (0.0, _number(0, 0.99)),
    "act_fn": ("silu", _one_of("silu", "swish", "mish", "gelu", "relu")),
    "attention_head_dim": (8, _or_none(_whole(1, WIDEST))),
    "norm_num_groups": (32, _or_none(_whole(1, WIDEST))),
    "attn_norm_num_groups": (None, _or_none(_whole(1, WIDEST))),
    "norm_eps": (1e-5, _number(0, 1)),
    "resnet_time_scale_shift": ("default", _one_of("default", "scale_shift")),
    "add_attention": (True, _flag),
    "class_embed_type": (None, _one_of(None)),
    "num_class_embeds": (None, _one_of(None)),
    "num_train_timesteps": (None, _or_none(_whole(1, LARGEST_TIMESTEPS))),
}
_SCHEDULER = {
    "num_train_timesteps": (1000, _whole(2, LARGEST_TIMESTEPS)),  # Fisher values are measured at timestep 1
    "beta_start": (1e-4, _number(1e-12, 0.9999)),
    "beta_end": (0.02, _number(1e-12, 0.9999)),
    "beta_schedule": ("linear", _one_of(*BETA_SCHEDULES)),
    "trained_betas": (None, _or_none(_list_of(_number(1e-12, 0.9999), LARGEST_TIMESTEPS))),
    "prediction_type": ("epsilon", _one_of(*PREDICTIONS)),
    "clip_sample": (True, _flag),
    "clip_sample_range": (1.0, _number(1e-3, 1e3)),
    "thresholding": (False, _one_of(False)),
    "rescale_betas_zero_snr": (False, _flag),
}
