"""lowbit.figures: matplotlib where it is installed, and a word on how to install it."""

from pathlib import Path

import pytest

from lowbit.figures import check_suffix, figure_class


def test_the_class_of_matplotlib():
    assert figure_class() is pytest.importorskip("matplotlib.figure").Figure


def test_without_matplotlib_the_error_names_the_extra(no_matplotlib):
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lowbit\[plot\]'") as error:
        figure_class()
    assert error.value.name == "matplotlib"


def test_suffixes_are_checked_before_there_is_a_figure():
    pytest.importorskip("matplotlib.figure")
    for name in ("p.png", "p.svg", "p.PDF"):
        check_suffix(Path(name))
    for name in ("p", "p.xyz", "png"):
        with pytest.raises(ValueError, match=f"{name} has no suffix of a picture"):
            check_suffix(Path(name))
