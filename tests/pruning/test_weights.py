import numpy as np
import pytest
import torch
from torch import nn

from slimnets import factorize
from slimnets.pruning.weights import (
    check_scope,
    check_sparsity,
    left_alone,
    prunable_weights,
    target_sparsity,
)
from tests.support import Perceptual, small_network


def names(network, **arguments):
    return list(prunable_weights(network, **arguments))


def test_weights_of_layers_and_never_biases_norms_or_embeddings():
    network = nn.ModuleDict(
        {
            "embedding": nn.Embedding(5, 4),
            "conv1": nn.Conv1d(4, 4, 3),
            "conv2": nn.Conv2d(4, 4, 3),
            "conv3": nn.Conv3d(4, 4, 3),
            "up": nn.ConvTranspose2d(4, 4, 2),
            "norm": nn.BatchNorm2d(4),
            "layernorm": nn.LayerNorm(4),
            "lstm": nn.LSTM(4, 4, num_layers=2, bidirectional=True, proj_size=2),
            "cell": nn.GRUCell(4, 4),
            "attention": nn.MultiheadAttention(4, 2),
            "mixed": nn.MultiheadAttention(4, 2, kdim=3),
            "head": nn.Linear(4, 4),
        }
    )
    found = names(network)
    lstm = [n for n in found if n.startswith("lstm")]
    assert len(lstm) == 12
    assert all(n.startswith("lstm.weight_") for n in lstm)
    assert [n for n in found if not n.startswith("lstm")] == [
        "conv1.weight",
        "conv2.weight",
        "conv3.weight",
        "up.weight",
        "cell.weight_ih",
        "cell.weight_hh",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "mixed.q_proj_weight",
        "mixed.k_proj_weight",
        "mixed.v_proj_weight",
        "mixed.out_proj.weight",
        "head.weight",
    ]


def test_a_layer_alone_is_a_network():
    assert names(nn.Linear(2, 2)) == ["weight"]


def test_shared_layers_and_tied_weights_are_there_once():
    shared = nn.Linear(4, 4)
    tied = nn.Linear(4, 4)
    tied.weight = shared.weight
    assert names(nn.Sequential(shared, shared, tied)) == ["0.weight"]


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("7", ["0.weight", "3.weight", "9.weight"]),
        ("[03]", ["7.weight", "9.weight"]),
        (nn.Linear, ["0.weight", "3.weight"]),
        (lambda name, layer: layer.weight.numel() < 300, ["3.weight", "7.weight"]),
        (["0", nn.Linear], ["3.weight"]),
    ],
)
def test_exclusion_by_glob_type_and_predicate(exclude, left):
    assert names(small_network(), exclude=exclude) == left


def test_an_exclusion_that_matches_nothing_lists_what_there_is():
    with pytest.raises(ValueError, match=r"exclude: 'head' matches no layer; .*'0', '3', '7', '9'"):
        names(small_network(), exclude="head")


@pytest.mark.parametrize("exclude", [3, [nn.Linear, 3], int])
def test_an_exclusion_of_a_wrong_type(exclude):
    with pytest.raises(TypeError, match=r"exclude=.*: expected a glob over layer names"):
        names(small_network(), exclude=exclude)


def test_a_mapping_gives_each_layer_the_first_glob_that_matches():
    _, targets = target_sparsity(small_network(), {"0": 0.1, "[0-3]": 0.5, "9": 0.7})
    assert targets == {"0.weight": 0.1, "3.weight": 0.5, "9.weight": 0.7}


def test_a_weight_with_several_names_goes_by_the_first_glob_that_matches_one():
    network = nn.ModuleDict({"encoder": nn.Linear(4, 4), "decoder": nn.Linear(4, 4)})
    network["decoder"].weight = network["encoder"].weight
    for sparsity in ({"decoder": 0.75, "encoder": 0.5}, {"decoder": 0.75, "*": 0.5}):
        _, targets = target_sparsity(network, sparsity)
        assert targets == {"encoder.weight": 0.75}


