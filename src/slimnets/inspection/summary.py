"""What is in a network and what it costs: weights, zeros, ranks, operations, bytes and time."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn

from slimnets.inputs import arguments_for, tensors_in
from slimnets.inspection import table
from slimnets.inspection.latency import Spread, device_of, measure, undisturbed
from slimnets.inspection.macs import count_macs
from slimnets.inspection.rows import Row, count_rows, total
from slimnets.layers import compressed_network, refuse_lazy


@dataclass(frozen=True)
class Summary:
    """The layers of a network, their total, and how it compares with a baseline.

    ``print`` shows it as a table.

    Attributes:
        rows: One for each layer that owns tensors or multiplies.
        total: Their sum; its kind is the network's type.
        parameters: Elements of all parameters, biases and norms among them.
        latency: Seconds that one forward pass of the example input takes.
        speedup: How many times faster than the baseline, from pairs of passes in turn.
        conditions: On what operations and latency were measured.
        baseline: The summary of the baseline.
    """

    rows: tuple[Row, ...]
    total: Row
    parameters: int
    latency: Spread | None = None
    speedup: Spread | None = None
    conditions: str | None = None
    baseline: "Summary | None" = None

    @property
    def ratios(self) -> dict[str, float]:
        """How many times more the baseline has of each, and how many times longer it takes."""
        if self.baseline is None:
            return {}
        found = {}
        for field in ("weights", "nonzeros", "bytes", "macs", "effective_macs"):
            theirs, own = getattr(self.baseline.total, field), getattr(self.total, field)
            if theirs is not None and own is not None:
                found[field] = theirs / own if own else math.inf if theirs else 1.0
        return found | ({"latency": self.speedup.median} if self.speedup else {})

    @property
    def totals(self) -> dict[str, float]:
        """The known figures of the whole network by name; latency in seconds."""
        fields = (
            "weights",
            "nonzeros",
            "sparsity",
            "bytes",
            "dead_channels",
            "macs",
            "effective_macs",
        )
        found = {field: getattr(self.total, field) for field in fields}
        found["latency"] = self.latency.median if self.latency else None
        return {name: float(value) for name, value in found.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Everything as nested dictionaries and lists, ready for JSON; a ratio to 0 is None."""
        return {
            "rows": [row.to_dict() for row in self.rows],
            "total": self.total.to_dict(),
            "parameters": self.parameters,
            "latency": asdict(self.latency) if self.latency else None,
            "speedup": asdict(self.speedup) if self.speedup else None,
            "conditions": self.conditions,
            "baseline": self.baseline.to_dict() if self.baseline else None,
            "ratios": {k: v if math.isfinite(v) else None for k, v in self.ratios.items()},
        }

    def to_markdown(self) -> str:
        """The table in Markdown."""
        return self._shown_by(table.markdown)

    def __str__(self) -> str:
        return self._shown_by(table.text)

    def _shown_by(self, show: Callable[..., str]) -> str:
        theirs = [self.baseline.total] if self.baseline else []
        fields = table.columns([*self.rows, self.total, *theirs])
        feet = [table.cells(self.total, fields)]
        if self.baseline is not None:
            feet.append(["baseline", *table.cells(self.baseline.total, fields)[1:]])
            ratios = {field: table.times(ratio) for field, ratio in self.ratios.items()}
            feet.append(["ratio", *(ratios.get(field, "") for field in fields[1:])])
        body = [table.cells(row, fields) for row in table.folded(self.rows)]
        return show(fields, body, feet, self._notes())

    def _notes(self) -> list[str]:
        counted = f"{self.parameters:,} parameters, biases and norms included"
        if self.latency is None:
            return [counted]
        measured = "MACs and latency" if self.total.macs else "latency"
        notes = [
            f"{counted}; {measured} for {self.conditions}",
            f"latency {_spread(self.latency)}",
        ]
        if self.speedup is not None and self.baseline is not None and self.baseline.latency:
            notes[-1] += (
                f", baseline {_spread(self.baseline.latency)}: {self.speedup.median:.2f}x as fast "
                f"({self.speedup.first:.2f} to {self.speedup.third:.2f})"
            )
        return notes


