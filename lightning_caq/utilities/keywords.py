"""Keywords: the fields of a dataclass as keyword arguments of a function, written down in the dataclass alone.

A function with ``**options`` that it hands to the dataclass gets a signature and a docstring that name every field.
``help()``, documentation tools and jsonargparse (LightningCLI) read these two.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from inspect import Parameter
from textwrap import fill
from typing import Any, TypeVar, get_type_hints

from lightning_caq.errors import OptionError

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = re.compile(r"^(?P<indent> +)\w+: Every field of (?P<name>\w+)\.$", re.MULTILINE)
_ENTRY = re.compile(r"^ {4}(?P<name>\w+): (?P<text>.+(?:\n {5,}.+)*)", re.MULTILINE)


def attribute_texts(kind: type, section: str = "Attributes") -> dict[str, str]:
    """What the docstring of a class or function says of each entry of a section; lines are joined.

    Args:
        kind: The class or function.
        section: ``"Attributes"`` or ``"Args"``.

    Returns:
        Name to text; empty where docstrings are stripped (``python -OO``).

    Example:
        >>> attribute_texts(OptionError), list(attribute_texts(attribute_texts, "Args"))
        ({}, ['kind', 'section'])
    """
    body = re.search(rf"^{section}:\n((?: +.*\n?|\n)+)", inspect.getdoc(kind) or "", re.MULTILINE)
    entries = _ENTRY.finditer(body.group(1)) if body else ()
    return {entry["name"]: " ".join(entry["text"].split()) for entry in entries}


def takes_fields_of(record: type) -> Callable[[F], F]:
    """Let the signature and docstring of a function, or of a class, name the fields of a dataclass.

    The function has ``**keywords`` for them, and in its docstring a line ``keywords: Every field of <record>.`` that
    the texts of the fields take the place of. A field that is to be given by position too has to be a parameter.

    Args:
        record: The dataclass; its docstring has a section ``Attributes``.

    Returns:
        A decorator that changes the two and returns the very function.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Dough:
        ...     \"\"\"What to knead.
        ...
        ...     Attributes:
        ...         flour: Grams of flour.
        ...     \"\"\"
        ...     flour: int = 500
        >>> @takes_fields_of(Dough)
        ... def bake(minutes: int, **dough: Any) -> None:
        ...     \"\"\"Bake.
        ...
        ...     Args:
        ...         minutes: How long.
        ...         dough: Every field of Dough.
        ...     \"\"\"
        >>> inspect.signature(bake)
        <Signature (minutes: int, *, flour: int = 500) -> None>
        >>> print(inspect.getdoc(bake))
        Bake.
        <BLANKLINE>
        Args:
            minutes: How long.
            flour: Grams of flour.
    """
    hints, texts = get_type_hints(record), attribute_texts(record)
    given = [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
        for field in fields(record)
    ]

    def decorate(taker: F) -> F:
        function: Any = taker.__init__ if isinstance(taker, type) else taker  # type: ignore[misc]
        signature = inspect.signature(function, eval_str=True)
        first = [p for p in signature.parameters.values() if p.kind < Parameter.KEYWORD_ONLY]
        others = [p for p in signature.parameters.values() if p.kind is Parameter.KEYWORD_ONLY]
        further = [p for p in given if p.name not in signature.parameters]
        function.__signature__ = signature.replace(parameters=[*first, *further, *others])
        if taker.__doc__ is not None:
            taker.__doc__ = _OPTIONS.sub(lambda line: _entries(texts, line["indent"]), taker.__doc__)
        return taker

    return decorate


def _entries(texts: Mapping[str, str], indent: str) -> str:
    lines = (f"{name}: {text}" for name, text in texts.items())
    return "\n".join(fill(x, 120, initial_indent=indent, subsequent_indent=f"{indent}    ") for x in lines)


def known_keywords(taker: Callable[..., Any], given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keywords that were given, if a function takes all of them.

    Args:
        taker: The function or class.
        given: Keyword to value.

    Raises:
        OptionError: If it has no argument of some name; the message says which one may be meant.

    Example:
        >>> known_keywords(attribute_texts, {"section": "Args"})
        {'section': 'Args'}
        >>> known_keywords(attribute_texts, {"sektion": "Args"})
        Traceback (most recent call last):
        lightning_caq.errors.OptionError: attribute_texts has no option 'sektion'; did you mean 'section'?
    """
    names = list(inspect.signature(taker).parameters)
    for name in given:
        if name not in names:
            close = get_close_matches(name, names, n=1)
            advice = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(names)}."
            raise OptionError(f"{taker.__name__} has no option {name!r}; {advice}")
    return given
