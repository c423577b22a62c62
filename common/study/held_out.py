"""Models judged by the loss on held-out digits, which costs a second where sampling costs a minute."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from common.ddpm.architecture import schedule_of
from common.ddpm.digits import to_model_range
from common.ddpm.noise import NoiseStreams
from common.ddpm.schedule import Schedule, denoising_loss
from common.formats.packed import Model
from common.metrics.estimate import standard_error
from common.runtime import distributed
from common.runtime.device import derive_seed
from common.study.rows import Figure, Row
from common.study.run import Run

DIGITS = 200
BATCH = 50
FID_DRAWS = 2  # of a row's permutations: so many are sampled too


@dataclass(frozen=True)
class Judged:
    """A model, and what its row says of its loss."""

    model: Model
    loss_increase: Figure
    place: tuple[int, int] | None = None
    size_apart: float | None = None

    def said(self) -> dict:
        """{field of a row: value}"""
        return {"loss_increase": self.loss_increase, "place": self.place, "size_apart": self.size_apart}


@dataclass(frozen=True)
class HeldOut:
    """Digits x0 (N, C, H, W), their timesteps (N,) and noise, the same for all models; before (N,): the loss of each
    with the baseline."""

    schedule: Schedule
    x0: torch.Tensor
    t: torch.Tensor
    noise: torch.Tensor
    before: np.ndarray

    def increase(self, model: Model) -> Figure:
        """The mean increase of the loss over the baseline's, and its standard error over digits (paired)."""
        more = distributed.on_first(lambda: self._losses(model)) - self.before
        return Figure(*mean_and_error(more))

    def _losses(self, model: Model) -> np.ndarray:
        return digit_losses(model.network().to(self.x0.device), self.schedule, self.x0, self.t, self.noise)


def mean_and_error(of_digit: np.ndarray) -> tuple[float, float]:
    """The mean over digits, and its standard error."""
    return float(of_digit.mean()), standard_error(of_digit)


def digit_losses(network, schedule, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> np.ndarray:
    """(digits,): the loss of each digit at its timestep, with its noise."""
    with torch.inference_mode():
        parts = zip(x0.split(BATCH), t.split(BATCH), noise.split(BATCH), strict=True)
        return torch.cat([denoising_loss(network, schedule, *part).double().cpu() for part in parts]).numpy()


def held_out(run: Run, baseline: Model, number: int = DIGITS) -> HeldOut:
    """So many test digits, or all where there are fewer, at timesteps spread evenly."""
    digits = run.load_images("test")
    seed, timesteps = derive_seed(run.sampling.seed, "sensitivity"), baseline.config.timesteps
    chosen = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))[:number]
    x0, n = to_model_range(digits[chosen]).to(run.device), len(chosen)
    t = ((torch.arange(n, device=run.device) + 0.5) * timesteps / n).long()
    noise, schedule = (
        NoiseStreams(seed, range(n), x0.shape[1:]).draw(run.device),
        schedule_of(baseline.config, run.device),
    )
    before = distributed.on_first(lambda: digit_losses(baseline.network().to(run.device), schedule, x0, t, noise))
    return HeldOut(schedule, x0, t, noise, before)


def judge(digits: HeldOut, model: Model, draws: Iterable[Model]) -> Iterator[Judged]:
    """The model with its place among the `draws`, models of a null hypothesis, and then the first `FID_DRAWS` of these.

    place: (how many of the draws have a loss as low or lower, how many there are). One that chose as the model did has
    the same loss, and speaks against it: so p = (lower + 1) / (draws + 1) is that of a permutation test.
    """
    own, size = digits.increase(model), model.size_mib()
    lower = count = 0
    apart, sampled = 0.0, []
    for draw in draws:
        increase = digits.increase(draw)
        lower, count = lower + (increase.value <= own.value), count + 1
        apart = max(apart, abs(draw.size_mib() / size - 1))
        if count <= FID_DRAWS:
            sampled.append(Judged(draw, increase))
    yield Judged(model, own, (lower, count), apart)
    yield from sampled


def format_losses(rows: list[Row]) -> str:
    """A line for each of the rows whose loss on held-out digits was measured; empty where none was."""
    return "\n".join(_line(row) for row in rows if row.loss_increase is not None)


def _line(row: Row) -> str:
    text = f"{row.label}: loss x1000 on held-out images {_signed(row.loss_increase)}"
    if row.place is None:
        return text + ("" if row.size_apart is None else f"; its size differs by {row.size_apart:.1%}")
    lower, draws = row.place
    return (
        f"{text}; {lower} of {draws} permutations of its Fisher values do as well or better "
        f"(p = {(lower + 1) / (draws + 1):.2g}); their sizes differ by at most {row.size_apart or 0:.1%}"
    )


def _signed(figure: Figure) -> str:
    """A thousand times value and error, to two digits of the error."""
    value, error = 1000 * figure.value, 1000 * figure.error
    digits = 2 if not error > 0 else max(0, 1 - int(np.floor(np.log10(error))))
    return f"{value:+.{digits}f} ± {error:.{digits}f}"
