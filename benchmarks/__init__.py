"""Benchmarks: one module per question, each beside a floor that is measured in the same run."""
