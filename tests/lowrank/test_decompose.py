"""Truncated SVD against numpy's, and Tai's layout against the formula written out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from slimnets.lowrank import decompose
from slimnets.lowrank.decompose import (
    as_matrix,
    factors,
    rank_for_energy,
    rank_for_fraction,
    truncated_svd,
)

SHAPES = {
    "linear": ((20, 30), "spatial"),
    "conv1d": ((20, 6, 5), "spatial"),
    "pointwise": ((20, 30, 1, 1), "spatial"),
    "spatial": ((20, 6, 3, 5), "spatial"),
    "channel": ((20, 6, 3, 5), "channel"),
}


def product(first, second):
    return torch.einsum("nk...,kc...->nc...", second, first)


def spectrum(name, n):
    i = torch.arange(1, n + 1, dtype=torch.float64)
    return {
        "flat": torch.ones_like(i),
        "slow": i**-0.5,
        "power": i**-1,
        "steep": i**-4,
        "exponential": torch.exp(-0.05 * i),
        "noise": torch.where(i <= 20, 1.0, 1e-3),
    }[name]


def matrix_with(values, columns):
    rows = len(values)
    u = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(columns, rows, dtype=torch.float64)).Q
    return ((u * values) @ v.mT).float()


def test_the_spatial_factors_are_those_of_the_paper():
    outputs, inputs, d, rank = 4, 3, 3, 5
    weight = torch.randn(outputs, inputs, d, d, dtype=torch.float64)
    # Tai et al.: rows (c, vertical offset), columns (n, horizontal offset)
    w = weight.numpy()
    laid_out = np.zeros((inputs * d, d * outputs))
    for n in range(outputs):
        for c in range(inputs):
            for i in range(d):
                for j in range(d):
                    laid_out[c * d + i, n * d + j] = w[n, c, i, j]
    u, s, vt = np.linalg.svd(laid_out)
    first, second = (half.numpy() for half in factors(weight, rank))
    assert first.shape == (rank, inputs, d, 1)
    assert second.shape == (outputs, rank, 1, d)
    for k in range(rank):
        vertical = np.array([[u[c * d + i, k] for i in range(d)] for c in range(inputs)])
        horizontal = np.array([[vt[k, n * d + j] for j in range(d)] for n in range(outputs)])
        sign = np.sign((first[k, :, :, 0] * vertical).sum())
        np.testing.assert_allclose(first[k, :, :, 0], sign * vertical * math.sqrt(s[k]))
        np.testing.assert_allclose(second[:, k, 0, :], sign * horizontal * math.sqrt(s[k]))


@pytest.mark.parametrize(("shape", "decomposition"), SHAPES.values(), ids=SHAPES)
def test_the_error_at_any_rank_is_the_energy_of_the_dropped_singular_values(shape, decomposition):
    weight = torch.randn(shape, dtype=torch.float64)
    matrix = as_matrix(weight, decomposition)
    assert matrix.numel() == weight.numel()
    s = torch.linalg.svdvals(matrix)
    for rank in range(1, len(s) + 1):
        error = (product(*factors(weight, rank, decomposition)) - weight).norm() ** 2
        torch.testing.assert_close(error, (s[rank:] ** 2).sum(), rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize(("rows", "columns"), [(100, 300), (192, 192), (160, 700), (256, 320)])
@pytest.mark.parametrize("name", ["flat", "slow", "power", "steep", "exponential", "noise"])
def test_the_error_is_within_one_percent_of_the_full_decomposition(rows, columns, name):
    matrix = matrix_with(spectrum(name, rows), columns)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    for rank in (1, 7, rows // 16, rows // 6, rows // 3, rows - 5, rows):
        best = (matrix - (u[:, :rank] * s[:rank]) @ vh[:rank]).norm()
        for tried in (matrix, matrix.mT):
            a, b, c = truncated_svd(tried, rank)
            error = (tried - (a * b) @ c).norm()
            floor = 1e-5 * matrix.norm()  # of float32
            assert error <= 1.01 * best + floor


@pytest.mark.parametrize("rows", [192, 384])
def test_random_weights_the_hardest_are_within_one_percent(rows):
    matrix = torch.randn(rows, 2 * rows)
    s = torch.linalg.svdvals(matrix)
    for rank in (rows // 16, rows // 8, rows // 5):
        a, b, c = truncated_svd(matrix, rank)
        assert (matrix - (a * b) @ c).norm() <= 1.01 * (s[rank:] ** 2).sum().sqrt()


def test_every_way_gives_the_same_decomposition():
    matrix = matrix_with(spectrum("power", 256), 300)
    full = decompose._full(matrix, 16)
    for way in (decompose._randomised, decompose._gram):
        u, s, vh = way(matrix, 16)
        torch.testing.assert_close(s, full[1], rtol=1e-3, atol=0)
        torch.testing.assert_close(u.mT @ u, torch.eye(16), rtol=0, atol=1e-4)
        torch.testing.assert_close(vh @ vh.mT, torch.eye(16), rtol=0, atol=2e-2)


@pytest.mark.parametrize("giant", [1.0, 1000.0])
def test_matrices_near_to_a_diagonal_one(giant):
    s = torch.cat([torch.tensor([giant]), torch.linspace(1, 0.5, 39), torch.full((360,), 0.1)])
    matrix = torch.diag(s[torch.randperm(400)])
    a, b, c = truncated_svd(matrix, 40)
    assert (matrix - (a * b) @ c).norm() <= 1.01 * s[40:].norm()


def test_it_is_deterministic_and_leaves_the_global_random_state_alone():
    matrix = torch.randn(400, 400)
    before = torch.get_rng_state()
    first, second = truncated_svd(matrix, 20), truncated_svd(matrix, 20)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(before, torch.get_rng_state())


def test_it_ignores_autocast_and_reduced_precision_and_puts_them_back():
    matrix = torch.randn(300, 300)
    expected = truncated_svd(matrix, 200)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = truncated_svd(matrix, 200)
            assert (matrix @ matrix).dtype == torch.bfloat16
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_it_ignores_reduced_precision_that_was_asked_for_by_the_newer_api():
    backend, seen = torch.backends.cuda.matmul, []
    if not hasattr(backend, "fp32_precision"):
        pytest.skip("this torch has the older API only")

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.mm.default:
                seen.append(backend.fp32_precision)
            return function(*args, **(kwargs or {}))

    before, backend.fp32_precision = backend.fp32_precision, "tf32"
    try:
        with Watch():
            truncated_svd(torch.randn(300, 300), 20)
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before
    assert set(seen) == {"ieee"}


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_weights_whose_squares_leave_float32(scale):
    matrix = torch.randn(300, 300) * scale
    u, s, vh = truncated_svd(matrix, 20)
    error = (matrix / scale - (u * (s / scale)) @ vh).norm()
    assert error <= 1.01 * (torch.linalg.svdvals(matrix / scale)[20:] ** 2).sum().sqrt()


@pytest.mark.parametrize("rows", [8, 200])
def test_a_weight_of_zeros(rows):
    first, second = factors(torch.zeros(rows, rows), 4)
    assert not second.any()
    assert first.any(1).all()  # or nothing would have a gradient
    assert torch.equal(first, factors(torch.zeros(rows, rows), 4)[0])


def test_ranks_that_a_weight_does_not_have():
    weight = torch.randn(12, 1) @ torch.randn(1, 9)
    weight[:, 4:] = 0.0
    first, second = factors(weight, 5)
    torch.testing.assert_close(second @ first, weight)
    assert first.any(1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    weight = torch.randn(16, 8, 3, 3).to(dtype)
    first, second = factors(weight, 6)
    assert first.dtype == second.dtype == dtype
    for half, expected in zip((first, second), factors(weight.float(), 6), strict=True):
        assert torch.equal(half, expected.to(dtype))


def test_double_precision_stays_double():
    weight = torch.randn(200, 200, dtype=torch.float64)
    torch.testing.assert_close(product(*factors(weight, 200)), weight, rtol=0, atol=1e-12)


def test_no_gradient_is_kept():
    weight = torch.randn(8, 8, requires_grad=True)
    assert not any(half.requires_grad for half in factors(weight, 2))


@settings(deadline=None, max_examples=50)
@given(
    values=st.lists(st.floats(0.01, 100), min_size=1, max_size=12),
    energy=st.floats(0.01, 0.999),
)
def test_the_rank_for_an_energy_is_the_smallest_that_keeps_it(values, energy):
    s = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    rank = rank_for_energy(torch.diag(s), energy)
    share = (s**2).cumsum(0) / (s**2).sum()
    assert share[rank - 1] >= energy - 1e-12
    assert rank == 1 or share[rank - 2] < energy + 1e-12


def test_the_rank_for_an_energy_of_zeros_is_one():
    assert rank_for_energy(torch.zeros(4, 6), 0.9) == 1


def test_the_energy_of_half_precision_weights_is_not_rounded():
    s = torch.ones(256)
    assert rank_for_energy(torch.diag(s).half(), 0.5) == 128


def test_a_fraction_is_never_less_than_one():
    assert [rank_for_fraction(f, 10) for f in (0.01, 0.25, 0.96)] == [1, 2, 10]
