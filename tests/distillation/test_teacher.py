import copy
import pickle
import warnings
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import slimnets
from slimnets.distillation import DistillationModule
from slimnets.distillation.teacher import Teacher, load_weights
from tests.support import assert_equal, small_network


def test_it_is_frozen_and_in_eval_mode_even_if_told_otherwise() -> None:
    network = small_network(dropout=0.5)
    teacher = Teacher(network)
    before = copy.deepcopy(network.state_dict())
    network.train()
    x = torch.randn(4, 3, 8, 8)

    output = teacher(x)

    assert not output.requires_grad
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(module.training for module in network.modules())
    torch.testing.assert_close(output, teacher(x), rtol=0, atol=0)
    assert_equal(network, before)


def test_a_torchscript_of_a_network_can_teach() -> None:
    network = small_network().eval()
    x = torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which releases of torch say in different ways
        script = torch.jit.trace(network, x)
    teacher = DistillationModule(small_network(), script)._teacher
    torch.testing.assert_close(teacher(x), network(x))
    assert not any(parameter.requires_grad for parameter in script.parameters())


def test_what_it_does_in_place_is_not_seen_outside() -> None:
    x, nested = torch.randn(4, 3), {"y": [torch.randn(4, 3)]}

    class InPlace(nn.Module):
        def forward(self, x, nested):
            return x.mul_(0) + nested["y"][0].mul_(0)

    assert (Teacher(InPlace())(x, nested=nested) == 0).all()
    assert (x != 0).all()
    assert (nested["y"][0] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_keeps_its_precision_and_is_given_inputs_of_it(dtype) -> None:
    teacher = Teacher(nn.Linear(3, 2).to(dtype))

    assert teacher(torch.randn(4, 3, dtype=torch.float16)).dtype == dtype
    tokens = torch.arange(3)
    assert torch.equal(Teacher(nn.Embedding(3, 2).to(dtype))(tokens).isnan().any(), tokens[0] > 0)


def test_a_network_without_weights_can_teach() -> None:
    teacher = Teacher(nn.Softmax(dim=1))
    teacher.to(torch.device("cpu"))
    x = torch.randn(2, 3, dtype=torch.float64)

    assert torch.equal(teacher(x), x.softmax(1))


def test_copies_share_it_and_pickles_hold_it() -> None:
    teacher = Teacher(nn.Linear(3, 2))

    assert copy.deepcopy([teacher])[0].network is teacher.network
    unpickled = pickle.loads(pickle.dumps(teacher))
    assert torch.equal(unpickled.network.weight, teacher.network.weight)


def test_the_fingerprint_tells_weights_names_and_shapes_apart() -> None:
    networks = [small_network(), small_network(), nn.Linear(4, 2), nn.Linear(2, 4)]
    prints = [Teacher(network).fingerprint() for network in networks]

    assert len(set(prints)) == 4
    assert prints == [Teacher(copy.deepcopy(network)).fingerprint() for network in networks]
    networks[0][1].num_batches_tracked += 1
    assert Teacher(networks[0]).fingerprint() != prints[0]
    assert Teacher(torch.compile(networks[1])).fingerprint() == prints[1]
    assert Teacher(nn.Linear(2, 2).bfloat16()).fingerprint() != prints[2]


@pytest.mark.parametrize(
    "kind", ["safetensors", "state dict", "checkpoint", "distilled", "of a module around it"]
)
def test_weights_are_read_from_a_file(tmp_path, kind) -> None:
    network, source = small_network(), small_network()
    state = source.state_dict()
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    if kind == "safetensors":
        save_file(state, path)
    else:
        prefixes = {"distilled": "student.", "of a module around it": "student.network."}
        prefix = prefixes.get(kind, "")
        state = {f"{prefix}{name}": value for name, value in state.items()}
        torch.save(state if kind == "state dict" else {"epoch": 3, "state_dict": state}, path)

    load_weights(network, str(path))

    assert_equal(network, source.state_dict())


@pytest.mark.parametrize("prefix", ["", "student."])
def test_a_file_and_a_network_may_be_compiled_or_not_in_part_or_whole(tmp_path, prefix) -> None:
    source, part = small_network(), small_network()
    for compiled in (torch.compile(source), part):
        if compiled is part:
            part[3] = torch.compile(part[3])
        state = {f"{prefix}{name}": value for name, value in compiled.state_dict().items()}
        torch.save(state, tmp_path / "weights.pt")
        for network in (small_network(), torch.compile(small_network())):
            load_weights(network, tmp_path / "weights.pt")
            assert Teacher(network).fingerprint() == Teacher(compiled).fingerprint()


def test_a_file_of_another_network_leaves_this_one_as_it_was(tmp_path) -> None:
    network, other = small_network(), small_network()
    other[9] = nn.Linear(32, 5)
    before = copy.deepcopy(network.state_dict())
    torch.save(other.state_dict(), tmp_path / "weights.pt")

    with pytest.raises(ValueError, match=r"weights.pt.*2 of .* differ, '9.bias' the first"):
        load_weights(network, tmp_path / "weights.pt")

    assert_equal(network, before)


def test_a_pickled_network_is_refused(tmp_path) -> None:
    torch.save(small_network(), tmp_path / "whole.pt")

    with pytest.raises(ValueError, match=r"whole\.pt' cannot be read: .* pass the network as"):
        load_weights(small_network(), tmp_path / "whole.pt")


@pytest.mark.parametrize("name", ["x.pt", "x.ckpt", "x.safetensors"])
def test_a_damaged_file_is_named(tmp_path, name) -> None:
    (tmp_path / name).write_bytes(b"garbage" * 9)
    with pytest.raises(ValueError, match=rf"teacher_weights=.*{name}' cannot be read:"):
        load_weights(small_network(), tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_weights(small_network(), tmp_path / f"no-{name}")


@pytest.mark.parametrize(
    "content", [torch.ones(3), {"state_dict": torch.ones(3)}, {"state_dict": [1]}, {1: 2}]
)
def test_a_file_of_something_else_has_no_names(tmp_path, content) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt' are not of this Linear: 2 of 2 names"):
        load_weights(nn.Linear(2, 2), tmp_path / "x.pt")


def test_a_file_of_slimnets_save_is_named_as_such(tmp_path) -> None:
    network = small_network()
    slimnets.save(network, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="fill the teacher by slimnets"):
        load_weights(network, tmp_path / "x.safetensors")
    save_file({"high": torch.ones(1)}, tmp_path / "y.safetensors")
    with pytest.raises(
        ValueError, match=r"of this Linear: 3 of 3 names .* differ, 'bias' the first$"
    ):
        load_weights(nn.Linear(2, 2), tmp_path / "y.safetensors")


def test_a_program_of_torch_export_can_teach() -> None:
    network, x = nn.Linear(4, 3).eval(), torch.randn(2, 4)
    program = torch.export.export(network, (x,)).module()
    teacher = DistillationModule(nn.Linear(4, 3), program)._teacher
    torch.testing.assert_close(teacher(x), network(x))


def test_an_input_that_cannot_be_changed() -> None:
    @dataclass(frozen=True)
    class Batch:
        images: torch.Tensor

    class Network(nn.Module):
        def forward(self, batch: Batch) -> torch.Tensor:
            return batch.images + 1

    torch.testing.assert_close(Teacher(Network())(Batch(torch.ones(2))), torch.full((2,), 2.0))
