"""What the tests share: leak checks, processes, ports, keys, and doubles that speak the real bytes."""
