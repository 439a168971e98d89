import pytest
from torch import nn

from slimnets.selectors import as_selectors, assign, glob_matches, matches, without


def network():
    block = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(1, 1, 1))
    return nn.ModuleDict({"a": block, "b": nn.Linear(2, 2)})


def layers(within=None):
    found = (network() if within is None else within).named_modules()
    return {name: one for name, one in found if isinstance(one, nn.Linear | nn.Conv2d)}


def test_the_first_glob_that_matches_wins_whatever_comes_later():
    assert assign({"a.*": 1, "*": 2}, layers(), "r") == {"a.0": 1, "a.1": 1, "b": 2}
    assert assign({"*.0": 2, "a.*": 1}, layers(), "r") == {"a.0": 2, "a.1": 1}
    assert assign({"b": 3}, layers(), "r") == {"b": 3}


def test_a_glob_that_wins_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"r\['b'\]=1 has no effect: .* '\*' .* put 'b' first"):
        assign({"*": 2, "b": 1}, layers(), "r")
    with pytest.raises(ValueError, match=r"r\['a'\]=3 has no effect: .* '\*0', 'a\.1' before it"):
        assign({"a.1": 1, "b": 2, "*0": 2, "a": 3}, layers(), "r")


def test_a_name_matches_itself_whatever_is_in_it():
    assert glob_matches("conv[3x3].first", "conv[3x3]")
    assert not glob_matches("conv3.first", "conv[3x3]x")


def test_globs_are_case_sensitive_and_cross_dots():
    with pytest.raises(ValueError, match=r"r: 'A\.\*' matches no layer; the layers are: 'a.0'"):
        assign({"A.*": 1}, layers(), "r")
    assert assign({"a*0": 1}, layers(), "r") == {"a.0": 1}


def test_a_predicate_is_asked_about_layers():
    layer = nn.Linear(2, 2)
    assert matches("a.weight", {"a": layer}, lambda name, one: (name, one) == ("a", layer))


def test_without():
    whole = network()

    def left(exclude):
        return list(without(whole, layers(whole), as_selectors(exclude)))

    assert left(nn.Linear) == ["a.1"]
    assert left(["b", "a.1"]) == ["a.0"]
    assert left(nn.Sequential) == ["b"]
    assert left(lambda name, layer: isinstance(layer, nn.Conv2d)) == ["a.0", "b"]
    with pytest.raises(ValueError, match="exclude: LSTM matches no layer"):
        left(nn.LSTM)


@pytest.mark.parametrize("layer", [nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1))])
def test_a_layer_itself_selects_nothing(layer):
    with pytest.raises(TypeError, match=r"(?s)exclude=.*: expected a glob over layer names"):
        as_selectors(layer)


def test_a_glob_that_matches_a_module_matches_the_layers_in_it():
    layers = {"block.conv.first": nn.Linear(2, 2), "block.conv.second": nn.Linear(2, 2)}
    assert assign({"block.conv": 1}, layers, "r") == dict.fromkeys(layers, 1)
    network = nn.ModuleDict({"block": nn.ModuleDict({"conv": nn.ModuleDict()})})
    assert without(network, layers, as_selectors("block")) == {}
    with pytest.raises(ValueError, match="'conv' matches no layer"):
        assign({"conv": 1}, layers, "r")
