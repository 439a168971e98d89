"""What becomes of each layer, and why; bad arguments."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from timm.models.beit import Beit
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import SwinTransformer

from slimnets.lowrank import factorize, plan
from tests.support import Perceptual, same_text_everywhere


class Everything(nn.Module):
    """One of each layer that is left, and some that are not."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3)
        self.conv1d = nn.Conv1d(16, 16, 3)
        self.linear = nn.Linear(16, 16)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.transposed = nn.ConvTranspose2d(4, 4, 3)
        self.conv3d = nn.Conv3d(4, 4, 3)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.lazy = nn.LazyConv2d(4, 3)
        self.meta = nn.Linear(16, 16, device="meta")
        self.lstm = nn.LSTM(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.embedding = nn.Embedding(20, 16)
        self.tied = nn.Linear(16, 20, bias=False)
        self.tied.weight = self.embedding.weight
        self.head = nn.Linear(16, 3)
        self.norm = nn.LayerNorm(16)


def rows(*args, **kwargs):
    return {row.name: row for row in plan(*args, **kwargs)}


def test_every_layer_has_its_rank_or_a_reason():
    found = rows(Everything(), 4)
    assert {name: row.rank for name, row in found.items() if row.rank} == {
        "conv": 4,
        "conv1d": 4,
        "linear": 4,
    }
    reasons = {
        "depthwise": "it is grouped (groups=16)",
        "transposed": "ConvTranspose2d is not supported",
        "conv3d": "Conv3d is not supported",
        "normed": "its weight is computed from other parameters",
        "lazy": "it has no values yet; run one batch through the network first",
        "meta": "it is on the meta device and has no values yet",
        "lstm": "LSTM is not supported",
        "attention": "MultiheadAttention is not supported",
        "attention.out_proj": "MultiheadAttention reads its weight",
        "tied": "it shares parameters with 'embedding'",
        "head": "rank 4 is not below its full rank of 3",
    }
    assert {name: row.reason for name, row in found.items() if row.rank is None} == reasons
    assert not any(row.asked for row in found.values())


def test_weights_that_are_another_layers_transposed_are_left():
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 16))
    net[2].weight = nn.Parameter(net[0].weight.detach().t())
    reasons = {name: row.reason for name, row in rows(net, 4).items()}
    assert reasons == {
        "0": "it shares parameters with '2'",
        "2": "it shares parameters with '0'",
        "3": "",
    }


def test_weights_are_counted_before_and_after():
    found = rows(Everything(), 4)
    assert (found["conv"].before, found["conv"].after) == (16 * 16 * 9, 4 * (48 + 48))
    assert (found["linear"].before, found["linear"].after) == (256, 128)
    assert (found["head"].before, found["head"].after) == (48, 48)
    channel = rows(Everything(), 4, decomposition="channel")["conv"]
    assert channel.after == 4 * (16 * 9 + 16)


def test_what_it_says_is_what_factorize_does():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 10))
    planned = plan(net, energy=0.6)
    dense = {name: net.get_submodule(name).weight.numel() for name in ("0", "2", "3")}
    assert {row.name: row.before for row in planned} == dense
    factorize(net, energy=0.6)
    assert planned.ranks
    for row in planned:
        layer = net.get_submodule(row.name)
        weights = sum(p.numel() for p in layer.parameters() if p.ndim > 1)
        assert (getattr(layer, "rank", None), weights) == (row.rank, row.after)


def test_it_changes_nothing():
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(8, 8))
    before, layers = copy.deepcopy(net.state_dict()), list(net.modules())
    plan(net, energy=0.5)
    assert list(net.modules()) == layers
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())


def test_a_pair_that_would_not_be_smaller_is_not_made():
    net = nn.Linear(10, 10)  # rank 5 has 100 weights, as many as there are
    assert rows(net, 4)[""].rank == 4
    assert rows(net, 5)[""].reason == "a pair of rank 5 would not be smaller: 100 weights"
    assert rows(net, 0.5)[""].rank is None
    assert rows(net, energy=0.999999)[""].rank is None


def test_fractions_are_of_each_layers_full_rank():
    net = nn.Sequential(nn.Linear(100, 40), nn.Conv2d(8, 30, 3), nn.Conv2d(8, 30, 3))
    assert plan(net, 0.25).ranks == {"0": 10, "1": 6, "2": 6}
    assert plan(net, 0.25, decomposition="channel").ranks == {"0": 10, "1": 8, "2": 8}


def test_energy_is_the_share_of_the_squared_singular_values():
    net = nn.Linear(4, 4, bias=False)
    net.weight.data = torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0]))  # 16, 4, 1 and 1 of 22
    assert [rows(net, energy=e)[""].rank for e in (0.5, 0.72)] == [1, 1]
    assert rows(net, energy=0.9)[""].reason == "a pair of rank 2 would not be smaller: 16 weights"


