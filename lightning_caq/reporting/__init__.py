"""Reporting: figures, TensorBoard and files, all from the plain objects of the road."""
