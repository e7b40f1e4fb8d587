"""One of two ranks that train the same network, by DDP over gloo or by a broker; prints its losses as JSON.

gloo listens on the interface that ``GLOO_SOCKET_IFNAME`` names, which must be loopback; the ranks find each other by a
file.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from distgrad_worker import Worker
from distgrad_worker.torch import DistributedOptimizer
from support.torch_models import batches, small_cnn, train

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.005, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.0005),
}


def halves(steps: int, rank: int) -> list[tuple[Any, Any]]:
    """Give this rank's half of every batch of 16."""
    return [(images[rank::2], labels[rank::2]) for images, labels in batches(steps)]


def main() -> None:
    """Train as the command line says: kind, rule, broker's address or store, steps, rank."""
    kind, rule, place, steps, rank = sys.argv[1:]
    data = halves(int(steps), int(rank))
    if kind == "distgrad":
        with Worker(place, worker_id=f"rank-{rank}") as worker:
            model = small_cnn()
            print(json.dumps(train(model, DistributedOptimizer(model, worker), data)))
        return
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}", rank=int(rank), world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(small_cnn())
    print(json.dumps(train(model, OPTIMIZERS[rule](model.parameters()), data)), flush=True)
    torch.distributed.barrier()
    # Its losses are what is wanted: gloo's threads abort a process now and then whose other rank ends first.
    os._exit(0)


if __name__ == "__main__":
    main()
