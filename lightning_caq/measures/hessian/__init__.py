"""Second derivatives of the loss over the weights: operators, and what their products tell of the spectrum."""

from lightning_caq.measures.hessian.gauss_newton import GaussNewton
from lightning_caq.measures.hessian.hessian import Hessian

__all__ = ["GaussNewton", "Hessian"]
