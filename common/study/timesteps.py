"""Which steps of sampling does quantization hurt? The quantized network runs in one part of them, FP32 in the others.

    python -m common timesteps --preset quick --format int4

Adds a row for each quarter of the timesteps. In that quarter alone, all weights of layers 1 to 6 have --format.
"""

from itertools import pairwise

import torch
from torch import nn

from common.options import script_parser

PARTS = 4


def parts_of(timesteps: int) -> list[tuple[int, int]]:
    """(first, last) of equal parts of 0..timesteps - 1, the finished image first."""
    edges = [timesteps * i // PARTS for i in range(PARTS + 1)]
    return [(first, after - 1) for first, after in pairwise(edges)]


class InOnePart(nn.Module):
    """`quantized` at timesteps first..last, `full` at all others. All images of a batch share their timestep."""

    def __init__(self, quantized: nn.Module, full: nn.Module, first: int, last: int):
        super().__init__()
        self.quantized, self.full, self.first, self.last = quantized, full, first, last
        self.architecture = full.architecture

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        inside = self.first <= int(t[0]) <= self.last
        return (self.quantized if inside else self.full)(x, t)


def main():
    parser = script_parser(__doc__, formats=True)
    options = parser.parse_args()
    if options.engine != "torch":
        parser.error("argument --engine: networks that change on the way are sampled by torch alone; leave it out")

    from common.runtime import distributed
    from common.study.baselines import load_baseline
    from common.study.evaluate import baseline_row, make_evaluator, measured_row, settings_of
    from common.study.pipeline import uniform
    from common.study.report import format_table
    from common.study.run import start

    run = start(options)
    baseline = load_baseline(run)
    evaluator = make_evaluator(run)
    original = evaluator.measure(baseline)
    quantized = uniform(run, baseline)
    settings = settings_of(run, evaluator, baseline.sha256)
    rows = [baseline_row(settings, baseline, original, run.checkpoint)]
    for first, last in parts_of(baseline.config.timesteps):
        label = f"{run.fmt.upper()} at timesteps {first}..{last} alone"
        network = InOnePart(quantized.network(), baseline.network(), first, last)
        weights = f"{quantized.sha256}, {first}..{last}; {baseline.sha256}"
        part = evaluator.measure_network(network, weights, label)
        about = {"strategy": "Timesteps", "setting": f"{first}..{last}", "format": run.fmt}
        rows.append(measured_row(settings, label, part, original, **about))
        if distributed.rank() == 0:
            run.results.add(rows[-1:])
    print(format_table(rows))
