"""Grids: the values that weights and inputs may take."""
