"""Measures: curvature, Lipschitz constants and rounding errors of a trained network, one row a layer."""
