"""Functions that take the fields of a dataclass: what Python itself, and a parser, then know of them."""

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from jsonargparse import ArgumentParser

from lightning_caq.errors import OptionError
from lightning_caq.utilities.keywords import attribute_texts, known_keywords, takes_fields_of


@dataclass(frozen=True)
class Record:
    """What there is.

    Attributes:
        kind: One of two,
            on two lines.
        count: How many: none by default.
    """

    kind: Literal["a", "b"] = "a"
    count: int | None = None


@takes_fields_of(Record)
class Taker:
    """Takes.

    Args:
        record: Every field of Record.
        own: Its own.
    """

    def __init__(self, *, own: float = 0.5, **record: Any) -> None:
        self.own, self.record = own, Record(**known_keywords(Taker, record))


class Child(Taker):
    """Takes one thing more."""

    def __init__(self, more: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)


def test_texts_are_those_of_the_section_each_on_one_line():
    assert attribute_texts(Record) == {"kind": "One of two, on two lines.", "count": "How many: none by default."}
    assert attribute_texts(Taker, "Args") == {**attribute_texts(Record), "own": "Its own."}
    assert attribute_texts(Child, "Args") == {}


def test_the_signature_names_the_fields_before_the_takers_own_keywords():
    assert str(inspect.signature(Taker)) == (
        "(*, kind: Literal['a', 'b'] = 'a', count: int | None = None, own: float = 0.5) -> None"
    )
    assert list(inspect.signature(Child).parameters) == ["more", "kwargs"]  # a subclass has its own signature


def test_a_field_that_is_a_parameter_keeps_its_place():
    @takes_fields_of(Record)
    def take(count: int | None = None, **record: Any) -> None: ...

    assert list(inspect.signature(take).parameters) == ["count", "kind"]


def test_the_call_goes_through_as_it_is():
    taker = Taker(own=1.0, kind="b")
    assert (taker.own, taker.record) == (1.0, Record(kind="b"))


@pytest.mark.parametrize("kind", [Taker, Child])
def test_a_parser_knows_type_default_and_text(kind):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "x")
    given = parser.parse_args(["--x.kind=b", "--x.count=3"]).x
    assert (given.kind, given.count, given.own) == ("b", 3, 0.5)
    assert "One of two, on two lines." in " ".join(parser.format_help().split())
    with pytest.raises(Exception, match="kind"):
        parser.parse_args(["--x.kind=c"])


def test_a_name_like_none_is_answered_with_all_that_there_are():
    with pytest.raises(OptionError, match="no option 'zzz'; choose from kind, count, own"):
        Taker(zzz=1)
    with pytest.raises(OptionError, match="Taker has no option 'cuont'; did you mean 'count'"):
        Taker(cuont=1)