def test_a_glob_that_matches_nothing_lists_what_there_is():
    with pytest.raises(ValueError, match=r"sparsity: 'features.\*' matches no layer; .*'0', '3'"):
        target_sparsity(small_network(), {"features.*": 0.5, "*": 0.9})


def test_a_network_without_layers():
    with pytest.raises(ValueError, match="Sequential has no layer to prune"):
        target_sparsity(nn.Sequential(nn.BatchNorm1d(3)), 0.5)


def test_lazy_layers_have_to_be_materialised_first():
    with pytest.raises(ValueError, match=r"'0' \(LazyLinear\) has no values yet; run one batch"):
        names(nn.Sequential(nn.LazyLinear(3)))


def test_computed_weights_are_left_and_named():
    network = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 3)),
        nn.Linear(3, 3),
    )
    assert names(network) == ["2.weight"]
    assert left_alone(network) == dict.fromkeys(
        ("0", "1"), "its weight is computed from other parameters"
    )


def test_recurrent_weights_that_are_computed_are_left_and_named():
    network = nn.ModuleDict({"old": nn.LSTM(4, 4), "new": nn.LSTM(4, 4)})
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(network["old"], "weight_hh_l0")
    nn.utils.parametrizations.weight_norm(network["new"], "weight_hh_l0")
    assert names(network) == ["old.weight_ih_l0", "new.weight_ih_l0"]
    assert list(left_alone(network)) == ["old.weight_hh_l0", "new.weight_hh_l0"]


@pytest.mark.parametrize("exclude", [(), "distance"])
def test_networks_within_metrics_are_left(exclude):
    network = nn.ModuleDict({"distance": Perceptual(), "head": nn.Linear(8, 8)})
    network["distance"].tokens = nn.ParameterList([torch.ones(8, 8)])
    assert names(network, exclude=exclude) == ["head.weight"]
    assert left_alone(network) == {}


def test_what_an_excluded_layer_shares_is_excluded_under_every_name():
    shared = nn.Linear(4, 4)
    network = nn.ModuleDict({"encoder": shared, "decoder": shared, "tied": nn.Linear(4, 4)})
    network["tied"].weight = shared.weight
    for exclude in ("encoder", "decoder", "tied"):
        assert names(network, exclude=exclude) == []
    assert names(network) == ["encoder.weight"]


def test_a_weight_tied_to_an_embedding_is_that_of_an_embedding():
    network = nn.ModuleDict({"embedding": nn.Embedding(10, 4), "head": nn.Linear(4, 10)})
    network["head"].weight = network["embedding"].weight
    assert names(network) == []
    assert left_alone(network) == {"head": "its weight is that of an embedding"}


def test_a_glob_that_matches_an_embedding_alone_says_so():
    network = nn.ModuleDict({"item": nn.Embedding(10, 4), "head": nn.Linear(4, 10)})
    message = r"sparsity: 'item' matches no layer \(Embedding is none\); the layers are: 'head'"
    with pytest.raises(ValueError, match=message):
        target_sparsity(network, {"item": 0.9})


def test_weights_that_share_their_values_are_tied_too():
    network = nn.ModuleDict({"embedding": nn.Embedding(10, 4), "head": nn.Linear(4, 10)})
    network["head"].weight.data = network["embedding"].weight.data
    network.update({"encoder": nn.Linear(4, 6), "decoder": nn.Linear(6, 4)})
    network["decoder"].weight.data = network["encoder"].weight.data.t()
    assert names(network) == ["encoder.weight"]
    assert names(network, exclude="decoder") == []
    assert left_alone(network) == {"head": "its weight is that of an embedding"}


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_named(dtype):
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    quantized = torch.ones(4, 4, dtype=torch.float32).to(dtype)
    network[0].weight = nn.Parameter(quantized, requires_grad=False)
    assert names(network) == ["1.weight"]
    assert left_alone(network) == {"0": f"its weight is of {dtype}"}


