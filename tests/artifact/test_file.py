"""Networks to a file and back: every bit, every structure, and nothing changed on failure."""

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.prune import identity

from slimnets.artifact.codec import same_bits
from slimnets.artifact.container import inspect, pack
from slimnets.artifact.file import load, save
from slimnets.artifact.streams import ArtifactError
from slimnets.files import write
from slimnets.lowrank.factorize import factorize
from slimnets.lowrank.modules import LowRankPair


class Net(nn.Sequential):
    def __init__(self, width: int = 8) -> None:
        super().__init__(
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 4, 2),
            nn.Flatten(),
            nn.Linear(4 * 25, 10),
        )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embedding.weight


class Lit(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()


class Wrapper(L.LightningModule):
    """What a DistillationModule is to ``save``."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    @property
    def compressed_network(self) -> nn.Module:
        return self.student


def prune(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.masked_fill_(torch.rand_like(parameter) < 0.8, 0.0)
    return network


def pair(rank: int) -> LowRankPair:
    return LowRankPair(nn.Linear(100, rank, bias=False), nn.Linear(rank, 10))


def assert_same(one: nn.Module, other: nn.Module) -> None:
    state, expected = one.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert same_bits(state[name], tensor), name


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.safetensors"


@pytest.mark.parametrize(
    "make", [Net, Tied, Lit, lambda: nn.LSTM(4, 5, 2), lambda: nn.Linear(3, 2)]
)
def test_every_bit_comes_back(path: Path, make: Callable[[], nn.Module]) -> None:
    network, fresh = prune(make()), make()
    save(network, path)
    assert load(path, fresh) is fresh
    assert_same(fresh, network)


def test_equal_networks_give_equal_files(path: Path) -> None:
    network = prune(Net())
    written = set()
    for _ in range(8):  # safetensors would write several entries of metadata in any order
        save(network, path)
        written.add(path.read_bytes())
    assert len(written) == 1


def test_a_low_rank_structure_comes_back(path: Path) -> None:
    network = Net()
    network[5] = pair(3)
    save(prune(network), path)
    fresh = Net()
    assert load(path, fresh) is fresh
    assert isinstance(fresh[5], LowRankPair)
    assert_same(fresh, network)
    images = torch.randn(2, 3, 4, 4)
    assert torch.equal(fresh.eval()(images), network.eval()(images))
    assert_same(load(path, fresh), network)  # a second time, where the pair already is


def test_a_root_that_is_a_layer_is_replaced(path: Path) -> None:
    network, fresh = pair(3), nn.Linear(100, 10)
    save(network, path)
    loaded = load(path, fresh)
    assert loaded is not fresh
    assert_same(loaded, network)


@pytest.mark.parametrize("wrap", [Wrapper, torch.compile, lambda net: Wrapper(torch.compile(net))])
def test_wrappers_are_seen_through(path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    network, fresh = Net(), Net()
    save(wrap(network), path)
    assert set(inspect(path).shapes) == set(network.state_dict())
    wrapped = wrap(fresh)
    assert load(path, wrapped) is wrapped
    assert_same(fresh, network)


def test_parts_may_be_compiled(path: Path) -> None:
    network, fresh = Net(), Net()
    plain = list(network.state_dict())
    network[3] = torch.compile(network[3])  # type: ignore[assignment]
    save(network, path)
    assert list(inspect(path).shapes) == plain
    fresh[0] = torch.compile(fresh[0])  # type: ignore[assignment]
    load(path, fresh)
    for one, other in zip(fresh.parameters(), network.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_compiled_layer_cannot_become_a_pair(path: Path) -> None:
    network, fresh = Net(), Net()
    network[5] = pair(3)
    save(network, path)
    compiled = torch.compile(fresh[5])
    fresh[5] = compiled  # type: ignore[assignment]
    with pytest.raises(ValueError, match="compile after load"):
        load(path, fresh)
    assert fresh[5] is compiled
    assert isinstance(compiled._orig_mod, nn.Linear)


def test_ties_are_stored_once_and_kept(path: Path) -> None:
    network, fresh = Tied(), Tied()
    save(network, path)
    assert inspect(path).ties == {"head.weight": "embedding.weight"}
    load(path, fresh)
    assert fresh.head.weight is fresh.embedding.weight
    assert_same(fresh, network)


def test_untied_values_do_not_fit_a_tied_network(path: Path) -> None:
    untied, fresh = Tied(), Tied()
    untied.head.weight = nn.Parameter(torch.randn(10, 6))
    save(untied, path)
    before = fresh.head.weight.clone()
    with pytest.raises(ArtifactError, match="are one tensor in the model"):
        load(path, fresh)
    assert torch.equal(fresh.head.weight, before)


def test_parametrized_layers(path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))

    network, fresh = make(), make()
    save(network, path)
    assert_same(load(path, fresh), network)


def test_lazy_layers_are_filled_and_not_saved_before(path: Path) -> None:
    network, fresh = nn.LazyLinear(3), nn.LazyLinear(3)
    with pytest.raises(TypeError, match="'weight': a lazy parameter"):
        save(network, path)
    network(torch.randn(1, 5))
    save(network, path)
    load(path, fresh)
    assert torch.equal(fresh.weight, network.weight)


class Counting(nn.Module):
    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_extra_state_is_kept_if_it_is_a_tensor(path: Path) -> None:
    save(Counting(torch.tensor([3, 4])), path)
    assert load(path, Counting(None)).extra.tolist() == [3, 4]
    with pytest.raises(TypeError, match="'_extra_state' is a dict"):
        save(Counting({"epoch": 3}), path)


def test_frozen_and_trained_parameters_stay_so(path: Path) -> None:
    network, fresh = Net(), Net().eval()
    fresh[0].weight.requires_grad_(False)
    parameters = list(fresh.parameters())
    save(network, path)
    load(path, fresh)
    assert not fresh[0].weight.requires_grad
    assert fresh[0].bias.requires_grad
    assert not fresh.training
    assert all(one is other for one, other in zip(fresh.parameters(), parameters, strict=True))


def test_negative_zeros_are_kept_and_warned_of(path: Path) -> None:
    network = nn.Linear(100, 100)
    network.weight.data *= torch.rand(100, 100) > 0.9
    with pytest.warns(UserWarning, match=r"zeros are negative.*weight\.data\.add_\(0\.0\)"):
        save(network, path)
    assert_same(load(path, nn.Linear(100, 100)), network)
    large = path.stat().st_size
    network.weight.data.add_(0.0)
    save(network, path)
    assert path.stat().st_size < large / 2


# Values that are not exact


def messages(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    # Lightning's logger has a handler of its own, and passes nothing on
    logger = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(path: Path, dtype: torch.dtype, log: Any) -> None:
    network, fresh = Net(), Net()
    save(network, path, dtype=dtype)
    load(path, fresh)
    for name, tensor in network.state_dict().items():
        expected = tensor.to(dtype).to(tensor.dtype) if tensor.is_floating_point() else tensor
        assert torch.equal(fresh.state_dict()[name], expected)
    assert (
        f"6 tensors are no longer bit-exact, rounded to {dtype}: 0.weight, 0.bias, 3.weight"
        in messages(log)
    )
    assert "1.running_var" not in messages(log)  # ones, which half precision does not round


def test_int8(path: Path, log: Any) -> None:
    network, fresh = prune(Net()), Net()
    save(network, path, dtype=torch.int8)
    scales = {name: entry.scale for name, entry in inspect(path).tensors.items() if entry.scale}
    assert {name: scale[0] for name, scale in scales.items()} == {
        "0.weight": 0,
        "3.weight": 1,  # (in, out, height, width)
        "5.weight": 0,
    }
    load(path, fresh)
    for name, tensor in network.state_dict().items():
        largest = tensor.abs().max()
        assert torch.allclose(fresh.state_dict()[name], tensor, atol=float(largest) / 127)
        assert ((fresh.state_dict()[name] == 0) >= (tensor == 0)).all()
    assert torch.equal(fresh[5].bias, network[5].bias)
    assert "rounded to torch.int8: 0.weight, 3.weight, 5.weight" in messages(log)


@pytest.mark.parametrize(
    ("compute", "name"),
    [
        (parametrizations.weight_norm, "0.parametrizations.weight.original1"),
        (parametrizations.spectral_norm, "0.parametrizations.weight.original"),
        (lambda layer: identity(layer, "weight"), "0.weight_orig"),
        (torch.compile, "0.weight"),
    ],
)
def test_int8_has_a_scale_for_each_channel_of_a_transposed_weight_however_it_is_computed(
    path: Path, compute: Callable[[nn.Module], nn.Module], name: str
) -> None:
    network = nn.Sequential(compute(nn.ConvTranspose2d(6, 4, 3)))
    network.append(parametrizations.weight_norm(nn.Conv2d(4, 3, 3)))
    save(network, path, dtype=torch.int8)
    scales = {name: entry.scale for name, entry in inspect(path).tensors.items() if entry.scale}
    assert scales[name][0] == 1
    assert scales["1.parametrizations.weight.original1"][0] == 0


def test_fewer_bits_are_fewer_bytes(path: Path) -> None:
    network, sizes = nn.Linear(300, 200), {}
    for bits in (8, np.int64(6), 4):
        save(network, path, dtype=torch.int8, bits=bits)
        sizes[bits] = path.stat().st_size
        restored = load(path, nn.Linear(300, 200)).weight.detach()
        assert all(len(row.unique()) <= 2**bits - 1 for row in restored)
        error = (restored - network.weight).abs().max()
        assert error <= network.weight.abs().max() / 2 ** (bits - 1)
    # uniform values, that no code makes smaller
    assert sizes[8] - sizes[6] == pytest.approx(network.weight.numel() * 2 / 8, rel=0.05)
    assert sizes[6] - sizes[4] == pytest.approx(network.weight.numel() * 2 / 8, rel=0.05)


def test_values_take_the_dtype_of_the_model(path: Path, log: Any) -> None:
    network = nn.Linear(3, 2)
    save(network, path)
    fresh = nn.Linear(3, 2).bfloat16()
    load(path, fresh)
    assert torch.equal(fresh.weight, network.weight.bfloat16())
    assert "rounded to torch.bfloat16: weight, bias" in messages(log)


def test_an_exact_file_says_nothing(path: Path, log: Any) -> None:
    save(prune(Net()), path)
    load(path, Net().double())
    assert not messages(log)


class Masked(nn.Linear):
    """As ``torch.nn.utils.prune`` leaves a layer."""

    def __init__(self) -> None:
        super().__init__(20, 10)
        self.register_buffer("weight_mask", (self.weight.detach() > 0).float())


def test_masks_and_other_buffers_are_exact(path: Path) -> None:
    network, fresh = Masked(), Masked()
    save(network, path, dtype=torch.int8, bits=2)
    load(path, fresh)
    assert torch.equal(fresh.weight_mask, network.weight_mask)
    assert not torch.equal(fresh.weight, network.weight)


class Expands(nn.Module):
    """Its layers are called as those of a pair, and are none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 64), nn.Linear(64, 4)
        self.conv_first, self.conv_second = nn.Conv2d(3, 40, 3), nn.Conv2d(40, 3, 3)


