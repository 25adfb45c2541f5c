"""Packing: codes in as few bytes as they need."""
