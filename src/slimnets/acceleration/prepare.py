"""What comes before the choice: a copy for inference, its graph, and that graph made smaller."""

import copy
from typing import Any

from torch import Tensor, fx, nn

from slimnets.acceleration.compare import agree_elsewhere, copied, same_results
from slimnets.acceleration.fold import fold_batch_norm
from slimnets.acceleration.nodes import Recorder
from slimnets.acceleration.shrink import shrink
from slimnets.acceleration.trace import trace
from slimnets.inputs import arguments_for
from slimnets.layers import compressed_network, refuse_lazy


def positional(model: nn.Module, example_input: Any) -> tuple[Any, ...]:
    """The arguments of ``forward`` that ``example_input`` is; copies, for it may work in place.

    Raises:
        TypeError: If ``model`` is not a network, or ``example_input`` is a dictionary with names
            that ``forward`` does not have, or does not take by position.
        ValueError: If a lazy layer of it has no weights yet.
    """
    network = compressed_network(model)
    refuse_lazy(network, "model")
    args, by_name = arguments_for(network, example_input)
    if by_name:
        raise TypeError(
            f"example_input: {', '.join(map(repr, by_name))} can only be given by name, and what "
            "is traced takes its arguments by position; a dictionary that is one of them stands in "
            "a tuple, (dictionary,)"
        )
    return copied(args)  # type: ignore[no-any-return]


def copy_for_inference(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters need no gradient."""
    memo: dict[int, Any] = {id(getattr(model, "_trainer", None)): None}  # a copy has no Trainer
    for module in model.modules():
        for value in vars(module).values():
            # weights that hooks compute cannot be copied with their history
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    network = copy.deepcopy(model, memo).eval()
    for parameter in network.parameters():
        if parameter.is_leaf:  # those of a copied ScriptModule are not, nor has it requires_grad_
            parameter.requires_grad_(False)
    return network


def graph_of(network: nn.Module, example: tuple[Any, ...], expected: Any) -> fx.GraphModule | None:
    """``network`` traced; None where that fails, or the graph does not compute ``expected``.

    Nor may it compute anything else than ``network`` for inputs that are unlike the example: it
    could have taken a turn that is right for the example only.
    """
    graph = trace(network, len(example))
    if graph is None or not same_results(graph, example, expected):
        return None
    return graph if agree_elsewhere(graph, network, example) else None


def simplify(
    graph: fx.GraphModule, example: tuple[Any, ...]
) -> tuple[dict[str, tuple[Any, ...]], dict[str, int]]:
    """Fold batch norm and remove dead channels, in place.

    Returns:
        The arguments of each module that is called as a whole, and how many channels each layer
        has lost.
    """
    recorder = Recorder(graph)
    recorder.run(*example)
    fold_batch_norm(graph)
    Recorder(graph).run(*example)
    return recorder.opaque, shrink(graph)
