"""Which steps of sampling does quantization hurt? The quantized network acts in one part of them, FP32 in the others.

    python -m common timesteps --preset quick --format int4

Adds a row for each quarter of the timesteps: all weights of layers 1 to 6 in --format there and nowhere else.
"""

from itertools import pairwise

import torch
from torch import nn

from common.ddpm.sampling import generate
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
        self.quantized, self.full, self.first, self.last, self.config = quantized, full, first, last, full.config

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        inside = self.first <= int(t[0]) <= self.last
        return (self.quantized if inside else self.full)(x, t)


def main():
    options = script_parser(__doc__).parse_args()

    from common.metrics.scores import score
    from common.runtime import distributed
    from common.study import report
    from common.study.pipeline import Measured, make_bench, make_row, measure, measured_row, uniform
    from common.study.run import print_sizes, settle
    from common.training.baseline import load_baseline

    run = settle(options)
    if run.dry_run:
        print_sizes(run)
        return
    baseline = load_baseline(run)
    bench = make_bench(run)
    reference = measure(run, bench, baseline)
    quantized = uniform(run, baseline)
    rows = [make_row(run, bench, baseline, reference, None)]
    for first, last in parts_of(baseline.config.timesteps):
        label = f"{run.fmt.upper()} at timesteps {first}..{last} alone"
        network = InOnePart(quantized.network(), baseline.network(), first, last)
        weights = f"{quantized.sha256}, {first}..{last}; {baseline.sha256}"
        images = generate(network, weights, run.sampling, run.device, run.out / "images", label)
        part = Measured(weights, images, score(images, bench.network, bench.reference))
        rows.append(measured_row(run, bench, baseline, label, part, reference))
    if distributed.rank() == 0:
        report.add_rows(run.out / "results.jsonl", rows[1:])
    print(report.format_table(rows))
