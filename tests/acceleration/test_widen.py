"""Networks over sequences, whose layers become those of images of one row."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from slimnets.acceleration.region import Region
from slimnets.lowrank.factorize import factorize
from tests.acceleration.networks import assert_right, computed_by

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")


def thin(network: nn.Module, density: float = 0.2) -> nn.Module:
    """Some zeros in what weights are, or are computed from; and norms that do something."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() == 3 and not name.endswith(("weight_g", "original0")):
                parameter.mul_(torch.rand_like(parameter) < density)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2.0)
    return network.eval()


def regions(fast: nn.Module) -> list[Region]:
    found = [module for module in fast.modules() if isinstance(module, Region)]
    assert all(None not in region.plans.values() for region in found), "the engine gave up"
    return found


class Chomp(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.size].contiguous()


class Block(nn.Module):
    """Two causal convolutions and a sum, as of Bai, Kolter and Koltun (arXiv 1803.01271)."""

    def __init__(self, inputs: int, outputs: int, dilation: int, norm) -> None:
        super().__init__()
        padding = 2 * dilation
        one, two = (
            norm(nn.Conv1d(n, outputs, 3, padding=padding, dilation=dilation))
            for n in (inputs, outputs)
        )
        after = (Chomp(padding), nn.ReLU(), nn.Dropout1d())
        self.net = nn.Sequential(one, *after, two, *after)
        self.down = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.net(x) + self.down(x))


class Padded(Block):
    """The same, but the input is padded instead, and the norm is a layer."""

    def __init__(self, inputs: int, outputs: int, dilation: int, norm) -> None:
        super().__init__(inputs, outputs, dilation, norm)
        self.padding = nn.ConstantPad1d((2 * dilation, 0), 0.0)
        layers = (nn.Conv1d(outputs, outputs, 3, dilation=dilation), nn.BatchNorm1d(outputs))
        self.net = nn.Sequential(nn.ReLU(), self.padding, *layers, nn.ReLU())
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        x = x + F.pad(self.net(x), (1, 0))[..., :, :-1]
        return F.pad(x, (0, self.dilation))[:, :, self.dilation :]


@pytest.mark.parametrize("block", [Block, Padded])
@pytest.mark.parametrize(
    "norm", [nn.Identity(), parametrizations.weight_norm, nn.utils.weight_norm], ids=repr
)
def test_causal_convolutions_are_one_region(block, norm):
    blocks = [block(n, 24, 2**i, norm) for i, n in enumerate((8, 24, 24))]
    network, x = thin(nn.Sequential(nn.Conv1d(8, 8, 1), *blocks)), torch.randn(4, 8, 50)
    fast = computed_by("engine", network, x)
    assert_right(network, fast, x, torch.randn(3, 8, 33), torch.randn(1, 8, 50))
    kinds = {(row.kind, row.choice) for row in fast.report.rows}
    assert kinds == {("Conv1d", "sparse kernel")}
    (region,) = regions(fast.fast)
    pads = [step for step in region.steps if type(step).__name__ == "Pad"]
    assert len(pads) == (0 if block is Block else 3 * 4)  # those around a sum cannot be fused


@pytest.mark.parametrize("density", [1.0, 0.2])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(24, 24, 3),
        nn.Conv1d(24, 24, 4, stride=2, padding=3, dilation=2),
        nn.Conv1d(24, 24, 3, padding="same", groups=24, bias=False),
        nn.Conv1d(24, 24, 3, padding=1, padding_mode="reflect"),
        nn.Conv1d(24, 24, (5,), stride=(3,)),
        nn.MaxPool1d(3, 2, 1, ceil_mode=True),
        nn.AvgPool1d(3, 2),
        nn.AvgPool1d(3, 2, 1, count_include_pad=False),
        nn.AdaptiveAvgPool1d(7),
        nn.BatchNorm1d(24),
        nn.ZeroPad1d((2, 1)),
        nn.ConstantPad1d((2, 1), 0.5),
        nn.Dropout1d(),
        nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(24, 5)),
    ],
    ids=repr,
)
def test_each_layer(layer, density):
    network = thin(nn.Sequential(nn.Conv1d(3, 24, 3), nn.ReLU(), layer, nn.ReLU()), density)
    x = torch.randn(2, 3, 40)
    fast = computed_by("engine", network, x)
    assert_right(network, fast, x, torch.randn(5, 3, 29), torch.randn(1, 3, 29))
    assert regions(fast.fast)
    assert_right(network, computed_by("dense", network, x), x)


class Between(nn.Module):
    """Two convolutions, and something between that cannot, or can, be done on images."""

    def __init__(self, call) -> None:
        super().__init__()
        self.a, self.call, self.b = nn.Conv1d(4, 8, 3), call, nn.Conv1d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.a, self.b)