def test_the_first_glob_that_matches_counts():
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    found = rows(net, {"1": 2, "[12]": 4, "3": 0.25})
    assert [found[name].rank for name in "0123"] == [None, 2, 4, 4]
    assert found["0"].reason == "not in r"
    assert found["0"].asked


class Holds(nn.Module):
    """Holds its layers where no module tree sees them, too."""

    def __init__(self, hold):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        hold(self)


class Sampler:
    """A user's object that is no module, and holds itself too."""

    def __init__(self, layer):
        self.again, self.steps = self, [partial(checkpoint, layer.forward)]


HELD = {
    "list": lambda net: vars(net).update(layers=[net.first]),
    "nested": lambda net: vars(net).update(layers=({"a": [net.second, {net.first}]}, 3)),
    "itself": lambda net: vars(net).update(layers=net.first),
    "method": lambda net: vars(net).update(layers=net.first.forward),
    "partial": lambda net: vars(net).update(layers=partial(checkpoint, net.first)),
    "keyword": lambda net: vars(net).update(layers=[partial(print, file=net.first.forward)]),
    "object": lambda net: vars(net).update(layers=Sampler(net.first)),
}


@pytest.mark.parametrize("hold", HELD.values(), ids=HELD)
def test_a_layer_that_is_held_outside_of_the_module_tree_is_left(hold):
    found = rows(nn.Sequential(Holds(hold)), 4)["0.first"]
    assert found.reason == "it is also held in Holds.layers, outside of the module tree"
    assert not found.asked


def test_a_layer_of_zeros_has_no_energy_to_keep():
    network = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    nn.init.zeros_(network[1].weight)
    with torch.no_grad():
        network[0].weight[1:] = network[0].weight[0]
    first, second = plan(network, energy=0.9).rows
    assert (first.rank, second.rank) == (1, None)
    assert "all zero" in second.reason
    assert plan(network, 4).rows[1].rank == 4


@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_a_layer_whose_parameter_is_held_outside_of_the_module_tree_is_left(parameter):
    def hold(net):  # as for an average of one's own, or a penalty
        pair = getattr(net.first, parameter), getattr(net.second, parameter).detach()
        vars(net).update(pairs=[pair])

    found = rows(nn.Sequential(Holds(hold)), 4)
    reason = "a parameter of it is also held in Holds.pairs, outside of the module tree"
    assert found["0.first"].reason == reason
    assert found["0.second"].rank == 4


def test_what_optimizers_hold_is_no_reason_to_leave_a_layer():
    class Own(torch.optim.SGD):
        pass

    net = nn.Sequential(Holds(lambda net: vars(net).update(own=Own(net.parameters(), 0.1))))
    assert plan(net, 4).ranks == {"0.first": 4, "0.second": 4}


def test_what_attributes_hold_besides_is_no_reason_to_leave_a_layer():
    def hold(net):
        net.first.register_forward_hook(print)
        vars(net.first)["own"] = [net.first]
        vars(net)["cycle"] = cycle = {"sizes": [16, 16]}
        cycle["again"] = [cycle]

    net = nn.Sequential(Holds(hold))
    vars(net)["stages"] = [net[0]]  # the layers in it are replaced in the stage
    assert plan(net, 4).ranks == {"0.first": 4, "0.second": 4}


def test_a_layer_that_is_compiled_by_itself_is_left():
    net = nn.Sequential(torch.compile(nn.Linear(16, 16)), nn.Linear(16, 16))
    assert plan(net, 4).ranks == {"1": 4}
    assert plan(torch.compile(nn.Linear(16, 16)), 4).ranks == {}
    assert "OptimizedModule" in plan(net, 4).left[0].reason


@pytest.mark.parametrize(
    "exclude",
    ["0", ["0"], nn.Conv1d, (nn.Conv1d,), lambda name, layer: name == "0"],
    ids=["glob", "list", "type", "tuple", "predicate"],
)
def test_exclusion(exclude):
    net = nn.Sequential(nn.Conv1d(16, 16, 3), nn.Linear(16, 16))
    planned = plan(net, 2, exclude=exclude)
    assert planned.ranks == {"1": 2}
    assert planned.rows[0].reason == "excluded"
    assert planned.left == ()


def test_networks_within_metrics_are_left():
    network = nn.ModuleDict({"distance": Perceptual(), "head": nn.Linear(64, 64)})
    found = plan(network, r=2)
    assert found.ranks == {"head": 2}
    assert {row.reason for row in found.left} == {"it is within a metric"}


def test_a_pair_is_named_and_can_be_matched():
    net = factorize(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), {"0": 4})
    found = rows(net, {"0": 2, "1": 2})
    assert found["0"].reason.startswith("already a pair of rank 4, not 2: ")
    assert found["0"].unmet == 2
    for same in (4, 0.25):
        assert rows(net, same)["0"].reason == "already a pair of rank 4"
        assert rows(net, same)["0"].unmet is None
    assert found["0"].before == found["0"].after == 128
    assert list(found) == ["0", "1"]


