"""Features that need no download and no training: a small convolutional network of fixed random weights.

Such features tell sets of images apart nearly as trained ones do, also where these were trained on other images (Naeem
et al. 2020, arXiv:2002.09797, section 3.3). How they order models of digits beside the features of the classifier:
docs/your-own-model.md.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from common.ddpm.digits import to_model_range
from common.runtime import sealed

SEED = 0
WIDTHS, STRIDES = (16, 16, 32), (1, 2, 2)
BIAS = 0.1  # standard deviation; without any, a negated image would differ in nothing but the side of the rectifier


class RandomFeatures(nn.Module):
    """The channels of three layers (He et al. 2015's initialization), each averaged over each quarter of the image."""

    name = "random"
    dimensions = 4 * sum(WIDTHS)

    def __init__(self, channels: int):
        super().__init__()
        generator = torch.Generator().manual_seed(SEED)
        self.convs = nn.ModuleList()
        for (a, b), stride in zip(pairwise((channels, *WIDTHS)), STRIDES, strict=True):
            conv = nn.Conv2d(a, b, 3, stride, padding=1)
            conv.weight.data = torch.randn(conv.weight.shape, generator=generator) * (2 / (9 * a)) ** 0.5
            conv.bias.data = torch.randn(conv.bias.shape, generator=generator) * BIAS
            self.convs.append(conv)
        self.sha256 = sealed.hash_tensors(self.state_dict())

    def forward(self, x):
        features = []
        for conv in self.convs:
            x = F.relu(conv(x))
            features.append(F.adaptive_avg_pool2d(x, 2).flatten(1))
        return torch.cat(features, dim=1)

    def extract(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        """uint8 (N, H, W) or (N, C, H, W) to features (N, 256), float32, on the CPU; no class probabilities."""
        return self(to_model_range(images.to(self.convs[0].weight.device))).cpu(), None
