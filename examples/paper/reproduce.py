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

from runs import REFERENCE, TABLES, Run  # noqa: E402
from train import Settings, result  # noqa: E402


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
    add("--only", default="*", metavar="GLOB", help="of the tables' runs, by name: 'cnn-1k*'")
    add("--folder", type=Path, default=Path("paper"), help="of the results")
    add("--data-dir", type=Path, default=Path("data"), help="of images, or for the download")
    add("--epochs", type=float, default=30, help="of each run; 0.5: of half the images")
    add("--reference-epochs", type=int, default=30, help="of the dense VGG-19")
    add("--reference", type=Path, help="file of the dense VGG-19's weights, so as not to train it")
    add("--seeds", type=int, default=3)
    add("--held-out", type=int, default=0, help="training images to measure on, for tuning")
    add(
        "--answers",
        type=int,
        default=0,
        help="augmentations to ask the teacher about, once, not anew at every step",
    )
    add("--batch-size", type=int, default=128)
    add("--device", default="auto", help="an accelerator of Lightning's: cpu, cuda, ...")
    add("--precision", default="32-true", help="of the Trainer, for example bf16-mixed")
    add("--batches", type=int, help="a limit for each epoch, to see that everything runs")
    options = parser.parse_args(arguments)
    settings = Settings(**{one.name: getattr(options, one.name) for one in fields(Settings)})
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", ".*does not have many workers")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    names = list(TABLES) if "all" in options.tables else options.tables
    asked = [run for name in names for run in TABLES[name] if fnmatch(run.name, options.only)]
    if not asked:
        parser.error(f"--only {options.only}: no run of {', '.join(names)} is called so")
    runs = dict.fromkeys(one for run in asked for one in needed(run))
    queue = [
        (run, seed)
        for seed in range(options.seeds)
        for run in runs
        if run != REFERENCE or seed == 0
    ]
    start, trained = time.time(), 0
    for number, (run, seed) in enumerate(queue, start=1):
        began = time.time()
        accuracy = result(run, seed, settings)["files"]["float32"]["accuracy"]
        if time.time() - began > 1:  # it was not there yet
            trained += 1
        left = (time.time() - start) / max(1, trained) * (len(queue) - number) / 60
        print(
            f"{number} of {len(queue)}: {run.name}, seed {seed}: {accuracy:.2%}; "
            f"about {left:.0f} minutes left",
            flush=True,
        )


if __name__ == "__main__":
    main()
