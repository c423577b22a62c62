"""FID against the number of sampling steps: the baseline under DDPM over all of them, and under others over fewer.

    python -m benchmarks.samplers --preset quick --ddim 10 20 50 100 250 --dpm 10 20 50

Names the fewest steps whose FID lies within one standard error of DDPM's. The rows join results.jsonl.
"""

from dataclasses import replace

from common.errors import run_main
from common.options import positive_int, script_parser
from common.study.rows import Row


def main():
    parser = script_parser(__doc__)
    parser.add_argument("--ddim", type=positive_int, nargs="+", default=[10, 20, 50, 100, 250], metavar="N")
    parser.add_argument("--dpm", type=positive_int, nargs="+", default=[10, 20, 50], metavar="N")
    options = parser.parse_args()
    if options.sampler or options.steps:
        parser.error("--sampler, --steps: every sampler is compared; give the numbers of steps with --ddim and --dpm")

    from common.runtime import distributed
    from common.study.baselines import load_baseline
    from common.study.evaluate import baseline_row, make_evaluator, settings_of
    from common.study.run import start

    run = start(options)
    timesteps = run.preset.network.timesteps
    for option, numbers in (("--ddim", options.ddim), ("--dpm", options.dpm)):
        if max(numbers) > timesteps:
            parser.error(f"argument {option}: {max(numbers)}: there are {timesteps} timesteps; give at most as many")
    baseline, evaluator = load_baseline(run), make_evaluator(run)
    samplings = [
        replace(run.sampling, sampler=sampler, steps=steps, eta=eta)
        for sampler, numbers, eta in (("ddim", options.ddim, run.sampling.eta), ("dpm++", options.dpm, 1.0))
        for steps in sorted(numbers)
    ]
    samplings.append(replace(run.sampling, sampler="ddpm", steps=timesteps, eta=1.0))
    rows, fids = [], []
    for sampling in samplings:
        one = replace(evaluator, sampling=sampling)
        measured = one.measure(baseline)
        rows.append(baseline_row(settings_of(run, one, baseline.sha256), baseline, measured, run.checkpoint))
        fids.append(measured.scores.fid_unbiased)
        if distributed.rank() == 0:
            run.results.add(rows[-1:])
    print(format_samplers(rows, [fid.minus(fids[-1]) for fid in fids]))


def format_samplers(rows: list[Row], differences: list[tuple[float, float]]) -> str:
    """A table of rows, the last of them DDPM's, with (difference of the unbiased FID to it, standard error) of each."""
    lines = [f"\n{'sampler':24}{'unbiased FID':>18}{'FID - DDPM':>18}{'Score':>18}"]
    near = []
    for row, (difference, error) in zip(rows, differences, strict=True):
        used = row.settings
        method = f"{used.sampler} {used.steps}, eta {used.eta:g}"
        ddpm = f"{difference:+.3f} ± {error:.3f}"
        said = row.inception_score.text(3) if row.inception_score else "-"
        lines.append(f"{method:24}{row.fid_unbiased.text(3):>18}{ddpm:>18}{said:>18}")
        if difference <= error:
            near.append((used.steps, used.sampler))
    steps, sampler = min(near)
    lines.append(f"fewest steps whose FID is within one standard error of DDPM's: {steps}, {sampler}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
