"""What a network is and costs, counted by hand, and that counting leaves it as it was."""

import copy
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from slimnets.artifact.file import save
from slimnets.distillation import DistillationModule
from slimnets.inspection.summary import Summary, summarize
from tests.support import assert_equal


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout()
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor, scale: float = 1.0) -> Tensor:
        hidden = self.drop(self.norm(self.convolution(images))).mean((2, 3))
        return self.head(hidden * scale)


IMAGES = torch.randn(2, 1, 6, 6)


@pytest.fixture
def pruned() -> Net:
    network = Net()
    network.convolution.weight.data[:4] = 0
    network.head.weight.data[:, :6] = 0
    return network


def test_totals_by_hand(pruned: Net) -> None:
    summary = summarize(pruned, IMAGES)
    total = summary.total
    assert (total.name, total.kind) == ("total", "Net")
    assert (total.weights, total.nonzeros) == (72 + 32, 36 + 8)
    assert total.sparsity == pytest.approx(1 - 44 / 104)
    assert total.dead_channels == 4
    positions = 2 * 16
    assert total.macs == positions * 72 + 2 * 32
    assert total.effective_macs == positions * 36 + 2 * 8
    assert summary.parameters == sum(parameter.numel() for parameter in pruned.parameters())


def test_without_an_input_operations_and_latency_are_unknown() -> None:
    summary = summarize(Net())
    assert summary.latency is summary.conditions is summary.total.macs is None
    assert "MACs" not in str(summary)
    assert "latency" not in str(summary)


def test_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(400, 500), nn.BatchNorm1d(500), nn.Linear(500, 100))
    network[0].weight.data[torch.rand(500, 400) < 0.9] = 0
    save(network, tmp_path / "net.safetensors")
    size = (tmp_path / "net.safetensors").stat().st_size
    total = summarize(network).total.bytes
    header = size - total
    assert 0 < header < 2000


@pytest.mark.parametrize(
    "example",
    [IMAGES, (IMAGES, 2.0), {"images": IMAGES, "scale": 2.0}],
    ids=["tensor", "tuple", "dict"],
)
def test_forms_of_input(example: Any) -> None:
    summary = summarize(Net(), example)
    assert summary.total.macs == 2 * 16 * 72 + 2 * 32
    assert "input (2, 1, 6, 6) on cpu, 1 thread" in str(summary)


