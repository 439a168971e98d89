"""Whole networks, accelerated: the same results, whatever is done with them afterwards."""

import copy
import pickle
import random
import subprocess
import sys
from collections import OrderedDict, deque
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import slimnets
from slimnets.acceleration.module import Accelerated, accelerate
from slimnets.acceleration.prepare import graph_of, same_draws, simplify
from slimnets.acceleration.trace import trace

TOLERANCE = 1e-4


def prune(network: nn.Module, sparsity: float) -> nn.Module:
    """Random zeros, with statistics and gains so that every layer is felt in the output."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            with torch.no_grad():
                fan = layer.weight[0].numel()
                nn.init.normal_(layer.weight, 0.0, (2.0 / fan / (1.0 - sparsity)) ** 0.5)
                layer.weight.masked_fill_(torch.rand_like(layer.weight) < sparsity, 0.0)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.2, 0.2)
            nn.init.uniform_(layer.running_var, 0.7, 1.5)
    return network.eval()


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for width in (16, 16, 0, 32, 32, 0, 64, 0):
        if width:
            conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(), nn.Linear(64 * 16, 10))


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


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


NETWORKS = {
    "vgg": (vgg, (3, 32, 32)),
    "resnet18": (torchvision.models.resnet18, (3, 64, 64)),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, (3, 32, 32)),
    "transformer": (transformer, (7, 32)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_whole_networks(name):
    make, shape = NETWORKS[name]
    network = prune(make(), 0.8)
    x = torch.randn(2, *shape)
    fast = accelerate(network, x)
    for batch in (2, 1, 5):
        x = torch.randn(batch, *shape)
        with torch.no_grad():
            expected = network(x)
        scale = float(expected.abs().max())
        assert scale > 0.01
        torch.testing.assert_close(fast(x), expected, rtol=0, atol=TOLERANCE * scale)
        layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers[:: max(1, len(layers) // 8)]:  # the outputs depend on every layer
        changed = copy.deepcopy(layer.weight)
        with torch.no_grad():
            layer.weight.mul_(torch.rand_like(layer.weight) > 0.5)
            difference = float((network(x) - expected).abs().max())
            layer.weight.copy_(changed)
        assert difference > 10 * TOLERANCE * scale
    assert fast.report.after <= fast.report.before
    assert "all" in str(fast.report)
    assert fast.report.to_dict()["rows"] or fast.fast is None


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return prune(vgg(), 0.9)


@pytest.fixture(scope="module")
def fast(network: nn.Module) -> Accelerated:
    return accelerate(network, torch.randn(4, 3, 32, 32))


def test_a_sparse_network_is_computed_by_the_engine(fast):
    pytest.importorskip("numba")
    assert {"sparse kernel"} == {row.choice for row in fast.report.rows}
    assert fast.report.speedup > 1.0
    assert [round(row.sparsity, 1) for row in fast.report.rows] == [0.9] * 6


def test_the_model_is_left_as_it_was(network):
    model = copy.deepcopy(network).train()
    before = copy.deepcopy(model.state_dict())
    accelerate(model, torch.randn(1, 3, 32, 32))
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_was_not_foreseen_goes_to_the_original(network, fast):
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(fast(input=x), network(x))
        torch.testing.assert_close(fast(x[0:0]), network(x[0:0]))
        with torch.autocast("cpu", torch.bfloat16):
            assert fast(x).dtype == torch.bfloat16
    for wrong in (x.double(), torch.randn(2, 4, 32, 32), torch.randn(2, 3, 40, 40), "text"):
        with pytest.raises(Exception) as expected:
            network(wrong)
        with pytest.raises(type(expected.value)):
            fast(wrong)
    assert not fast.train().training
    assert not fast(x.requires_grad_()).requires_grad


def test_moving_to_another_type_gives_the_original(fast):
    half = copy.deepcopy(fast).double()
    x = torch.randn(2, 3, 32, 32)
    assert half.fast is None
    torch.testing.assert_close(half(x.double()).float(), fast(x), rtol=1e-3, atol=1e-3)
    assert copy.deepcopy(fast).float().fast is not None


def test_pickle_and_deepcopy(fast):
    x = torch.randn(3, 3, 32, 32)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert other.fast is not None
        assert torch.equal(other(x), fast(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torch_compile_leaves_it_alone(fast):
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(torch.compile(fast, backend="eager")(x), fast(x))


def test_control_flow_keeps_the_module_and_exchanges_layers():
    model = prune(Branches(), 0.9)
    x = torch.randn(4, 3, 40, 40)
    fast = accelerate(model, x)
    with torch.no_grad():
        for sign in (1, -1):
            for call in ({}, {"scale": 2.0}, {"twice": True}):
                expected, found = model(sign * x, **call), fast(sign * x, **call)
                assert found.keys() == expected.keys()
                torch.testing.assert_close(found["y"], expected["y"], rtol=1e-4, atol=1e-4)
    assert "cannot be traced" in fast.report.note or fast.fast is None


class Stochastic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x) + torch.rand(4) * self.calls


def test_random_numbers_are_drawn_at_every_call():
    fast = accelerate(Stochastic(), torch.randn(2, 4))
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


def test_a_single_layer_and_a_shared_one():
    layer = prune(nn.Conv2d(16, 16, 3, padding=1), 0.9)
    x = torch.randn(2, 16, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(accelerate(layer, x)(x), layer(x), rtol=1e-4, atol=1e-4)
        twice = nn.Sequential(layer, nn.BatchNorm2d(16), layer).eval()
        torch.testing.assert_close(accelerate(twice, x)(x), twice(x), rtol=1e-4, atol=1e-4)


WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
import torch
from torch import nn
from slimnets.acceleration import accelerate
torch.manual_seed(0)
torch.set_num_threads(1)
net = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
                    nn.Conv2d(64, 64, 3, stride=2), nn.Flatten(), nn.Linear(64 * 49, 10)).eval()
with torch.no_grad():
    for p in net.parameters():
        if p.dim() > 1:
            p.mul_(torch.rand_like(p) > 0.98)
    x = torch.randn(1, 32, 16, 16)
    fast = accelerate(net, x)
    assert "engine" not in fast.report.tried and "dense" in fast.report.tried
    x = torch.randn(3, 32, 16, 16)
    torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-4)
print([row.choice for row in fast.report.rows])
"""


