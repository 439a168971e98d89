"""The paper's tables, trained: one table, several, or all of them.

    python examples/paper/reproduce.py all --data-dir DIR --epochs 30 --seeds 3 --device cuda
    python examples/paper/reproduce.py students --answers 4 --reference vgg19.safetensors
    python examples/paper/results.py                  # tables and plots of what there is

What is finished is not done again, and a run that was interrupted goes on from its last checkpoint.
"""

import argparse
import logging
import sys
import time
import warnings
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path

FOLDERS = (Path(__file__).parents[1], Path(__file__).parents[1] / "benchmarks")
sys.path += map(str, FOLDERS)  # the other examples

import torch  # noqa: E402
from networks import NETWORKS  # noqa: E402
from runs import REFERENCE, TABLES, Run  # noqa: E402
from settings import Settings  # noqa: E402
from train import add_speed, result  # noqa: E402

import slimnets  # noqa: E402


def needed(run: Run | None) -> list[Run]:
    """The run, after those that it goes on with."""
    return [*needed(run.of), run] if run else []


def main(arguments: list[str] | None = None) -> None:
    """Train what is asked for, and say how long the rest will take."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("tables", nargs="+", choices=[*TABLES, "all"])
    add("--only", nargs="+", default=["*"], metavar="GLOB", help="of the tables' runs, by name")
    add("--folder", type=Path, default=Path("paper"), help="of the results")
    add("--data-dir", type=Path, default=Path("data"), help="of images, or for the download")
    add("--epochs", type=float, default=15, help="of each run; 0.5: of half the images")
    add("--reference-epochs", type=int, default=30, help="of the dense VGG-19")
    add("--reference", type=Path, help="file of the dense VGG-19's weights, so as not to train it")
    add("--seeds", type=int, default=3)
    add(
        "--held-out",
        type=int,
        default=0,
        help="training images to measure on, for tuning; a given --reference may have seen them",
    )
    add(
        "--answers",
        type=int,
        default=0,
        help="augmentations to ask the teacher about, once, not anew at every step",
    )
    add("--batch-size", type=int, default=128)
    add("--learning-rate", type=float, help="of all, to compare some on --held-out images")
    add("--device", default="auto", help="an accelerator of Lightning's: cpu, cuda, ...")
    add("--precision", default="32-true", help="of the Trainer, for example bf16-mixed")
    add("--time-again", action="store_true", help="measure speeds anew, with nothing else running")
    add("--batches", type=int, help="a limit for each epoch, to see that everything runs")
    options = parser.parse_args(arguments)
    settings = Settings(**{one.name: getattr(options, one.name) for one in fields(Settings)})
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", ".*does not have many workers")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    names = list(TABLES) if "all" in options.tables else options.tables
    listed = [run for name in names for run in TABLES[name]]
    asked = [run for run in listed if any(fnmatch(run.name, glob) for glob in options.only)]
    if not asked:
        parser.error(f"--only {' '.join(options.only)}: no run of {', '.join(names)} is called so")
    runs = dict.fromkeys(one for run in asked for one in needed(run))
    queue = [(run, seed) for seed in range(options.seeds) for run in runs if run != REFERENCE]
    left = [one for one in queue if not settings.path(*one).exists()]
    print(f"{len(queue) - len(left)} of {len(queue)} runs are finished", flush=True)
    result(REFERENCE, 0, settings)
    image = torch.zeros(1, 3, 32, 32)
    macs = {
        name: slimnets.summarize(NETWORKS[name](), image).total.macs
        for name in {run.network for run, _ in left}
    }
    start = time.time()
    for number, (run, seed) in enumerate(left, start=1):
        figures = result(run, seed, settings)
        done, rest = (
            sum(macs[one.network] for one, _ in part) for part in (left[:number], left[number:])
        )
        print(
            f"{run.name}, seed {seed}: {figures['files']['float32']['accuracy']:.2%} after "
            f"{figures['epochs']:g} epochs; {len(left) - number} runs and about "
            f"{(time.time() - start) * rest / done / 60:.0f} minutes left",
            flush=True,
        )
    if not settings.batches:
        for run, seed in [(REFERENCE, 0), *queue]:
            add_speed(run, seed, settings, options.time_again)


if __name__ == "__main__":
    main()
