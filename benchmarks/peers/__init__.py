"""distgrad beside what a user would pick instead, and beside what the machine can do: ``python -m benchmarks.peers``."""
