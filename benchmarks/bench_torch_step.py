"""Measure one training step of PyTorch at 25 million parameters with two workers on one host, beside DDP over gloo.

Ours: `DistributedOptimizer` in two processes, ``distgrad broker --policy sync --workers 2 --optimizer sgd``. The floor:
``DistributedDataParallel`` with ``torch.optim.SGD`` in two processes, which listen on loopback only. Both do the same
forward and backward pass on the same model (five layers of 2236 by 2236) and a batch of 4, one thread each.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from benchmarks import harness

WORKERS = 2
LAYERS = 5
START_S = 240.0  # four processes that import torch and compile what they need, on busy cores


def model_of(width: int) -> Any:
    """Make the network; the same in every process."""
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(LAYERS)))


def stepping(model: Any, optimizer: Any, width: int, finish: Callable[[], None]) -> Callable[[int], None]:
    """Make what takes `count` steps."""
    torch: Any = importlib.import_module("torch")
    batch = torch.ones(4, width)

    def run(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
        finish()

    return run


def worker(connection: Connection, address: str, width: int, overlap: bool, rank: int) -> None:
    from distgrad_worker import Worker
    from distgrad_worker.torch import DistributedOptimizer

    with Worker(address, worker_id=f"rank-{rank}") as ours:
        model = model_of(width)
        optimizer = DistributedOptimizer(model, ours, overlap=overlap)
        harness.take_rounds(connection, stepping(model, optimizer, width, optimizer.synchronize))


def ddp_rank(connection: Connection, store: str, width: int, rank: int) -> None:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    torch: Any = importlib.import_module("torch")
    distributed: Any = importlib.import_module("torch.distributed")
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORKERS)
    model = torch.nn.parallel.DistributedDataParallel(model_of(width))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    harness.take_rounds(connection, stepping(model, optimizer, width, lambda: None))
    distributed.destroy_process_group()


def measure(*, tiny: bool) -> list[dict[str, Any]]:
    """Compare, without and with overlap."""
    return [measure_one(overlap, tiny=tiny) for overlap in (False, True)]


def measure_one(overlap: bool, *, tiny: bool) -> dict[str, Any]:
    width = 64 if tiny else 2236
    options = ("--policy", "sync", "--workers", str(WORKERS), "--optimizer", "sgd", "--lr", "0.001")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="distgrad-bench"))
        broker = stack.enter_context(harness.Broker(*options))
        ours = [
            stack.enter_context(harness.Child(worker, broker.address, width, overlap, rank)) for rank in range(WORKERS)
        ]
        floor = [
            stack.enter_context(harness.Child(ddp_rank, f"{folder}/store", width, rank)) for rank in range(WORKERS)
        ]
        for child in (*ours, *floor):
            child.hear(START_S)
        return harness.compare(
            "torch step, overlapped" if overlap else "torch step",
            1.0,
            harness.Side(harness.Together(ours), [*(child.pid for child in ours), broker.pid]),
            harness.Side(harness.Together(floor), [child.pid for child in floor]),
            count=2 if tiny else 4,
            rounds=2 if tiny else 9,
            parameters=LAYERS * width * width,
            workers=WORKERS,
        )
