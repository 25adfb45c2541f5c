"""Evaluation: float against quantized, predicted against observed."""
