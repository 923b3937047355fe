"""Which device a network runs on, and what that device is good at."""

import contextlib
from collections.abc import Iterator

import torch

from wsiseg.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """Return the device of a `--device` value; `auto` takes CUDA, then MPS, then the CPU.

    Raises
    ------
    ConfigError
        The name is not a device, or this machine has none of that kind.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        msg = f"--device {name}: not a device; use auto, cpu, cuda, cuda:0 or mps"
        raise ConfigError(msg) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        msg = f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices"
        raise ConfigError(msg)
    if device.type == "mps" and not torch.backends.mps.is_available():
        msg = f"--device {name}: MPS is not available on this machine"
        raise ConfigError(msg)
    if device.type not in ("cpu", "cuda", "mps"):
        msg = f"--device {name}: not supported; use auto, cpu, cuda, cuda:0 or mps"
        raise ConfigError(msg)
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether bfloat16 autocast pays on a device.

    On a GPU: whether it computes bfloat16 itself. On a CPU: whether it has AMX tiles. AVX512-BF16
    without them is not enough: a training step takes 1.5 times as long as in float32 (`tiny` at
    128 px, Xeon of the fifth generation), since only the convolutions gain. MPS: no.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


@contextlib.contextmanager
def intra_op_threads(count: int) -> Iterator[None]:
    """Let each CPU operation use `count` threads, also in threads that begin inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
