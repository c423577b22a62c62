"""Images of a model and their scores: every model of a study is sampled and measured alike."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn

from common.choose.layers import layer_of, layer_weights, layers_in_order
from common.ddpm.digits import some_of
from common.ddpm.sampling import Sampling, generate, image_file, load_images, prepare_torch
from common.engines.engine import OpenVINO, engine_name, warning
from common.engines.integers import decoding_note, stored_integers
from common.errors import UserError
from common.formats.numbers import IntegerTensor
from common.formats.packed import MIB, Model, tensor_shapes
from common.metrics.changed import share_changed
from common.metrics.features import load_features
from common.metrics.frechet import Reference
from common.metrics.scores import (
    Scores,
    describe,
    load_reference,
    pool_scores,
    psnr,
    require_enough,
    score,
    squared_errors,
)
from common.options import DIGITS
from common.presets import UNetConfig
from common.study.rows import BASELINE, REAL, Figure, Row, Settings, checked
from common.study.run import Run

PUBLISHED_BASELINE = (22.7512, 134.2)
SAID = (  # of a model's metadata, and so of its row
    "strategy", "setting", "variant", "draw", "updates", "format", "published", "weighting", "curvature", "rounding",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Where the images of the weights of a hash are kept, a file for each seed, and the scores of all together.

    ms_per_step: the median of an image and step, where any was sampled and not read back."""

    weights: str
    image_files: tuple[Path, ...]
    scores: Scores
    ms_per_step: float | None = None


@dataclass(frozen=True)
class Evaluator:
    """Samples and scores: how, on which device, with which features, against which digits. sampling: of the first of
    `seeds` draws, whose seeds follow; images: the folder where they are kept; engine: what samples, if not torch."""

    sampling: Sampling
    seeds: int
    device: torch.device
    images: Path
    features: nn.Module
    reference: Reference
    engine: OpenVINO | None = None

    def measure(self, model: Model) -> Measured:
        """Samples from the model, or reads its images back, and scores them."""
        label = model.metadata["label"]
        if self.engine is None:
            return self.measure_network(model.network(), model.sha256, label)
        if note := decoding_note(model):
            print(f"{label} {note}")
        return self.measure_network(model.network(), model.sha256, label, stored_integers(model))

    def measure_network(
        self, network: nn.Module, weights: str, label: str, integers: dict[str, IntegerTensor] | None = None
    ) -> Measured:
        """The same of any network in evaluation mode; `weights` names it and nothing else, `label` the progress bar.

        integers: {weight: its codes}, of those that 8 bits hold as they are."""
        files, draws, times = [], [], []
        prepare = prepare_torch if self.engine is None else self.engine.prepare(weights, integers or {})
        for seed in range(self.sampling.seed, self.sampling.seed + self.seeds):
            sampling = replace(self.sampling, seed=seed)
            images = generate(network, weights, sampling, self.device, self.images, label, prepare, times.append)
            draws.append(self.score(images))
            files.append(image_file(self.images, sampling, weights))
        return Measured(weights, tuple(files), pool_scores(draws), 1000 * median(times) if times else None)

    def score(self, images: torch.Tensor) -> Scores:
        """FID, KID and score of uint8 images, as `generate` gives them."""
        return score(images, self.features, self.reference)


def make_evaluator(run: Run) -> Evaluator:
    """The feature network and the statistics of the training digits. Raises UserError for too few images."""
    channels = run.preset.network.image_shape[0]
    features = load_features(run.metric, run.device, run.inception_weights, channels)
    require_enough(run.sampling.images, features)
    reference = load_reference(run.load_images("train"), features, run.out / "reference", run.sampling.device)
    evaluator = Evaluator(run.sampling, run.seeds, run.device, run.out / "images", features, reference)
    return evaluator if run.sampling.engine == "torch" else with_engine(run, evaluator, run.sampling.precision)


def with_engine(run: Run, evaluator: Evaluator, precision: str) -> Evaluator:
    """The same evaluator, which samples by OpenVINO. Raises UserError where a package is missing, or the device is no
    CPU."""
    if run.device.type != "cpu":
        raise UserError(f"--device {run.device}: OpenVINO runs on the CPU; give --device cpu")
    sampling = replace(evaluator.sampling, precision=precision, engine=engine_name("openvino", precision, run.data))
    if note := warning(precision):
        print(note)
    engine = OpenVINO(run.load_images("train"), run.data, run.out / "models")
    return replace(evaluator, sampling=sampling, engine=engine)


def settings_of(run: Run, evaluator: Evaluator, baseline: str | None) -> Settings:
    """What a row shares with those that it can be compared with; `baseline`: the hash of its weights."""
    return Settings(
        preset=run.preset_name,
        baseline=baseline,
        metric=describe(evaluator.features),
        data=run.data,
        torch=torch.__version__,
        seeds=evaluator.seeds,
        **asdict(evaluator.sampling),
    )


