"""Networks of other libraries, and each situation that a layer can be in."""

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import slimnets
from slimnets.lowrank import LowRankPair, plan

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))  # where the scripts find each other
try:
    from zoo_check import RANK, SPARSITY, check
    from zoo_networks import TIMM, images, lazy, networks
finally:
    sys.path.remove(str(ROOT / "examples"))

NETWORKS = networks()
SMALL = [name for name, network in NETWORKS.items() if network.family == "small"]
SMALLEST = ["mobilenetv3_small_050", "lcnet_035", "starnet_s050", "vit_tiny_patch16_224"]

ATTENTION = "MultiheadAttention is not supported"
READS = "MultiheadAttention reads its weight"
COMPUTED = "its weight is computed from other parameters"
SHARED = "it shares parameters with another"
GROUPED = "it is grouped"
EMBEDDING = "it is an embedding"

# layers, of these pruned and factorized, why others were left dense, why weights were not pruned
EXPECTED: dict[str, tuple[int, int, int, dict[str, int], dict[str, int]]] = {
    "LSTM": (2, 2, 1, {"LSTM is not supported": 1}, {EMBEDDING: 1}),
    "GRU": (2, 2, 1, {"GRU is not supported": 1}, {EMBEDDING: 1}),
    "LSTM cell": (2, 2, 1, {"LSTMCell is not supported": 1}, {}),
    "Transformer encoder": (8, 8, 4, {ATTENTION: 2, READS: 2}, {}),
    "cross-attention": (3, 3, 1, {ATTENTION: 1, READS: 1}, {}),
    "tied embeddings": (9, 8, 4, {ATTENTION: 2, READS: 2, SHARED: 1}, {EMBEDDING: 1}),
    "layer used twice": (3, 3, 3, {}, {}),
    "weight used twice": (3, 2, 1, {SHARED: 2}, {}),
    "weight norm": (2, 1, 1, {COMPUTED: 1}, {COMPUTED: 2}),
    "weight norm, by a hook": (2, 1, 1, {COMPUTED: 1}, {COMPUTED: 2}),
    "spectral norm": (2, 1, 1, {COMPUTED: 1}, {COMPUTED: 1}),
    "orthogonal": (2, 1, 1, {COMPUTED: 1}, {COMPUTED: 1}),
    "lazy, after a batch": (2, 2, 2, {}, {}),
    "convolutions": (7, 7, 4, {GROUPED: 2, "ConvTranspose2d is not supported": 1}, {}),
    "convolutions, 1-d and 3-d": (
        *(4, 4, 2),
        {"ConvTranspose1d is not supported": 1, "Conv3d is not supported": 1},
        {},
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_situations_of_layers(name: str) -> None:
    outcome = check(NETWORKS[name])
    assert (outcome.wrong, outcome.refused) == ("", "")
    counts = (outcome.layers, outcome.pruned, outcome.factorized)
    assert (*counts, outcome.dense, outcome.unpruned) == EXPECTED[name]
    assert outcome.bytes_file < outcome.bytes_dense


def test_every_situation_is_expected() -> None:
    assert {*SMALL} == {*EXPECTED, "lazy"}


def test_a_network_without_weights_is_refused_by_name() -> None:
    outcome = check(NETWORKS["lazy"])
    assert outcome.wrong == ""
    assert outcome.refused.startswith("layer '0' (LazyConv2d) has no values yet; run one batch")


def test_a_lazy_network_takes_dense_weights_and_no_pairs(tmp_path: Path) -> None:
    build = NETWORKS["lazy, after a batch"].build
    dense, pruned = build(), build()
    slimnets.prune(pruned, SPARSITY)
    slimnets.save(pruned, tmp_path / "dense")
    slimnets.save(slimnets.factorize(dense, RANK), tmp_path / "pairs")
    fresh = lazy()
    reasons = {row.reason for row in plan(fresh, RANK)}
    assert reasons == {"it has no values yet; run one batch through the network first"}
    with pytest.raises(slimnets.ArtifactError, match="it has no values yet; run one batch"):
        slimnets.load(tmp_path / "pairs", fresh)
    assert isinstance(fresh[0], nn.LazyConv2d)
    slimnets.load(tmp_path / "dense", fresh)
    (example,) = images(8)
    assert fresh(example).equal(pruned(example))


def test_tied_embeddings_stay_tied_and_dense(tmp_path: Path) -> None:
    network = NETWORKS["tied embeddings"]
    model = network.build()
    before = model.embedding.weight.detach().clone()
    slimnets.factorize(model, RANK)
    masks = slimnets.prune(model, SPARSITY)
    assert not {"embedding.weight", "output.weight"} & masks.keys()
    slimnets.save(model, tmp_path / "file")
    loaded = slimnets.load(tmp_path / "file", network.build())
    assert loaded.output.weight is loaded.embedding.weight
    assert loaded.output.weight.equal(before)


def test_a_layer_used_twice_becomes_one_pair(tmp_path: Path) -> None:
    network = NETWORKS["layer used twice"]
    model = slimnets.factorize(network.build(), RANK)
    masks = slimnets.prune(model, SPARSITY)
    slimnets.save(model, tmp_path / "file")
    loaded = slimnets.load(tmp_path / "file", network.build())
    for one in (model, loaded):
        assert isinstance(one[1], LowRankPair) and one[1] is one[3]
    assert sorted(masks) == [
        f"{i}.{half}.weight" for i in (0, 1, 4) for half in ("first", "second")
    ]
    assert slimnets.merge(loaded)[1] is loaded[3]


def test_a_weight_used_twice_is_pruned_once() -> None:
    model = NETWORKS["weight used twice"].build()
    masks = slimnets.prune(model, SPARSITY)
    assert sorted(masks) == ["0.weight", "3.weight"]
    assert model[2].weight is model[0].weight


@pytest.mark.parametrize(
    "name", ["weight norm", "weight norm, by a hook", "spectral norm", "orthogonal"]
)
def test_weights_that_are_computed_are_untouched(name: str) -> None:
    model = NETWORKS[name].build().eval()
    before = copy.deepcopy(model[0].state_dict())
    slimnets.factorize(model, RANK)
    assert {*slimnets.prune(model, SPARSITY)} == {"2.first.weight", "2.second.weight"}
    after = model[0].state_dict()
    assert before.keys() == after.keys()
    assert all(after[key].equal(before[key]) for key in before)


def test_the_check_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    network = NETWORKS["LSTM"]

    def forgetful(path: Path, model: nn.Module) -> nn.Module:
        loaded = slimnets.artifact.load(path, model)
        with torch.no_grad():
            loaded.head.second.bias[0] = torch.nextafter(loaded.head.second.bias[0], torch.ones(()))
        return loaded

    monkeypatch.setattr(slimnets, "load", forgetful)
    assert check(network).wrong == "load"
    monkeypatch.undo()

    def negative(model: nn.Module, sparsity: float) -> dict[str, torch.Tensor]:
        masks = slimnets.pruning.prune(model, sparsity)
        with torch.no_grad():
            model.head.first.weight[~masks["head.first.weight"]] = -0.0
        return masks

    monkeypatch.setattr(slimnets, "prune", negative)
    assert check(network).wrong == "zeros"
    monkeypatch.undo()
    monkeypatch.setattr(slimnets, "merge", lambda model: model)
    assert check(network).wrong == "merge gives another structure"


@pytest.mark.parametrize("name", SMALLEST)
def test_small_networks_of_timm(name: str) -> None:
    outcome = check(NETWORKS[name])
    assert (outcome.wrong, outcome.refused) == ("", "")
    assert outcome.pruned == outcome.layers
    assert outcome.factorized + outcome.dense.total() == outcome.layers


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in (*SMALL, *SMALLEST)])
def test_networks_that_nobody_here_wrote(name: str) -> None:
    outcome = check(NETWORKS[name])
    assert (outcome.wrong, outcome.refused) == ("", "")
    assert outcome.factorized + outcome.dense.total() == outcome.layers
    assert outcome.bytes_file < outcome.bytes_dense


@pytest.mark.nightly
@pytest.mark.parametrize("name", [*EXPECTED, "lcnet_035"])
def test_accelerated(name: str) -> None:
    outcome = check(NETWORKS[name], accelerate=True)
    assert outcome.wrong == ""
    assert outcome.accelerated is not None


def test_enough_of_each_family() -> None:
    counts = {family: len(entries.split()) for family, entries in TIMM.items()}
    assert sum(counts.values()) >= 40
    assert min(counts.values()) >= 5


def test_the_page_has_every_network() -> None:
    rows = re.findall(
        r"^\| ([^|]+) \|(?: *\d+ \|){3}", (ROOT / "docs/networks.md").read_text(), re.M
    )
    assert rows == [*NETWORKS]
