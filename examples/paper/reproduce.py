"""The paper's tables, trained: one table, several, or all of them.

    python examples/paper/reproduce.py all --data-dir DIR --epochs 30 --seeds 3 --device cuda
    python examples/paper/reproduce.py students --reference vgg19.pt --reference-epochs 200
    python examples/paper/results.py                  # tables and plots of what there is

What is finished is not done again, and a run that was interrupted goes on from its last checkpoint.
"""

import argparse
import sys
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path

EXAMPLES = Path(__file__).parents[1]
sys.path += map(str, (EXAMPLES, EXAMPLES / "benchmarks"))

from measure import add_speed  # noqa: E402
from provenance import FREE  # noqa: E402
from runs import REFERENCE, TABLES, Run, needed  # noqa: E402
from schedule import quiet, train_all  # noqa: E402
from settings import FOLDER, Settings  # noqa: E402
from train import result  # noqa: E402


def chosen(tables: list[str], globs: list[str]) -> list[Run]:
    """What the tables need of this name, each after those that it goes on with or learns from."""
    listed = [one for name in tables for run in TABLES[name] for one in needed(run)]
    asked = [run for run in listed if any(fnmatch(run.name, glob) for glob in globs)]
    return list(dict.fromkeys(one for run in asked for one in needed(run)))


def otherwise(run: Run, seeds: list[int], settings: Settings) -> str:
    """The options that these seeds, which are finished, were trained with; "" for the same ones.

    Raises:
        ValueError: If they cannot be compared with what ``settings`` would give.
    """
    found = []
    for seed in seeds:
        before = result(run, seed, settings)["settings"]
        for name in FREE:
            if before[name] != getattr(settings, name):
                value = "of its own" if before[name] is None else f"{before[name]:g}"
                found.append(f"--{name.replace('_', '-')} {value}")
    return ", ".join(dict.fromkeys(found))


def main(arguments: list[str] | None = None) -> None:
    """Train what is asked for, and say how long the rest will take."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("tables", nargs="+", choices=[*TABLES, "all"])
    add("--only", nargs="+", default=["*"], metavar="GLOB", help="of the tables' runs, by name")
    add("--folder", type=Path, default=FOLDER, help="of the results")
    add("--data-dir", type=Path, default=Path("data"), help="of images, or for the download")
    add("--epochs", type=float, default=15, help="of each run; 0.5: of half the images")
    add("--reference-epochs", type=int, help="of the dense VGG-19, 30 unless it is from a file")
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
        help="on a CPU: augmentations to ask the teacher about, once, not anew at every step",
    )
    add("--batch-size", type=int, default=128)
    add("--learning-rate", type=float, help="of all, to compare some on --held-out images")
    add("--device", default="auto", help="an accelerator of Lightning's: cpu, cuda, ...")
    add("--precision", default="32-true", help="of the Trainer, for example bf16-mixed")
    add("--processes", type=int, default=1, help="runs to train at the same time, on one device")
    add("--time-again", action="store_true", help="measure speeds anew, with nothing else running")
    add("--batches", type=int, help="a limit for each epoch, to see that everything runs")
    options = parser.parse_args(arguments)
    if options.reference_epochs is None:
        if options.reference:
            parser.error("--reference: say by --reference-epochs how long it was trained")
        options.reference_epochs = 30
    for name in ("epochs", "reference_epochs", "seeds", "batch_size", "processes"):
        if (value := getattr(options, name)) <= 0:
            parser.error(f"--{name.replace('_', '-')} {value:g}: give a number above 0")
    settings = Settings(**{one.name: getattr(options, one.name) for one in fields(Settings)})
    quiet()

    names = list(TABLES) if "all" in options.tables else options.tables
    runs = chosen(names, options.only)
    if not runs:
        parser.error(f"--only {' '.join(options.only)}: no run of {', '.join(names)} is called so")
    queue = [(run, seed) for seed in range(options.seeds) for run in runs if run != REFERENCE]
    queue.insert(0, (REFERENCE, 0))
    finished = [one for one in queue if settings.path(*one).exists()]
    print(f"{len(finished)} of {len(queue)} runs are finished", flush=True)
    for run in dict.fromkeys(run for run, _ in finished if run != REFERENCE):
        others = otherwise(run, [seed for one, seed in finished if one == run], settings)
        if others and any(one == run and (one, seed) not in finished for one, seed in queue):
            parser.error(f"{run.name} has seeds with {others}: train all in the same way")
        if others:
            print(f"{run.name} stays as it was with {others}")
    train_all([(*one, settings) for one in queue], settings.processes)
    if not settings.batches:
        for run, seed in queue:
            add_speed(run, seed, settings, options.time_again)


if __name__ == "__main__":
    main()
