"""Failures: what is said when quantization fails, and whether training goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn


@contextmanager
def failures_reported(on_error: str) -> Iterator[None]:
    """Say that nothing is lost when something fails.

    Args:
        on_error: ``"raise"`` the error then, or ``"warn"`` and go on; what is no ``Exception``, such as Ctrl-C, is
            raised in any case.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     with failures_reported("warn"):
        ...         1 / 0
        >>> "training goes on" in str(caught[0].message)
        True
    """
    try:
        yield
    except BaseException as error:
        if on_error == "warn" and isinstance(error, Exception):
            rank_zero_warn(
                f"caq: quantization failed ({type(error).__name__}: {error}); training goes on with the network as "
                "it was, and its checkpoints are untouched."
            )
            return
        rank_zero_info("caq: quantization failed; the network and its checkpoints are as training left them.")
        raise
