"""The packages of the page, which `pip install lowbit` alone does not promise."""

from __future__ import annotations

import importlib.util

_PACKAGES = {"jinja2": "jinja2", "PIL": "pillow"}


def check_packages() -> None:
    """Raises ModuleNotFoundError, with the remedy, if a package of the page is missing."""
    missing = [
        name for module, name in _PACKAGES.items() if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise ModuleNotFoundError(
            f"an HTML page needs {', '.join(missing)}: pip install 'lowbit[report]'",
            name=missing[0],
        )
