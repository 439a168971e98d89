"""Factorized layers: two thin layers, or their product where that is faster."""

from collections.abc import Callable

from torch import nn

from slimnets.acceleration.attention import traceable
from slimnets.layers import replace
from slimnets.lowrank.factorize import merge
from slimnets.lowrank.modules import pairs_of


def pairs_or_products(
    network: nn.Module, times: Callable[[nn.Module], dict[str, float]]
) -> nn.Module:
    """Multiply out those pairs of ``network`` whose product is faster.

    Args:
        network: Changed, its tensors are not.
        times: The seconds that each layer of a network takes, by name.
    """
    products = merge(traceable(network))
    of_pairs, of_products = times(network), times(products)
    for name in pairs_of(network):
        if name not in of_products:
            continue
        halves = [f"{name}.{half}" if name else half for half in ("first", "second")]
        known = all(half in of_pairs for half in halves)
        if known and of_products[name] < sum(of_pairs[half] for half in halves):
            network = replace(network, name, products.get_submodule(name))
    return network
