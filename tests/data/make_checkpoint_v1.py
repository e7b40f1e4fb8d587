"""Make ``checkpoint_v1.safetensors``: a checkpoint of format 1, which every later distgrad has to read.

It was made once, by the first distgrad that wrote checkpoints. A later one may write other bytes, and then the file
stays as it is::

    python tests/data/make_checkpoint_v1.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distgrad.durable.checkpoint_file import CheckpointWriter
from distgrad.durable.checkpoint_header import Checkpoint
from distgrad.durable.disk import OsDisk
from distgrad.layout import Layout

PATH = Path(__file__).with_name("checkpoint_v1.safetensors")


def checkpoint() -> Checkpoint:
    """Give what the file holds: every kind of leaf and name, and numbers that no rounding leaves alone."""
    nest = {
        "half": np.array([1.5, -0.0, np.inf], np.float16),
        "layer": [(np.arange(6, dtype=np.float32) / 5).reshape(2, 3), {"bias": np.zeros(0, np.float32)}],
        "double": np.array(np.pi),
        "mask": np.array([True, False, True]),
        "count": np.array([-(2**63), 2**63 - 1]),
        "optimizer:exp_avg:half": np.arange(4, dtype=np.uint8),
        "__metadata__": np.array([7], np.int16),
        'naïve\n"name"': np.array([8], np.uint32),
    }
    layout = Layout.of(nest)
    slots = {
        "exp_avg": [np.arange(3, dtype=np.float32) / 3, np.arange(6, dtype=np.float32) / 7, np.array([1 / 11])],
        "exp_avg_sq": [-np.arange(3, dtype=np.float32) / 3, -np.arange(6, dtype=np.float32) / 7, np.array([-1 / 11])],
    }
    slots["exp_avg"][1].view(np.uint32)[5] = 0x7FC0_1234  # not a number, with a message
    return Checkpoint(123_456, 98_765, bytes(range(256)), layout, layout.pack(nest), slots)


def main() -> None:
    """Write the file beside this script."""
    writer = CheckpointWriter(OsDisk(), str(PATH), checkpoint())
    while not writer.step():
        pass


if __name__ == "__main__":
    main()