class ByPosition(nn.Module):
    """Runs a network in a way of its own for positional arguments only, as ``accelerate`` does."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.compressed_network = network
        self.calls = 0

    def forward(self, images: Tensor, *rest: Any, **named: Any) -> Any:
        self.calls += not named
        return self.compressed_network(images, *rest, **named)


def test_a_dictionary_is_given_by_the_names_of_the_network_and_by_position() -> None:
    model = ByPosition(Net())
    summary = summarize(model, {"scale": 2.0, "images": IMAGES})
    assert summary.total.macs == 2 * 16 * 72 + 2 * 32
    assert model.calls >= 10
    with pytest.raises(TypeError, match="example_input: missing a required argument: 'images'"):
        summarize(model, {"scale": 2.0})


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_is_as_it_was(fails: bool) -> None:
    network = Net()
    network.drop.eval()
    before = copy.deepcopy(network.state_dict())
    random = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError):
            summarize(network, torch.ones(1, 3, 2, 2))
    else:
        summarize(network, IMAGES)
    assert_equal(network, before)
    assert [module.training for module in network.modules()] == [True, True, True, False, True]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in network.parameters())
    network(IMAGES).sum().backward()


def test_against_a_baseline(pruned: Net) -> None:
    summary = summarize(pruned, IMAGES, baseline=Net())
    assert summary.baseline is not None
    assert summary.baseline.total.nonzeros == 104
    ratios = summary.ratios
    assert ratios["weights"] == 1
    assert ratios["nonzeros"] == pytest.approx(104 / 44)
    assert ratios["effective_macs"] == pytest.approx((32 * 72 + 64) / (32 * 36 + 16))
    assert ratios["bytes"] == summary.baseline.total.bytes / summary.total.bytes
    assert summary.speedup is not None
    assert ratios["latency"] == summary.speedup.median > 0
    assert "baseline" in str(summary)
    assert "2.36x" in str(summary)


def test_a_slower_baseline_is_seen_to_be_slower() -> None:
    fast = nn.Sequential(nn.Linear(64, 64))
    slow = nn.Sequential(*(nn.Linear(64, 64) for _ in range(40)))
    assert summarize(fast, torch.randn(8, 64), baseline=slow).ratios["latency"] > 3


def test_inputs_of_every_shape_are_named() -> None:
    class Scaled(nn.Module):
        def forward(self, x: object, scale: float = 1.0) -> torch.Tensor:
            x = x if isinstance(x, torch.Tensor) else x[0]["x"]  # type: ignore[index]
            return x * scale

    x = torch.ones(2, 3)
    for example, shapes in ((x, "(2, 3)"), (([{"x": x}], 2.0), "(2, 3)"), ({"x": x}, "(2, 3)")):
        assert f"input {shapes} on cpu" in (summarize(Scaled(), example).conditions or "")


def test_a_network_without_nonzeros_divides_by_nothing() -> None:
    network = nn.Linear(2, 2)
    network.weight.data.zero_()
    assert summarize(network, baseline=nn.Linear(2, 2)).ratios["nonzeros"] == float("inf")
    written = summarize(network, baseline=nn.Linear(2, 2)).to_dict()
    assert json.loads(json.dumps(written, allow_nan=False))["ratios"]["nonzeros"] is None
    assert summarize(nn.Flatten(), baseline=nn.Flatten()).ratios["weights"] == 1


def test_it_converts_to_json(pruned: Net) -> None:
    summary = summarize(pruned, IMAGES, baseline=Net())
    found = json.loads(json.dumps(summary.to_dict()))
    assert [row["name"] for row in found["rows"]] == ["convolution", "norm", "head"]
    assert found["rows"][0]["sparsity"] == 0.5
    assert found["total"]["nonzeros"] == 44
    assert found["latency"]["median"] > 0
    assert found["baseline"]["total"]["nonzeros"] == 104
    assert summarize(pruned).to_dict()["latency"] is None


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = Net()
        self.example_input_array = IMAGES

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


def test_a_lightning_module_brings_its_example() -> None:
    summary = summarize(Module())
    assert summary.total.macs == 2 * 16 * 72 + 2 * 32
    assert summary.rows[0].name == "network.convolution"


def test_a_distillation_brings_its_example_where_the_student_has_none() -> None:
    module = DistillationModule(Net(), Net())
    module.example_input_array = IMAGES
    assert summarize(module).total.macs == 2 * 16 * 72 + 2 * 32


def test_of_a_distillation_the_student_counts() -> None:
    module = DistillationModule(student=Net(), teacher=nn.Linear(1, 1))
    summary = summarize(module, IMAGES)
    assert summary.total.kind == "Net"
    assert summary.rows[0].name == "convolution"


def test_a_compiled_network_is_measured_compiled() -> None:
    calls = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        def run(*args: Any) -> Any:
            calls.append(1)
            return graph(*args)

        return run

    compiled = torch.compile(Net(), backend=backend)
    summary = summarize(compiled, IMAGES)
    assert summary.rows[0].name == "convolution"
    assert len(calls) >= 5


def test_what_is_no_network_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model='net.safetensors': expected an nn.Module"):
        summarize("net.safetensors")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="baseline="):
        summarize(Net(), baseline={})  # type: ignore[arg-type]


def test_a_lazy_layer_is_refused_before_it_is_initialized() -> None:
    network = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"model: '0.weight' has no values yet; run one batch"):
        summarize(network, torch.ones(1, 2))
    assert isinstance(network[0], nn.LazyLinear)


def test_markdown_holds_what_the_table_holds(pruned: Net) -> None:
    summary: Summary = summarize(pruned)
    shown = [line.strip("| ").split("|") for line in summary.to_markdown().splitlines()]
    table = [line.split() for line in str(summary).splitlines()]
    assert [cell.strip() for cell in shown[2] if cell.strip()] == table[3]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.RNN(8, 4)

    def forward(self, packed: PackedSequence) -> Tensor:
        return self.layer(packed)[1]


def test_a_packed_sequence_is_one_argument() -> None:
    packed = pack_sequence([torch.randn(5, 8), torch.randn(2, 8)])
    for given in (packed, (packed,)):
        summary = summarize(Recurrent(), given)
        assert summary.total.macs == 7 * (8 * 4 + 4 * 4)
        assert summary.latency
