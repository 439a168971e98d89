"""Two thin weights for one: truncated SVD and the choice of its rank, as functions of tensors."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Decomposition: TypeAlias = Literal["spatial", "channel"]
"""``"spatial"``: d x 1 then 1 x d (Tai); ``"channel"``: d x d then 1 x 1."""


def as_matrix(weight: Tensor, decomposition: Decomposition = "spatial") -> Tensor:
    """Lay a weight out as the matrix whose rank the pair limits.

    Args:
        weight: ``(outputs, inputs, *kernel)`` of a linear layer or convolution.
        decomposition: How a two-dimensional kernel is split; others go to the first factor whole.

    Returns:
        ``(inputs * first kernel, second kernel * outputs)``, as in Tai et al., arXiv 1511.06067.
    """
    return weight.movedim(0, -1).reshape(matrix_shape(weight.shape, decomposition))


def matrix_shape(shape: torch.Size, decomposition: Decomposition = "spatial") -> tuple[int, int]:
    """The shape of :func:`as_matrix` of a weight of ``shape``."""
    rows = shape[1] * math.prod(_first_kernel(shape, decomposition))
    return rows, shape.numel() // rows


def matrix_shape_of_pair(first: torch.Size, second: torch.Size) -> tuple[int, int]:
    """The same of the weight that two layers stand for, whose weights have these shapes."""
    return math.prod(first[1:]), second[0] * math.prod(second[2:])


def factors(
    weight: Tensor, rank: int, decomposition: Decomposition = "spatial"
) -> tuple[Tensor, Tensor]:
    """The weights of two layers that, one after the other, approximate ``weight`` best.

    Best in the Frobenius norm, each factor with the square root of the singular values (Tai et
    al., arXiv 1511.06067). Half precision is computed in float32. Of ranks whose singular value is
    zero, such as all of a layer that begins with zeros, the first factor is random, so that they
    can be trained.

    Args:
        weight: ``(outputs, inputs, *kernel)`` of a linear layer or convolution; finite.
        rank: From 1 to the smaller side of :func:`as_matrix`.
        decomposition: How a two-dimensional kernel is split.

    Returns:
        ``(rank, inputs, *first kernel)`` and ``(outputs, rank, *second kernel)``.
    """
    u, s, vh = truncated_svd(as_matrix(weight.detach(), decomposition), rank)
    outputs, inputs, *kernel = weight.shape
    own = _first_kernel(weight.shape, decomposition)
    ones = [1] * len(kernel)
    left = (u * s.sqrt()).reshape(inputs, *own, rank).movedim(-1, 0)
    right = (vh * s.sqrt()[:, None]).reshape(rank, *kernel[len(own) :], outputs).movedim(-1, 0)
    first = left.reshape(rank, inputs, *own, *ones[len(own) :])
    second = right.reshape(outputs, rank, *ones[: len(own)], *kernel[len(own) :])
    # two factors that are both zero have no gradient; one of them leaves the product as it is
    unused = ~first.flatten(1).any(1)
    if unused.any():
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(first[unused].shape, generator=generator)
        first[unused] = noise.to(first) / math.sqrt(first[0].numel())
    return first.to(weight.dtype).contiguous(), second.to(weight.dtype).contiguous()


def rank_for_fraction(fraction: float, full_rank: int) -> int:
    """The rank nearest to a fraction of the full rank, at least 1.

    Examples:
        >>> rank_for_fraction(0.25, 64)
        16
    """
    return max(1, round(fraction * full_rank))


def rank_for_energy(matrix: Tensor, energy: float) -> int:
    """The smallest rank that keeps the share ``energy`` of the squared singular values.

    Args:
        matrix: ``(m, n)``, finite.
        energy: Share in (0, 1).
    """
    shares = energies(matrix)
    return min(int((shares.cumsum(0) < energy).sum()) + 1, len(shares))


def energies(matrix: Tensor) -> Tensor:
    """The share that each squared singular value has in the sum of all.

    Args:
        matrix: ``(m, n)``, finite.

    Returns:
        ``(min(m, n),)``, descending, of float64 and on the CPU; NaN for a matrix of zeros.
    """
    with _full_precision(matrix.device):
        wide = matrix.detach().double()
        wide = wide if wide.shape[0] <= wide.shape[1] else wide.mT
        # the eigenvalues of the Gram matrix are the squared singular values, ascending
        squares: Tensor = torch.linalg.eigvalsh(wide @ wide.mT).clamp(min=0).flip(0).cpu()
    return squares / squares.sum()


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` largest singular values of ``matrix`` and their vectors.

    Computed by whichever of the full SVD, the eigenvectors of the Gram matrix and a randomised
    range finder suits the shape and the rank; the error of the approximation is within 1 % of the
    full SVD's. Deterministic, and the global random state is left alone.

    Args:
        matrix: ``(m, n)``, finite; half precision is computed in float32.
        rank: From 1 to ``min(m, n)``.

    Returns:
        ``U`` ``(m, rank)``, ``S`` ``(rank,)`` in descending order, ``V^T`` ``(rank, n)``.
    """
    if matrix.shape[0] > matrix.shape[1]:
        u, s, vh = truncated_svd(matrix.mT, rank)
        return vh.mT, s, u.mT
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    # squares neither overflow nor vanish, and a power of two rounds nothing
    largest = torch.linalg.vector_norm(matrix, math.inf)
    scale = torch.exp2(largest.clamp(min=torch.finfo(matrix.dtype).tiny).log2().floor())
    with torch.no_grad(), _full_precision(matrix.device):
        u, s, vh = _truncated_svd(matrix / scale, rank)
    return u, s * scale, vh


