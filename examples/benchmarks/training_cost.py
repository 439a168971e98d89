"""What pruning, factorizing and distilling cost in training, beside what a user would pick instead.

    python examples/benchmarks/training_cost.py

Every figure is a ratio of two times measured in turn, A B A B, in this process; the median, and the
smallest and largest. ``torch.nn.utils.prune`` is what Lightning's ``ModelPruning`` applies.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import torch
from file_size import vgg19
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

import slimnets
from slimnets.distillation import soft_targets
from slimnets.lowrank.decompose import as_matrix, factors
from slimnets.pruning.masks import lowest
from slimnets.pruning.pruner import Pruner
from slimnets.pruning.weights import target_sparsity

RANKS = (5, 24, 48, 48, 64, 128, 128, 160, 192, 256, 320, 320, 320, 320, 320, 320)


@dataclass
class Row:
    """One comparison: the time of ``what`` in times of that of ``against``."""

    what: str
    against: str
    ratio: float
    smallest: float
    largest: float
    seconds: float


def compare(
    what: str, against: str, a: Callable[[], object], b: Callable[[], object], rounds: int
) -> Row:
    """Time ``a`` and ``b`` in turn."""
    a(), b()
    ratios, seconds = [], []
    for _ in range(rounds):
        times = []
        for call in (a, b):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
        seconds.append(times[0])
    middle = statistics.median
    return Row(what, against, middle(ratios), min(ratios), max(ratios), middle(seconds))


class Training:
    """Steps of SGD with momentum on one batch."""

    def __init__(self, network: nn.Module, batch: int, loss: Callable[..., Tensor]) -> None:
        self.network, self.loss = network, loss
        self.images, self.labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
        self.optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)
        self.before_step: Callable[[], object] = lambda: None

    def __call__(self) -> None:
        """One step."""
        self.optimizer.zero_grad()
        self.loss(self.network(self.images), self).backward()
        self.before_step()
        self.optimizer.step()


def own_loss(logits: Tensor, training: Training) -> Tensor:
    """The cross entropy."""
    return F.cross_entropy(logits, training.labels)


def pruned_steps(network: nn.Module, batch: int, rounds: int) -> list[Row]:
    """A step with masks against one without."""
    plain = Training(copy.deepcopy(network), batch, own_loss)
    ours = Training(copy.deepcopy(network), batch, own_loss)
    pruner = Pruner(*target_sparsity(ours.network, 0.9))
    pruner.grow(pruner.targets)
    ours.before_step = pruner.mask_gradients
    ours.optimizer.register_step_post_hook(lambda *_: pruner.apply(pruner.parameters))

    peer = Training(copy.deepcopy(network), batch, own_loss)
    for layer in peer.network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            torch_prune.l1_unstructured(layer, "weight", amount=0.9)
    peer.optimizer = torch.optim.SGD(peer.network.parameters(), lr=1e-4, momentum=0.9)
    label = f"plain step, batch {batch}"
    rows = [
        compare("step under GradualPrune", label, ours, plain, rounds),
        compare("step under torch.nn.utils.prune", label, peer, plain, rounds),
    ]
    for name, mask in pruner.pruned.items():
        if bool(ours.network.get_parameter(name)[mask].any()):
            raise SystemExit(f"{name}: a pruned weight is not zero")
    return rows


def mask_updates(network: nn.Module, sizes: list[int], rounds: int) -> list[Row]:
    """A global mask update against torch's, and against one of twice the weights."""

    def ours() -> None:
        copied = copy.deepcopy(network)
        slimnets.prune(copied, 0.9, scope="global")

    def theirs() -> None:
        copied = copy.deepcopy(network)
        layers = [m for m in copied.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        torch_prune.global_unstructured(
            [(layer, "weight") for layer in layers], torch_prune.L1Unstructured, amount=0.9
        )

    rows = [compare("mask update, global", "prune.global_unstructured", ours, theirs, rounds)]
    for smaller, larger in pairwise(sizes):
        one, two = torch.randn(smaller), torch.randn(larger)
        rows.append(
            compare(
                f"selection among {larger / 1e6:g} M weights",
                f"among {smaller / 1e6:g} M",
                lambda scores=two: lowest([scores], int(0.9 * len(scores))),
                lambda scores=one: lowest([scores], int(0.9 * len(scores))),
                rounds,
            )
        )
    return rows


def factorizing(network: nn.Module, rounds: int, share: float) -> list[Row]:
    """The paper's ranks against a full SVD of every layer."""
    weights = [m.weight.detach() for m in network.modules() if isinstance(m, nn.Conv2d)]
    ranks = [max(1, round(rank * share)) for rank in RANKS]

    def ours() -> list[tuple[Tensor, Tensor]]:
        return [factors(w, r) for w, r in zip(weights, ranks, strict=True)]

    def full() -> list[tuple[Tensor, Tensor]]:
        pairs = []
        for weight, rank in zip(weights, ranks, strict=True):
            u, s, vh = torch.linalg.svd(as_matrix(weight), full_matrices=False)
            root = s[:rank].sqrt()
            pairs.append((u[:, :rank] * root, root[:, None] * vh[:rank]))
        return pairs

    for weight, (first, second), (left, right) in zip(weights, ours(), full(), strict=True):
        own = (weight - torch.einsum("nk...,kc...->nc...", second, first)).norm()
        best = (as_matrix(weight) - left @ right).norm()
        if own > 1.01 * best:
            raise SystemExit(f"error {own:.4g}, that of the full SVD {best:.4g}")
    return [compare("factorize, the paper's ranks", "full SVD per layer", ours, full, rounds)]


def distilling(network: nn.Module, batch: int, rounds: int) -> list[Row]:
    """A distillation step against the student's step and the teacher's forward pass."""
    teacher = copy.deepcopy(network).eval().requires_grad_(False)
    plain = Training(copy.deepcopy(network), batch, own_loss)
    student = copy.deepcopy(network)
    module = slimnets.DistillationModule(student, teacher)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-4, momentum=0.9)

    def ours() -> None:
        optimizer.zero_grad()
        module.training_step((plain.images, plain.labels), 0).backward()
        optimizer.step()

    def apart() -> None:
        plain()
        with torch.no_grad():
            teacher(plain.images)

    hand = soft_targets(student(plain.images), teacher(plain.images))
    if not bool(hand.isfinite()):
        raise SystemExit("the distillation loss is not finite")
    label = f"student's step + teacher's forward, batch {batch}"
    return [compare("distillation step", label, ours, apart, rounds)]


