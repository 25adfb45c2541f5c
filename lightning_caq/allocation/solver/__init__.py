"""The solver: the cheapest choice of bits within limits."""