def summarize(
    model: nn.Module, example_input: Any = None, *, baseline: nn.Module | None = None
) -> Summary:
    """Count what is in ``model`` and, given an input, measure what it costs to run.

    The network runs in eval mode; training flags, batch norm's statistics and the random states of
    PyTorch, NumPy and Python are as before afterwards. Latency is the median over forward passes
    under ``torch.inference_mode`` with as many threads as PyTorch is set to; a baseline takes turns
    with it, A B A B.

    Args:
        model: The network; of a :class:`slimnets.DistillationModule`, its student. A compiled or
            accelerated network is counted as it was before, and measured as it is.
        example_input: What the network is called with: a tensor, a tuple of arguments or a
            dictionary of keyword arguments. Default: a LightningModule's ``example_input_array``;
            without one, operations and latency stay unknown.
        baseline: A network to compare with, usually the one before its compression.

    Returns:
        The rows, their total and the ratios; print it for a table.

    Raises:
        TypeError: If ``model`` or ``baseline`` is not a network, or a dictionary's keys are not the
            names of its arguments.
        ValueError: If a lazy layer has no weights yet.

    Examples:
        >>> summary = summarize(nn.Linear(4, 2), torch.ones(1, 4))
        >>> summary.total.weights, summary.total.macs
        (8, 8)
    """
    _check("model", model)
    models = [model]
    if baseline is not None:
        _check("baseline", baseline)
        models.append(baseline)
    networks = [compressed_network(one) for one in models]
    if example_input is None:
        example_input = example_of(model)
    if example_input is None:
        return _compare([count(network) for network in networks])

    with undisturbed(*models):
        summaries = [count(network, example_input) for network in networks]
        with torch.inference_mode():
            # what was given, not what is counted of it: it may be compiled or accelerated
            forwards = [_forward(one, example_input) for one in models]
            times = measure(*forwards, devices={*map(device_of, models)})
    return _compare(summaries, times, _conditions(networks[0], example_input))


def example_of(model: nn.Module) -> Any:
    """The ``example_input_array`` of the network in ``model``, or else that of ``model``."""
    for one in (compressed_network(model), model):
        if (example := getattr(one, "example_input_array", None)) is not None:
            return example
    return None


def count(network: nn.Module, example_input: Any = None) -> Summary:
    """What of the summary is counted; nothing is run if there is no ``example_input``."""
    macs = None
    if example_input is not None:
        macs = count_macs(network, _forward(network, example_input))
    rows = count_rows(network, macs)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Summary(rows, total(rows, type(network).__name__), parameters)


def _check(argument: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{argument}={model!r}: expected an nn.Module")
    refuse_lazy(compressed_network(model), argument)


def _forward(network: nn.Module, example_input: Any) -> Callable[[], object]:
    moved = move_data_to_device(example_input, device_of(network))
    # by position, for which alone an accelerated network is fast
    args, kwargs = arguments_for(compressed_network(network), moved)
    return lambda: network(*args, **kwargs)


def _compare(
    summaries: list[Summary], times: list[list[float]] | None = None, conditions: str | None = None
) -> Summary:
    if times:
        summaries = [
            replace(one, latency=Spread.of(own), conditions=conditions)
            for one, own in zip(summaries, times, strict=True)
        ]
    own, *others = summaries
    if not others:
        return own
    speedup = Spread.of([b / a for a, b in zip(*times, strict=True)]) if times else None
    return replace(own, speedup=speedup, baseline=others[0])


def _conditions(network: nn.Module, example_input: Any) -> str:
    shapes = [str(tuple(tensor.shape)) for tensor in tensors_in(example_input)]
    threads = torch.get_num_threads()
    place = f"{device_of(network)}, {threads} thread{'s' * (threads > 1)}"
    return f"input {', '.join(shapes)} on {place}" if shapes else place


def _spread(latency: Spread) -> str:
    half = (latency.third - latency.first) / 2
    return f"{table.scaled(latency.median, 's')} ± {table.scaled(half, 's')}"
