"""What does each part of layer_budget.py buy? One part after the other, in files of equal size.

    python -m common waterfall --preset quick --times 10 13 16

At each size, steps follow from Fisher information, and each row adds one part: codes rounded to the nearest
("nearest"); codes chosen by error and bits together ("no feedback"); feedback from column to column ("by columns");
feedback from row to row too ("no output bias"); the output's bias subtracted ("no contrast"); its contrast corrected
("exact inputs"); and each layer rounded for the inputs that the rounded layers before it leave, in place of FP32's
exact ones, which is all of layer_budget.py.

Further rows have all parts and a trellis ("trellis"), or all parts with steps by something else: Gauss-Newton values,
mean squared weights ("magnitude"), or the same value for all tensors ("unweighted"). --finetune N adds a row with codes
and steps that were trained for N updates. The increase of the loss on held-out digits stands below the table.
"""

from collections.abc import Iterator
from dataclasses import replace

from common.fisher.information import WORDS
from common.formats.packed import Model
from common.options import bounded_float, positive_int, script_parser
from common.study.budget_models import Maker, limits_of, other_values, require_reachable, tensor_values
from common.study.codings import EntropyCoding
from common.study.held_out import Judged, held_out
from common.study.pipeline import run_models
from common.study.run import Run


def models(
    run: Run,
    baseline: Model,
    limits: dict[str, int],
    others: dict[str, dict[str, float]],
    updates: int | None = None,
) -> Iterator[Judged]:
    """One for each limit, {what was asked for: bytes}, and part; and one that was finetuned for so many `updates`.

    others: {variant: {tensor: value}}, what else may decide the steps. Raises UserError at once, before any work, for a
    limit that is too small.
    """
    require_reachable(run, baseline, "entropy", limits)
    maker, digits = Maker(run, baseline, "entropy"), held_out(run, baseline)
    whole = EntropyCoding(baseline, maker.feedback, inputs=maker.inputs, bias=maker.bias)
    on_exact_inputs = replace(whole, inputs=None)
    columns_alone = {name: replace(feedback, by_rows=None) for name, feedback in maker.feedback.items()}
    parts = {
        "nearest": (EntropyCoding(baseline, {}, price=0.0), maker.values),
        "no feedback": (EntropyCoding(baseline, {}), maker.values),
        "by columns": (EntropyCoding(baseline, columns_alone), maker.values),
        "no output bias": (replace(on_exact_inputs, bias=None), maker.values),
        "no contrast": (
            replace(on_exact_inputs, bias=maker.bias and replace(maker.bias, contrast=False)),
            maker.values,
        ),
        "exact inputs": (on_exact_inputs, maker.values),
        None: (whole, maker.values),
        "trellis": (replace(whole, trellis=True), maker.values),
    }
    parts |= {variant: (whole, v) for variant, v in (others | other_values(baseline.state, maker.values)).items()}

    def made() -> Iterator[Judged]:
        for asked, limit in limits.items():
            for variant, (coding, values) in parts.items():
                model = maker.fit(limit, values, maker.metadata(asked, variant), coding)
                yield Judged(model, digits.increase(model))
            for model in maker.finetuned_if_it_fits(asked, limit, updates) if updates else []:
                yield Judged(model, digits.increase(model))

    return made()


def main():
    parser = script_parser(__doc__, fisher=True)
    parser.add_argument(
        "--times",
        type=bounded_float(1, 1e6, 10),
        nargs="+",
        default=[10.0, 13.0, 16.0],
        metavar="X",
        help="files X times smaller than FP32's tensors",
    )
    parser.add_argument("--finetune", type=positive_int, metavar="N", help="add rows of codes trained for N updates")
    parser.set_defaults(timestep_weighting="image")
    options = parser.parse_args()

    def build(run, evaluator, baseline):
        other = next(curvature for curvature in WORDS if curvature != run.curvature)
        values = tensor_values(replace(run, curvature=other), baseline)
        return models(run, baseline, limits_of(baseline, options.times), {WORDS[other]: values}, options.finetune)

    run_models(options, build)
