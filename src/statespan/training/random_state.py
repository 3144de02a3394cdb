"""The states of the process's random generators (Python, NumPy, PyTorch) as tensors and JSON values."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def capture_random() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states now, for `restore_random`."""
    version, words, gauss = random.getstate()
    _, keys, place, has_gauss, numpy_gauss = np.random.get_state()
    tensors = {
        "python": torch.tensor(words),
        "numpy": torch.from_numpy(np.asarray(keys, np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors, {"python": [version, gauss], "numpy": [int(place), int(has_gauss), float(numpy_gauss)]}


def restore_random(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Go on drawing where `capture_random` was called."""
    version, gauss = values["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    np.random.set_state(("MT19937", tensors["numpy"].numpy().astype(np.uint32), *values["numpy"]))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
