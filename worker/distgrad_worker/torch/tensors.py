"""Between tensors and arrays: the same memory seen from both sides, also where NumPy has no such type."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from distgrad.arrays import BFLOAT16, dtype_of
from distgrad.errors import LayoutError

Array = np.ndarray[Any, Any]

# Types that distgrad trains; the second has no counterpart in NumPy itself, so its bits are handed over.
_TRAINED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def name_of(dtype: torch.dtype) -> str:
    """Give the name that a dtype has in NumPy.

    Parameters
    ----------
    dtype : torch.dtype
        Any.

    Returns
    -------
    str
        ``"float32"`` for ``torch.float32``.
    """
    return str(dtype).removeprefix("torch.")


def check_trainable(name: str, tensor: torch.Tensor) -> None:
    """Refuse a parameter that no broker can train.

    Parameters
    ----------
    name : str
        Of the parameter, for the error.
    tensor : Tensor
        The parameter.

    Raises
    ------
    LayoutError
        If it has no values yet, is not dense, or has a type that is not trained.
    """
    if isinstance(tensor, torch.nn.parameter.UninitializedTensorMixin) or tensor.device.type == "meta":
        raise LayoutError(
            f"parameter {name!r} has no values yet: initialize the model (one forward pass) first", leaf=name
        )
    if tensor.layout != torch.strided:
        raise LayoutError(f"parameter {name!r} must be dense, got {tensor.layout}", leaf=name)
    if tensor.dtype not in _TRAINED:
        allowed = ", ".join(map(name_of, _TRAINED))
        raise LayoutError(f"parameter {name!r} must be one of {allowed}, got {name_of(tensor.dtype)}", leaf=name)


def as_array(tensor: torch.Tensor) -> Array:
    """See a tensor on the CPU as an array.

    Parameters
    ----------
    tensor : Tensor
        Dense, on the CPU. Any strides.

    Returns
    -------
    ndarray
        Of the same memory, shape and type.

    Raises
    ------
    LayoutError
        If it is a bfloat16 and ``ml_dtypes`` is not installed.
    """
    tensor = tensor.detach()
    if tensor.dtype != torch.bfloat16:
        array: Array = tensor.numpy()
        return array
    bits: Array = tensor.view(torch.int16).numpy()
    return bits.view(dtype_of(BFLOAT16))


def as_tensor(array: Array) -> torch.Tensor:
    """See an array as a tensor.

    Parameters
    ----------
    array : ndarray
        Writeable, of a type that torch has.

    Returns
    -------
    Tensor
        Of the same memory, shape and type.
    """
    if array.dtype.name != BFLOAT16:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
