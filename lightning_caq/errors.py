"""The errors this package raises, each also an instance of the built-in a caller would expect."""


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
