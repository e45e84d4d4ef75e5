"""Types of the command line's arguments: each reads a text, or says what it should have been."""

from __future__ import annotations

import argparse
import math


def words(text: str) -> tuple[str, ...]:
    """Words, separated by commas."""
    found = tuple(word.strip() for word in text.split(",") if word.strip())
    if not found:
        raise argparse.ArgumentTypeError("an empty list")
    return found


def number(text: str) -> int:
    """A whole number of at least 1."""
    try:
        found = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if found < 1:
        raise argparse.ArgumentTypeError(f"{found} is not at least 1")
    return found


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers of at least 1, separated by commas."""
    return tuple(map(number, words(text)))


def seconds(text: str) -> float:
    """A time of more than 0."""
    try:
        found = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds") from None
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return found
