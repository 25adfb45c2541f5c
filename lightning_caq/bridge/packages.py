"""Two packages, one Lightning: what differs between ``lightning.pytorch`` and ``pytorch_lightning`` is hidden here.

The two hold the same classes under different identities, and each one's command line rejects callbacks of the other.
A callback that derives from both bases is accepted by both.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

import lightning.pytorch

__all__ = ["Callback", "every"]


def _packages() -> tuple[ModuleType, ...]:
    try:
        return lightning.pytorch, importlib.import_module("pytorch_lightning")
    except ImportError:
        return (lightning.pytorch,)


PACKAGES = _packages()


def every(module: str, name: str) -> tuple[Any, ...]:
    """The class called ``name`` in each package that is installed, for ``isinstance``.

    Args:
        module: The module inside the package, such as ``"loggers"``.
        name: The class.

    Returns:
        One class a package; empty where the installed versions have no such class.

    Example:
        >>> {x.__name__ for x in every("loggers", "CSVLogger")}
        {'CSVLogger'}
        >>> every("callbacks", "NotWrittenYet")
        ()
    """
    modules = [importlib.import_module(f"{package.__name__}.{module}") for package in PACKAGES]
    return tuple(getattr(m, name) for m in modules if hasattr(m, name))


if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    Callback = type("Callback", every("callbacks", "Callback"), {"__doc__": "A callback of every installed package."})
