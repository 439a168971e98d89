"""Networks that are hard to trace: state, random numbers, changes in place, containers."""

import random
from collections import OrderedDict, deque
from dataclasses import dataclass
from enum import Enum

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from slimnets.acceleration.compare import same_draws
from slimnets.acceleration.convert import accelerate
from slimnets.acceleration.export import export
from slimnets.acceleration.prepare import graph_of, simplify
from slimnets.acceleration.trace import trace
from tests.acceleration.networks import assert_right, body, computed_by, prune


class Branches(nn.Module):
    """Control flow on values, weights read by hand, several inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3), nn.Linear(32, 32)

    def forward(self, x, scale=1.0, *, twice=False):
        y = self.a(x)
        y = -y if y.mean() > 0 else y
        y = self.b(y.mean((2, 3))) * scale + self.b.weight.sum()
        return {"y": y, "positive": y > 0, "twice": (y, y * 2) if twice else None}


def test_control_flow_keeps_the_module_and_exchanges_layers():
    model = prune(Branches(), 0.9)
    x = torch.randn(4, 3, 40, 40)
    fast = computed_by("layers", model, x)
    assert "cannot be traced" in fast.report.note
    assert {row.name for row in fast.report.rows} == {"a", "b"}
    with torch.no_grad():
        for sign in (1, -1):
            torch.testing.assert_close(fast.fast(sign * x), model(sign * x), rtol=1e-4, atol=1e-4)
            for call in ({}, {"scale": 2.0}, {"twice": True}):
                expected, found = model(sign * x, **call), fast(sign * x, **call)
                assert found.keys() == expected.keys()
                torch.testing.assert_close(found["y"], expected["y"], rtol=1e-4, atol=1e-4)


class Stochastic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x) + torch.rand(4) * self.calls


def test_random_numbers_are_drawn_at_every_call():
    fast = accelerate(Stochastic(), torch.randn(2, 4))
    assert fast.fast is None and "computes the same" in fast.report.note  # no call is as another
    x = torch.randn(2, 4)
    assert not torch.equal(fast(x), fast(x))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(16, 16, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.layer(x) * self.calls


def test_a_state_is_kept_from_call_to_call():
    model, x = prune(Counting(), 0.98), torch.randn(2, 16, 20, 20)
    fast = accelerate(model, x)
    assert fast.fast is None and "changes its buffers" in fast.report.note
    for _ in range(3):
        torch.testing.assert_close(fast(x), model(x).detach(), rtol=1e-4, atol=1e-4)
    assert trace(model, 1) is None


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) + torch.arange(4.0)


def test_a_constant_made_on_the_way_does_not_hinder_tracing():
    model, x = Constant().eval(), torch.randn(2, 4)
    graph = trace(model, 1)
    assert torch.equal(graph(x), model(x))


class Padded(nn.Module):
    """Changes a tensor in place through a view of it, or reads another view of what was changed."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 8, 3, padding=1)
        self.kind = kind

    def forward(self, x, padding):
        y = torch.relu(self.a(x))
        if self.kind == "through a view":
            y.flatten(2).masked_fill_(padding[:, None], 0.0)
        elif self.kind == "before it is read":
            whole, y = y, y.transpose(2, 3).transpose(2, 3)
            whole.masked_fill_(padding.unflatten(1, (16, 16))[:, None], 0.0)
        else:
            rows = y.shape[2]
            y = y.masked_fill_(padding.unflatten(1, (rows, rows))[:, None], 0.0)
        return self.b(y)


@pytest.mark.parametrize("kind", ["through a view", "before it is read", "directly"])
def test_what_is_changed_in_place(kind):
    network = prune(Padded(kind), 0.9)
    x, padding = torch.randn(2, 3, 16, 16), torch.zeros(2, 256, dtype=torch.bool)
    assert (trace(network, 2) is not None) == (kind == "directly")
    variant = "engine" if kind == "directly" else "layers"
    fast = computed_by(variant, network, (x, padding)).fast
    padding[:, 100:] = True
    with torch.no_grad():
        torch.testing.assert_close(fast(x, padding), network(x, padding), rtol=1e-4, atol=1e-4)


class Mode(Enum):
    FEATURES = 1
    LOGITS = 2