def test_layers_that_are_called_first_and_second(path: Path) -> None:
    network = nn.Sequential(Expands())
    save(network, path)
    assert_same(load(path, nn.Sequential(Expands())), network)


def test_a_student_that_is_itself_a_pair(path: Path) -> None:
    network, module = pair(3), Wrapper(nn.Linear(100, 10))
    save(network, path)
    assert load(path, module) is module
    assert_same(module.student, network)


# Failures


def snapshot(network: nn.Module) -> tuple[list[Any], list[Tensor]]:
    modules = [(name, module, type(module)) for name, module in network.named_modules()]
    return modules, [tensor.clone() for tensor in network.state_dict().values()]


def assert_untouched(network: nn.Module, before: tuple[list[Any], list[Tensor]]) -> None:
    modules, tensors = snapshot(network)
    assert modules == before[0]
    assert all(same_bits(a, b) for a, b in zip(tensors, before[1], strict=True))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "'0.weight' is missing in the file; '0.bias' .* and 6 more"),
        (Net().state_dict() | {"9.weight": torch.ones(1)}, "'9.weight' is missing in the model"),
        (Net(4).state_dict(), r"'0.weight' is \(4, 3, 3, 3\) in the file, \(8, 3, 3, 3\) in"),
        (
            Net().state_dict() | {"5.bias": torch.ones(10, 1)},
            r"'5.bias' is \(10, 1\) in the file, \(10,\) in the model",
        ),
    ],
    ids=["empty", "unexpected", "shape", "dimensions"],
)
def test_a_file_of_another_network(path: Path, state: dict[str, Tensor], message: str) -> None:
    write(path, pack(state))
    fresh = Net()
    before = snapshot(fresh)
    with pytest.raises(ArtifactError, match=f"net.safetensors: does not fit the model: {message}"):
        load(path, fresh)
    assert_untouched(fresh, before)


