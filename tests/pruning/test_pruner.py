import copy

import pytest
import torch
from torch import nn

from slimnets import keep_zeros, prune
from slimnets.pruning import magnitude, random
from slimnets.pruning.pruner import Pruner
from slimnets.pruning.weights import target_sparsity
from tests.support import assert_equal, small_data, small_network, zeros


def pruner_of(network, sparsity=0.9, **arguments):
    return Pruner(*target_sparsity(network, sparsity), **arguments)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.333, 0.5, 0.9, 0.99])
def test_exactly_round_s_n_in_every_layer(sparsity):
    network = small_network()
    prune(network, sparsity)
    sizes = {n: p.numel() for n, p in network.named_parameters() if p.ndim > 1}
    assert zeros(network) == {n: round(sparsity * size) for n, size in sizes.items()}


def test_the_smallest_magnitudes_go_by_hand():
    layer = nn.Linear(3, 2, bias=False)
    layer.weight.data = torch.tensor([[0.1, -0.5, 0.3], [-0.2, 0.6, -0.4]])
    masks = prune(layer, 0.5)
    assert layer.weight.tolist() == torch.tensor([[0.0, -0.5, 0.0], [0.0, 0.6, -0.4]]).tolist()
    assert masks["weight"].tolist() == [[False, True, False], [False, True, True]]


def test_globally_the_counts_are_of_the_whole_network():
    network = small_network()
    with torch.no_grad():
        network[0].weight *= 100
    prune(network, 0.5, scope="global")
    counts = zeros(network)
    total = sum(p.numel() for p in network.parameters() if p.ndim > 1)
    assert sum(counts.values()) == round(0.5 * total)
    assert counts["0.weight"] < 5


def test_pruned_weights_are_positive_zeros_even_of_negatives_and_nan():
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight.fill_(-1.0)
        layer.weight[0, 0] = torch.nan
    pruner = pruner_of(layer)
    pruner.pruned["weight"][:] = True
    pruner.apply(pruner.parameters)
    assert torch.equal(layer.weight.view(torch.int32), torch.zeros(4, 4, dtype=torch.int32))


def test_what_is_left_alone_unasked_is_said(caplog):
    network = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    assert list(prune(network, 0.5)) == ["1.weight"]
    assert caplog.messages == [
        "prune leaves '0' alone: its weight is computed from other parameters"
    ]
    prune(network, {"1": 0.5})
    assert len(caplog.messages) == 1


def test_a_network_without_values_is_refused():
    with pytest.raises(ValueError, match="model: 'weight' is on the meta device, without values"):
        prune(nn.Linear(4, 4, device="meta"), 0.5)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_layer_of_which_nothing_is_left_is_named(scope):
    network = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 1 if scope == "layer" else 8))
    if scope == "global":
        nn.init.constant_(network[1].weight, 1e-9)
    with pytest.warns(UserWarning, match=r"pruning leaves nothing of '1\.weight', and the network"):
        prune(network, 0.995 if scope == "layer" else 0.8, scope=scope)
    assert not network[1].weight.any()


def test_zeros_are_kept_in_a_loop_of_ones_own():
    network = small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)

    def train():
        for images, labels in small_data():
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()

    train()  # momentum moves what is pruned
    handle = keep_zeros(network, prune(network, 0.9), optimizer)
    before = zeros(network)
    train()
    assert zeros(network) == before
    handle.remove()
    train()
    assert sum(zeros(network).values()) < sum(before.values())
    with pytest.raises(
        ValueError, match=r"masks\['x'\]: Sequential has no weight of this name and"
    ):
        keep_zeros(network, {"x": torch.ones(2, 2, dtype=torch.bool)}, optimizer)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32])
def test_masks_that_are_not_bool_are_refused(dtype):
    network = small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    masks = {name: mask.to(dtype) for name, mask in prune(network, 0.9).items()}
    with pytest.raises(TypeError, match=r"masks\['0.weight'\]: expected bool, got .*mask.bool()"):
        keep_zeros(network, masks, optimizer)


def test_what_is_no_optimizer_is_refused():
    network = small_network()
    with pytest.raises(TypeError, match="optimizer=list: expected one of torch"):
        keep_zeros(network, prune(network, 0.9), [torch.optim.SGD(network.parameters())])


def test_masks_only_grow_and_zeros_of_before_are_kept():
    network = small_network()
    first = prune(network, 0.5)
    second = prune(network, 0.8, criterion=random)
    for name, mask in second.items():
        assert not (mask & ~first[name]).any()
    third = prune(network, 0.3)
    assert all(torch.equal(third[name], second[name]) for name in second)


