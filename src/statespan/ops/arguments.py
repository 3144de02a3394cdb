"""Checks of an op's arguments, each with one clear line when it fails."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from statespan.errors import UnknownName, UserError

DISCRETIZATIONS = {"mamba": 0, "zoh": 1, "bilinear": 2}  # and the numbers by which kernels know them


def check_shape(op: str, name: str, tensor: Tensor | None, letters: str, shape: tuple[int, ...]) -> None:
    """Raise UserError unless the tensor, where there is one, has this shape."""
    if tensor is not None and tensor.shape != shape:
        raise UserError(f"{op}: {name} must be {letters} = {list(shape)}, got {list(tensor.shape)}")


def check_dim(op: str, name: str, tensor: Tensor, letters: str) -> None:
    """Raise UserError unless the tensor has as many dimensions as there are letters, "[b t d]"."""
    if tensor.dim() != letters.count(" ") + 1:
        raise UserError(f"{op}: {name} must be {letters}, got {list(tensor.shape)}")


def check_steps(op: str, name: str, tensor: Tensor, letters: str) -> None:
    """Raise UserError unless there is a time step, the second dimension."""
    if tensor.shape[1] == 0:
        raise UserError(f"{op}: {name} has no time step, its shape {letters} is {list(tensor.shape)}")


def check_groups(op: str, groups: int, letter: str, count: int) -> None:
    """Raise UserError unless the groups of B and C divide what they are shared by."""
    if groups == 0 or count % groups:
        raise UserError(f"{op}: the {groups} groups of B and C must divide {letter} = {count}")


def check_devices(op: str, **tensors: Tensor | None) -> None:
    """Raise UserError unless all the tensors are on one device: kernels take addresses."""
    first, device = "", None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise UserError(f"{op}: {first} is on {device}, and {name} on {tensor.device}; move them to one device")


def check_tensors(op: str, wanted: Mapping[str, tuple[Tensor | None, str, tuple[int, ...]]]) -> None:
    """Raise UserError unless each tensor that is there has its shape, told in letters, and all are on one device."""
    for name, (tensor, letters, shape) in wanted.items():
        check_shape(op, name, tensor, letters, shape)
    check_devices(op, **{name: tensor for name, (tensor, _, _) in wanted.items()})


def check_name(kind: str, name: str, known: Collection[str]) -> None:
    """Raise UnknownName, with the nearest known one, unless the name is known."""
    if name not in known:
        raise UnknownName(kind, name, known)


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is done with these tensors now."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def refuse_gradients(op: str, backend: str) -> None:
    """Raise UserError where a backend without gradients was asked for by name."""
    if backend not in ("auto", "reference"):
        raise UserError(
            f"{op}: backend {backend!r} has no gradients; use backend='auto', or call it under torch.no_grad()"
        )