def test_without_numba():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NUMBA], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "sparse kernel" not in done.stdout


def test_parametrized_and_masked_layers_go_on_working():
    network = prune(vgg(), 0.5)
    nn.utils.parametrizations.weight_norm(network[0])
    nn.utils.prune.l1_unstructured(network[3], "weight", 0.9)
    x = torch.randn(2, 3, 32, 32)
    network(x)  # leaves weights with a history behind
    with torch.no_grad():
        fast = accelerate(network, x)
        torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-4)
    assert "stays as it is: " not in fast.report.note  # nothing went wrong


def test_masks_and_cross_attention_go_to_pytorch():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
            self.encoder = transformer()

        def forward(self, x, memory):
            mask = nn.Transformer.generate_square_subsequent_mask(7)
            y = self.encoder(x, mask=mask) + self.encoder(x)
            crossed, weights = self.attention(y, memory, memory)
            return crossed + self.attention(y, y, y, need_weights=False)[0], weights

    network, inputs = prune(Decoder(), 0.8), (torch.randn(2, 7, 32), torch.randn(2, 5, 32))
    fast = accelerate(network, inputs)
    with torch.no_grad():
        for found, expected in zip(fast(*inputs), network(*inputs), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_it_is_counted_and_saved_as_the_network_it_computes(network, fast, tmp_path):
    x = torch.randn(2, 3, 32, 32)
    summary = slimnets.summarize(fast, x, baseline=network)
    assert {summary.ratios[name] for name in ("weights", "nonzeros", "macs", "bytes")} == {1.0}
    files = [tmp_path / "fast.safetensors", tmp_path / "network.safetensors"]
    for model, file in zip((fast, network), files, strict=True):
        slimnets.save(model, file)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_weights_that_are_loaded_are_used(network):
    fast, x = accelerate(network, torch.randn(2, 3, 32, 32)), torch.randn(2, 3, 32, 32)
    assert fast.fast is not None
    other = prune(vgg(), 0.5)
    fast.original.load_state_dict(other.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fast(x), other(x))


def test_a_variant_that_fails_prints_nothing(capfd):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 4)

        def forward(self, x):
            return self.linear(self.convolution(x).view(-1, 8 * 36))  # not of channels-last

    accelerate(prune(Views(), 0.9), torch.randn(2, 3, 8, 8))
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        ("net.pt2", torch.ones(1, 2), "model='net.pt2': expected an nn.Module"),
        (nn.Linear(2, 1), {"input": torch.ones(1, 2)}, "example_input: got a dictionary"),
    ],
)
def test_what_cannot_be_called_is_refused(model, example, message):
    with pytest.raises(TypeError, match=message):
        accelerate(model, example)


def test_a_lazy_network_is_refused():
    with pytest.raises(ValueError, match=r"model: '0\.weight' has no values yet; run one batch"):
        accelerate(nn.Sequential(nn.LazyLinear(3)), torch.ones(1, 2))


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
    fast = accelerate(network, (x, padding))
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
    fast = accelerate(network, (x, [Mode.LOGITS], torch.float32))
    for arguments in (([Mode.FEATURES], torch.float32), ([Mode.LOGITS], torch.float64)):
        with torch.no_grad():
            expected = network(x, *arguments)
        torch.testing.assert_close(fast(x, *arguments), expected, rtol=1e-4, atol=1e-4)