class Modes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 8, 3)

    def forward(self, x, modes, dtype):
        y = self.a(x)
        y = y if modes[0] is Mode.FEATURES else self.b(y)
        return y.double() if dtype is torch.float64 else y


def test_what_an_argument_is_compared_with():
    network, x = prune(Modes(), 0.9), torch.randn(2, 3, 16, 16)
    fast = computed_by("engine", network, (x, [Mode.LOGITS], torch.float32))
    for arguments in (([Mode.FEATURES], torch.float32), ([Mode.LOGITS], torch.float64)):
        with torch.no_grad():
            expected = network(x, *arguments)
        torch.testing.assert_close(fast(x, *arguments), expected, rtol=1e-4, atol=1e-4)


class Brake(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(32, 32, 1)

    def forward(self, x):
        return self.layer(x) if x.mean() > 0.5 else x


class NormAndRelu(nn.BatchNorm2d):
    def forward(self, x):
        return torch.relu(super().forward(x))


@pytest.mark.parametrize(
    "module",
    [
        Brake(),
        nn.Sequential(nn.Conv2d(32, 32, 1), Brake()),
        NormAndRelu(32),
        nn.Dropout(inplace=True),
    ],
    ids=["control flow", "nested", "batch norm", "dropout"],
)
def test_the_rest_of_the_network_is_traced(module):
    network = prune(body(module), 0.9)
    graph = trace(network, 1)
    assert graph is not None
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    assert called & {"2", "2.1"}
    x = torch.randn(4, 3, 20, 20)
    assert_right(network, computed_by("engine", network, x), x, 100 * x)


class Clamped(nn.Module):
    def __init__(self, call) -> None:
        super().__init__()
        self.a, self.b, self.call = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 8, 3), call

    def forward(self, x):
        h = self.a(x)
        self.call(h)
        return self.b(h)


@pytest.mark.parametrize(
    ("call", "variant"),
    [
        (lambda h: torch.clamp(h, -6.0, 6.0, out=h), "layers"),
        (lambda h: nn.functional.hardtanh_(input=h, min_val=-6.0, max_val=6.0), "engine"),
    ],
)
def test_what_is_changed_by_keyword(call, variant):
    network, x = prune(Clamped(call), 0.9), torch.randn(2, 3, 16, 16) / 10
    assert_right(network, computed_by(variant, network, x), x, 1000 * x)


