"""Figures: plain data in, a matplotlib ``Figure`` out, drawn without pyplot's global state; one file a figure."""