def test_a_layer_initialised_with_zeros_is_not_a_pruned_one():
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.zeros_(network[1].weight)
    pruner = pruner_of(network, 0.5)
    assert pruner.counts == {"0.weight": 0, "1.weight": 0}


def test_a_users_criterion():
    network = small_network()
    prune(network, 0.5, criterion=lambda p: -p.abs())
    assert network[7].weight.abs().max() < 0.06  # the largest are gone


@pytest.mark.parametrize("bad", [lambda p: p.abs().sum(), lambda p: 3])
def test_a_criterion_of_another_shape_changes_nothing(bad):
    network = small_network()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=r"expected scores of the shape of '0.weight'"):
        prune(network, 0.5, criterion=bad)
    assert_equal(network, before)


def test_a_criterion_that_fails_on_a_later_layer_changes_nothing():
    network = small_network()
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    network[9].weight.grad = None
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(AttributeError):
        prune(network, 0.5, criterion=lambda p: p.abs() * p.grad.abs())
    assert_equal(network, before)


def test_a_criterion_that_cannot_be_called_is_named():
    with pytest.raises(TypeError, match=r"criterion='magnitude': .* such as slimnets.pruning"):
        prune(small_network(), 0.5, criterion="magnitude")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions(dtype):
    network = small_network().to(dtype)
    prune(network, 0.9)
    assert zeros(network)["7.weight"] == round(0.9 * 8192)


def test_one_byte_of_lasting_memory_a_weight():
    network = small_network()
    pruner = pruner_of(network)
    size = sum(mask.untyped_storage().nbytes() for mask in pruner.pruned.values())
    assert size == sum(p.numel() for p in pruner.parameters.values())


def test_only_what_is_named_grows_and_globally_all_or_nothing():
    network = small_network()
    pruner = pruner_of(network, 0.5)
    versions = {name: weights._version for name, weights in pruner.parameters.items()}
    assert pruner.grow({"7.weight": 0.5})
    assert zeros(network) == {"0.weight": 0, "3.weight": 0, "7.weight": 4096, "9.weight": 0}
    pruner.apply(pruner.parameters)  # a graph that is alive sees no change where there is none
    changed = {n for n, weights in pruner.parameters.items() if weights._version > versions[n]}
    assert changed == {"7.weight"}
    together = pruner_of(small_network(), 0.5, scope="global")
    assert not together.grow({"7.weight": 0.5})
    assert together.grow(together.targets)


def test_masks_are_packed_to_bits_and_come_back():
    network = small_network()
    pruner = pruner_of(network)
    pruner.grow(pruner.targets)
    state = pruner.state_dict()
    stored = sum(one["bits"].untyped_storage().nbytes() for one in state.values())
    assert stored <= sum(p.numel() for p in pruner.parameters.values()) / 8 + len(state)
    other = pruner_of(small_network())
    other.load_state_dict(state)
    assert all(torch.equal(other.pruned[n], pruner.pruned[n]) for n in pruner.pruned)
    assert other.counts == pruner.counts


def test_masks_of_another_network_are_refused_and_named():
    state = pruner_of(small_network()).state_dict()
    with pytest.raises(ValueError, match=r"of another network.*'3.weight'"):
        pruner_of(small_network()[:3]).load_state_dict(state)


def test_gradients_of_pruned_weights_are_zero():
    layer = nn.Linear(4, 4)
    pruner = pruner_of(layer, 0.5)
    pruner.grow(pruner.targets)
    layer(torch.randn(2, 4)).sum().backward()
    pruner.mask_gradients()
    assert (layer.weight.grad[pruner.pruned["weight"]] == 0).all()
    assert (layer.weight.grad[~pruner.pruned["weight"]] != 0).all()


def test_magnitude_is_of_the_shape_of_the_parameter():
    parameter = nn.Parameter(torch.tensor([[-2.0, 1.0]]))
    assert magnitude(parameter).tolist() == [[2.0, 1.0]]
    assert random(parameter).shape == parameter.shape


def test_scores_of_minus_infinity_do_not_prune_more_than_asked():
    layer = nn.Linear(10, 10)

    def some_are_minus_infinity(parameter):
        scores = torch.rand_like(parameter)
        return scores.masked_fill(torch.rand_like(parameter) < 0.4, -torch.inf)

    pruner = pruner_of(layer, 0.3, criterion=some_are_minus_infinity)
    for share in (0.1, 0.2, 0.3):
        pruner.grow({"weight": share})
    assert pruner.counts == {"weight": 30}
    assert zeros(layer) == {"weight": 30}


def test_what_begins_with_more_zeros_than_asked_is_named():
    network = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    nn.init.eye_(network[1].weight)
    assert pruner_of(network, 0.9).overfull() == {"1.weight": 4032 / 4096}
