"""Make ``torch_reference.npz``: what ``torch.optim`` does with 100 gradients, for the tests of the rules.

Run it with torch 2.13 and NumPy installed; the tests themselves need no torch::

    python tests/data/make_torch_reference.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch  # only who remakes the file needs it

STEPS = 100
SHAPES = {"weight": (5, 7), "bias": (7,), "scale": ()}
DTYPES = {"float32": torch.float32, "float64": torch.float64}

# Settings as distgrad names them, by a name for the case. The rule is what the name begins with.
CASES: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.05},
    "sgd-decay": {"lr": 0.05, "weight_decay": 0.1},
    "sgd-momentum": {"lr": 0.02, "momentum": 0.9},
    "sgd-dampening": {"lr": 0.05, "momentum": 0.9, "dampening": 0.3},
    "sgd-momentum-decay": {"lr": 0.02, "momentum": 0.8, "dampening": 0.1, "weight_decay": 0.05},
    "sgd-nesterov": {"lr": 0.02, "momentum": 0.9, "nesterov": True},
    "sgd-nesterov-decay": {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
    "adam": {"lr": 0.01},
    "adam-numbers": {"lr": 0.02, "beta1": 0.8, "beta2": 0.99, "eps": 1e-6},
    "adam-decay": {"lr": 0.01, "weight_decay": 0.1},
    "adamw": {"lr": 0.01},
    "adamw-decay": {"lr": 0.02, "weight_decay": 0.3},
}


def optimizer(case: str, tensors: list[torch.Tensor], *, maximize: bool) -> torch.optim.Optimizer:
    """Make torch's optimizer for a case, in its plainest implementation."""
    settings = dict(CASES[case])
    if "beta1" in settings:
        settings["betas"] = (settings.pop("beta1"), settings.pop("beta2"))
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[case.split("-")[0]]
    made: torch.optim.Optimizer = kind(tensors, maximize=maximize, foreach=False, **settings)
    return made


def main() -> None:
    """Write the file beside this script."""
    rng = np.random.default_rng(13)
    # Well away from zero: a leaf that crosses it ends small, and its relative error tells of cancellation only.
    start = {leaf: np.asarray(rng.uniform(4.0, 8.0, shape), np.float32) for leaf, shape in SHAPES.items()}
    # Rounded to float32 so that both dtypes are given the same numbers.
    gradients = {leaf: np.asarray(rng.standard_normal((STEPS, *shape)), np.float32) for leaf, shape in SHAPES.items()}
    arrays: dict[str, np.ndarray[Any, Any]] = {f"start/{leaf}": array for leaf, array in start.items()}
    arrays |= {f"gradient/{leaf}": array for leaf, array in gradients.items()}
    for dtype, torch_dtype in DTYPES.items():
        for case in CASES:
            for mode in ("descent", "ascent"):
                tensors = {leaf: torch.tensor(array, dtype=torch_dtype) for leaf, array in start.items()}
                rule = optimizer(case, list(tensors.values()), maximize=mode == "ascent")
                for step in range(STEPS):
                    for leaf, tensor in tensors.items():
                        tensor.grad = torch.tensor(gradients[leaf][step], dtype=torch_dtype)
                    rule.step()
                arrays |= {f"{dtype}/{case}/{mode}/{leaf}": tensor.numpy() for leaf, tensor in tensors.items()}
    arrays["cases"] = np.array(json.dumps(CASES))
    arrays["torch"] = np.array(torch.__version__)
    np.savez_compressed(Path(__file__).with_name("torch_reference.npz"), **arrays)  # type: ignore[arg-type]  # a stub's limit


if __name__ == "__main__":
    main()
