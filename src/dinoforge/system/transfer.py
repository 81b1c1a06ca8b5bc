"""Copies to a device for which nobody waits."""

import torch
from torch import Tensor

PAGE_LOCKED = {"cuda", "xpu"}  # types of devices that copy from page-locked memory while the host goes on


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host to a device while the host goes on.

    From ordinary memory a copy of more than 64 KiB would be waited for, so the tensor is first copied to page-locked
    memory, where the device can use such memory.

    Args:
        x: A tensor on the CPU, or on the device already.
        device: The device that gets the copy.
    """
    if device.type in PAGE_LOCKED and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
