"""How errors of other people's code are told."""

from lowbit.errors import one_line


def test_one_line():
    assert one_line(ValueError("first\nsecond")) == "ValueError: first"
    assert one_line(ValueError()) == "ValueError"
    assert one_line(ValueError("x" * 500)) == "ValueError: " + "x" * 185 + "..."
