"""How FID falls during training: scores the weights that `simplediffusion.py --keep-every N` kept.

    python simplediffusion.py --preset quick --retrain --keep-every 2000 --checkpoint mine.safetensors
    python -m common learning-curve --preset quick --checkpoint mine.safetensors
    python -m common report --preset quick        # draws the curve, too

Adds a row for each set of weights, with its difference to the baseline, the weights at the end of the training.
"""

from common.errors import UserError
from common.options import script_parser


def main():
    options = script_parser(__doc__).parse_args()

    from common.runtime import distributed
    from common.study.baselines import load_baseline
    from common.study.evaluate import baseline_row, make_evaluator, measured_row, real_rows, settings_of
    from common.study.report import format_table
    from common.study.run import read_checkpoint, start
    from common.training.baseline import kept_file

    run = start(options)
    baseline = load_baseline(run)
    pattern = kept_file(run.checkpoint, "*")
    begin, end = pattern.name.split("*")
    names = sorted(path for path in pattern.parent.iterdir() if path.name.startswith(begin) and path.name.endswith(end))
    kept = {path: read_checkpoint(path) for path in names}
    if not kept:
        raise UserError(
            f"{pattern}: no such file; make them with: "
            "simplediffusion.py --retrain --keep-every N --checkpoint FILE, and name the same FILE here"
        )
    for path, model in kept.items():
        if model.metadata["training"] != baseline.metadata["training"]:
            raise UserError(f"{path} is of another training than {run.checkpoint}; delete it")
    evaluator = make_evaluator(run)
    settings, final = settings_of(run, evaluator, baseline.sha256), evaluator.measure(baseline)
    rows = [
        *real_rows(run, evaluator, baseline.sha256),
        baseline_row(settings, baseline, final, run.checkpoint),
    ]
    for model in sorted(kept.values(), key=lambda model: model.metadata["digits_seen"]):
        about = {"strategy": "Training", "digits_seen": model.metadata["digits_seen"]}
        rows.append(measured_row(settings, model.metadata["label"], evaluator.measure(model), final, **about))
    if distributed.rank() == 0:
        run.results.add(rows)
    print(format_table(rows))
