"""PyTorch models trained by a broker; needs the extra ``torch``. ``docs/torch.md`` shows how."""

from distgrad_worker.torch.buffers import SharedBuffers
from distgrad_worker.torch.optimizer import DistributedOptimizer

__all__ = ["DistributedOptimizer", "SharedBuffers"]
