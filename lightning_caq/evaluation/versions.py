"""Versions of everything that computed a result."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("lightning-caq", "torch", "lightning", "pytorch-lightning", "torchmetrics", "numpy", "scipy")


def versions() -> dict[str, str]:
    """Python and the packages that are installed.

    Example:
        >>> "python" in versions() and "torch" in versions()
        True
    """
    installed = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed
