"""Errors of other people's code, as a note or a message tells them."""

from __future__ import annotations


def one_line(error: Exception) -> str:
    """An error as its type and the first line of its text, at most 200 characters."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
