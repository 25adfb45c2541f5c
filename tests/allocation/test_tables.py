import numpy as np
import pytest
from every import every

from lightning_caq.allocation.methods import available_methods, get_method, is_search
from lightning_caq.allocation.tables import layer_column, layer_table
from lightning_caq.errors import OptionError
from lightning_caq.profile import CurvatureProfile, LayerCurvature


def _profile(*rows):
    return CurvatureProfile(tuple(LayerCurvature(name, 10, 1, 10, **values) for name, values in rows))


def test_figures_come_in_the_order_of_layers_and_bits():
    profile = _profile(("a", {"trace": 1.0, "kl": {4: 0.1, 2: 0.5}}), ("b", {"trace": 2.0, "kl": {2: 3.0, 4: 4.0}}))
    np.testing.assert_array_equal(layer_column(profile, "trace"), [1, 2])
    np.testing.assert_array_equal(layer_table(profile, "kl", (4, 2)), [[0.1, 0.5], [4.0, 3.0]])


def test_what_was_not_measured_is_named():
    profile = _profile(("a", {"trace": 1.0, "kl": {2: 0.5, 4: 0.1}}), ("b", {"kl": {2: 0.5}}))
    with pytest.raises(OptionError, match="'trace' of layer 'b' was not measured; measure"):
        layer_column(profile, "trace")
    with pytest.raises(OptionError, match="'kl' of layer 'b' was not measured at 4 bits"):
        layer_table(profile, "kl", (2, 4))


@every("name", sorted(set(available_methods()) - {"uniform", "cet"}))
def test_no_table_is_made_of_what_was_not_measured(name):
    method = get_method(name)
    if not is_search(method):
        with pytest.raises(OptionError, match="was not measured"):
            method.costs(_profile(("a", {})), (2, 4))
