"""Measures of single layers: κ, L and magnitudes."""
