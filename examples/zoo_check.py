"""What becomes of a network that is pruned, factorized, saved, loaded and merged."""

import io
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from zoo_networks import Network, detected

import slimnets
from slimnets.lowrank import plan
from slimnets.pruning.weights import left_alone

SPARSITY = 0.8
RANK = 0.125  # of each layer's full rank
TOLERANCE = 1e-3
"""Of what two samples differ by: the most that rounding may change."""


@dataclass
class Outcome:
    """What became of one network.

    Attributes:
        family: What it is one of.
        layers: Layers that a user may have in mind.
        pruned: Layers of which weights were pruned.
        factorized: Layers that became pairs.
        dense: Why layers were not factorized, and how many of them.
        unpruned: Why weights of two and more dimensions were not pruned, and how many of them.
        weights: All parameters before.
        zeros: Weights pruned.
        bytes_dense: What ``torch.save`` takes for the state dict of the dense network.
        bytes_file: What ``slimnets.save`` takes for that of the compressed one.
        zeros_exact: Whether every weight has exactly the zeros asked for, all of them +0.0.
        loaded_exact: Whether the loaded state and outputs are those that were saved, bit for bit.
        merged: Largest difference of an output after ``merge``, in float64, relative to what two
            samples differ by; None if it did not give the layers of the dense network back.
        accelerated: The same after ``accelerate``; None if that was not asked for.
        choice: What ``accelerate`` chose.
        refused: The sentence with which this library refused it.
        failed: Any other error, which is a bug.
    """

    family: str
    layers: int = 0
    pruned: int = 0
    factorized: int = 0
    dense: Counter[str] = field(default_factory=Counter)
    unpruned: Counter[str] = field(default_factory=Counter)
    weights: int = 0
    zeros: int = 0
    bytes_dense: int = 0
    bytes_file: int = 0
    zeros_exact: bool = False
    loaded_exact: bool = False
    merged: float | None = None
    accelerated: float | None = None
    choice: str = ""
    refused: str = ""
    failed: str = ""

    @property
    def wrong(self) -> str:
        """What did not come true of all that is promised; a refusal by name is promised too."""
        if self.refused or self.failed:
            return self.failed
        ends = {"merge": self.merged, "accelerate": self.accelerated}
        wrong = {
            "zeros": not self.zeros_exact,
            "load": not self.loaded_exact,
            "merge gives another structure": self.merged is None,
            # NaN is wrong too
            **{k: not v < TOLERANCE for k, v in ends.items() if v is not None},
        }
        return ", ".join(name for name, is_wrong in wrong.items() if is_wrong)


def check(network: Network, *, accelerate: bool = False) -> Outcome:
    """Prune and factorize a network, save it, load it, merge it, and compare.

    Args:
        network: How to build it.
        accelerate: Whether to do that too, with what was loaded.

    Returns:
        What became of it. Whatever this library does not refuse by name is raised.
    """
    outcome = Outcome(network.family)
    torch.manual_seed(0)
    model = network.build().eval()
    inputs = network.inputs()
    _wake(model)
    outcome.bytes_dense = _bytes(model)
    outcome.weights = sum(p.numel() for p in model.parameters() if not is_lazy(p))
    dense = _structure(model)
    try:
        model = _compress(model, outcome)
    except ValueError as error:
        outcome.refused = str(error)
        return outcome
    _settle(model, network)
    loaded = _reload(model, network, inputs, outcome)
    with torch.no_grad():
        if accelerate:
            _accelerate(loaded, network, inputs, network.smooth(model, *inputs), outcome)
        # in a deep random network two samples may differ by no more than float32's rounding
        exact = apply_to_collection(inputs, torch.FloatTensor, Tensor.double)
        expected = network.smooth(model.double(), *exact)
        merged = slimnets.merge(loaded.double())
        if _structure(merged) == dense:
            outcome.merged = difference(network.smooth(merged, *exact), expected)
    return outcome


def _compress(model: nn.Module, outcome: Outcome) -> nn.Module:
    rows = plan(model, RANK).rows
    ranks = {row.name for row in rows if row.rank is not None}
    model = slimnets.factorize(model, RANK)
    masks = slimnets.prune(model, SPARSITY)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    layers = {name.rpartition(".")[0] for name in masks}
    outcome.layers = len(rows)
    outcome.factorized = len(ranks)
    outcome.pruned = len({re.sub(r"\.(first|second)$", "", name) for name in layers})
    outcome.dense = Counter(general(row.reason) for row in rows if row.rank is None)
    outcome.unpruned = _unpruned(model, masks)
    outcome.zeros = sum(int((~mask).sum()) for mask in masks.values())
    outcome.zeros_exact = all(
        int((_bits(parameters[name]) == 0).sum()) == round(SPARSITY * mask.numel())
        and mask.equal(parameters[name] != 0)
        for name, mask in masks.items()
    )
    return model


