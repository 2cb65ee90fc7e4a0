"""Stage *engine*: from the device a user names to one that is there."""

from __future__ import annotations

import torch

from ckavg.errors import SettingError


def resolve_device(device: str) -> str:
    """The torch device for `auto`, `cpu`, `cuda` or `cuda:N`.

    `auto` is the CPU: its kernels keep up with the reading, and a GPU must be fed through the same memory.

    Raises:
        SettingError: the name means nothing, or there is no such device here.
    """
    if device in ("auto", "cpu"):
        return "cpu"
    kind, _, number = device.partition(":")
    if kind != "cuda" or not (number == "" or number.isdigit()):
        raise SettingError(f"device is {device!r}; it must be auto, cpu, cuda or cuda:N.")
    if not torch.cuda.is_available() or int(number or 0) >= torch.cuda.device_count():
        raise SettingError(f"device is {device!r}, but torch finds no such GPU here.", hint="Use --device cpu.")
    return device