def real_rows(run: Run, evaluator: Evaluator, baseline: str | None) -> list[Row]:
    """The row of as many real test digits as there are images: what a perfect model would score with as many. None, and
    a line that says so, where there are too few digits for it."""
    test, called = run.load_images("test"), "test digits" if run.images is None else "held-out images"
    digits = some_of(test, run.sampling.images, run.sampling.seed)
    if len(digits) <= evaluator.features.dimensions:
        instead = ": --data mnist" if run.images is None else ""
        print(f"{len(digits)} {called} in {run.data} are too few for a row of real {called.split()[1]}{instead}")
        return []
    settings = settings_of(run, evaluator, baseline)
    return [Row(f"Real {called} ({len(digits)})", settings, **figures(evaluator.score(digits)), strategy=REAL)]


def baseline_row(settings: Settings, baseline: Model, measured: Measured, path: Path) -> Row:
    """The row of the baseline, whose file is at `path`."""
    own = isinstance(baseline.config, UNetConfig)
    return model_row(
        settings, baseline, measured, None, path, file_mib=None, published=PUBLISHED_BASELINE if own else None,
        digits_seen=baseline.metadata.get("digits_seen"),
    )  # fmt: skip


def model_row(
    settings: Settings, model: Model, measured: Measured, baseline: Measured | None, path: Path, **more
) -> Row:
    """The row of a model whose packed file is at `path`, with differences to the images of `baseline`, if any.

    What it is, its metadata say; `more` adds to the fields or replaces them.
    """
    same = baseline is None or baseline.weights == measured.weights
    known = said_of(model) | {"file_mib": path.stat().st_size / MIB}
    return Row(
        label=model.metadata["label"] + engine_note(settings),
        settings=settings,
        weights=measured.weights,
        size_mib=model.size_mib(),
        file=str(path),
        image_file=str(measured.image_files[0]),
        formats=model.formats,
        kept=kept_by_layer(model),
        ms_per_step=measured.ms_per_step,
        **figures(measured.scores),
        **({} if same else differences(settings, measured, baseline)),
        **(known | more),
    )


def engine_note(settings: Settings) -> str:
    """What a label says of engine and precision, where they are not torch and FP32."""
    engine = "" if settings.engine == "torch" else settings.engine.split()[0] + " "
    return "" if not engine and settings.precision == "fp32" else f" [{engine}{settings.precision}]"


def said_of(model: Model) -> dict:
    """{field of a row: value} that the model's metadata say. Raises UserError for what no row can hold."""
    said = {"strategy": BASELINE, "format": "fp32"} | {
        "timestep_weighting" if key == "weighting" else key: value
        for key, value in model.metadata.items()
        if value is not None and key in SAID
    }
    try:
        return {key: checked(key, value) for key, value in said.items()}
    except ValueError as error:
        raise UserError(f"{str(model.metadata['label'])[:80]}: not a model of this software: {error}") from None


def measured_row(settings: Settings, label: str, measured: Measured, baseline: Measured, **more) -> Row:
    """The row of images that no packed model made, with differences to the images of `baseline`."""
    return Row(
        label, settings, **figures(measured.scores), weights=measured.weights, ms_per_step=measured.ms_per_step,
        **differences(settings, measured, baseline), **more,
    )  # fmt: skip


def figures(scores: Scores) -> dict[str, Figure]:
    """{field of a row: value and error}."""
    return {key: estimate and Figure(estimate.value, estimate.error) for key, estimate in vars(scores).items()}


def differences(settings: Settings, measured: Measured, baseline: Measured) -> dict[str, Figure]:
    """{field of a row: value and error}: paired differences to the baseline's images of the same noise, PSNR, and of
    digits the share that became others."""
    found = {
        f"{key}_difference": Figure(*getattr(measured.scores, key).minus(getattr(baseline.scores, key)))
        for key in ("fid", "fid_unbiased", "kid")
    }
    after, before = (torch.cat([load_images(path) for path in m.image_files]) for m in (measured, baseline))
    if settings.data in DIGITS and before.shape[1:] == (32, 32):
        found["changed"] = Figure(*share_changed(before, after))
    decibels, error = psnr(squared_errors(after, before))
    return found | {"psnr": Figure(decibels, error)} if np.isfinite(decibels) else found  # equal images have none


def kept_by_layer(model: Model) -> dict[str, list[str]]:
    """The weights of the layers that stay FP32, by layer, in the order of the forward pass."""
    names = layer_weights(tensor_shapes(model.config))  # a file has its formats in another order
    kept: dict[str, list[str]] = {layer: [] for layer in layers_in_order(names)}
    for name in names:
        if model.formats[name] == "fp32":
            kept[layer_of(name)].append(name.removeprefix(f"{layer_of(name)}.").removesuffix(".weight"))
    return kept
