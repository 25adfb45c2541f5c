"""Utilities: numbers, seeds, memory and progress, nothing of quantization."""
