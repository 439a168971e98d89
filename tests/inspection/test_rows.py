"""Each layer is counted once, and all bytes of the file are in the rows."""

import pytest
import torch
from torch import nn

from slimnets.artifact.container import stored_bytes
from slimnets.inspection.macs import Macs
from slimnets.inspection.rows import Row, count_rows, total
from slimnets.lowrank.factorize import factorize


def rows(network: nn.Module) -> dict[str, Row]:
    return {row.name: row for row in count_rows(network)}


def test_weights_are_counted_without_biases() -> None:
    layer = nn.Conv2d(2, 3, 3)
    layer.weight.data[:, 0] = 0
    (row,) = count_rows(nn.Sequential(layer))
    assert (row.name, row.kind) == ("0", "Conv2d")
    assert (row.weights, row.nonzeros, row.sparsity) == (54, 27, 0.5)
    assert row.rank is row.macs is row.effective_macs is None


def test_embeddings_are_weights_and_neither_norms_nor_biases_are_whatever_their_shape() -> None:
    network = nn.Sequential(nn.Embedding(10, 6), nn.LayerNorm((4, 6)), nn.RMSNorm((4, 6)))
    network.append(nn.MultiheadAttention(6, 2, add_bias_kv=True))
    found = rows(network)
    assert {name: row.weights for name, row in found.items()} == {
        **{"0": 60, "1": 0, "2": 0},
        **{"3": 3 * 36, "3.out_proj": 36},
    }
    assert all(row.sparsity == 0 for row in found.values())
    assert found["1"].bytes > 0


def test_minus_zero_is_a_zero_and_nan_is_not() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.data = torch.tensor([[-0.0, torch.nan], [0.0, 1.0]])
    assert count_rows(layer)[0].nonzeros == 2


def test_zeros_of_eight_bit_floats_are_counted() -> None:
    layer = nn.Linear(2, 2)
    weight = torch.tensor([[-0.0, torch.nan], [0.0, 1.0]]).to(torch.float8_e4m3fn)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    assert count_rows(layer)[0].nonzeros == 2


def test_a_factorized_pair_is_one_layer() -> None:
    network = factorize(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), 2)
    found = rows(network)
    assert set(found) == {"0", "1"}
    assert found["0"].rank == 2
    assert found["0"].weights == 2 * 8 * 3 + 8 * 2 * 3
    network[0].second.weight.data[:3] = 0
    assert rows(network)["0"].dead_channels == 3


def test_operations_inside_of_a_pair_are_the_pairs() -> None:
    network = factorize(nn.Sequential(nn.Linear(8, 8)), 2)
    macs = {"0.first": Macs(10, 5), "0.second": Macs(20, 6)}
    (row,) = count_rows(network, macs)
    assert (row.macs, row.effective_macs) == (30, 11)


@pytest.mark.parametrize(
    ("layer", "channel"),
    [
        (nn.Linear(4, 6), lambda weight: weight[2]),
        (nn.Conv2d(4, 6, 3), lambda weight: weight[2]),
        (nn.Conv2d(4, 6, 3, groups=2), lambda weight: weight[2]),
        (nn.ConvTranspose2d(4, 6, 3), lambda weight: weight[:, 2]),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), lambda weight: weight[2:, 1]),
    ],
)
def test_a_dead_channel_is_an_output_without_weights(layer: nn.Module, channel) -> None:
    assert count_rows(layer)[0].dead_channels == 0
    channel(layer.weight.data)[...] = 0
    assert count_rows(layer)[0].dead_channels == 1
    # it is dead: no input changes it
    shape = (1, 4) if isinstance(layer, nn.Linear) else (1, 4, 5, 5)
    one, other = layer(torch.randn(shape)), layer(torch.randn(shape))
    same = (one == other).flatten(2).all(2) if one.dim() > 2 else one == other
    assert same.sum() == 1


def test_other_layers_have_no_channels() -> None:
    network = nn.ModuleList([nn.Embedding(3, 2), nn.LSTM(2, 2), nn.BatchNorm1d(2)])
    assert all(row.dead_channels is None for row in count_rows(network))


def test_tied_weights_count_once() -> None:
    network = nn.Module()
    network.embedding = nn.Embedding(7, 4)
    network.head = nn.Linear(4, 7, bias=False)
    network.head.weight = network.embedding.weight
    found = rows(network)
    assert found["embedding"].weights == 28
    assert (found["head"].weights, found["head"].bytes) == (0, 0)
    assert found["head"].kind == "Linear tied to embedding"


def test_a_layer_in_two_places_is_one_row() -> None:
    layer = nn.Linear(2, 2)
    assert len(count_rows(nn.Sequential(layer, nn.ReLU(), layer))) == 1


def test_every_byte_of_the_state_is_in_a_row() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4))
    network.register_buffer("seen", torch.ones(100))
    found = count_rows(network)
    assert total(found, "").bytes == sum(stored_bytes(network.state_dict()).values())
    assert {row.name: row.kind for row in found}[""] == "Sequential"


def test_extra_state_is_no_tensor_and_is_left_out() -> None:
    class Stateful(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 3}

        def set_extra_state(self, state: dict[str, int]) -> None: ...

    assert count_rows(Stateful(2, 2))[0].weights == 4


def test_a_total_adds_what_is_known() -> None:
    rows = [Row("a", "A", 4, 2, 10, macs=None), Row("b", "B", 4, 4, 10, rank=3, dead_channels=1)]
    assert total(rows, "Net") == Row("total", "Net", 8, 6, 20, None, 1, None, None)
    assert total([], "Net").weights == 0
