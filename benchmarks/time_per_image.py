"""Time of an image at equal quality: the published way against the cheapest of this project's, and the steps between.

    python -m benchmarks.time_per_image --preset quick --dpm 10 15 20 30
    python -m benchmarks.time_per_image --preset paper --images 1000

Quality is the unbiased FID of the baseline, on the same noise, less that of DDPM over all timesteps by torch in FP32: a
way is as good where that is at most one standard error above zero. The ways are DPM-Solver++ in each of the --dpm steps
by each engine in each precision (torch in bfloat16 where the processor has it, OpenVINO where it and nncf are
installed); one whose fewer steps are good enough is not tried with more. Times are measured in turn, as
benchmarks.speed does: what a step takes, times the steps. The published way is 1,000 steps, one image at a time, in
FP32; its images are those of DDPM. The rows join results.jsonl.
"""

import statistics
from dataclasses import dataclass, replace
from functools import partial

from common.errors import run_main
from common.options import positive_int, script_parser
from common.presets import PRECISIONS

ROUNDS = 5  # that count, after one that does not


@dataclass(frozen=True)
class Way:
    """One way to make images: milliseconds for one, and (unbiased FID less DDPM's, standard error)."""

    name: str
    ms: float
    difference: tuple[float, float]

    @property
    def is_as_good(self) -> bool:
        return self.difference[0] <= self.difference[1]


def main():
    parser = script_parser(__doc__)
    parser.add_argument("--dpm", type=positive_int, nargs="+", default=[10, 15, 20, 30], metavar="N", help="steps")
    options = parser.parse_args()
    given = options.sampler or options.steps or options.eta is not None
    if given or (options.engine, options.precision) != ("torch", "fp32"):
        parser.error("--sampler, --steps, --eta, --engine, --precision: all are compared; leave them out")

    from common.engines.openvino import has_bfloat16, is_installed
    from common.runtime import distributed
    from common.runtime.device import bf16_is_faster
    from common.study.baselines import load_baseline
    from common.study.evaluate import baseline_row, make_evaluator, settings_of, with_engine
    from common.study.run import start

    if options.model:
        parser.error(f"argument --model: {options.model}: the published way has this project's networks; leave it out")
    run = start(options)
    timesteps = run.preset.network.timesteps
    if max(options.dpm) > timesteps:
        parser.error(f"argument --dpm: {max(options.dpm)}: there are {timesteps} timesteps; give at most as many")
    baseline, by_torch = load_baseline(run), make_evaluator(run)
    evaluators = {"torch fp32": by_torch}
    if bf16_is_faster(run.device):
        evaluators["torch bf16"] = replace(by_torch, sampling=replace(run.sampling, precision="bf16"))
    if run.device.type == "cpu" and is_installed():
        there = [p for p in PRECISIONS if p != "bf16" or has_bfloat16()]
        evaluators |= {f"openvino {p}": with_engine(run, by_torch, p) for p in there}

    def in_steps(evaluator, sampler: str, steps: int):
        return replace(evaluator, sampling=replace(evaluator.sampling, sampler=sampler, steps=steps, eta=1.0))

    def measure(one):
        measured = one.measure(baseline)
        if distributed.rank() == 0:
            run.results.add([baseline_row(settings_of(run, one, baseline.sha256), baseline, measured, run.checkpoint)])
        return measured.scores.fid_unbiased

    reference = measure(in_steps(by_torch, "ddpm", timesteps))
    found = {}
    for name, evaluator in evaluators.items():
        for steps in sorted(options.dpm):
            evaluators[name] = in_steps(evaluator, "dpm++", steps)
            found[name, steps] = measure(evaluators[name]).minus(reference)
            if found[name, steps][0] <= found[name, steps][1]:
                break
    ms = step_times(run, baseline, evaluators)
    ways = [
        Way(f"published: DDPM {timesteps}, one at a time", timesteps * ms["published"], (0.0, 0.0)),
        Way(f"DDPM {timesteps}, torch fp32", timesteps * ms["torch fp32"], (0.0, 0.0)),
        *(Way(f"DPM-Solver++ {steps}, {name}", steps * ms[name], found[name, steps]) for name, steps in found),
    ]
    print(format_ways(ways))


def step_times(run, baseline, evaluators: dict) -> dict[str, float]:
    """{name: milliseconds of an image and step}, the median of `ROUNDS` rounds in which each has its turn. OpenVINO
    runs what the images of its evaluator were made with."""
    import torch
    from tqdm import tqdm

    from benchmarks import published
    from benchmarks.speed import sampling, spawned_process, step_time
    from common.engines.integers import stored_integers

    network = baseline.network().to(run.device, memory_format=torch.channels_last).eval()
    batch, works = run.sampling.batch_size, {}
    for name, evaluator in evaluators.items():
        if evaluator.engine is None:
            works[name] = partial(sampling, network, run.device, batch, evaluator.sampling.precision)
        else:
            prepare = evaluator.engine.prepare(baseline.sha256, stored_integers(baseline))
            denoise = prepare(baseline.network(), evaluator.sampling, run.device)
            works[name] = partial(step_time, denoise, run.preset.network.timesteps, run.device, batch)
    with spawned_process() as apart:
        works["published"] = lambda: apart.submit(published.sampling, run.preset.network, run.device).result()
        times = {name: [] for name in works}
        for _ in tqdm(range(ROUNDS + 1), desc="time", unit="round"):
            for name, work in works.items():
                times[name].append(work())
    return {name: 1000 * statistics.median(of[1:]) for name, of in times.items()}


def format_ways(ways: list[Way]) -> str:
    """All ways, and then the waterfall: from the first, one part after the other, to the cheapest that is as good."""
    lines = [f"\n{'way':44}{'ms an image':>13}{'faster':>10}{'FID - DDPM':>18}"]
    for way in ways:
        difference, error = way.difference
        shown = f"{difference:+.4f} ± {error:.4f}" if error else "-"
        lines.append(f"{way.name:44}{way.ms:>13.2f}{f'{ways[0].ms / way.ms:,.0f}x':>10}{shown:>18}")
    published, plain, *fewer = ways
    good = [way for way in fewer if way.is_as_good]
    steps = [way for way in good if way.name.endswith("torch fp32")]
    parts = [published, plain, *steps[:1]]
    if good and min(good, key=lambda way: way.ms) not in parts:
        parts.append(min(good, key=lambda way: way.ms))
    lines.append(f"\n{'as good as DDPM, step by step':44}{'ms an image':>13}{'faster':>10}{'than above':>18}")
    for before, way in zip([published, *parts], parts, strict=False):
        lines.append(
            f"{way.name:44}{way.ms:>13.2f}{f'{published.ms / way.ms:,.0f}x':>10}{f'{before.ms / way.ms:.1f}x':>18}"
        )
    if not good:
        lines.append("none of DPM-Solver++'s ways is as good as DDPM: give more steps with --dpm, or more --images")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
