"""Consistency policies: when a gradient counts, and when a worker may have the parameters."""
