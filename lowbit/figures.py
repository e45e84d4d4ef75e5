"""Where pictures get their figure from: matplotlib, an extra, asked for when it is needed."""

from __future__ import annotations

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
