"""Allocation: numbers in, bits out."""
