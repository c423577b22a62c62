"""The published U-Net, at any width."""

import re

import torch
import torch.nn.functional as F
from torch import nn

from common.ddpm.schedule import Schedule
from common.presets import CHANNEL_FACTORS, UNetConfig


def norm_relu(norm: nn.GroupNorm, x):
    """In FP32 under autocast too, as CUDA does: a CPU takes three times as long in bfloat16."""
    return F.relu(norm(x.float() if x.dtype == torch.bfloat16 else x), inplace=True)


class ResidualBlock(nn.Module):
    """x + embedding, then twice GroupNorm, ReLU, conv 3x3; plus the x that already holds the embedding."""

    def __init__(self, channels: int, groups: int, dropout: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.dropout = dropout

    def forward(self, x, embedding):  # (N, C, H, W), (N, width)
        x = x + embedding[:, : x.shape[1], None, None]
        h = self.conv1(norm_relu(self.norm1, x))
        h = F.dropout(h, self.dropout, self.training)
        return x + self.conv2(norm_relu(self.norm2, h))


def attend(q, k, v):
    """softmax(q k' / sqrt(width)) v of heads (N, heads, positions, width)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # the fused kernel takes three times as long there
        return torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Self-attention over pixels, with neither norm nor residual.

    Without the published dropout on the attention weights: it rules out the fused kernels.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.proj1 = nn.Linear(channels, 3 * channels)
        self.proj2 = nn.Linear(channels, channels)

    def forward(self, x):  # (N, C, H, W)
        n, c, height, width = x.shape
        qkv = self.proj1(x.flatten(2).transpose(1, 2))  # (N, HW, 3C), laid out (channel in head, head, q/k/v)
        q, k, v = qkv.view(n, height * width, c // self.heads, self.heads, 3).permute(4, 0, 3, 1, 2)
        h = attend(q.contiguous(), k.contiguous(), v.contiguous())  # (N, heads, HW, C / heads)
        h = self.proj2(h.permute(0, 2, 3, 1).reshape(n, height * width, c))  # (channel in head, head)
        return h.transpose(1, 2).reshape(n, c, height, width)


class Layer(nn.Module):
    """Residual block, attention where the layer has one, residual block (the skip), then down or up."""

    def __init__(self, channels: int, config: UNetConfig, attention: bool, up: bool):
        super().__init__()
        self.block1 = ResidualBlock(channels, config.groups, config.dropout)
        self.attention = Attention(channels, config.heads) if attention else None
        self.block2 = ResidualBlock(channels, config.groups, config.dropout)
        if up:
            self.resample = nn.ConvTranspose2d(channels, channels // 2, 4, stride=2, padding=1)
        else:
            self.resample = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)

    def forward(self, x, embedding):
        x = self.block1(x, embedding)
        if self.attention is not None:
            x = self.attention(x)
        x = self.block2(x, embedding)
        return self.resample(x), x


def sinusoidal_embedding(timesteps: int, width: int) -> torch.Tensor:
    """(timesteps, width): sin at even and cos at odd places of position / 10000^(2i / width) (Vaswani et al. 2017)."""
    position = torch.arange(timesteps, dtype=torch.float64)[:, None]
    angle = position / 10000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1).float()


class OutputBias(nn.Module):
    """What a quantized network's output lacks on average: a mixture of few images, another at each timestep. And what
    the digits lack that follow from it, which lie too near to their mean: contrast c moves each digit x_0 by c x_0, and
    the mixture moves all of them back by c times the mean.

    forward(x, output, t): both (N, 1, 32, 32), t (N,) int64 in 0..T-1; returns the output as it should be. Mixture and
    contrast are given at `GRID` timesteps, those of a sampler of so many steps. What they add to the output is
    interpolated between these, and stays below the first. Timestep 0 is none of them: the error there is many times as
    large, and would reach those that samplers meet.
    """

    GRID = 20

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.per_timestep = self.GRID / config.timesteps
        self.maps = nn.Parameter(torch.zeros(config.output_bias, *config.image_shape))
        self.mixture = nn.Parameter(torch.zeros(self.GRID, config.output_bias))
        self.contrast = nn.Parameter(torch.zeros(self.GRID)) if config.output_contrast else None
        schedule = Schedule(config.timesteps)
        levels = torch.from_numpy(1 - schedule.alphas_cumprod).sqrt()  # of the noise: its standard deviation in x
        self.register_buffer("noise_levels", levels.float(), persistent=False)  # (T,)
        self.register_buffer("per_noise", (1 / levels[self.given_at(schedule)]).float(), persistent=False)  # (GRID,)

    @classmethod
    def given_at(cls, schedule: Schedule) -> torch.Tensor:
        """The timesteps (GRID,) at which mixture and contrast are given, the least noise first."""
        return torch.tensor(schedule.spaced_timesteps(cls.GRID)[::-1]).clamp(min=0)

    def forward(self, x, output, t):
        place = ((t + 1) * self.per_timestep - 1).clamp(min=0)  # (N,)
        below = place.long().clamp(max=self.GRID - 2)
        share = (place - below).unsqueeze(1)
        mixture = torch.lerp(self.mixture[below], self.mixture[below + 1], share)  # (N, maps)
        bias = (mixture[:, :, None, None, None] * self.maps).sum(1)  # no product of matrices, which 8 bits would take
        if self.contrast is not None:
            per_digit = self.contrast * self.per_noise  # what a digit, as large as it is in x, adds to the noise
            per_digit = torch.lerp(per_digit[below], per_digit[below + 1], share[:, 0]).view(-1, 1, 1, 1)
            output = output + per_digit * (self.noise_levels[t].view(-1, 1, 1, 1).to(x.dtype) * output - x)
        return output + bias


class UNet(nn.Module):
    """Predicts the noise in x_t.

    forward(x, t): x (N, 1, 32, 32) float, t (N,) int64 in 0..T-1, returns (N, 1, 32, 32).
    `state_dict` holds the learned tensors alone; `config` rebuilds the rest, and is its `architecture` as well, the
    name that networks of diffusers have for theirs.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = self.architecture = config
        channels = config.channels
        self.shallow_conv = nn.Conv2d(1, channels[0], 3, padding=1)
        for i, c in enumerate(channels, start=1):
            self.add_module(f"layer{i}", Layer(c, config, attention=i in config.attention_layers, up=i > 3))
        joined = channels[5] // 2 + channels[0]
        self.late_conv = nn.Conv2d(joined, joined // 2, 3, padding=1)
        self.output_conv = nn.Conv2d(joined // 2, 1, 1)
        self.output_bias = OutputBias(config) if config.output_bias else None
        self.register_buffer(
            "embedding", sinusoidal_embedding(config.timesteps, max(channels)), persistent=False
        )  # (T, width)

    def forward(self, x, t):
        embedding = self.embedding[t].to(x.dtype)
        noised = x
        x = self.shallow_conv(x)
        x, skip1 = self.layer1(x, embedding)
        x, skip2 = self.layer2(x, embedding)
        x, skip3 = self.layer3(x, embedding)
        x = torch.cat([self.layer4(x, embedding)[0], skip3], dim=1)
        x = torch.cat([self.layer5(x, embedding)[0], skip2], dim=1)
        x = torch.cat([self.layer6(x, embedding)[0], skip1], dim=1)
        x = self.output_conv(F.relu(self.late_conv(x)))
        return x if self.output_bias is None else self.output_bias(noised, x, t)


_PUBLISHED_PARTS = (
    (r"^Layer(\d)\.ResBlock(\d)\.gnorm(\d)\.", r"layer\1.block\2.norm\3."),
    (r"^Layer(\d)\.ResBlock(\d)\.conv(\d)\.", r"layer\1.block\2.conv\3."),
    (r"^Layer(\d)\.attention_layer\.", r"layer\1.attention."),
    (r"^Layer(\d)\.conv\.", r"layer\1.resample."),
)


def from_published(state_dict: dict[str, torch.Tensor], groups: int = 32, heads: int = 8) -> UNet:
    """The network of a state dict with the published names, in evaluation mode.

    The widths follow from the shapes; the number of groups and heads does not, so it is asked for.
    Raises ValueError naming the tensors that are missing, unknown or of the wrong shape.
    """
    renamed = {}
    for name, tensor in state_dict.items():
        for pattern, replacement in _PUBLISHED_PARTS:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    try:
        width = renamed["shallow_conv.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"not a published state dict: {error.args[0]} is missing") from None
    except (AttributeError, IndexError):
        raise ValueError("not a published state dict: shallow_conv.weight is no tensor of channels") from None
    config = UNetConfig(channels=tuple(width * factor for factor in CHANNEL_FACTORS), groups=groups, heads=heads)
    with torch.device("meta"):
        _require_fit(UNet(config), renamed)  # before memory is taken for the width that one tensor claims
    network = UNet(config)
    network.load_state_dict(renamed)
    return network.eval()


def load_tensors(network: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Loads `state` exactly; raises ValueError naming one tensor that is missing, unknown or of another shape."""
    _require_fit(network, state)
    network.load_state_dict(state)


def _require_fit(network: nn.Module, state: dict[str, torch.Tensor]) -> None:
    expected = network.state_dict()
    for name in expected.keys() - state.keys():
        raise ValueError(f"tensor {name} is missing")
    for name in state.keys() - expected.keys():
        raise ValueError(f"tensor {name} is unknown to this architecture")
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{name} is no tensor of real numbers")
        if tensor.shape != expected[name].shape:
            raise ValueError(f"tensor {name} is {tuple(tensor.shape)}, the network has {tuple(expected[name].shape)}")