class Recent(nn.Module):
    """The mean of what it gave for this input and the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = body(), deque(maxlen=2)

    def forward(self, x):
        self.last.append(self.body(x))
        return sum(self.last) / len(self.last)


def test_what_is_kept_in_a_container():
    network, x = prune(Recent(), 0.98), torch.randn(2, 3, 16, 16)
    assert trace(network, 1) is None
    assert not network.last  # no proxies
    fast = computed_by("layers", network, x)
    for module in (network, fast.fast):
        module(x)
        module(x)
    assert_right(network, fast, 3 * x, 5 * x)


class Chance(nn.Module):
    def __init__(self, draw) -> None:
        super().__init__()
        self.layer, self.draw = nn.Conv2d(3, 8, 3), draw

    def forward(self, x):
        return self.layer(x) * self.draw()


@pytest.mark.parametrize("draw", [random.random, lambda: float(np.random.rand())])
def test_every_generator_is_asked_anew(draw):
    x = torch.randn(2, 3, 8, 8)
    fast = computed_by("layers", Chance(draw), x).fast
    assert not torch.equal(fast(x), fast(x))


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        y = self.layer(x)
        return nn.functional.dropout(y + torch.randn_like(y))


@torch.no_grad()
def test_a_network_that_draws_random_numbers_is_compared_with_the_same_ones():
    network, x = Noisy().eval(), torch.randn(2, 3, 8, 8)
    state = torch.get_rng_state()
    with same_draws():
        expected = network(x)
    assert torch.equal(torch.get_rng_state(), state)
    graph = graph_of(network, (x,), expected)
    assert graph is not None
    assert not torch.equal(graph(x), graph(x))
    fast = computed_by("engine", network, x).fast
    assert not torch.equal(fast(x), fast(x))


class EveryGenerator(Noisy):
    def forward(self, x):
        return super().forward(x) + random.random() + np.random.rand()


@pytest.mark.parametrize(("kind", "variant"), [(Noisy, "engine"), (EveryGenerator, "layers")])
@pytest.mark.parametrize("to", ["accelerated", "file.pt2"])
def test_generators_are_left_as_they_were(kind, variant, to, tmp_path):
    network, x = kind().eval(), torch.randn(2, 3, 8, 8)
    L.seed_everything(0, verbose=False)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    if to == "accelerated":
        computed_by(variant, network, x)
    else:
        export(network, x, tmp_path / to)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


@torch.no_grad()
def test_results_keep_their_type():
    class Segments(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body()

        def forward(self, x):
            features = OrderedDict(low=x, high=self.body(x))
            return OrderedDict(out=features["high"] * 2, aux=OrderedDict(features))

    network, x = prune(Segments(), 0.98), torch.randn(2, 3, 16, 16)
    expected = network(x)
    graph = graph_of(network, (x,), expected)
    assert graph is not None
    assert type(graph(x)) is type(graph(x)["aux"]) is OrderedDict
    found = computed_by("engine", network, x).fast(x)
    assert list(found) == ["out", "aux"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("given", [(), (2.0,), (2.0, (3, 2))])
def test_defaults_that_are_containers(given):
    class Pools(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body()

        def forward(self, x, scale=0.5, size=(2, 2), tasks=("sum", "mean")):
            y = nn.functional.adaptive_avg_pool2d(self.body(x) * scale, size)
            return {"y": y, **{task: getattr(y, task)((2, 3)) for task in tasks}}

    network, x = prune(Pools(), 0.98), torch.randn(2, 3, 16, 16)
    expected = network(x, *given)
    assert graph_of(network, (x, *given), expected) is not None
    fast = computed_by("engine", network, (x, *given))
    torch.testing.assert_close(fast.fast(x, *given), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast(x, 3.0, (4, 4)), network(x, 3.0, (4, 4)))


@torch.no_grad()
def test_a_weight_that_is_read_by_hand_too_is_not_changed():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.norm = nn.Linear(8, 6), nn.BatchNorm1d(6)
            self.narrow = nn.Linear(6, 6)

        def forward(self, x):
            hidden = self.narrow(self.norm(self.encode(x)).relu())
            return nn.functional.linear(hidden, self.encode.weight.t())

    network = prune(Tied(), 0.5)
    nn.init.uniform_(network.norm.running_var, 0.5, 2.0)
    network.encode.weight.data[2:4] = 0  # silent
    x = torch.randn(5, 8)
    expected = network(x)
    graph = graph_of(network, (x,), expected)
    assert graph is not None
    simplify(graph, (x,))
    torch.testing.assert_close(graph(x), expected)


def test_the_input_is_left_as_it_was():
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body()

        def forward(self, x):
            x -= 0.5
            return self.body(x)

    network, x = prune(Centred(), 0.98), torch.randn(2, 3, 16, 16)
    before = x.clone()
    fast = accelerate(network, x)
    assert torch.equal(x, before)
    assert fast.fast is None and "changes its input" in fast.report.note
    with torch.no_grad():
        torch.testing.assert_close(fast(x.clone()), network(x.clone()))


class Out(OrderedDict):
    @property
    def logits(self):
        return self["logits"]


@dataclass
class Both:
    logits: torch.Tensor


@pytest.mark.parametrize(("kind", "variant"), [(Out, "layers"), (Both, "engine")])
def test_a_result_keeps_its_type(kind, variant):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body()

        def forward(self, x):
            return kind(logits=self.body(x))

    network, x = prune(Net(), 0.98), torch.randn(2, 3, 24, 24)
    fast = computed_by(variant, network, x).fast
    with torch.no_grad():
        torch.testing.assert_close(fast(x).logits, network(x).logits, rtol=1e-4, atol=1e-4)
    assert type(fast(x)) is kind


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_a_batch_norm_without_gain_is_folded(bias):
    norm = nn.BatchNorm1d(16, affine=False)
    network = nn.Sequential(nn.Linear(8, 16, bias=bias), norm, nn.ReLU(), nn.Linear(16, 4)).eval()
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    nn.init.uniform_(norm.running_mean, -1.0, 1.0)
    x = torch.randn(5, 8)
    expected = network(x)
    graph = graph_of(network, (x,), expected)
    simplify(graph, (x,))
    assert not any(isinstance(module, nn.BatchNorm1d) for module in graph.modules())
    torch.testing.assert_close(graph(x), expected)