def _truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    m, n = matrix.shape  # m <= n
    if m <= 128:
        return _full(matrix, rank)
    # time of the range finder against that of the Gram matrix and its eigenvectors, as measured
    is_low = 8 * n * m * rank <= n * m**2 + 2 * m**3
    u, s, vh = _randomised(matrix, rank) if is_low else _gram(matrix, rank)
    # Both work with squares, where singular values below sqrt(eps) of the largest are lost: what
    # is left over has to be far above that, or the error is not the best.
    total, kept = matrix.norm() ** 2, s.norm() ** 2
    if total - kept < torch.finfo(matrix.dtype).eps ** 0.5 * total:
        return _full(matrix, rank)
    return u, s, vh


def _full(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank]


def _gram(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u = torch.linalg.eigh(matrix @ matrix.mT)[1][:, -rank:].flip(1)  # ascending
    return _scaled(u, u.mT @ matrix)


def _randomised(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Randomised subspace iteration (Halko et al., arXiv 0909.4061) with dynamic shifts.

    The shifts (Feng et al., arXiv 2404.09276) are here at the Chebyshev nodes of the unwanted end
    of the spectrum. A quarter of oversampling and two iterations keep the error within 1 % for
    the flat spectrum of random weights, the hardest there is. The sketch has to be a dense one: a
    sparse one, which is faster, loses singular vectors of matrices near to a diagonal one.
    """
    generator = torch.Generator().manual_seed(0)
    columns = min(rank + rank // 4 + 8, matrix.shape[0])
    sketch = torch.randn(matrix.shape[1], columns, generator=generator, dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ sketch.to(matrix.device)).Q
    for node in (0.146, 0.854):  # (1 -+ cos(pi / 4)) / 2
        projected = matrix.mT @ basis
        unwanted = torch.linalg.eigvalsh(projected.mT @ projected)[0]  # a lower bound of its end
        basis = torch.linalg.qr(matrix @ projected - node * unwanted * basis).Q
    projected = basis.mT @ matrix
    inner = torch.linalg.eigh(projected @ projected.mT)[1][:, -rank:].flip(1)
    return _scaled(basis @ inner, inner.mT @ projected)


def _scaled(u: Tensor, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    s = torch.linalg.vector_norm(projected, dim=1)
    return u, s, projected / s.clamp(min=torch.finfo(s.dtype).tiny)[:, None]


def _first_kernel(shape: torch.Size, decomposition: Decomposition) -> torch.Size:
    is_split = len(shape) == 4 and decomposition == "spatial"
    return shape[2:3] if is_split else shape[2:]


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, and no TF32 or bf16 in matrix products, which Lightning advises to turn on."""
    with ExitStack() as afterwards:
        try:
            before = torch.get_float32_matmul_precision()
        except RuntimeError:  # set by torch's newer API, which the older one does not know
            for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]
                afterwards.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
                backend.fp32_precision = "ieee"
        else:
            afterwards.callback(torch.set_float32_matmul_precision, before)
            torch.set_float32_matmul_precision("highest")
        afterwards.enter_context(torch.autocast(device.type, enabled=False))
        yield
