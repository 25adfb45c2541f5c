"""What the registry lets in, what the page says, and where the tables agree."""

import doctest
from pathlib import Path

import numpy as np
import pytest
from every import every
from method_rows import BITS, by_bits, costs_of, row

from lightning_caq.allocation.methods import available_methods, get_method, is_search, register_method
from lightning_caq.errors import OptionError
from lightning_caq.measures.registry import available_measures

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


SEARCHES = {"random_search", "evolution", "cet_subspace"}


@pytest.fixture
def _own_registry(monkeypatch):
    monkeypatch.setattr("lightning_caq.allocation.methods._registered", {})


def test_methods_that_were_promised_are_there():
    tables = {
        "uniform", "gradient_norm", "hessian_diagonal", "hawq", "hawq_v2", "hawq_v3", "mckp", "zeroq", "limpq", "dmbq",
        "caq", "caq_bound", "cet", "cet_expected",
    }  # fmt: skip
    assert tables | SEARCHES <= set(available_methods())


@every("name", available_methods())
def test_methods_say_what_they_need_and_what_they_are(name):
    method = get_method(name)
    assert method.needs <= available_measures()
    assert is_search(method) == (name in SEARCHES)
    assert hasattr(method, "costs") != is_search(method)


@every("name", sorted(set(available_methods()) - {"weight_mse"}))
def test_the_page_on_methods_has_each(name):
    assert f"(`{name}`)" in PAGE.read_text(encoding="utf-8")


def test_an_unknown_method():
    with pytest.raises(OptionError, match=r"method='magic' is not known; choose from 'caq'"):
        get_method("magic")


class _Mine:
    needs = frozenset({"rounding_error"})

    def costs(self, profile, bits):
        return np.zeros((len(profile.layers), len(bits)))


@pytest.mark.usefixtures("_own_registry")
def test_a_method_of_ones_own():
    first, second = _Mine(), _Mine()
    register_method("mine", first)
    assert "mine" in available_methods()
    assert get_method("mine") is first
    register_method("mine", second)  # as when a notebook's cell is run again
    assert get_method("mine") is second
    assert "mine" not in {path.stem for path in Path(PAGE.parents[1], "lightning_caq/allocation/methods").iterdir()}


class _Both(_Mine):
    search = _Mine.costs


class _WithoutNeeds:
    costs = _Mine.costs


@pytest.mark.usefixtures("_own_registry")
@every(
    ("name", "method", "words"),
    [
        ("Mine", _Mine(), "name='Mine' is not allowed"),
        ("my method", _Mine(), "lower-case letters"),
        ("", _Mine(), "name='' is not allowed"),
        (3, _Mine(), "name=3 is not allowed"),
        ("cet", _Mine(), "belongs to a built-in method"),
        ("mine", _Mine, "not a class"),
        ("mine", _Both(), "one of 'costs"),
        ("mine", _WithoutNeeds(), "frozenset 'needs'"),
        ("mine", None, "method=None is no method"),
    ],
)
def test_what_is_not_registered(name, method, words):
    with pytest.raises(OptionError, match=words):
        register_method(name, method)
    assert "mine" not in available_methods()


@pytest.mark.usefixtures("_own_registry")
def test_examples_of_the_page():
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    results = doctest.testfile(str(PAGE), module_relative=False, optionflags=options, encoding="utf-8")
    assert results.attempted > 5
    assert results.failed == 0


def test_the_quadratic_methods_agree_on_a_sphere():
    """Where H is c times the identity all of them are ½ c ‖Δ‖², or twice that."""
    c, n, errors = 3.0, 100, by_bits(4.0, 1.0, 0.1)
    energy = {b: c * e for b, e in errors.items()}
    layer = row(
        "a", n, top_eigenvalue=c, trace=c * n, rounding_error=errors, diagonal_energy=energy, second_order=energy,
        subspace_curvature=0.0, subspace_energy=dict.fromkeys(BITS, 0.0),
    )  # fmt: skip
    expected = np.array([[0.5 * energy[b] for b in BITS]])
    for method in ("mckp", "hessian_diagonal", "cet", "cet_expected"):
        np.testing.assert_allclose(costs_of(method, layer, residual_curvature=c), expected)
    for method in ("hawq", "hawq_v2"):
        np.testing.assert_allclose(costs_of(method, layer, residual_curvature=c), 2 * expected)