def _reload(
    model: nn.Module, network: Network, inputs: tuple[Any, ...], outcome: Outcome
) -> nn.Module:
    torch.manual_seed(1)
    fresh = network.build().eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        slimnets.save(model, path)
        outcome.bytes_file = path.stat().st_size
        loaded = slimnets.load(path, fresh)
    saved, found = model.state_dict(), loaded.state_dict()
    with torch.no_grad():
        outputs = [flat(one(*inputs)) for one in (model, loaded)]
    outcome.loaded_exact = (
        saved.keys() == found.keys()
        and all(_same_bits(saved[name], found[name]) for name in saved)
        and len(outputs[0]) == len(outputs[1]) > 0
        and all(_same_bits(a, b) for a, b in zip(*outputs, strict=True))
    )
    return loaded


def _accelerate(
    model: nn.Module, network: Network, inputs: tuple[Any, ...], expected: Any, outcome: Outcome
) -> None:
    if network.smooth is detected:
        outcome.choice = "not tried: boxes are chosen by their scores"
        return
    fast = slimnets.accelerate(model, inputs)
    gain = f"{fast.report.speedup:.1f}x as fast"
    outcome.choice = fast.report.note or (gain if fast.report.speedup > 1 else "kept as it is")
    outcome.accelerated = difference(network.smooth(fast, *inputs), expected)


def _wake(model: nn.Module) -> None:
    """Give parameters that begin as constants random values.

    A head or the scale of a residual branch that begins at zero would hide whatever comes before.
    """
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if not is_lazy(parameter) and parameter.numel() > 1 and parameter.std() == 0:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def _structure(model: nn.Module) -> dict[str, str]:
    return {name: type(layer).__name__ for name, layer in model.named_modules()}


def _settle(model: nn.Module, network: Network) -> None:
    """Give batch norms the statistics of some inputs, without which signals fade away in depth."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().reset_running_stats()
        norm.momentum = None  # the mean of all batches
    with torch.no_grad():
        for _ in range(4 if norms else 0):
            model(*network.inputs())
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum


def _unpruned(model: nn.Module, masks: Mapping[str, Tensor]) -> Counter[str]:
    """Why parameters of two and more dimensions have no mask."""
    reasons = left_alone(model)
    pruned = {id(model.get_parameter(name)) for name in masks}
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and id(parameter) not in pruned:
            owner, _, rest = name.partition(".parametrizations.")
            owner = owner if rest else name.rpartition(".")[0]
            reason = reasons.get(owner) or reasons.get(name)
            found[reason or _whose(model.get_submodule(owner), name)] += 1
    return found


def _whose(owner: nn.Module, parameter: str) -> str:
    if isinstance(owner, nn.Embedding):
        return "it is an embedding"
    return f"{parameter.rpartition('.')[2]!r} of {type(owner).__name__} belongs to no layer"


def general(reason: str) -> str:
    """``reason`` without names and numbers, to be counted."""
    reason = re.sub(r" \(groups=\d+\)|: [\d,]+ weights", "", re.sub(r"'[^']*'", "another", reason))
    return re.sub(r"\b\d+\b", "n", reason)


def flat(outputs: Any) -> list[Tensor]:
    """The tensors in nested outputs."""
    if isinstance(outputs, Tensor):
        return [outputs]
    parts = outputs.values() if isinstance(outputs, Mapping) else outputs
    return [tensor for part in parts for tensor in flat(part)]


def difference(outputs: Any, expected: Any) -> float:
    """How far outputs are from those expected, relative to what the two samples differ by."""

    def relative(found: Tensor, wanted: Tensor) -> float:
        spread = (wanted - wanted.roll(1, 0)).abs().max()
        return float((found - wanted).abs().max() / spread)

    pairs = zip(flat(outputs), flat(expected), strict=True)
    return max(relative(found, wanted) for found, wanted in pairs)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.int32)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    first, second = (t.detach().reshape(-1).contiguous().view(torch.uint8) for t in (one, other))
    return first.equal(second)


def _bytes(model: nn.Module) -> int:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()
