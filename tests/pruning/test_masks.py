import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimnets.pruning.masks import lowest, zero_

SCORES = [
    torch.randn(1000),
    torch.randn(40, 50).abs(),
    torch.randint(-3, 3, (500,)).float(),
    torch.tensor([0.0, -0.0, 1e-45, -1e-45, torch.inf, -torch.inf, 3.4e38]),
    torch.randn(600_000).bfloat16(),
]


@pytest.mark.parametrize("scores", SCORES, ids=lambda s: f"{s.dtype}{tuple(s.shape)}")
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9, 1.0])
def test_chooses_exactly_k_and_none_above_the_threshold(scores, share):
    k = round(share * scores.numel())
    (chosen,), threshold = lowest([scores], k)
    assert chosen.sum() == k
    assert chosen.shape == scores.shape
    if k:
        assert threshold == torch.kthvalue(scores.flatten().float(), k).values
    if 0 < k < scores.numel():
        assert scores[chosen].max() <= scores[~chosen].min()


@given(
    st.lists(st.lists(st.floats(width=32, allow_nan=False), max_size=8), min_size=1, max_size=4),
    st.integers(0, 40),
)
def test_several_tensors_are_chosen_from_as_one(lists, k):
    scores = [torch.tensor(values, dtype=torch.float32) for values in lists]
    together = torch.cat(scores)
    k = min(k, together.numel())
    chosen, _ = lowest(scores, k)
    assert torch.equal(torch.cat(chosen).sum(), torch.tensor(k))
    expected = together.sort().values[:k]
    assert torch.equal(together[torch.cat(chosen)].sort().values, expected)


def test_equal_scores_do_not_empty_whole_rows():
    (chosen,), _ = lowest([torch.ones(64, 64)], 2048)
    assert chosen.sum() == 2048
    assert chosen.sum(1).min() > 16
    assert chosen.sum(1).max() < 48


def test_equal_scores_are_chosen_the_same_every_time_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    first, _ = lowest([torch.zeros(100)], 30)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(5)
    second, _ = lowest([torch.zeros(100)], 30)
    assert torch.equal(first[0], second[0])


def test_not_a_number_is_the_highest_score():
    scores = torch.tensor([torch.nan, 1.0, -torch.nan, torch.inf])
    assert lowest([scores], 1)[0][0].tolist() == [False, True, False, False]
    assert lowest([scores], 4)[0][0].tolist() == [True] * 4
    assert lowest([scores], 2)[0][0].sum() == 2


@pytest.mark.parametrize("k", [-1, 4])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=rf"k={k}: expected a count from 0 to 3"):
        lowest([torch.ones(3)], k)


def test_the_scores_are_not_changed():
    scores = torch.randn(100)
    before = scores.clone()
    lowest([scores], 50)
    assert torch.equal(scores, before)


LAYOUTS = {
    "flat": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1),
    "strided": lambda x: x.repeat(2, 1, 1, 1)[::2],
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_zeros_are_positive_whatever_stood_there_and_the_rest_is_untouched(dtype, layout):
    values = torch.randn(600, 9, 8, 8).to(dtype)
    values[0, 0, 0, :4] = torch.tensor([-1.0, torch.nan, torch.inf, -0.0])
    values = LAYOUTS[layout](values)
    chosen = torch.rand(values.shape) < 0.9
    chosen |= ~values.isfinite()
    before = values.clone()
    zero_(values, chosen)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    assert not values[chosen].view(integers).any()
    assert torch.equal(values[~chosen].view(integers), before[~chosen].view(integers))
