"""Train a convolutional network on handwritten digits on several processes, each on its own part of every epoch.

Start a broker, then this on two processes, from the folder of this file::

    distgrad broker --policy sync --optimizer adam --lr 0.003
    distgrad worker 127.0.0.1:5556 torch_digits:train --processes 2

``torch_digits_single.py`` is the same in one process. Needs torch and scikit-learn.
"""

import os

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from distgrad_worker import Worker
from distgrad_worker.torch import DistributedOptimizer

BATCH = 64
EPOCHS = 10


def train(worker: Worker) -> None:
    """Train, and print how well it goes on digits that were not trained on."""
    rank, world = int(os.environ.get("DISTGRAD_RANK", "0")), int(os.environ.get("DISTGRAD_WORLD", "1"))
    torch.manual_seed(0)
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = images.float().reshape(-1, 1, 8, 8) / 16
    order = torch.randperm(len(images))
    test, training = order[:360], order[360:]

    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
    )
    optimizer = DistributedOptimizer(model, worker)
    for epoch in range(1, EPOCHS + 1):
        for batch in training[torch.randperm(len(training))].split(BATCH):
            batch = batch[rank::world]
            loss = functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(loss=loss, examples=len(batch))
        with torch.no_grad():
            accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean()
        print(f"epoch {epoch}: loss {loss:.3f}, accuracy {accuracy:.1%}")


if __name__ == "__main__":
    with Worker("127.0.0.1:5556") as worker:
        train(worker)
