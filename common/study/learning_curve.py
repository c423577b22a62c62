"""How FID falls in training: scores the weights that `simplediffusion.py --keep-every N` kept.

    python simplediffusion.py --preset quick --retrain --keep-every 2000
    python -m common learning-curve --preset quick
    python -m common report --preset quick        # draws the curve, too

Adds a row for each, with its difference to the baseline that the training ended with.
"""

from common.errors import UserError
from common.options import script_parser


def main():
    options = script_parser(__doc__, quantizes=False).parse_args()

    from common.runtime import distributed
    from common.study import report
    from common.study.pipeline import baseline_row, make_bench, measure, measured_row, real_rows
    from common.study.run import print_sizes, read_checkpoint, settle
    from common.training.baseline import kept_file, load_baseline

    run = settle(options)
    if run.dry_run:
        print_sizes(run)
        return
    baseline = load_baseline(run)
    pattern = kept_file(run, "*")
    kept = sorted(
        map(read_checkpoint, pattern.parent.glob(pattern.name)), key=lambda model: model.metadata["digits_seen"]
    )
    if not kept:
        raise UserError(f"{pattern}: no such file; simplediffusion.py --retrain --keep-every N makes them")
    for model in kept:
        if model.metadata["training"] != baseline.metadata["training"]:
            raise UserError(
                f"{kept_file(run, model.metadata['digits_seen'])} is of another training than {run.checkpoint}; delete it"
            )
    bench = make_bench(run)
    end = measure(run, bench, baseline)
    rows = [*real_rows(run, bench, baseline.sha256), baseline_row(run, bench, baseline, end, run.checkpoint)]
    for model in kept:
        row = measured_row(run, bench, baseline, model.metadata["label"], measure(run, bench, model), end)
        rows.append(row | {"digits_seen": model.metadata["digits_seen"]})
    if distributed.rank() == 0:
        report.add_rows(run.out / "results.jsonl", rows)
    print(report.format_table(rows))
