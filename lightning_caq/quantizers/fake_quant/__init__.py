"""Fake-quant modules: the network's own modules, snapped to a grid."""
