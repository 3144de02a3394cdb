"""How tensors lie in memory when kernels are given their addresses."""

import torch

from statespan.ops.layout import near


def test_groups_far_from_each_other_are_brought_together() -> None:
    """Products of a stride and a group's or a token's number have 32 bits in the Triton kernels."""
    shape, far = (2, 100, 3, 16), (1 << 30) + 16
    for strides in ((4800, 48, 16, 1), (1600, 3200, 32 * 100 * 2, 1), (1 << 40, 48, 16, 1), (4800, 48, far // 2, 1)):
        tensor = torch.empty_strided(shape, strides, device="meta")
        assert near(tensor) is tensor
    for strides in ((4800, 48, far, 1), (48, far, 16, 1), (4800, 48, 16, 2)):
        assert near(torch.empty_strided(shape, strides, device="meta")).is_contiguous()
