"""From scores to masks, exactly k weights over one tensor or many; and masks applied."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from slimnets.layers import INTEGERS

_DIGIT = 16  # bits that one pass over the scores settles; float32 has two such digits
_BINS = 1 << _DIGIT
_CHUNK = 1 << 18  # what is worked on at a time, so that what is computed from it stays in the cache


def lowest(scores: Sequence[Tensor], k: int) -> tuple[list[Tensor], float]:
    """Choose exactly the ``k`` lowest of all scores together.

    A radix selection in two passes of one histogram each: no sorted copy, and no copy of all scores
    in one place. Equal scores at the threshold are chosen in a fixed pseudo-random order, since
    index order would empty whole rows of a layer of equal weights. A score that is not a number is
    the highest.

    Args:
        scores: Tensors of any shapes, compared in float32.
        k: How many to choose, from 0 to the number of all scores.

    Returns:
        One bool tensor per tensor of scores, of its shape and on its device, True where chosen; and
        the highest score that was chosen, ``-inf`` for ``k = 0``.

    Raises:
        ValueError: If ``k`` is out of range.

    Examples:
        >>> chosen, threshold = lowest([torch.tensor([3.0, 1.0]), torch.tensor([2.0])], k=2)
        >>> [c.tolist() for c in chosen], threshold
        ([[False, True], [True]], 2.0)
    """
    total = sum(score.numel() for score in scores)
    if not 0 <= k <= total:
        raise ValueError(f"k={k}: expected a count from 0 to {total}, the number of scores")
    if k == 0:
        return [torch.zeros_like(score, dtype=torch.bool) for score in scores], float("-inf")

    comparable = [score.detach().to(torch.float32) for score in scores]
    threshold, below = _kth(comparable, k)
    chosen = [score < threshold for score in comparable]
    equal = [_equals(score, threshold) for score in comparable]
    _choose_among_equals(chosen, equal, k - below)
    return chosen, threshold


def zero_(values: Tensor, chosen: Tensor) -> None:
    """Set ``values`` to +0.0, in place, where ``chosen`` is True.

    Args:
        values: Of any shape and floating-point dtype.
        chosen: Bool, of the same shape and on the same device.
    """
    bits = INTEGERS.get(values.element_size())
    is_flat = values.is_contiguous() and chosen.is_contiguous()
    if bits is None or not is_flat or values.device.type != "cpu":
        values.masked_fill_(chosen, 0)
        return
    # masked_fill_ is a scalar loop on the CPU; this takes a third of its time
    flat, marks = values.view(-1).view(bits), chosen.view(-1).view(torch.int8)
    for part, mark in zip(flat.split(_CHUNK), marks.split(_CHUNK), strict=True):
        part.bitwise_and_(mark.to(bits).sub_(1))


def zero_pruned(weights: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> None:
    """Set what is ``pruned``, by name of the weight, to +0.0, past autograd's count of changes."""
    for name, mask in pruned.items():
        # .data, since to write zeros where there are zeros must not break a backward to come
        zero_(weights[name].data, mask.to(weights[name].device))


def _kth(scores: Sequence[Tensor], k: int) -> tuple[float, int]:
    """The ``k``-th smallest score, and how many scores are smaller than it."""
    high, below = _settle((key >> _DIGIT for key in _keys(scores)), k)
    in_bin = (key[(key >> _DIGIT) == high] & (_BINS - 1) for key in _keys(scores))
    low, below_in_bin = _settle(in_bin, k - below)
    key = torch.tensor((high << _DIGIT) + low, dtype=torch.int32)
    return _flip_negative(key).view(torch.float32).item(), below + below_in_bin


def _keys(scores: Iterable[Tensor]) -> Iterator[Tensor]:
    """Integers in the order of the scores, a chunk at a time."""
    for score in scores:
        for chunk in score.flatten().split(_CHUNK):
            ordered = chunk.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
            ordered += 0.0  # -0.0 equals 0.0, and has to have the same bits
            yield _flip_negative(ordered.view(torch.int32))


def _flip_negative(bits: Tensor) -> Tensor:
    """The bits of a float as an integer of the same order, and back: its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _settle(digits: Iterable[Tensor], k: int) -> tuple[int, int]:
    """The digit of the ``k``-th smallest, and how many digits are smaller than it."""
    histogram: Tensor | None = None
    for digit in digits:
        counts = torch.bincount(digit + _BINS // 2, minlength=_BINS * 3 // 2)
        histogram = counts if histogram is None else histogram.add_(counts.to(histogram.device))
    assert histogram is not None
    cumulative = histogram.cumsum(0).cpu()
    index = int(torch.searchsorted(cumulative, k))
    return index - _BINS // 2, int(cumulative[index - 1]) if index else 0


def _equals(score: Tensor, threshold: float) -> Tensor:
    equal = score == threshold
    return equal | score.isnan() if threshold == torch.inf else equal


def _choose_among_equals(chosen: Sequence[Tensor], equal: Sequence[Tensor], take: int) -> None:
    counts = [int(tie.count_nonzero()) for tie in equal]
    if sum(counts) == take:
        for mask, tie in zip(chosen, equal, strict=True):
            mask |= tie
        return
    winners = torch.zeros(sum(counts), dtype=torch.bool)
    winners[torch.randperm(len(winners), generator=torch.Generator().manual_seed(0))[:take]] = True
    for mask, tie, won in zip(chosen, equal, winners.split(counts), strict=True):
        mask[tie] = won.to(mask.device)