def test_a_file_of_a_network_that_is_a_part_of_the_model_or_has_it_as_one(path: Path) -> None:
    whole = nn.ModuleDict({"net": Net()})
    save(whole, path)
    with pytest.raises(ArtifactError, match=r"file is in 'net': .*network='net'\)$"):
        load(path, whole["net"])
    save(whole["net"], path)
    with pytest.raises(ArtifactError, match=r"model is in 'net': load into that part$"):
        load(path, whole)


def test_a_pair_that_cannot_come_from_the_layer(path: Path) -> None:
    network = Net()
    network[5] = LowRankPair(nn.Linear(99, 3, bias=False), nn.Linear(3, 10))
    save(network, path)
    fresh = Net()
    before = snapshot(fresh)
    with pytest.raises(ArtifactError, match=r"5\.first"):
        load(path, fresh)
    assert_untouched(fresh, before)


def test_a_rank_beyond_all_reason(path: Path) -> None:
    network, fresh = Net(), Net()
    network[5] = pair(rank=101)
    write(path, pack(prune(network).state_dict()))
    before = snapshot(fresh)
    with pytest.raises(ArtifactError, match=r"5\.first\.weight: \(101, 100\) and then"):
        load(path, fresh)
    assert_untouched(fresh, before)


def test_structures_that_nobody_built(path: Path) -> None:
    generator = random.Random(0)
    fresh = Net()
    before = snapshot(fresh)
    for _ in range(200):
        state = Net().state_dict()
        layer = generator.choice(["0.", "1.", "3.", "5.", "6.", ""])
        for part in generator.sample(["weight", "bias"], k=generator.randrange(3)):
            state.pop(layer + part, None)
        parts = ["first.weight", "second.weight", "first.bias", "second.bias", "first.first.weight"]
        for part in generator.sample(parts, k=generator.randrange(1, 5)):
            sizes = generator.choices([0, 1, 3, 8, 10, 50, 100], k=generator.randrange(5))
            state[layer + part] = torch.zeros(sizes)
        write(path, pack(state))
        with pytest.raises(ArtifactError):
            load(path, fresh)
        assert_untouched(fresh, before)


