"""Several processes that train one model: torchrun starts them, gradients are summed between them.

Each takes its share of every step's tiles; the sums of losses, gradients and tiles are added over
all of them before anything is divided, clipped or judged. All therefore take the same step, skip
the same steps and hold the same weights. The first alone averages, validates and writes.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from wsiseg.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The place of this process among those that train together.

    `local` : on its machine. `attempt` : how often torchrun has started all of them again.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    attempt: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def share(self, num: int) -> slice:
        """Return this process's part of `num` things, of which all have equally many."""
        part = num // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def check_batch(self, num_tiles: int) -> None:
        """Raise ConfigError unless the tiles of a step can be shared out equally."""
        if num_tiles % self.size:
            msg = (
                f"a step of {num_tiles} tiles cannot be shared by {self.size} processes; choose a "
                f"--batch-size that is a multiple of {self.size}"
            )
            raise ConfigError(msg)

    def device(self, device: torch.device) -> torch.device:
        """Return this process's own device of the kind asked for."""
        if self.size > 1 and device.type == "cuda":
            own = torch.device("cuda", self.local)
            torch.cuda.set_device(own)
            return own
        return device

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Add tensors of one type over all processes, in place."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        distributed.all_reduce(flat)
        first = 0
        for tensor in tensors:
            tensor.copy_(flat[first : first + tensor.numel()].view(tensor.shape))
            first += tensor.numel()

    def from_first(self, number: int) -> int:
        """Return the number that the first process gives; all wait for it."""
        if self.size == 1:
            return number
        shared = torch.tensor([number], dtype=torch.int64, device=self._own_device())
        distributed.broadcast(shared, src=0)
        return int(shared)

    def _own_device(self) -> torch.device:
        is_gpu = distributed.get_backend() == "nccl"
        return torch.device("cuda", self.local) if is_gpu else torch.device("cpu")

    def check_agree(self, number: int, *, what: str) -> None:
        """Raise ConfigError unless all processes have the number of the first."""
        if self.size == 1:
            return
        first = self.from_first(number)
        differs = torch.tensor([number != first], dtype=torch.int64, device=self._own_device())
        self.sum([differs])
        if int(differs):
            msg = (
                f"process {self.rank} of {self.size} is at {what} {number}, the first at {first}; "
                "the run folder must be one that all processes see"
            )
            raise ConfigError(msg)


ALONE = Ranks()


@contextlib.contextmanager
def joined(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Connect the processes: by NCCL between GPUs, by gloo otherwise."""
    if ranks.size == 1:
        yield
        return
    found = rendezvous("env://", ranks.rank, ranks.size)
    store, _, _ = next(found)
    # torchrun keeps its store over restarts: without a place of its own an attempt would read the
    # addresses of processes that are dead, and wait for them.
    own = distributed.PrefixStore(f"wsiseg/{ranks.attempt}", store)  # type: ignore[attr-defined] # public, but not in its stubs
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=own, rank=ranks.rank, world_size=ranks.size)
    try:
        yield
    finally:
        distributed.destroy_process_group()
