"""Which device a network runs on."""

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
