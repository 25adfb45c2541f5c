"""The network: what can be compressed, how it is run, and what its outputs mean."""
