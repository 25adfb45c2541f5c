"""The bridge to Lightning: the only place that knows it."""
