"""HAWQ-v3: the costs of HAWQ-v2 under an integer linear program (Yao et al. 2021, "Dyadic NN Quantization")."""

from __future__ import annotations

from lightning_caq.allocation.methods import hawq_v2


class Method(hawq_v2.Method):
    """Cost tr(H_ii) / n_i · ‖Δ_i(b)‖², as in HAWQ-v2.

    What HAWQ-v3 adds lies outside the table: an integer linear program in place of a Pareto front, which the solver is
    for every method here, and limits on bit operations or latency beside the size. So at a budget of size it gives the
    bits of ``hawq_v2``; under a budget of BOPs it is HAWQ-v3.

    Example:
        >>> Method().costs is not None and issubclass(Method, hawq_v2.Method)
        True
    """
