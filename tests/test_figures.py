"""lowbit.figures: matplotlib where it is installed, and a word on how to install it."""

import pytest

from lowbit.figures import figure_class


def test_the_class_of_matplotlib():
    assert figure_class() is pytest.importorskip("matplotlib.figure").Figure


def test_without_matplotlib_the_error_names_the_extra(no_matplotlib):
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lowbit\[plot\]'") as error:
        figure_class()
    assert error.value.name == "matplotlib"
