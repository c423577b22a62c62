"""Trains the MNIST classifier whose features the metrics use; needs the full MNIST.

python -m common features --data-dir data --out FILE
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.ddpm.digits import load_mnist, to_model_range
from common.metrics.features import DigitClassifier
from common.options import Parser, file_name
from common.runtime import sealed
from common.runtime.device import derive_seed, set_up_torch
from common.study.run import require_writable_file


def train_classifier(data_dir: Path, epochs: int = 3, seed: int = 0) -> tuple[DigitClassifier, float]:
    """The classifier trained on the 60,000 digits, shifted by up to 2 pixels, and its accuracy on the 10,000 others."""
    set_up_torch()
    torch.manual_seed(derive_seed(seed, "features"))
    (images, labels), test = (load_mnist(split, data_dir) for split in ("train", "test"))
    network, batch = DigitClassifier().to(memory_format=torch.channels_last), 128
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    batches = [chosen for _ in range(epochs) for chosen in torch.randperm(len(images)).split(batch)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=len(batches))
    for chosen in tqdm(batches, desc="features", unit="step"):
        shift = torch.randint(-2, 3, (2,)).tolist()
        x = to_model_range(images[chosen].roll(shift, (1, 2)))
        loss = F.cross_entropy(network(x)[1], labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    images, labels = test
    with torch.inference_mode():
        predicted = torch.cat([network.extract(part)[1].argmax(1) for part in images.split(500)])
    return network, float((predicted == labels).double().mean())


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--data-dir", type=file_name, default=Path("data"), metavar="DIR", help="holds MNIST/raw")
    parser.add_argument(
        "--out", type=file_name, required=True, metavar="FILE", help="figures compare only where it is kept"
    )
    options = parser.parse_args()
    require_writable_file("--out", options.out)
    network, accuracy = train_classifier(options.data_dir)
    sealed.save(options.out, "features", network.state_dict(), {"accuracy": accuracy})
    print(f"{accuracy:.2%} of the test digits; SHA-256 {sealed.hash_tensors(network.state_dict())}; {options.out}")
