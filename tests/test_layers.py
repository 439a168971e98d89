import lightning as L
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from slimnets import factorize, load, prune, save
from slimnets.layers import compressed_network, is_parametrized, names_of, paths_in, replace
from slimnets.lowrank.modules import LowRankPair


@pytest.mark.parametrize(
    "wrap", [L.Fabric(accelerator="cpu", devices=1).setup_module, nn.DataParallel, AveragedModel]
)
def test_a_wrapper_is_taken_off(wrap, tmp_path):
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 64), nn.Linear(64, 64))
    wrapped = wrap(network)
    inner = compressed_network(wrapped)
    assert type(inner) is nn.Sequential
    assert list(prune(wrapped, {"0": 0.5})) == ["0.weight"]
    assert factorize(wrapped, {"2": 4}) is wrapped
    assert isinstance(inner[2], LowRankPair)
    save(wrapped, tmp_path / "x.safetensors")
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 64), nn.Linear(64, 64))
    load(tmp_path / "x.safetensors", plain)
    x = torch.randn(3, 4)
    torch.testing.assert_close(plain(x), wrapped(x))


def test_replace_puts_the_new_layer_wherever_the_old_one_stood():
    shared = nn.Linear(2, 2)
    network = nn.Sequential(shared, nn.ModuleDict({"again": shared}))
    new = nn.Identity()
    assert names_of(network, shared) == ["0", "1.again"]
    assert replace(network, "0", new) is network
    assert network[0] is new
    assert network[1]["again"] is new
    assert replace(shared, "", new) is new


def test_the_compressed_network_is_found_through_wrappers():
    network = nn.Linear(2, 2)

    class Wrapper(nn.Module):
        @property
        def compressed_network(self):
            return network

    assert compressed_network(network) is network
    assert compressed_network(Wrapper()) is network
    assert compressed_network(torch.compile(network)) is network


def test_a_compressed_network_that_is_no_submodule_is_named():
    class Wrapper(nn.Module):
        compressed_network = nn.Linear(2, 2)

    with pytest.raises(ValueError, match="compressed_network of Wrapper is a Linear that is none"):
        paths_in(Wrapper(), {"": 1})


def test_layers_of_the_compressed_network_have_paths_in_what_wraps_it():
    network = nn.Sequential(nn.Linear(2, 2))

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.compile(network)

        @property
        def compressed_network(self):
            return self.inner

    assert paths_in(network, {"0": 1, "": 2}) == {"0": 1, "": 2}
    assert paths_in(Wrapper(), {"0": 1}) == {"inner._orig_mod.0": 1}
    assert paths_in(torch.compile(network), {"": 1}) == {"_orig_mod": 1}


def test_is_parametrized():
    assert not is_parametrized(nn.Linear(2, 2))
    assert is_parametrized(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    assert not is_parametrized(nn.ReLU())
