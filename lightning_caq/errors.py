"""The errors this package raises, each also an instance of the built-in a caller would expect."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import takewhile

_NAME = "CurvatureQuantizationCallback"


class CAQError(Exception):
    """Base of every error raised by this package."""


class OptionError(CAQError, ValueError):
    """An argument has a value that is not allowed; raised before any work starts."""


class BudgetError(OptionError):
    """No budget, two budgets, or one that no choice of bits can meet."""


class CalibrationError(CAQError, ValueError):
    """The calibration batches cannot be used: empty, one-shot, not what the model takes, or not finite."""


class LayerError(CAQError, ValueError):
    """The network has nothing to quantize, or a layer holds weights that cannot be quantized."""


class PlanError(CAQError, ValueError):
    """A plan does not belong to this network or to these weights, or its file is damaged."""


class ExportError(CAQError, RuntimeError):
    """A network cannot be exported: a package is missing, an operator has no counterpart, or the outputs differ."""


@contextmanager
def short_errors() -> Iterator[None]:
    """End a program with one sentence where an option is not allowed, for programs with a ``LightningCLI``.

    The parser of such programs (jsonargparse) wraps the sentence into a list of all that the callbacks could have been,
    and that into a traceback, or ends the program with it after a page of usage. Other errors go on as they are.

    With ``LightningCLI(..., parser_kwargs={"exit_on_error": False})`` the parser raises what it has to say of a
    wrong type or name, so that it can be shortened too.

    Raises:
        SystemExit: With the sentence, in place of an error that is or comes from an ``OptionError``, or that the parser
            raised.

    Example:
        >>> with short_errors():
        ...     raise OptionError("bits=0 is not allowed; give a whole number from 1 to 8.")
        Traceback (most recent call last):
        SystemExit: bits=0 is not allowed; give a whole number from 1 to 8.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OptionError):
            cause = cause.__cause__
        if cause is None and isinstance(error, ArgumentError):
            sys.exit(_of_callback(str(error)))
        if cause is None:
            raise
        sys.exit(str(cause))


@contextmanager
def exiting_with_parser() -> Iterator[None]:
    """End the program with one sentence where a parser makes an object and an option of it is not allowed.

    A command line's parser (jsonargparse) wraps what goes wrong while it makes objects into a list of all that they
    could have been, and that into a traceback. If it is one that ends the program for its own errors, ours do as well.

    Raises:
        SystemExit: With the sentence of an ``OptionError``, under such a parser.

    Example:
        >>> with exiting_with_parser():  # no parser: errors go on as they are
        ...     raise OptionError("bits=0 is not allowed.")
        Traceback (most recent call last):
        lightning_caq.errors.OptionError: bits=0 is not allowed.
    """
    try:
        yield
    except OptionError as error:
        if _under_exiting_parser():
            raise SystemExit(str(error)) from error
        raise


def _under_exiting_parser() -> bool:
    """Whether a parser that ends the program for its own errors is among the callers."""
    frame = sys._getframe().f_back
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("jsonargparse."):
            exits = getattr(frame.f_locals.get("self"), "exit_on_error", None)
            if exits is not None:
                return bool(exits)
        frame = frame.f_back
    return False


def _of_callback(message: str) -> str:
    """What a parser says of our callback in a list of all that it could have been, in one line; or all of it."""
    path = re.search(rf"'([\w.]+\.{_NAME})'", message)
    if path is None:
        return message
    lines = message[path.end() :].splitlines()[1:]
    said = " ".join(line.strip() for line in takewhile(lambda line: not line.lstrip().startswith("- Problem"), lines))
    unknown = re.search(r"Option '(\w+)' is not accepted", said)
    return f"{_NAME} has no option '{unknown[1]}'; {_meant(unknown[1], path[1])}" if unknown else f"{_NAME}: {said}"


def _meant(option: str, path: str) -> str:
    """The option of a class that may be meant by one that it does not have."""
    module, _, name = path.rpartition(".")
    names = list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    close = get_close_matches(option, names, n=1)
    return f"did you mean '{close[0]}'?" if close else f"choose from {', '.join(names)}."
