"""One test, many values: a fact that holds for every value of a list is one test with a loop, not a test for each."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch


def every(names: str | tuple[str, ...], values: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run the test for all values, one after the other, as a single test.

    It is written as ``pytest.mark.parametrize`` is, and stacks as that does. Each value starts from the same random
    state, and a failure names the value. Fixtures are made once: a test that changes one is parametrized instead.
    """
    keys = (names,) if isinstance(names, str) else names
    rows = [(value,) if isinstance(names, str) else value for value in values]
    assert rows, f"no values of {names}: nothing would be tested"

    def looped(test: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(test)
        assert set(keys) <= set(signature.parameters)

        @functools.wraps(test)
        def run(**others: Any) -> None:
            __tracebackhide__ = True
            for row in rows:
                chosen = dict(zip(keys, row, strict=True))
                torch.manual_seed(0)
                try:
                    test(**chosen, **others)
                except (Exception, pytest.fail.Exception) as error:
                    raise AssertionError(", ".join(f"{key} = {value!r}" for key, value in chosen.items())) from error

        others = [x for name, x in signature.parameters.items() if name not in keys]
        run.__signature__ = signature.replace(parameters=others)  # what pytest takes for fixtures
        return run

    return looped
