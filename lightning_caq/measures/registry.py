"""Registry: measures, one file each, found by their names.

To add one, put a file with a ``Measure`` called ``MEASURE`` into one of the rooms beside this file, or register your
own with ``register_measure``. Figures that a row has no field for go to its ``extra``.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import lightning_caq.measures
from lightning_caq.errors import OptionError
from lightning_caq.measures.cost import Cost, Extent
from lightning_caq.measures.measurement import Measurement
from lightning_caq.profile import CurvatureProfile

_registered: dict[str, Measure] = {}


def costs_nothing(extent: Extent) -> Cost:
    """The cost of what takes no gradients worth counting."""
    return Cost()


@dataclass(frozen=True)
class Measure:
    """One measure: what it is called, what it takes, and how it is taken.

    Attributes:
        name: What it is asked for by.
        step: The step of the work that it is part of, as progress announces it.
        take: Fills its figures into a profile that holds this process's rows, and what was measured so far.
        cost: About what it costs, without the measures that it needs.
        needs: Names of measures that are taken before it, asked for or not.
        after: Names of measures that are taken before it if they are asked for.
        aliases: Other names that it is asked for by.
        collective: Whether every process takes part, even one without layers of its own.
    """

    name: str
    step: str
    take: Callable[[Measurement, CurvatureProfile], CurvatureProfile]
    cost: Callable[[Extent], Cost] = costs_nothing
    needs: frozenset[str] = frozenset()
    after: frozenset[str] = frozenset()
    aliases: tuple[str, ...] = ()
    collective: bool = False

    @property
    def names(self) -> frozenset[str]:
        """Every name that it is asked for by."""
        return frozenset({self.name, *self.aliases})


def available_measures() -> frozenset[str]:
    """Names of all measures, registered ones among them.

    Example:
        >>> {"kappa", "subspace", "trace"} <= available_measures()
        True
    """
    return frozenset({*_built_in(), *_registered})


def get_measure(name: str) -> Measure:
    """The measure that is asked for by ``name``.

    Raises:
        OptionError: If there is none.

    Example:
        >>> get_measure("trace").name
        'subspace'
    """
    measure = _registered.get(name) or _built_in().get(name)
    if measure is None:
        raise OptionError(f"{name!r} is not a known measure; choose needs from {sorted(available_measures())}.")
    return measure


def required_measures(needs: Iterable[str]) -> tuple[Measure, ...]:
    """The measures that are asked for and those that they need, in the order in which they are taken.

    Each comes behind what it needs; those of one step follow each other as far as that allows.

    Raises:
        OptionError: If a name is not known, or measures need each other.

    Example:
        >>> [measure.name for measure in required_measures({"loss_change"})]
        ['rounding_error', 'subspace', 'loss_change']
    """
    pending: dict[str, Measure] = {}
    names = list(needs)
    while names:
        measure = get_measure(names.pop())
        if measure.name not in pending:
            pending[measure.name] = measure
            names.extend(measure.needs)
    ordered: list[Measure] = []
    while pending:
        waiting = frozenset().union(*(measure.names for measure in pending.values()))
        ready = [pending[name] for name in sorted(pending) if not waiting & (pending[name].needs | pending[name].after)]
        if not ready:
            raise OptionError(f"The measures {sorted(pending)} need each other, so none can be taken first.")
        measure = next((x for x in ready if ordered and x.step == ordered[-1].step), ready[0])
        ordered.append(pending.pop(measure.name))
    return tuple(ordered)


def total_cost(measures: Iterable[Measure], extent: Extent) -> Cost:
    """What measures cost together.

    Example:
        >>> extent = Extent("task", layers=20, bits=6, eigenpairs=10, samples=256, first=128)
        >>> total_cost(required_measures({"loss_change", "gradient_norm"}), extent).gradients
        293.99...
    """
    return sum((measure.cost(extent) for measure in measures), Cost())


def register_measure(measure: Measure) -> None:
    """Make a measure of your own available by its name, wherever measures are asked for.

    Args:
        measure: The measure; its names are lower-case letters, digits and underscores, and not those of a built-in
            one. A name that was registered before gets the new measure.

    Raises:
        OptionError: If a name is not allowed.

    Example:
        >>> from dataclasses import replace
        >>> def take(measurement, profile):
        ...     return profile.with_rows(lambda row: replace(row, extra={**row.extra, "fan_out": float(row.channels)}))
        >>> register_measure(Measure("fan_out", step="shapes", take=take))
        >>> "fan_out" in available_measures()
        True
    """
    for name in measure.names:
        if not re.fullmatch("[a-z][a-z0-9_]*", name):
            raise OptionError(f"name={name!r} is not allowed; use lower-case letters, digits and _.")
        if name in _built_in():
            raise OptionError(f"name={name!r} belongs to a built-in measure; choose another.")
    _registered.update(dict.fromkeys(measure.names, measure))


@cache
def _built_in() -> dict[str, Measure]:
    """Every measure of the rooms beside this file, by each of its names."""
    measures: dict[str, Measure] = {}
    for module in pkgutil.walk_packages(lightning_caq.measures.__path__, f"{lightning_caq.measures.__name__}."):
        measure = getattr(importlib.import_module(module.name), "MEASURE", None)
        if isinstance(measure, Measure):
            measures |= dict.fromkeys(measure.names, measure)
    return measures
