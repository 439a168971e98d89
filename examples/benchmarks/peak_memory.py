"""Peaks of memory, each in a process of its own.

    python examples/benchmarks/peak_memory.py GradualPrune

prints bytes; ``training_cost.py`` asks for all of them.
"""

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

from workload import Work, full_svd, gradual, lightnings, prune_globally, quiet, torch_globally

from slimnets.lowrank.decompose import factors

BESIDE = {
    "GradualPrune": "plain training",
    "ModelPruning": "plain training",
    "DistillationModule": "student and teacher apart",
    "mask update, global": "no mask update",
    "prune.global_unstructured": "no mask update",
    "factorize": "no mask update",
    "full SVD per layer": "no mask update",
}
"""Each, and what its peak is beyond that of."""


def peaks(work: Work) -> dict[str, Callable[[], object]]:
    """What is run in a process of its own."""
    return {
        "plain training": lambda: work.fit(work.plain),
        "GradualPrune": lambda: work.fit(work.plain, gradual),
        "ModelPruning": lambda: work.fit(work.plain, lightnings),
        "student and teacher apart": lambda: work.fit(work.apart),
        "DistillationModule": lambda: work.fit(work.distilled),
        "no mask update": lambda: work.network(),
        "mask update, global": lambda: prune_globally(work.network()),
        "prune.global_unstructured": lambda: torch_globally(work.network()),
        "factorize": lambda: work.factorized(factors),
        "full SVD per layer": lambda: work.factorized(full_svd),
    }


def peak_bytes() -> int:
    """The most memory that this process has had resident."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux counts the parent's peak in what getrusage says of a new process
        (line,) = (one for one in status.read_text().splitlines() if one.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory(work: Work, names: Iterable[str] = BESIDE) -> dict[str, float]:
    """Bytes of peak memory per prunable weight, beyond that of what each stands beside."""
    weights = sum(p.numel() for p in work.network().parameters() if p.dim() > 1)
    options = [f"--{name}={value}" for name, value in asdict(work).items()]
    found = {}
    for name in dict.fromkeys([*names, *(BESIDE[name] for name in names)]):
        command = [sys.executable, __file__, name, *options]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[name] = int(done.stdout.split()[-1])
    return {name: (found[name] - found[BESIDE[name]]) / weights for name in names}


def main(arguments: list[str] | None = None) -> None:
    """Do one thing, and print the peak."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("what", choices=dict.fromkeys([*BESIDE, *BESIDE.values()]))
    add("--width", type=float, default=1.0, help="of VGG-19's channels, a fraction")
    add("--batch", type=int, default=8)
    add("--steps", type=int, default=2, help="of an epoch")
    add("--threads", type=int, default=1)
    options = vars(parser.parse_args(arguments))
    what = options.pop("what")
    quiet(options["threads"])
    peaks(Work(**options))[what]()
    print(peak_bytes())


if __name__ == "__main__":
    main()
