"""The network of diffusers, called as this project's own; the one module that imports diffusers."""

import torch
from diffusers import UNet2DModel
from torch import nn

from common.ddpm.pipelines import DiffusersConfig


class DiffusersUNet(UNet2DModel):
    """A UNet2DModel whose forward(x, t) returns the prediction alone: x (N, C, H, W) float, t (N,) int64.

    GroupNorm is in FP32 under autocast too, as CUDA does: a CPU takes three times as long in bfloat16.
    """

    def __init__(self, architecture: DiffusersConfig):
        super().__init__(**architecture.unet)
        self.architecture = architecture
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_pre_hook(_in_fp32)

    def forward(self, x, t):
        return super().forward(x, t, return_dict=False)[0]


def _in_fp32(norm: nn.GroupNorm, inputs: tuple[torch.Tensor]):
    return (inputs[0].float(),) if inputs[0].dtype == torch.bfloat16 else None
