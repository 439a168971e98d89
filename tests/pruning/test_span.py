import math

import pytest

from slimnets.pruning.span import Span, check_span, resolve_span


@pytest.mark.parametrize("length", [1, 2, 3, 12, 99, 100, 101, 1000, 100_000])
def test_the_defaults_serve_runs_of_any_length(length):
    span = resolve_span(0.0, 0.75, 0.01, length)
    assert 0 <= span.begin < span.end <= length
    updates = {span.progress(step) for step in range(length + 1)}
    assert 1.0 in updates
    assert len(updates) <= 78


def test_the_end_is_an_update_even_if_the_span_is_no_multiple_of_every():
    span = Span(begin=10, end=45, every=10)
    assert [span.progress(step) for step in (9, 10, 19, 20, 44, 45, 46)] == [
        None,
        0.0,
        0.0,
        10 / 35,
        30 / 35,
        1.0,
        1.0,
    ]


def test_a_span_of_no_length_is_one_update():
    span = resolve_span(5, 5, 1, 10)
    assert [span.progress(step) for step in (4, 5, 6)] == [None, 1.0, 1.0]


def test_ints_and_fractions_mix():
    assert resolve_span(10, 0.5, 3, 100) == Span(10, 50, 3)


def test_ints_need_no_length():
    assert resolve_span(0, 50, 5, math.inf) == Span(0, 50, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 101, 1, 100), r"end=101: the run has only 100 optimizer steps"),
        ((80, 0.5, 1, 100), r"begin=80 is step 80 and end=0.5 is step 50 of the 100"),
        (
            (0.0, 10, 1, math.inf),
            r"begin=0.0 is a fraction of the run, but the number of optimizer",
        ),
        ((0, 0.5, 1, math.inf), r"end=0.5 is a fraction"),
        ((0, 10, 0.1, math.inf), r"every=0.1 is a fraction"),
    ],
)
def test_what_does_not_fit_the_run(arguments, message):
    with pytest.raises(ValueError, match=message):
        resolve_span(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("0", 1, 1), TypeError, "begin='0': expected an int, in optimizer steps, or a float"),
        ((0, True, 1), TypeError, "end=True"),
        ((0, 100.0, 1), ValueError, r"end=100.0: a float is a fraction.*did you mean 100 steps"),
        ((0, 1.5, 1), ValueError, r"end=1.5: a float is a fraction of the run, in \[0, 1\]$"),
        ((0, float("nan"), 1), ValueError, "end=nan"),
        ((-1, 5, 1), ValueError, "begin=-1: expected no negative"),
        ((0, 5, 0), ValueError, "every=0: expected at least 1"),
        ((6, 5, 1), ValueError, "begin=6, end=5: pruning cannot end before it begins"),
        ((0.6, 0.5, 1), ValueError, "begin=0.6, end=0.5"),
    ],
)
def test_what_no_run_could_satisfy(arguments, error, message):
    with pytest.raises(error, match=message):
        check_span(*arguments)
