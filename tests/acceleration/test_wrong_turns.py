"""Networks that ask what a tracer answers wrongly, or the example does not show."""

import copy
from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import slimnets
from slimnets.acceleration.convert import accelerate
from slimnets.acceleration.module import Accelerated
from slimnets.acceleration.nodes import is_plain
from slimnets.acceleration.prepare import graph_of
from slimnets.acceleration.report import Report, Row
from slimnets.acceleration.trace import trace
from tests.acceleration.networks import assert_right, computed_by
from tests.support import same_text_everywhere


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.memory: Any = SimpleNamespace(last=None)


class Plain(Net):
    def forward(self, x, **ignored):
        return self.conv(x)


class OneOfSizes(Net):
    def forward(self, x):
        return self.conv(F.avg_pool2d(x, 2) if x.shape[-1] in {16, 64} else x)


class TableOfSizes(Net):
    def forward(self, x):
        return self.conv(x) * {16: 2.0}.get(x.shape[-1], 1.0)


class IsATensor(Net):
    def forward(self, x, widths=None):
        if isinstance(widths, Tensor):
            x = x * (torch.arange(x.shape[-1]) < widths[:, None])[:, None, None]
        return self.conv(x)


class HasAttribute(Net):
    def forward(self, x):
        return self.conv(x if hasattr(x, "no_such_attribute") else x.clamp(0, 1))


class Options(Net):
    def forward(self, x, **options):
        return self.conv(x.clamp(0, 1) if options.get("limit") is None else x)


class OwnCall(Net):
    def __call__(self, x):
        return 2 * super().__call__(x)

    def forward(self, x):
        return self.conv(x)


class InAnObject(Net):
    def forward(self, x):
        last, self.memory.last = self.memory.last, x
        return self.conv(x if last is None else x - last)


class InANestedDict(Net):
    def __init__(self) -> None:
        super().__init__()
        self.memory = {"layer": {"last": 0.0}}

    def forward(self, x):
        last, self.memory["layer"]["last"] = self.memory["layer"]["last"], x
        return self.conv(x - last)


ONES = torch.ones(2, 3, 12, 12)


@pytest.mark.parametrize(
    ("kind", "example", "traced"),
    [
        (Plain, (ONES,), True),
        (OneOfSizes, (ONES,), False),
        (TableOfSizes, (ONES,), False),
        (IsATensor, (ONES, torch.tensor([12, 12])), False),
        (HasAttribute, (ONES,), False),
        (Options, (ONES,), False),
        (OwnCall, (ONES,), False),
        (InAnObject, (ONES,), False),
        (InANestedDict, (ONES,), False),
    ],
)
def test_a_graph_takes_no_turn_that_only_the_example_takes(kind, example, traced):
    network = kind().eval()
    with torch.no_grad():
        assert (graph_of(network, example, network(*example)) is not None) == traced


@pytest.mark.parametrize("kind", [InAnObject, InANestedDict])
def test_a_state_goes_on_in_a_network_that_is_accelerated(kind):
    network = kind().eval()
    fast = computed_by("layers", network, ONES).fast
    network(ONES), fast(ONES)  # the last that both have seen
    for x in torch.randn(3, 2, 3, 12, 12):
        torch.testing.assert_close(fast(x), network(x).detach())


KEYS = ("x", "mask")


class Both(NamedTuple):
    x: Tensor
    mask: Tensor | None


@dataclass
class Data:
    x: Tensor
    mask: Tensor | None


@pytest.mark.parametrize("make", [Both, Data, lambda x, mask: OrderedDict(x=x, mask=mask)])
def test_a_part_of_an_argument_may_be_missing(make):
    class Masked(Net):
        def forward(self, batch):
            x, mask = (batch[k] if isinstance(batch, dict) else getattr(batch, k) for k in KEYS)
            return self.conv(x.relu() if mask is None else x * mask)

    network = Masked().eval()
    fast = Accelerated(network, nn.Identity(), (make(ONES, ONES),), Report())
    batch = make(torch.randn_like(ONES), None)
    torch.testing.assert_close(fast(batch), network(batch).detach())


class Pops(Net):
    def forward(self, batch):
        return self.conv(batch.pop("x"))


def test_an_example_is_left_as_it_is_by_a_network_that_empties_it():
    batch = {"x": ONES.clone()}
    fast = accelerate(Pops().eval(), (batch,))
    assert "its input" in fast.report.note
    assert torch.equal(batch["x"], ONES)


class Slices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        y = self.b(self.a(x).relu())
        return y[:, :8, 1:-1].sigmoid() * y[:, 8:, 1:-1]


def test_slices_of_what_the_engine_computes():
    network = Slices().eval()
    slimnets.prune(network, 0.9)
    x = torch.randn(2, 3, 12, 12)
    fast = computed_by("engine", network, x).fast
    torch.testing.assert_close(fast(x), network(x).detach(), rtol=0, atol=1e-5)


class Tiling(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(F.pad(input, [1] * 4, "circular"), weight, bias)


def test_a_convolution_that_convolves_in_its_own_way_is_not_plain():
    patched = nn.Conv2d(3, 8, 3)
    assert is_plain(patched)
    patched._conv_forward = Tiling(3, 8, 3)._conv_forward
    assert not is_plain(patched)
    assert not is_plain(Tiling(3, 8, 3))


def test_results_lie_in_memory_as_those_of_pytorch_do():
    network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
    x = torch.randn(4, 3, 24, 24)
    assert_right(network, fast := computed_by("dense, channels last", network, x), x)
    assert fast.fast(x).stride() == network(x).stride()


def test_a_layer_may_be_called_like_markup():
    row = Row("[/x]", "[b]", 0.0, "[red]a", 1.0, 1.0)
    text = str(Report(rows=[row], note="[/y]"))
    for part in ("[/x]", "[b]", "[red]a", "[/y]"):
        assert part in text


def test_in_a_notebook_and_where_colours_are_forced_a_report_is_the_same_text(monkeypatch):
    report = Report(rows=[Row("conv", "Conv2d", 0.0, "PyTorch", 1.0, 1.0)])
    assert "conv" in same_text_everywhere(lambda: str(report), monkeypatch)


class Serve(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)


def test_an_accelerated_part_is_counted_once_and_as_it_was():
    network = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval()
    slimnets.prune(network, 0.95)
    x = torch.randn(2, 3, 24, 24)
    fast = computed_by("engine", network, x)
    whole, part = (slimnets.summarize(Serve(one), x).total for one in (network, fast))
    assert (part.weights, part.macs, part.bytes) == (whole.weights, whole.macs, whole.bytes)
    assert len(Serve(fast).state_dict()) == len(network.state_dict())


def test_weights_of_a_part_and_low_rank_pairs_that_are_loaded_are_used(tmp_path):
    layer = nn.Linear(64, 64).eval()
    x = torch.randn(8, 64)
    pair = slimnets.factorize(nn.Linear(64, 64), 4)
    slimnets.save(pair, tmp_path / "pair.safetensors")
    fast = Accelerated(layer, copy.deepcopy(layer), (x,), Report())
    slimnets.load(tmp_path / "pair.safetensors", fast)
    torch.testing.assert_close(fast(x), pair(x).detach())

    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    fast = Accelerated(network, copy.deepcopy(network), (x,), Report())
    fast.original[0].load_state_dict(nn.Linear(64, 64).state_dict())
    torch.testing.assert_close(fast(x), network(x).detach())


class Turns(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_trace_that_fails_within_a_part_has_kept_no_value():
    assert trace(nn.Sequential(nn.Conv2d(3, 8, 3), Turns()).eval(), 1) is not None
