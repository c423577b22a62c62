"""What each engine and precision costs in quality and takes in time: same weights, same noise, against torch in FP32.

    python -m common engines --preset quick --images 300
    python -m common engines --preset quick --also FILE

The first rows are of the baseline, run by OpenVINO in FP32, bf16, int8 and mixed. Then uniform INT8 and the packed
models that --also names have three rows each: by torch, and by OpenVINO in int8 and mixed. Every difference is to the
baseline by torch in FP32. Below the table stand the milliseconds per image and step, and what each layer costs in 8
bits by Gauss-Newton values; mixed leaves the costliest layers in bf16.
"""

from dataclasses import replace

from common.errors import UserError
from common.options import file_name, script_parser, whole_number
from common.presets import PRECISIONS

SHOWN = 8  # layers


def main():
    parser = script_parser(__doc__)
    parser.add_argument(
        "--also", type=file_name, nargs="+", default=[], metavar="FILE", help="packed models to run too"
    )
    parser.add_argument(
        "--left",
        type=whole_number(0, 10_000),
        nargs="+",
        default=[],
        metavar="N",
        help="add rows of the baseline with the N costliest layers in bf16 and the others in int8",
    )
    options = parser.parse_args()
    if (options.engine, options.precision) != ("torch", "fp32"):
        parser.error("--engine, --precision: all are compared; leave them out")

    from common.choose.layers import layer_weights
    from common.runtime import distributed
    from common.study.baselines import load_baseline
    from common.study.evaluate import (
        baseline_row,
        make_evaluator,
        measured_row,
        real_rows,
        said_of,
        settings_of,
        with_engine,
    )
    from common.study.report import format_table, format_times
    from common.study.rows import ENGINE
    from common.study.run import read_checkpoint, start

    run = start(options)
    baseline = load_baseline(run)
    others = [baseline.quantize(layer_weights(baseline.state), "int8", {"label": "Uniform (INT8)"})]
    for path in options.also:
        model = read_checkpoint(path, "--also")
        if model.metadata.get("baseline") != baseline.sha256:
            raise UserError(f"--also {path}: was not made of {run.checkpoint}; name a packed model that was")
        said_of(model)
        others.append(model)
    torch_fp32 = make_evaluator(run)
    engines = {p: with_engine(run, torch_fp32, p) for p in PRECISIONS}  # raises where absent
    engines |= {f"mixed {n}": with_engine(run, torch_fp32, f"mixed {n}") for n in options.left}
    original = torch_fp32.measure(baseline)
    rows = [
        *real_rows(run, torch_fp32, baseline.sha256),
        baseline_row(settings_of(run, torch_fp32, baseline.sha256), baseline, original, run.checkpoint),
    ]

    def add(model, evaluator):
        settings = settings_of(run, evaluator, baseline.sha256)
        label = f"{model.metadata['label']} by {settings.engine.split()[0]} {settings.precision}"
        measured = evaluator.measure(model)
        about = {"strategy": ENGINE, "setting": settings.precision, "size_mib": model.size_mib()}
        rows.append(measured_row(settings, label, measured, original, **about))
        if distributed.rank() == 0:
            run.results.add(rows)

    for evaluator in engines.values():
        add(baseline, evaluator)
    for model in others:
        for evaluator in (torch_fp32, engines["int8"], engines["mixed"]):
            add(model, evaluator)
    kept = {row.identity: row for row in distributed.on_first(run.results.rows)}
    rows = [kept[row.identity] for row in rows]  # with the times of images that were sampled before
    print(format_table(rows))
    print(f"\n{format_times(rows)}\n")
    print(format_costs(engines["int8"].engine.costs(baseline, replace(run.sampling, precision="int8"))))


def format_costs(costs: dict[str, float]) -> str:
    """The costliest layers, and which of them mixed leaves in bf16."""
    from common.engines.costs import most_costly

    left, total = most_costly(costs), sum(costs.values())
    lines = [f"{'layer in 8 bits':30}{'squared error':>15}{'share':>8}"]
    for name, cost in list(costs.items())[:SHOWN]:
        lines.append(f"{name:30}{cost:>15.2e}{cost / total:>8.1%}{'  bf16 in mixed' if name in left else ''}")
    lines.append(f"{f'all {len(costs)} layers':30}{total:>15.2e}")
    return "\n".join(lines)
