"""Tables as text, wherever they are made."""

from io import StringIO
from typing import Any

from rich.console import Console


def as_text(table: Any, width: int) -> str:
    """``table``, which rich can print, as lines of up to ``width`` characters, without colours."""
    out = StringIO()
    # a notebook's console would show the table and write nothing; names in brackets are no markup
    Console(
        file=out, width=width, force_terminal=False, force_jupyter=False, markup=False, emoji=False
    ).print(table)
    return out.getvalue()