def memory(network: nn.Module) -> dict[str, float]:
    """Lasting bytes per prunable weight, beyond those of the plain network."""
    weights = sum(p.numel() for p in network.parameters() if p.dim() > 1)
    pruner = Pruner(*target_sparsity(copy.deepcopy(network), 0.9))
    masks = sum(mask.untyped_storage().nbytes() for mask in pruner.pruned.values())
    peer = copy.deepcopy(network)
    before = sum(t.untyped_storage().nbytes() for t in peer.state_dict().values())
    for layer in peer.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            torch_prune.l1_unstructured(layer, "weight", amount=0.9)
    after = sum(t.untyped_storage().nbytes() for t in peer.state_dict().values())
    computed = sum(
        layer.weight.untyped_storage().nbytes()
        for layer in peer.modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    )
    if masks > weights:
        raise SystemExit(f"{masks} bytes of masks for {weights} weights")
    return {
        "GradualPrune": masks / weights,
        "torch.nn.utils.prune": (after + computed - before) / weights,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--quick", action="store_true", help="a narrow network, each time once")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rounds, batch = (1, 4) if options.quick else (options.rounds, options.batch)
    network = vgg19(width=8 if options.quick else 64)
    sizes = [10**5, 2 * 10**5] if options.quick else [20 * 10**6, 100 * 10**6, 300 * 10**6]

    rows = [
        *pruned_steps(network, batch, rounds),
        *mask_updates(network, sizes, min(rounds, 3)),
        *factorizing(network, min(rounds, 3), 1 / 8 if options.quick else 1),
        *distilling(network, batch, rounds),
    ]
    lasting = memory(network)

    versions = {name: version(name) for name in ("torch", "slimnets")}
    versions |= {"python": platform.python_version()}
    shown = Table(
        title="VGG-19 for 32 x 32 images",
        caption=f"median of {rounds} rounds in turn; {options.threads} thread(s); "
        + ", ".join(f"{name} {number}" for name, number in versions.items()),
        box=SIMPLE_HEAD,
    )
    for heading in ("", "in times of", "ratio", "smallest to largest", "seconds"):
        shown.add_column(heading)
    for row in rows:
        spread = f"{row.smallest:.3f} to {row.largest:.3f}"
        shown.add_row(row.what, row.against, f"{row.ratio:.3f}", spread, f"{row.seconds:.3f}")
    console = Console(width=max(120, Console().width))
    console.print(shown)
    for name, share in lasting.items():
        console.print(f"{name}: {share:.2f} lasting bytes per prunable weight")
    if options.json:
        figures = {"threads": options.threads, "batch": batch, "versions": versions}
        figures |= {"rows": [asdict(row) for row in rows], "lasting_bytes_per_weight": lasting}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
