"""A deterministic simulation of brokers, workers, network, disk and clocks, that dies in every way that it can."""
