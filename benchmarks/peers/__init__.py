"""Compare distgrad with what one would pick instead, and with the machine: ``python -m benchmarks.peers``."""