def test_in_a_notebook_and_where_colours_are_forced_it_is_the_same_text(monkeypatch):
    found = plan(nn.Sequential(nn.Linear(16, 16)), 2)
    assert "Linear" in same_text_everywhere(lambda: str(found), monkeypatch)


def test_it_prints_as_a_table():
    text = str(plan(Everything(), 4))
    for word in ("conv1d", "left because", "2,304", "it is grouped (groups=16)"):
        assert word in text


BAD = {
    "neither": ({}, ValueError, r"r=None, energy=None, budget=None: give exactly one"),
    "both": ({"r": 2, "energy": 0.5}, ValueError, "r=2, energy=0.5, budget=None: give exactly one"),
    "negative": ({"r": -1}, ValueError, "r=-1: expected a rank of at least 1"),
    "zero": ({"r": 0}, ValueError, "r=0: expected"),
    "bool": ({"r": True}, TypeError, "r=True: expected"),
    "string": ({"r": "16"}, TypeError, "r='16': expected"),
    "float rank": ({"r": 16.0}, ValueError, r"r=16\.0: expected .* did you mean 16\?"),
    "one": ({"r": 1.0}, ValueError, r"r=1\.0: expected"),
    "nan": ({"r": float("nan")}, ValueError, "r=nan: expected"),
    "inf": ({"r": float("inf")}, ValueError, "r=inf: expected"),
    "list": ({"r": [4]}, TypeError, r"r=\[4\]: expected"),
    "empty": ({"r": {}}, ValueError, "r={}: expected globs"),
    "in mapping": ({"r": {"*": 0}}, ValueError, r"r\['\*'\]=0: expected"),
    "key": ({"r": {0: 4}}, TypeError, "expected globs over layer names, not 0"),
    "much too much": ({"energy": 500}, ValueError, r"energy=500: expected [^;]*$"),
    "infinite": ({"r": math.inf}, ValueError, r"r=inf: expected [^;]*$"),
    "percent": ({"energy": 90}, ValueError, r"energy=90: expected .* did you mean 0\.9\?"),
    "budget and energy": (
        {"budget": 0.5, "energy": 0.5},
        ValueError,
        r"r=None, energy=0\.5, budget=0\.5: give exactly one",
    ),
    "percent of weights": ({"budget": 40}, ValueError, r"budget=40: .* did you mean 0\.4\?"),
    "budget type": ({"budget": True}, TypeError, "budget=True: expected a share"),
    "all energy": ({"energy": 1.0}, ValueError, r"energy=1\.0: expected a share"),
    "energy type": ({"energy": "0.9"}, TypeError, "energy='0.9': expected"),
    "decomposition": ({"r": 2, "decomposition": "tai"}, ValueError, "decomposition='tai'"),
    "exclude": ({"r": 2, "exclude": 3}, TypeError, "exclude=3: expected a glob"),
    "glob": ({"r": {"nope.*": 2}}, ValueError, r"r: 'nope\.\*' matches no layer.*'0', '1'"),
    "excluded glob": ({"r": 2, "exclude": "x"}, ValueError, "exclude: 'x' matches no layer"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named_and_change_nothing(arguments, error, message):
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    layers = list(net.modules())
    for function in (plan, factorize):
        with pytest.raises(error, match=message):
            function(net, **arguments)
    assert list(net.modules()) == layers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_before_any_change(value):
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    net[1].weight.data[0, 0] = value
    layers = list(net.modules())
    for arguments in ({"r": 2}, {"energy": 0.5}):
        with pytest.raises(ValueError, match="weight of layer '1' has infinite or NaN values"):
            factorize(net, **arguments)
    assert list(net.modules()) == layers


def test_numbers_of_numpy_are_numbers():
    net = nn.Linear(16, 16)
    assert plan(net, np.int64(4)).ranks == plan(net, np.float32(0.25)).ranks == {"": 4}


def test_a_weight_that_the_module_around_it_reads():
    swin = SwinTransformer([2, 2], 16, [2], [2], [2, 2], num_classes=4)
    reason = "ShiftedWindowAttention reads its weight"
    found = {row.name.rpartition(".")[2]: row.reason for row in plan(swin, {"*.attn.*": 4})}
    assert (found["qkv"], found["proj"]) == (reason, reason)
    beit = Beit(img_size=32, embed_dim=16, depth=1, num_heads=2, num_classes=4)
    found = {row.name: row.reason for row in plan(beit, {"blocks.*.attn.*": 4})}
    assert found["blocks.0.attn.qkv"] == "Attention reads its weight"
    assert not found["blocks.0.attn.proj"]
    (_, out) = plan(nn.MultiheadAttention(16, 2), 4)
    assert (out.name, out.reason) == ("out_proj", "MultiheadAttention reads its weight")


def test_what_a_layer_has_besides_its_weight_would_be_lost():
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(16, 16)
            self.scale = nn.Parameter(torch.ones(1))

    assert rows(Scaled(), 2)[""].reason == "it has scale besides its weight and bias"
