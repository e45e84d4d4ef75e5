"""Arguments of the command line: what is read, and what is said of the rest."""

import argparse

import pytest

from lowbit import argument_types


def test_what_is_read():
    assert argument_types.words("a, b,,c ") == ("a", "b", "c")
    assert argument_types.number("12") == 12
    assert argument_types.numbers("1,3,224, 224") == (1, 3, 224, 224)
    assert argument_types.seconds("0.5") == 0.5


@pytest.mark.parametrize(
    ("read", "text", "said"),
    [
        ("words", ", ", "an empty list"),
        ("number", "0", "0 is not at least 1"),
        ("number", "1.5", "'1.5' is no whole number"),
        ("numbers", "1x256", "'1x256' is no whole number"),
        ("numbers", "1,-2", "-2 is not at least 1"),
        ("seconds", "soon", "'soon' is no number of seconds"),
        ("seconds", "0", "0 is not more than 0"),
        ("seconds", "nan", "nan is not more than 0"),
        ("seconds", "inf", "inf is not more than 0"),
    ],
)
def test_what_is_refused(read, text, said):
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--option", type=getattr(argument_types, read))
    with pytest.raises(argparse.ArgumentError, match=f"^argument --option: {said}$"):
        parser.parse_args([f"--option={text}"])
