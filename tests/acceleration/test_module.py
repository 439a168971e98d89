"""Whole networks, accelerated: the same results, whatever is done with them afterwards."""

import copy
import os
import pickle
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import slimnets
from slimnets.acceleration import host
from slimnets.acceleration.convert import accelerate
from slimnets.acceleration.module import Accelerated
from tests.acceleration.networks import (
    TOLERANCE,
    assert_right,
    computed_by,
    prune,
    transformer,
    vgg,
)

NETWORKS = {
    "vgg": (vgg, (3, 32, 32)),
    "resnet18": (torchvision.models.resnet18, (3, 64, 64)),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, (3, 32, 32)),
    "transformer": (transformer, (7, 32)),
}


ROWS = {"vgg": 6, "resnet18": 21, "mobilenet_v2": 53, "transformer": 8}


@pytest.mark.parametrize("name", NETWORKS)
def test_whole_networks(name):
    make, shape = NETWORKS[name]
    network = prune(make(), 0.8)
    found = computed_by("engine", network, torch.randn(2, *shape))
    for batch in (2, 1, 5):
        x = torch.randn(batch, *shape)
        with torch.no_grad():
            expected = network(x)
        scale = float(expected.abs().max())
        assert scale > 0.01
        torch.testing.assert_close(found.fast(x), expected, rtol=0, atol=TOLERANCE * scale)
        layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers[:: max(1, len(layers) // 8)]:  # the outputs depend on every layer
        changed = copy.deepcopy(layer.weight)
        with torch.no_grad():
            layer.weight.mul_(torch.rand_like(layer.weight) > 0.5)
            difference = float((network(x) - expected).abs().max())
            layer.weight.copy_(changed)
        assert difference > 10 * TOLERANCE * scale
    report = found.report
    assert (report.before, report.after) == (report.tried["PyTorch"], report.tried["engine"])
    assert min(report.tried.values()) > 0.0 and "all" in str(report)
    rows = report.to_dict()["rows"]
    assert {"sparse kernel"} <= {row["choice"].partition(",")[0] for row in rows}
    assert len(rows) == ROWS[name] and all(row["after"] > 0.0 for row in rows)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return prune(vgg(), 0.9)


@pytest.fixture(scope="module")
def fast(network: nn.Module) -> Accelerated:
    return computed_by("engine", network, torch.randn(4, 3, 32, 32))


def test_a_sparse_network_is_computed_by_the_engine(network):
    pytest.importorskip("numba")
    fast = accelerate(network, torch.randn(4, 3, 32, 32))
    assert {"sparse kernel"} == {row.choice for row in fast.report.rows}
    assert fast.report.speedup > 1.0
    assert [round(row.sparsity, 1) for row in fast.report.rows] == [0.9] * 6


def test_the_model_is_left_as_it_was(network):
    model = copy.deepcopy(network).train()
    before = copy.deepcopy(model.state_dict())
    computed_by("engine", model, torch.randn(1, 3, 32, 32))
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_was_not_foreseen_goes_to_the_original(network, fast):
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
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
    torch.testing.assert_close(half(x.double()).float(), fast.fast(x), rtol=1e-3, atol=1e-3)
    assert copy.deepcopy(fast).float().fast is not None


def test_pickle_and_deepcopy(fast):
    x = torch.randn(3, 3, 32, 32)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other.fast(x), fast.fast(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torch_compile_leaves_it_alone(fast):
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(torch.compile(fast, backend="eager")(x), fast.fast(x))


def test_a_single_layer_and_a_shared_one():
    layer = prune(nn.Conv2d(16, 16, 3, padding=1), 0.9)
    x = torch.randn(2, 16, 12, 12)
    for network in (layer, nn.Sequential(layer, nn.BatchNorm2d(16), layer).eval()):
        assert_right(network, computed_by("engine", network, x), x)


WITHOUT_NUMBA = """
import torch
from torch import nn
from slimnets.acceleration import convert
torch.manual_seed(0)
torch.set_num_threads(1)
net = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
                    nn.Conv2d(64, 64, 3, stride=2), nn.Flatten(), nn.Linear(64 * 49, 10)).eval()
with torch.no_grad():
    for p in net.parameters():
        if p.dim() > 1:
            p.mul_(torch.rand_like(p) > 0.98)
    x = torch.randn(1, 32, 16, 16)
    convert.fastest = lambda times, least_gain: "dense"
    fast = convert.accelerate(net, x)
    assert "engine" not in fast.report.tried
    x = torch.randn(3, 32, 16, 16)
    torch.testing.assert_close(fast.fast(x), net(x), rtol=1e-4, atol=1e-4)
print([row.choice for row in fast.report.rows], fast.report.note)
"""


def test_without_numba(tmp_path):
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 2.3 or less')")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NUMBA],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert "sparse kernel" not in done.stdout
    assert "cannot be used here: Numba needs NumPy 2.3 or less" in done.stdout


@pytest.mark.parametrize(
    ("numba", "note"),
    [
        ("raise ModuleNotFoundError('No Numba', name='numba')", "missing.*: pip install slimnets"),
        ("import llvmlight", "cannot be used here: No module named 'llvmlight'$"),
        ("raise OSError('no libllvmlite.so')", "cannot be used here: no libllvmlite.so$"),
    ],
)
def test_why_there_is_no_engine(numba, note, tmp_path, monkeypatch):
    (tmp_path / "numba.py").write_text(numba)
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert re.search(note, runpy.run_path(host.__file__)["NO_ENGINE"])


def test_parametrized_and_masked_layers_go_on_working():
    network = prune(vgg(), 0.5)
    nn.utils.parametrizations.weight_norm(network[0])
    nn.utils.prune.l1_unstructured(network[3], "weight", 0.9)
    x = torch.randn(2, 3, 32, 32)
    network(x)  # leaves weights with a history behind
    assert_right(network, computed_by("engine", network, x), x)


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
    fast = computed_by("engine", network, inputs).fast
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
    x = torch.randn(2, 3, 32, 32)
    fast = computed_by("engine", network, x)
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

    tried = accelerate(prune(Views(), 0.5), torch.randn(2, 3, 8, 8)).report.tried
    assert "PyTorch" in tried and "dense, channels last" not in tried
    assert "Traceback" not in "".join(capfd.readouterr())


class NamedOnly(nn.Module):
    def forward(self, *, x):
        return x


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        ("net.pt2", torch.ones(1, 2), "model='net.pt2': expected an nn.Module"),
        (nn.Linear(2, 1), {"x": torch.ones(1, 2)}, "example_input: missing .* 'input' of forward"),
        (nn.Bilinear(2, 2, 1), [torch.ones(1, 2), torch.ones(1, 2)], "give a tuple"),
        (NamedOnly(), {"x": torch.ones(1, 2)}, "'x' can only be given by name"),
    ],
)
def test_what_cannot_be_called_is_refused(model, example, message):
    with pytest.raises(TypeError, match=message):
        accelerate(model, example)


def test_arguments_may_be_given_by_name():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = vgg()

        def forward(self, images, scale):
            return self.body(images) * scale

    network = prune(Scaled(), 0.9)
    example = {"scale": torch.ones(2, 1), "images": torch.randn(2, 3, 32, 32)}
    fast = computed_by("engine", network, example)
    calls = []
    fast.fast.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        torch.testing.assert_close(fast(**example), network(**example), rtol=1e-4, atol=1e-4)
    assert calls
    with pytest.raises(TypeError, match="unexpected keyword argument 'x'"):
        fast(x=1)


def test_a_lazy_network_is_refused():
    with pytest.raises(ValueError, match=r"model: '0\.weight' has no values yet; run one batch"):
        accelerate(nn.Sequential(nn.LazyLinear(3)), torch.ones(1, 2))


def test_hooks_are_called_as_before():
    block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    network = prune(nn.Sequential(block, nn.ReLU()), 0.9)
    found: list[str] = []
    for name in ("0", "0.1", "0.2"):
        network.get_submodule(name).register_forward_hook(lambda *_, name=name: found.append(name))
    x = torch.randn(2, 3, 16, 16)
    for hooked in (network, block):  # the root of the second is hooked
        variant = "dense" if hooked is network else "layers"
        fast = computed_by(variant, hooked, x).fast
        found.clear()
        fast(x)
        assert found == ["0.1", "0.2", "0"]


def test_features_of_inner_layers_are_those_of_the_network() -> None:
    """A copy of a graph of torch.fx is in training mode, and would write batch statistics."""
    network = prune(vgg(), 0.9)
    extract = create_feature_extractor(network, ["2", "7"]).eval()
    x = torch.randn(4, 3, 32, 32)
    expected, before = extract(x), copy.deepcopy(extract.state_dict())

    fast = computed_by("engine", extract, x)
    for name, value in fast.fast(x).items():
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

    if scripted == "part":
        assert_right(network, computed_by("layers", network, x), x)
    else:  # it cannot even be asked for its arguments
        fast = accelerate(network, x)
        assert fast.fast is None and "no signature" in fast.report.note
        assert torch.equal(fast(x), network(x))


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
    fast = computed_by("dense" if kind == "packed" else "engine", network, given).fast
    torch.testing.assert_close(fast(given), network(given))


def test_halves_are_compared_as_coarsely_as_they_are_rounded() -> None:
    network = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).bfloat16().eval()
    x = torch.randn(2, 8, 64, dtype=torch.bfloat16)
    fast = computed_by("dense", network, x).fast
    torch.testing.assert_close(fast(x), network(x), rtol=0.02, atol=0.02)