def test_damage_is_found_before_anything_changes(path: Path) -> None:
    network = prune(Net())
    network[5] = pair(3)
    data = pack(network.state_dict())
    fresh = Net()
    before = snapshot(fresh)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        damaged = bytearray(data)
        where = int(torch.randint(len(data), (1,), generator=generator))
        damaged[where] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"net\.safetensors: "):
            load(path, fresh)
    assert_untouched(fresh, before)


def test_an_error_after_the_structure_changed_undoes_it(path: Path) -> None:
    network = Net()
    network[5] = pair(3)
    state = network.state_dict()
    state["0.bias"] = torch.ones(3)
    write(path, pack(state))
    fresh = Net()
    before = snapshot(fresh)
    with pytest.raises(ArtifactError, match=r"'0\.bias'"):
        load(path, fresh)
    assert_untouched(fresh, before)


def test_the_fast_path_of_a_transformer_comes_back_with_its_layers(path: Path) -> None:
    def network(width: int) -> nn.Sequential:
        return nn.Sequential(nn.TransformerEncoderLayer(32, 2, 64), nn.Linear(3, width))

    compressed, other = network(3), network(4)
    compressed[0].linear1 = factorize(compressed[0].linear1, 4)
    save(compressed, path)
    with pytest.raises(ArtifactError, match=r"'1\.weight' is"):
        load(path, other)
    assert type(other[0].linear1) is nn.Linear
    assert other[0].activation_relu_or_gelu == 1


def test_an_error_of_a_hook_leaves_the_structure_as_it_was(path: Path) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no values, please")

    save(nn.Sequential(pair(2), nn.Linear(6, 6)), path)
    model = nn.Sequential(nn.Linear(100, 10), nn.Linear(6, 6))
    before = list(model.modules())
    model[1].register_load_state_dict_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="no values, please"):
        load(path, model)
    assert list(model.modules()) == before


def test_a_model_without_memory_is_refused(path: Path) -> None:
    save(nn.Linear(3, 2), path)
    with torch.device("meta"):
        fresh = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"'weight' .* meta device.*to_empty"):
        load(path, fresh)


def test_an_expanded_buffer_is_refused(path: Path) -> None:
    network = nn.Module()
    network.register_buffer("table", torch.ones(1).expand(3))
    save(network, path)
    with pytest.raises(ValueError, match=r"'table' .* expanded"):
        load(path, network)


def test_a_file_that_is_not_there(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(path, Net())
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load(path.parent, Net())


def test_saving_fails_before_it_writes(path: Path) -> None:
    save(Net(), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"dtype=torch\.float64"):
        save(Net(), path, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"bits=9.* from 2 to 8"):
        save(Net(), path, dtype=torch.int8, bits=9)
    with pytest.raises(ValueError, match=r"bits=6.0"):
        save(Net(), path, dtype=torch.int8, bits=6.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bits=6, dtype=torch.float16"):
        save(Net(), path, dtype=torch.float16, bits=6)
    with pytest.raises(TypeError, match="meta device"):
        save(nn.Linear(3, 2, device="meta"), path)
    assert path.read_bytes() == before
