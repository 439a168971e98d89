"""What a table shows of its rows."""

import pytest

from slimnets.inspection.rows import Row
from slimnets.inspection.table import cells, columns, folded, markdown, scaled, text, times
from tests.support import same_text_everywhere

CONVOLUTION = Row("features.0", "Conv2d", 1200, 120, 3456)
NORMS = [Row("features.1", "BatchNorm2d", bytes=10), Row("features.4", "LayerNorm", bytes=20)]


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0, "B", "0 B"),
        (512, "B", "512 B"),
        (999.7, "B", "1.00 kB"),
        (20_600_000, "B", "20.6 MB"),
        (398_000_000, "", "398 M"),
        (1.234e12, "", "1.23 T"),
        (2.5, "s", "2.50 s"),
        (0.01234, "s", "12.3 ms"),
        (0.0009999, "s", "1.00 ms"),
        (3.21e-5, "s", "32.1 µs"),
    ],
)
def test_numbers_have_three_digits(value: float, unit: str, shown: str) -> None:
    assert scaled(value, unit) == shown


def test_ratios() -> None:
    assert [times(ratio) for ratio in (1.0, 8.771, 12.34, 523.4)] == [
        "1.00x",
        "8.77x",
        "12.3x",
        "523x",
    ]


def test_columns_that_would_be_empty_are_left_out() -> None:
    assert columns([CONVOLUTION]) == ["name", "kind", "weights", "nonzeros", "sparsity", "bytes"]
    pair = Row("a", "LowRankPair", 1, 1, 1, rank=4, macs=3)
    assert {"rank", "macs"} <= set(columns([CONVOLUTION, pair]))


def test_layers_without_weights_share_a_line() -> None:
    *shown, last = folded([NORMS[0], CONVOLUTION, NORMS[1]])
    assert shown == [CONVOLUTION]
    assert cells(last, ["name", "kind", "weights", "bytes"]) == [
        "2 without weights",
        "BatchNorm2d, LayerNorm",
        "",
        "30",
    ]


def test_both_forms_show_the_same() -> None:
    fields = columns([CONVOLUTION])
    body = [cells(CONVOLUTION, fields)]
    table = text(fields, body, body, ["a note"])
    assert table.splitlines()[-1] == "  a note"
    assert table.splitlines()[1].split() == [
        *("layer", "type", "weights", "non-zeros", "sparsity", "bytes")
    ]
    assert table.splitlines()[3].split() == [
        "features.0",
        "Conv2d",
        "1,200",
        "120",
        "90.0%",
        "3,456",
    ]
    assert markdown(fields, body, body, ["a note"]).splitlines() == [
        "| layer | type | weights | non-zeros | sparsity | bytes |",
        "| :-- | :-- | --: | --: | --: | --: |",
        "| features.0 | Conv2d | 1,200 | 120 | 90.0% | 3,456 |",
        "| **features.0** | **Conv2d** | **1,200** | **120** | **90.0%** | **3,456** |",
        "",
        "a note",
    ]


def test_in_a_notebook_and_where_colours_are_forced_it_is_the_same_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fields = ["name", "weights"]
    shown = same_text_everywhere(
        lambda: text(fields, [cells(CONVOLUTION, fields)], [], []), monkeypatch
    )
    assert "features.0" in shown


def test_names_are_no_markup() -> None:
    row = Row("blocks[red].0", ":smile:", 1, 1, 1)
    fields = ["name", "kind"]
    assert "blocks[red].0" in (table := text(fields, [cells(row, fields)], [], []))
    assert ":smile:" in table
