"""What a training program imports to work for a broker: `Worker`, and the `Snapshot` that a pull brings."""

from distgrad.snapshot import Snapshot
from distgrad_worker.worker import Worker

__all__ = ["Snapshot", "Worker"]
