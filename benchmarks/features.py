"""Do random features order models as the features of the digit classifier do?

    python -m benchmarks.features --out results/quick

Scores the images that are kept in DIR/images once more, by --metric random, and prints for each model the unbiased FIDs
of both, and the rank correlation (Spearman) of the two over all models, and over those that the classifier finds near.
"""

from pathlib import Path

from common.errors import UserError, run_main
from common.options import Parser, file_name

NEAR = 0.3  # unbiased FID by the classifier; further away any features see the difference
FEWEST = 500  # images of a row


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=file_name, default=Path("results/quick"), metavar="DIR", help="of rows of digits")
    parser.add_argument("--data-dir", type=file_name, default=Path("data"), metavar="DIR", help="holds MNIST/raw")
    options = parser.parse_args()

    import numpy as np
    import torch
    from scipy.stats import spearmanr
    from tqdm import tqdm

    from common.ddpm.digits import load_digits
    from common.ddpm.sampling import load_images
    from common.metrics.features import load_features
    from common.metrics.frechet import fid_unbiased
    from common.metrics.scores import extract, make_reference
    from common.study.rows import ResultStore

    found = {}  # {file of images: row}; several rows may be of one
    for row in ResultStore(options.out / "results.jsonl").rows():
        s = row.settings
        path = options.out / "images" / Path(row.image_file or "none").name
        kept = row.fid_unbiased and path.is_file() and s.metric.startswith("mnist ") and s.seeds == 1
        if kept and s.images >= FEWEST:
            found.setdefault(path, row)
    if len(found) < 3:
        raise UserError(f"--out {options.out}: images of {len(found)} rows are there; give a folder of three or more")
    if len(kinds := {row.settings.data for row in found.values()}) > 1:
        raise UserError(f"--out {options.out}: has rows of {' and '.join(sorted(kinds))}; give a folder of one")
    (data,) = kinds
    network = load_features("random", torch.device("cpu"))
    reference = make_reference(extract(load_digits(data, "train", options.data_dir), network)[0])
    classifier, random = [], []
    for path, row in tqdm(found.items(), desc="random features", unit="model"):
        fid = fid_unbiased(extract(load_images(path), network)[0], reference)
        classifier.append(row.fid_unbiased.value)
        random.append(fid.value)
        tqdm.write(f"{row.label:44} classifier {row.fid_unbiased.text(4)}, random {fid.value:.4f} ± {fid.error:.4f}")
    near = np.array(classifier) < NEAR
    print(f"rank correlation over {len(found)} models: {spearmanr(classifier, random)[0]:.3f}")
    if near.sum() > 2:
        over = spearmanr(np.array(classifier)[near], np.array(random)[near])[0]
        print(f"over the {near.sum()} whose unbiased FID by the classifier is below {NEAR}: {over:.3f}")


if __name__ == "__main__":
    run_main(main)
