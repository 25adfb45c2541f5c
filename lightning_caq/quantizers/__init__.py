"""Quantizers: grids, rounding, fake-quant modules and the repair of batch-norm statistics."""