@pytest.mark.parametrize(
    ("call", "one_region"),
    [
        (lambda x, a, b: b(a(x)[:, :, 2:-3].relu()), True),
        (lambda x, a, b: b(a(x)[:, :, :]), True),
        (lambda x, a, b: b(F.relu6(torch.cat([a(x)[:, :4], a(x)[:, 4:]], 1))), False),
        (lambda x, a, b: b(torch.cat([a(x)[:, :, 1:], a(x)[:, :, :-1]], dim=1)[:, ::2]), False),
        (lambda x, a, b: b(a(x)[:, :, :9]), False),
        (lambda x, a, b: b(a(x)[:, :, ::2]), False),
        (lambda x, a, b: b(a(x)[:, :, -9:]), False),
        (lambda x, a, b: b(F.pad(a(x), (1, 2), "reflect")), False),
        (lambda x, a, b: b(F.pad(a(x), (1, 2), value=1.0)), False),
        (lambda x, a, b: b(F.pad(F.relu(F.pad(a(x), (1, -2))), (-1, 2)) * 2.0), False),
        (lambda x, a, b: b(F.pad(a(x), (1, 2, 0, 0))), False),
        (lambda x, a, b: b(a(x).mean(2, keepdim=True) + a(x)), False),
        (lambda x, a, b: b(a(x).transpose(1, 2).flatten(1).unflatten(1, (8, -1))), False),
        (lambda x, a, b: b(F.max_pool1d(a(x), 2, return_indices=True)[0]), False),
        (lambda x, a, b: b(torch.cat(tensors=[a(x), a(x)[:, :, :]], dim=1)[:, :8]), False),
        (lambda x, a, b: a(x).mean(-1), True),
        (lambda x, a, b: torch.mean(a(x), 2), True),
        (lambda x, a, b: a(x).flatten(1), True),
        (lambda x, a, b: a(x).flatten(1, 2), True),
        (lambda x, a, b: b(F.pad(y := a(x), (4, 0))) + b(F.pad(y.relu(), (4, 0))), True),
        (lambda x, a, b: b(F.pad(y := a(x), (4, 0))) + F.pad(y, (2, 0))[:, :4], False),
    ],
)
def test_what_lies_between(call, one_region):
    network, x = thin(Between(call), 0.6), torch.randn(2, 4, 20)
    fast = computed_by("engine", network, x)
    assert_right(network, fast, x, torch.randn(5, 4, 20), torch.randn(1, 4, 30))
    assert (len(regions(fast.fast)) == 1) == one_region


def test_a_sequence_without_a_batch_and_a_layer_that_takes_both():
    network, x = thin(nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU())), torch.randn(3, 20)
    assert_right(network, computed_by("dense", network, x), x)

    both = thin(Between(lambda x, a, b: b(x)[0] + b(x[0])))
    both.b, x = nn.Conv1d(8, 8, 3, padding=1), torch.randn(1, 8, 20)
    assert_right(both, computed_by("dense", both, x), x)


def test_pairs_and_dead_channels_over_sequences():
    layers = nn.Conv1d(16, 32, 5, padding=2), nn.ReLU(), nn.Conv1d(32, 32, 5, padding=2)
    network, x = nn.Sequential(*layers).eval(), torch.randn(2, 16, 40)
    with torch.no_grad():
        network[0].weight[3:6] = 0.0
        network[0].bias[3:6] = 0.0
    fast = computed_by("engine", network, x)
    assert_right(network, fast, x)
    assert fast.report.rows[0].choice == "dense kernel, 3 channels removed"
    pairs = factorize(network, {"0": 4, "2": 4})
    fast = computed_by("engine", pairs, x)
    assert_right(pairs, fast, x, torch.randn(1, 16, 30))
    assert len(regions(fast.fast)) == 1


class Turns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else self.layer(x[0])[None]


def test_a_convolution_in_a_network_that_cannot_be_traced():
    network, x = thin(Turns()), torch.rand(1, 8, 8)
    fast = computed_by("layers", network, x)
    assert_right(network, fast, x, -x)
    assert [row.choice for row in fast.report.rows] == ["sparse kernel"] and regions(fast.fast)


class Indices(nn.Module):
    """An argument that is called as the layer is, and a layer with two results."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.pool = nn.Conv1d(4, 8, 3), nn.MaxPool1d(2, return_indices=True)

    def forward(self, layer: Tensor) -> Tensor:
        largest, indices = self.pool(self.layer(layer))
        return largest + indices


def test_a_layer_with_two_results():
    network, x = thin(Indices()), torch.randn(2, 4, 20)
    fast = computed_by("engine", network, x)
    assert_right(network, fast, x, torch.randn(1, 4, 31))
    assert len(regions(fast.fast)) == 1


class Shaken(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.rand_like(weight)


def test_a_weight_that_is_another_at_every_call_is_computed_at_every_call():
    network, x = nn.Sequential(nn.Conv1d(8, 8, 3), nn.Conv1d(8, 8, 3)).eval(), torch.randn(2, 8, 40)
    parametrize.register_parametrization(network[0], "weight", Shaken())
    fast = computed_by("engine", network, x).fast
    assert not torch.equal(fast(x), fast(x))


def test_the_network_goes_on_computing_its_weight():
    network, x = nn.Sequential(nn.Conv1d(8, 8, 3)).eval(), torch.randn(2, 8, 40)
    parametrizations.weight_norm(network[0])
    expected = network(x)
    fast = computed_by("engine", network, x)
    assert torch.equal(network(x), expected) and parametrize.is_parametrized(fast.original[0])
    torch.testing.assert_close(fast.original(x), expected)