def test_weights_of_unknown_types_are_named_and_what_is_no_weight_is_not():
    def holding(kind, **shapes):
        module = type(kind, (nn.Module,), {})()
        for name, shape in shapes.items():
            setattr(module, name, nn.Parameter(torch.randn(shape)))
        return module

    network = holding("Network", text_projection=(4, 8), logit_scale=(), class_token=(1, 1, 8))
    network.bilinear = nn.Bilinear(2, 3, 4)
    network.experts = holding("Experts", up=(2, 4, 8), up_bias=(2, 8))
    network.attention = holding("Attention", relative_position_bias_table=(49, 4), scale=(4, 1, 1))
    network.positions = holding("PosEmbedRel", height_rel=(7, 4))
    network.query = holding("Query", pos_embed=(1, 9, 8), latents=(1, 9, 8))
    network.norm = nn.LayerNorm((4, 8))
    network.tied, network.linear = nn.Module(), nn.Linear(4, 8)
    network.tied.weight = network.linear.weight
    network.computed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 8))
    network.later = nn.Module()
    network.later.weight = nn.UninitializedParameter()
    assert left_alone(network) == {
        "text_projection": REASON.format("Network"),
        "bilinear.weight": REASON.format("Bilinear"),
        "experts.up": REASON.format("Experts"),
        "computed": "its weight is computed from other parameters",
    }
    assert names(network) == ["linear.weight"]


REASON = "the type of its layer, {}, is not known (in an nn.Linear it would be pruned)"


@pytest.mark.parametrize(
    ("sparsity", "error", "message"),
    [
        (90, ValueError, r"sparsity=90: expected a fraction in \[0, 1\), did you mean 0.9\?"),
        (1.0, ValueError, r"sparsity=1.0: expected a fraction in \[0, 1\)$"),
        (-0.1, ValueError, r"sparsity=-0.1"),
        (float("nan"), ValueError, "sparsity=nan"),
        ("0.9", TypeError, "sparsity='0.9'"),
        (True, TypeError, "sparsity=True"),
        (None, TypeError, "sparsity=None"),
        ({"a": 90}, ValueError, r"sparsity\['a'\]=90: .*did you mean 0.9"),
        ({}, ValueError, "expected at least one glob"),
        ({nn.Linear: 0.5}, TypeError, "expected globs as keys"),
    ],
)
def test_what_is_no_sparsity(sparsity, error, message):
    with pytest.raises(error, match=message):
        check_sparsity(sparsity)


def test_scopes():
    check_scope("layer", {"*": 0.5})
    check_scope("global", 0.5)
    with pytest.raises(ValueError, match="scope='network': expected 'layer' or 'global'"):
        check_scope("network", 0.5)
    with pytest.raises(ValueError, match="scope='global' with a mapping"):
        check_scope("global", {"*": 0.5})


def test_numpy_numbers_are_numbers():
    check_sparsity(np.float32(0.5))
    with pytest.raises(ValueError, match=r"did you mean 0\.9"):
        check_sparsity(np.int64(90))


def test_an_exclusion_goes_on_choosing_a_layer_whose_place_a_pair_has_taken():
    network = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8))
    excludes = ["0", lambda name, layer: name == "0", lambda name, layer: layer.out_features == 16]
    assert [names(network, exclude=one) for one in excludes] == [["1.weight"]] * 3

    factorize(network, 2)

    left = ["1.first.weight", "1.second.weight"]
    assert [names(network, exclude=one) for one in excludes] == [left] * 3
    assert list(target_sparsity(network, 0.5, excludes[1])[1]) == left


def test_a_type_that_is_excluded_is_left_with_what_is_in_it():
    layer = nn.TransformerEncoderLayer(16, 4, 32)
    assert names(layer, exclude=nn.MultiheadAttention) == ["linear1.weight", "linear2.weight"]


def test_only_the_name_of_a_parameter_tells_that_it_is_a_bias_or_a_token():
    class TokenMixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))
            self.token = nn.Parameter(torch.randn(8, 8))

    assert list(left_alone(nn.Sequential(TokenMixer(), nn.Linear(8, 8)))) == ["0.weight"]


def test_a_glob_goes_through_a_compiled_module():
    network = nn.ModuleDict({"body": torch.compile(nn.Sequential(nn.Linear(4, 4)))})
    assert list(target_sparsity(network, {"body.0": 0.5})[1].values()) == [0.5]
