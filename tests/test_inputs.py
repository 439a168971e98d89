"""A dictionary of arguments is the same call as by position, and one call has one form."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from slimnets.inputs import arguments_for


def of(forward: Callable[..., Any]) -> nn.Module:
    network = nn.Module()
    network.forward = forward
    return network


@pytest.mark.parametrize(
    ("forward", "given", "expected"),
    [
        (lambda x, y: 0, {"y": 2, "x": 1}, ((1, 2), {})),
        (lambda x, a=3, b=4, c=5: 0, {"x": 1, "b": 2}, ((1, 3, 2), {})),
        (lambda a=3, /, x=4: 0, {"x": 1}, ((3, 1), {})),
        (lambda x, a=3, *rest, y: 0, {"x": 1, "y": 2}, ((1, 3), {"y": 2})),
        (lambda x, *, a=3: 0, {"x": 1}, ((1,), {})),
        (lambda x, **more: 0, {"x": 1, "y": 2}, ((1,), {"y": 2})),
        (lambda *args, **kwargs: 0, {"x": 1}, ((), {"x": 1})),
        (lambda x, y: 0, (1, 2), ((1, 2), {})),
        (lambda x: 0, ({"x": 1},), (({"x": 1},), {})),
        (lambda x: 0, [1, 2], (([1, 2],), {})),
    ],
)
def test_arguments_go_by_position_where_they_can(
    forward: Callable[..., Any], given: Any, expected: Any
) -> None:
    assert arguments_for(of(forward), given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": 1}, "example_input: missing a required argument: 'y' of forward"),
        ([1, 2], "example_input: got a list, .* give a tuple"),
        ({"x": 1, "y": 2, "z": 3}, r"unexpected keyword argument 'z' of forward\(x, y\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        arguments_for(of(lambda x, y: 0), given)


@pytest.mark.filterwarnings("ignore:.torch.jit.*")
def test_a_network_whose_arguments_are_not_known_is_called_by_name() -> None:
    layer, x = nn.Linear(2, 3), torch.randn(1, 2)
    traced = torch.jit.trace(layer, x)
    args, kwargs = arguments_for(traced, {"input": x})
    assert torch.equal(traced(*args, **kwargs), layer(x))