def test_hooks_are_called_as_before():
    block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    network = prune(nn.Sequential(block, nn.ReLU()), 0.9)
    found: list[str] = []
    for name in ("0", "0.1", "0.2"):
        network.get_submodule(name).register_forward_hook(lambda *_, name=name: found.append(name))
    x = torch.randn(2, 3, 16, 16)
    for hooked in (network, block):  # the root of the second is hooked
        fast = accelerate(hooked, x)
        found.clear()
        fast(x)
        assert found == ["0.1", "0.2", "0"]


def body(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), *more, nn.Conv2d(32, 16, 3))


def assert_right(network, fast, *inputs):
    with torch.no_grad():
        for x in inputs:
            expected = network(x.clone())
            scale = float(expected.abs().max())
            torch.testing.assert_close(fast(x.clone()), expected, rtol=0, atol=1e-4 * scale)


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
    assert_right(network, accelerate(network, x), x, 100 * x)


class Clamped(nn.Module):
    def __init__(self, call) -> None:
        super().__init__()
        self.a, self.b, self.call = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 8, 3), call

    def forward(self, x):
        h = self.a(x)
        self.call(h)
        return self.b(h)


@pytest.mark.parametrize(
    "call",
    [
        lambda h: torch.clamp(h, -6.0, 6.0, out=h),
        lambda h: nn.functional.hardtanh_(input=h, min_val=-6.0, max_val=6.0),
    ],
)
def test_what_is_changed_by_keyword(call):
    network, x = prune(Clamped(call), 0.9), torch.randn(2, 3, 16, 16) / 10
    assert_right(network, accelerate(network, x), x, 1000 * x)


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
    fast = accelerate(network, x)
    for module in (network, fast):
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
    fast = accelerate(Chance(draw), x)
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
    assert accelerate(network, x).report.note != NOTHING_IS_THE_SAME


NOTHING_IS_THE_SAME = "Nothing that was tried computes the same: the network stays as it is."


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
    found = accelerate(network, x)(x)
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
    fast = accelerate(network, (x, *given))
    torch.testing.assert_close(fast(x, *given), expected, rtol=1e-4, atol=1e-4)
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
    assert "changes its input" in fast.report.note
    assert_right(network, fast, x)


class Out(OrderedDict):
    @property
    def logits(self):
        return self["logits"]


@dataclass
class Both:
    logits: torch.Tensor


@pytest.mark.parametrize("kind", [Out, Both])
def test_a_result_keeps_its_type(kind):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body()

        def forward(self, x):
            return kind(logits=self.body(x))

    network, x = prune(Net(), 0.98), torch.randn(2, 3, 24, 24)
    fast = accelerate(network, x)
    with torch.no_grad():
        torch.testing.assert_close(fast(x).logits, network(x).logits, rtol=1e-4, atol=1e-4)
    assert type(fast(x)) is kind


def test_features_of_inner_layers_are_those_of_the_network() -> None:
    """A copy of a graph of torch.fx is in training mode, and would write batch statistics."""
    network = prune(vgg(), 0.9)
    extract = create_feature_extractor(network, ["2", "7"]).eval()
    x = torch.randn(4, 3, 32, 32)
    expected, before = extract(x), copy.deepcopy(extract.state_dict())

    fast = accelerate(extract, x)

    assert not fast.report.note  # the graph was taken over, not single layers exchanged
    for name, value in fast(x).items():
        torch.testing.assert_close(value, expected[name], rtol=TOLERANCE, atol=TOLERANCE)
    for state in (extract.state_dict(), fast.original.state_dict()):
        assert all(torch.equal(state[name], value) for name, value in before.items())


@pytest.mark.filterwarnings("ignore:.torch.jit.*:FutureWarning")
@pytest.mark.parametrize("scripted", ["part", "whole"])
def test_a_scripted_network_goes_on_running(scripted) -> None:
    part = torch.jit.script(nn.Linear(16, 4))
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), part).eval()
    if scripted == "whole":
        network = torch.jit.script(network)
    x = torch.randn(3, 8)

    torch.testing.assert_close(accelerate(network, x)(x), network(x))


@dataclass(frozen=True)
class Frozen:
    images: torch.Tensor


@pytest.mark.parametrize("kind", ["packed", "frozen"])
def test_inputs_of_other_types(kind: str) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.RNN(8, 4), nn.Linear(8, 3)

        def forward(self, given: Any) -> torch.Tensor:
            return self.layer(given)[1] if kind == "packed" else self.head(given.images)

    packed = nn.utils.rnn.pack_sequence([torch.randn(5, 8), torch.randn(2, 8)])
    given = packed if kind == "packed" else Frozen(torch.randn(2, 8))
    network = Network().eval()
    torch.testing.assert_close(accelerate(network, given)(given), network(given))


def test_halves_are_compared_as_coarsely_as_they_are_rounded() -> None:
    network = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).bfloat16().eval()
    fast = accelerate(network, torch.randn(2, 8, 64, dtype=torch.bfloat16))
    assert "computes the same" not in fast.report.note
