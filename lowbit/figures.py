"""Where pictures get their figure from: matplotlib, an extra, asked for when it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure_class() -> type[Figure]:
    """matplotlib's `Figure`: one made of it needs no display and leaves pyplot's state alone.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModuleNotFoundError(
            "a plot needs matplotlib: pip install 'lowbit[plot]'", name="matplotlib"
        ) from error
    return Figure


def check_suffix(path: Path) -> None:
    """Whether a figure can be drawn into this file, asked before there is one.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: it knows no format of this suffix.
    """
    known = figure_class()().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"{path.name} has no suffix of a picture, such as .png, .svg or .pdf")
