"""The page on the command line: the option that asks for it, and writing it."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from lowbit.comparison import Comparison
from lowbit.report import size_text


def add_argument(parser: argparse.ArgumentParser, *flags: str, default: Path | None = None) -> None:
    """Adds the option for the page's file, `arguments.html`."""
    text = "write one HTML page" + ("" if default is None else " (default: %(default)s)")
    parser.add_argument(*flags, type=Path, metavar="FILE", dest="html", default=default, help=text)


def write(
    comparison: Comparison, arguments: argparse.Namespace, inputs: str
) -> tuple[str, dict[str, Any]]:
    """Writes the page if one is asked for. Returns what the command adds to its text and JSON.

    Args:
        comparison: with details.
        arguments: with `html`, and with the command line in `argv`.
        inputs: what the models ran on.
    """
    if arguments.html is None:
        return "", {}
    command = shlex.join(["lowbit", *arguments.argv])
    comparison.save_html(arguments.html, command=command, inputs=inputs)
    size = arguments.html.stat().st_size
    text = f"\n\nwrote {arguments.html} ({size_text(size)})"
    return text, {"html": str(arguments.html), "html_bytes": size}
