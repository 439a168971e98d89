"""The compressed network for other runtimes."""

import inspect
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from slimnets.acceleration.attention import traceable
from slimnets.acceleration.compare import copied, same_draws, same_results
from slimnets.acceleration.prepare import copy_for_inference, graph_of, positional, simplify
from slimnets.acceleration.trace import versions_of
from slimnets.files import target_of, written_whole
from slimnets.layers import compressed_network

log = logging.getLogger(__name__)

PACKAGES = {".pt2": (), ".onnx": ("onnx", "onnxscript"), ".pte": ("executorch",)}


def export(model: nn.Module, example_input: Any, path: str | Path) -> Path:
    """Write ``model`` for another runtime, with batch norm folded and dead channels removed.

    Weights are written dense: these runtimes gain nothing from single zeros. The first dimension
    of every input, the batch, may change afterwards where the network allows it; that of a vector
    if it is as long as the batch is large, and one of length 1 beside longer ones stays that. An
    example of one sample alone is taken twice, so give two if some inputs are the same for all.

    Args:
        model: Any module that ``torch.export`` understands; it is copied and left as it is.
        example_input: An input tensor, a tuple of the arguments of ``forward``, or a dictionary of
            them by name.
        path: Where to: ``*.pt2`` for ``torch.export.load``, ``*.onnx`` for ONNX Runtime, OpenVINO
            and others (needs ``onnx`` and ``onnxscript``), ``*.pte`` for ExecuTorch with XNNPACK
            (needs ``executorch``; the batch is that of ``example_input``, or smaller).

    Returns:
        ``path``.

    Raises:
        TypeError: If ``model`` is not a network, or ``forward`` cannot be called so.
        ValueError: If the suffix is another.
        OSError: If there is no such folder, or the file cannot be written; what was there before is
            left.
        ImportError: If a package for the format is missing.
    """
    path = Path(path)
    if path.suffix not in PACKAGES:
        raise ValueError(f"path={str(path)!r}: expected a name that ends in {', '.join(PACKAGES)}")
    target_of(path)  # or the error would come when all has been computed
    missing = [name for name in PACKAGES[path.suffix] if not find_spec(name)]
    if missing:
        extra = "executorch" if path.suffix == ".pte" else "slimnets[export]"
        raise ImportError(f"{path.suffix} needs {' and '.join(missing)}: pip install {extra}")
    example = positional(model, example_input)
    with torch.no_grad(), same_draws():  # the caller's generators stay where they are
        network = simplified(compressed_network(model), example)
        with written_whole(path) as beside:
            _write(network, _at_least_two(example), beside)
    return path


def simplified(model: nn.Module, example: tuple[Any, ...]) -> nn.Module:
    """A copy of ``model`` with batch norm folded and dead channels removed, where it is traced."""
    original = copy_for_inference(model)
    original(*copied(example))  # what is made at the first run is there at the next
    versions = versions_of(original)
    with same_draws():
        expected = original(*copied(example))
    if versions != versions_of(original):  # the file has to begin where the model stands
        return copy_for_inference(model)
    graph = graph_of(traceable(original), example, expected)
    if graph is None:
        return original
    simplify(graph, example)
    return graph if same_results(graph, example, expected) else original


def _at_least_two(example: tuple[Any, ...]) -> tuple[Any, ...]:
    # torch.export takes a dimension of one for a constant
    return _of_batches(
        example, lambda batch: torch.cat([batch, batch]) if len(batch) == 1 else batch, lambda x: x
    )


def _write(network: nn.Module, example: tuple[Any, ...], path: Path) -> None:
    mobile = path.suffix == ".pte"
    any_size = torch.export.Dim.AUTO

    def sizes(batch: Tensor) -> Any:
        # ExecuTorch plans its memory ahead
        return {0: any_size(min=1, max=len(batch)) if mobile else any_size}

    free = _of_batches(example, sizes, lambda _: None)
    # nested as in the signature, where *args is one
    by_name = inspect.signature(network.forward).bind(*free).arguments
    with warnings.catch_warnings():  # the exporters' own, about versions to come
        warnings.simplefilter("ignore")
        program = torch.export.export(network, example, dynamic_shapes=dict(by_name), strict=False)
        limits = [] if mobile else _limits(program, free)
        if limits:
            log.warning("export: %s, as the network is written", "; ".join(limits))
        if mobile:
            path.write_bytes(_executorch(program))
        elif path.suffix == ".pt2":
            # PyTorch's own writer ends the process where a disk is full
            torch.export.save(program, archive := io.BytesIO())
            path.write_bytes(archive.getbuffer())
        else:
            torch.onnx.export(program, (), path, dynamo=True, external_data=False, verbose=False)
            if limits:
                _fix_sizes(path)


def _limits(program: torch.export.ExportedProgram, free: tuple[Any, ...]) -> list[str]:
    """What the file asks of batches whose size was to be free."""
    asked, _ = tree_flatten(free, is_leaf=lambda one: isinstance(one, dict) and 0 in one)
    nodes = {node.name: node for node in program.graph.nodes}
    limits = []
    for shape, name in zip(asked, program.graph_signature.user_inputs, strict=True):
        if shape is not None:
            size = nodes[str(name)].meta["val"].shape[0]
            size = size.node.expr if isinstance(size, torch.SymInt) else size
            if size not in program.range_constraints:
                limits.append(f"the batch of {name!r} is always {size}")
            elif (least := program.range_constraints[size].lower) > 2:
                limits.append(f"the batch of {name!r} is at least {least}")
    return limits


def _fix_sizes(path: Path) -> None:
    """Write sizes that are fixed as numbers, where ``torch.onnx`` writes a free one called "4"."""
    onnx = import_module("onnx")
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param.isdigit():
                size.dim_value = int(size.dim_param)
    onnx.save(model, path)


def _of_batches(
    example: tuple[Any, ...], of_batch: Callable[[Tensor], Any], of_others: Callable[[Any], Any]
) -> tuple[Any, ...]:
    """``example`` with something else in the place of each batch, and of all else."""
    # a list, as of images to a detector, is a batch itself
    leaves, structure = tree_flatten(example, is_leaf=lambda one: isinstance(one, list))
    found = [
        of_batch(leaf) if is_batch else tree_map(of_others, leaf)
        for leaf, is_batch in zip(leaves, _are_batches(leaves), strict=True)
    ]
    return tree_unflatten(found, structure)  # type: ignore[no-any-return]


def _are_batches(example: Sequence[Any]) -> list[bool]:
    tensors = [value for value in example if isinstance(value, Tensor) and value.dim()]
    sizes = {len(value) for value in tensors if value.dim() > 1}
    batches = [
        value
        for value in tensors
        if (value.dim() > 1 or len(value) in sizes) and (len(value) > 1 or sizes == {1})
    ]
    return [any(value is one for one in batches) for value in example]


def _executorch(program: torch.export.ExportedProgram) -> bytes:
    exir = import_module("executorch.exir")
    xnnpack = import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    partitioner = [xnnpack.XnnpackPartitioner()]
    edge = exir.to_edge_transform_and_lower(program, partitioner=partitioner)
    return edge.to_executorch().buffer  # type: ignore[no-any-return]
