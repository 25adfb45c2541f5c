import dataclasses
import inspect

import pytest
from every import every

from lightning_caq import CurvatureQuantizationCallback, quantize
from lightning_caq.allocation.budget import AvgBits, Ratio
from lightning_caq.allocation.choose import GRANULARITIES
from lightning_caq.errors import BudgetError, OptionError
from lightning_caq.options import CHOICES, QuantizationOptions
from lightning_caq.quantizers.grids.ranges import RANGES, SYMMETRIES
from lightning_caq.quantizers.grids.values import QUANTIZERS
from lightning_caq.utilities.keywords import attribute_texts


def test_defaults_are_those_that_were_promised():
    options = QuantizationOptions(avg_bits=3)
    assert (options.method, options.rounding, options.batchnorm) == ("cet", "error_feedback", "recentre")
    assert (options.objective, options.bits, options.compare) == ("distill", (2, 3, 4, 5, 6, 8), ("uniform",))
    assert (options.calibration_samples, options.seed) == (512, 0)
    assert options.budget == AvgBits(3)
    assert QuantizationOptions(ratio=10).budget == Ratio(10)


def test_bits_are_sorted_and_each_once():
    assert QuantizationOptions(avg_bits=3, bits=[8, 2, 4, 2]).bits == (2, 4, 8)


def test_methods_are_the_chosen_one_and_then_the_others_once():
    assert QuantizationOptions(method="caq", avg_bits=3, compare=["uniform", "caq", "cet"]).methods == (
        "caq",
        "uniform",
        "cet",
    )
    assert QuantizationOptions(avg_bits=3, compare=()).methods == ("cet", "uniform")  # uniform bits are the guard
    assert QuantizationOptions(avg_bits=3, compare=(), guard=False).methods == ("cet",)


@every(
    ("name", "value", "message"),
    [
        ("method", "magic", "method='magic' is not known; choose from .*'cet'"),
        ("compare", ["magic"], "compare='magic' is not known; choose from"),
        ("compare", "uniform", r"compare='uniform' must be a list of strings, such as \['uniform'\]"),
        ("rounding", "stochastic", "rounding='stochastic' is not known; choose from 'nearest', .*'long_axis'"),
        ("batchnorm", True, "batchnorm=True is not known; choose from 'recentre', 'keep'"),
        ("objective", "loss", "objective='loss' is not known; choose from 'distill', 'task'"),
        ("bits", (), r"bits=\(\) is not allowed; give whole numbers from 1 to 8"),
        ("bits", (0, 2), r"bits=\(0, 2\) is not allowed"),
        ("bits", (2, 9), r"bits=\(2, 9\) is not allowed"),
        ("bits", (2, 2.5), "is not allowed"),
        ("bits", (True, 2), "is not allowed"),
        ("bits", 4, "bits=4 is not allowed"),
        ("bits", "248", "bits='248' is not allowed"),
        ("calibration_samples", 0, "calibration_samples=0 is not allowed; give a whole number from 1 up"),
        ("calibration_samples", 2.5, "calibration_samples=2.5 is not allowed"),
        ("curvature_samples", -1, "curvature_samples=-1 is not allowed"),
        ("eigenpairs", True, "eigenpairs=True is not allowed"),
        ("include", "conv*", r"include='conv\*' must be a list of strings"),
        ("exclude", [1], r"exclude=\[1\] must be a list of strings"),
        ("exclude", 1, "exclude=1 must be a list of strings"),
        ("compare", None, "compare=None must be a list of strings"),
        ("method", ["cet"], "method=.* is not known"),
    ],
)
def test_bad_options(name, value, message):
    with pytest.raises(OptionError, match=message):
        QuantizationOptions(**{"avg_bits": 3, name: value})


def test_long_axis_rounding_is_for_evenly_spaced_values():
    with pytest.raises(OptionError, match="'long_axis' is for quantizer='affine'; with 'codebook' give 'nearest'"):
        QuantizationOptions(avg_bits=3, quantizer="codebook", rounding="long_axis")


def test_a_runtime_chooses_the_grids():
    assert QuantizationOptions(avg_bits=3).values.symmetry == "asymmetric"
    assert QuantizationOptions(avg_bits=3, runtime="onnxruntime").values.symmetry == "signed_byte"
    for name, value in (("quantizer", "codebook"), ("symmetry", "mid_rise"), ("coding", "entropy")):
        with pytest.raises(OptionError, match=f"{name}='{value}' does not go with runtime='onnxruntime'"):
            QuantizationOptions(avg_bits=3, runtime="onnxruntime", **{name: value})


def test_the_budget_is_checked_with_the_rest():
    with pytest.raises(BudgetError, match="no budget"):
        QuantizationOptions()
    with pytest.raises(BudgetError, match="two budgets"):
        QuantizationOptions(avg_bits=3, ratio=3)
    with pytest.raises(BudgetError, match="avg_bits=2 cannot be met"):
        QuantizationOptions(avg_bits=2, bits=(3, 4))


def test_options_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantizationOptions(avg_bits=3).seed = 1


def test_every_option_has_a_default_and_a_text():
    texts = attribute_texts(QuantizationOptions)
    for field in dataclasses.fields(QuantizationOptions):
        assert field.default is not dataclasses.MISSING, field.name
        assert texts[field.name].endswith("."), field.name


def test_quantize_and_the_callback_take_every_option_with_its_type_default_and_text():
    options = inspect.signature(QuantizationOptions, eval_str=True).parameters
    for taker in (quantize, CurvatureQuantizationCallback):
        taken = inspect.signature(taker).parameters
        for name, parameter in options.items():
            assert (taken[name].default, taken[name].annotation) == (parameter.default, parameter.annotation), name
        assert attribute_texts(taker, "Args").keys() == taken.keys()
        assert attribute_texts(taker, "Args").items() >= attribute_texts(QuantizationOptions).items()


def test_the_names_of_an_option_are_those_that_its_room_knows():
    known = {"granularity": GRANULARITIES, "quantizer": QUANTIZERS, "range": RANGES, "symmetry": SYMMETRIES}
    assert {name: sorted(CHOICES[name]) for name in known} == {name: sorted(names) for name, names in known.items()}


@pytest.mark.parametrize("taker", [lambda **options: quantize(None, None, **options), CurvatureQuantizationCallback])
def test_a_mistyped_option_is_answered_with_the_one_that_was_meant(taker):
    with pytest.raises(OptionError, match="no option 'avgbits'; did you mean 'avg_bits'"):
        taker(avgbits=3)


def test_every_option_is_among_the_plain_values_for_loggers_and_reports():
    names = [field.name for field in dataclasses.fields(QuantizationOptions)]
    assert list(QuantizationOptions(avg_bits=3).to_dict()) == names
