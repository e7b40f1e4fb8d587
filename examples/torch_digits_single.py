"""Train a convolutional network on handwritten digits in one process: ``python torch_digits_single.py``.

What it takes to train it on many is in ``torch_digits.py``. Needs torch and scikit-learn.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

BATCH = 64
EPOCHS = 10


def train() -> None:
    """Train, and print how well it goes on digits that were not trained on."""
    torch.manual_seed(0)
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = images.float().reshape(-1, 1, 8, 8) / 16
    order = torch.randperm(len(images))
    test, training = order[:360], order[360:]

    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for epoch in range(1, EPOCHS + 1):
        for batch in training[torch.randperm(len(training))].split(BATCH):
            loss = functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean()
        print(f"epoch {epoch}: loss {loss:.3f}, accuracy {accuracy:.1%}")


if __name__ == "__main__":
    train()
