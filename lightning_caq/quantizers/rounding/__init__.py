"""Rounding: which value of its grid each weight takes."""
