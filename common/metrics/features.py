"""Feature networks of the metrics: a small MNIST classifier that ships, and pytorch-fid's Inception."""

import hashlib
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from common.ddpm.digits import to_model_range
from common.errors import UserError, one_line
from common.metrics.random_features import RandomFeatures
from common.runtime import distributed, sealed

CLASSIFIER_FILE = Path(__file__).parents[2] / "checkpoints" / "features.safetensors"
CLASSIFIER_SHA256 = "abcc2d222f6c21c5f551b2e2c2519179085815f17fc1863703819d058add19ad"
INCEPTION_DIMENSIONS = 2048
INCEPTION_SHA256_PREFIX = "6726825d"  # also the end of the file's name, as torch.hub expects it


class DigitClassifier(nn.Module):
    """Ten classes from (N, 1, 32, 32) in [-1, 1], and the features of `--metric mnist`.

    The features are the 64 channels of the fourth block, averaged over each quarter of the image. The last block's
    are no use: training draws each class together to a point there, so that only the class is left of a digit.
    """

    name = "mnist"
    dimensions = 256
    feature_block = 3

    def __init__(self):
        super().__init__()
        widths, strides = (1, 16, 32, 32, 64, 128), (1, 2, 1, 2, 2)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride, padding=1, bias=False)
            for (a, b), stride in zip(pairwise(widths), strides, strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x):
        for block, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(conv(x)))
            if block == self.feature_block:
                features = F.adaptive_avg_pool2d(x, 2).flatten(1)
        return features, self.head(x.mean((2, 3)))

    def extract(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (N, 32, 32) to features (N, 256), float32, and class probabilities (N, 10), float64, on the CPU."""
        features, logits = self(to_model_range(images.to(self.head.weight.device)))
        return features.cpu(), logits.double().softmax(1).cpu()


class Inception(nn.Module):
    """pytorch-fid's Inception: 2,048 pooled features and 1,008 class probabilities, as published figures use them."""

    name = "inception"
    dimensions = INCEPTION_DIMENSIONS

    def __init__(self, network: nn.Module, class_weight: torch.Tensor):
        super().__init__()
        self.network = network
        self.register_buffer("class_weight", class_weight)  # (1008, 2048); the score leaves the bias out

    def extract(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (N, H, W) or (N, 3, H, W) to features (N, 2048), float32, and class probabilities (N, 1008), float64,
        on the CPU."""
        x = images.to(self.class_weight.device).float() / 255
        x = x.unsqueeze(1).expand(-1, 3, -1, -1) if x.dim() == 3 else x
        features = self.network(x)[0].flatten(1)  # resized to 299 and scaled to [-1, 1] inside
        return features.cpu(), (features @ self.class_weight.T).double().softmax(1).cpu()


def load_features(
    metric: str, device: torch.device, inception_weights: Path | None = None, channels: int = 1
) -> nn.Module:
    """The feature network of `metric`, "mnist", "inception" or "random", in evaluation mode, for images of so many
    channels.

    It has `name`, `dimensions`, `extract`, and `sha256`, the hash of its weights. Raises UserError where the weights
    are missing, unreachable, altered or of the wrong shape.
    """
    if metric == "inception" and channels not in (1, 3):
        raise UserError(
            f"--metric inception: takes 1 or 3 channels, and the model makes {channels}; use --metric random"
        )
    if metric == "random":
        network = RandomFeatures(channels)
    else:
        network = _load_classifier() if metric == "mnist" else _load_inception(inception_weights)
    return network.to(device).eval().requires_grad_(False)


def _load_classifier() -> DigitClassifier:
    if not CLASSIFIER_FILE.is_file():
        raise UserError(f"{CLASSIFIER_FILE} is missing; git checkout it")
    try:
        tensors, _ = sealed.load(CLASSIFIER_FILE, "features")
    except (sealed.CheckpointError, OSError) as error:
        raise UserError(f"{CLASSIFIER_FILE} is unreadable, truncated or altered; git checkout it") from error
    sha256 = sealed.hash_tensors(tensors)
    if sha256 != CLASSIFIER_SHA256:
        raise UserError(
            f"{CLASSIFIER_FILE} is not the frozen feature network (SHA-256 {sha256[:12]}, expected "
            f"{CLASSIFIER_SHA256[:12]}): figures would not compare; git checkout it"
        )
    network = DigitClassifier()
    network.load_state_dict(tensors)
    network.sha256 = sha256
    return network


def _load_inception(weights: Path | None) -> Inception:
    from pytorch_fid import inception

    if weights is None:
        path = distributed.on_first(lambda: _download_inception(inception.FID_WEIGHTS_URL))
        named = f"--metric inception: {path}"
        remedy = "delete it, so that it is downloaded again, or name another with --inception-weights"
    else:
        path, named = weights, f"--inception-weights {weights}"
        remedy = f"get them from {inception.FID_WEIGHTS_URL}, or leave the option out to download them"
    try:
        if not path.is_file():  # reading a named pipe would never end
            raise UserError(f"{named}: {'not a file' if path.exists() else 'no such file'}; {remedy}")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if not digest.startswith(INCEPTION_SHA256_PREFIX):
                raise UserError(
                    f"{named}: SHA-256 {digest[:8]}... instead of {INCEPTION_SHA256_PREFIX}...: not the weights of "
                    f"pytorch-fid's Inception, so no Inception figure is given; {remedy}"
                )
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        with mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: state):
            network = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[Inception.dimensions]])
        result = Inception(network, state["fc.weight"])
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{named}: cannot be read ({error.strerror}); {remedy}") from None
    except Exception as error:  # torch.load and load_state_dict raise many kinds; all mean the same here
        reason = " ".join((str(error) or type(error).__name__).split())[:160]
        raise UserError(f"{named}: not the weights of pytorch-fid's Inception ({reason}); {remedy}") from None
    result.sha256 = digest
    return result


def inception_file() -> Path:
    """Where torch.hub keeps the weights of pytorch-fid's Inception once they are downloaded."""
    from pytorch_fid.inception import FID_WEIGHTS_URL

    return Path(torch.hub.get_dir()) / "checkpoints" / FID_WEIGHTS_URL.rsplit("/", 1)[1]


def _download_inception(url: str) -> Path:
    path = inception_file()
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=INCEPTION_SHA256_PREFIX)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"--metric inception: the weights cannot be downloaded ({one_line(error)}); fetch {url} on another "
                "machine and name the file with --inception-weights, or use --metric mnist, which needs no download"
            ) from None
    return path
