"""The best combined network so far, from the file that is kept here, against the dense VGG-19.

    python examples/paper/best.py --data-dir DIR --reference vgg19.safetensors

prints the accuracy of both on the 10,000 test images, bytes, weights and speed on one thread. It is
the int6 file that this made, with FILE and its epochs as in ``docs/results.md``, after the two runs
that teach it, too, whose commands stand there::

    python examples/paper/reproduce.py stacked --epochs 30 --seeds 1 --answers 4 --device cpu
        --only resnet10-medium-gradualtapered-more-distilled3
        --reference FILE --reference-epochs 33 --data-dir DIR
"""

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import lightning as L
import torch

FOLDER = Path(__file__).parent
sys.path.append(str(FOLDER.parent))  # the other examples

from cifar10 import Classifier  # noqa: E402
from data import CIFAR10  # noqa: E402
from networks import NETWORKS  # noqa: E402
from report import report  # noqa: E402
from runs import BEST, REFERENCE  # noqa: E402

import slimnets  # noqa: E402
from slimnets.distillation.teacher import load_weights  # noqa: E402

FILE = FOLDER / f"{BEST.network}.safetensors"


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("data"), help="of images, or for the download")
    add("--reference", type=Path, required=True, help="file of the dense VGG-19's weights")
    add("--batch-size", type=int, default=64, help="of the images that both are timed on")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="lightning")

    dense = NETWORKS[REFERENCE.network]()
    load_weights(dense, options.reference)
    compressed = slimnets.load(FILE, NETWORKS[BEST.network]())
    data = CIFAR10(options.data_dir, batch_size=500, held_out=0)
    data.prepare_data()
    data.setup("test")
    data.validation = data.test
    tester = L.Trainer(
        devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    accuracies = [
        tester.validate(Classifier(network), data, verbose=False)[0]["val/accuracy"]
        for network in (dense, compressed)
    ]
    torch.set_num_threads(1)
    images = torch.randn(options.batch_size, 3, 32, 32)
    dense, compressed = dense.cpu().eval(), compressed.cpu().eval()
    with tempfile.TemporaryDirectory() as folder:
        pickled = Path(folder) / "dense.pt"
        torch.save(dense.state_dict(), pickled)
        report(
            dense,
            compressed,
            slimnets.accelerate(compressed, images),
            images,
            accuracies=(accuracies[0], accuracies[1]),
            files=(pickled, FILE),
        )


if __name__ == "__main__":
    main()
