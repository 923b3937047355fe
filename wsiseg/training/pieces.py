"""A step in pieces: a few tiles per network call, several calls at a time on a CPU.

On a CPU each call is single-threaded and the cores work on different tiles, which is faster than
all cores on one call and gives the same sums for any number of threads. Gradients are added in a
fixed binary tree, so that two processes with half of the pieces each add up to the same bits.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from wsiseg.models.device import has_fast_bf16, intra_op_threads

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

Piece = Callable[[nn.Module], tuple[torch.Tensor, float]]
"""Runs some tiles of a step through the network: the sum of their losses, and how many count."""


@dataclass(slots=True)
class Gradient:
    """Sums over pieces. `loss` : float64 (), of all tiles. `count` : tiles that count."""

    loss: torch.Tensor
    count: float
    of_parameters: list[torch.Tensor]

    def add(self, other: "Gradient") -> None:
        """Add another one in place."""
        self.loss += other.loss
        self.count += other.count
        for own, more in zip(self.of_parameters, other.of_parameters, strict=True):
            own.add_(more)


class Runner:
    """Calls functions under autocast, in threads if there are any."""

    def __init__(
        self,
        device: torch.device,
        *,
        amp: bool,
        pool: ThreadPoolExecutor | None = None,
        num_workers: int = 0,
    ) -> None:
        self._device = device
        self._amp = amp and has_fast_bf16(device)
        self._pool = pool
        self._num_workers = num_workers

    def map(
        self, function: Callable[[ItemT], ResultT], items: Iterable[ItemT]
    ) -> Iterator[ResultT]:
        """Yield function(item) in order."""

        def call(item: ItemT) -> ResultT:
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._amp):
                return function(item)

        if self._pool is None:
            yield from map(call, items)
            return
        waiting: deque[Future[ResultT]] = deque()
        # As many as have a thread, so that no more gradients are in memory than are being made.
        for item in items:
            waiting.append(self._pool.submit(call, item))
            if len(waiting) > self._num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def gradient(self, model: nn.Module, pieces: Sequence[Piece]) -> Gradient:
        """Return the summed losses of pieces and their gradient.

        Raises
        ------
        ValueError
            There is no piece.
        """
        parameters = [p for p in model.parameters() if p.requires_grad]

        def differentiate(piece: Piece) -> Gradient:
            loss, count = piece(model)
            grads = torch.autograd.grad(loss, parameters)
            return Gradient(loss.detach().double(), count, list(grads))

        return add_in_tree(self.map(differentiate, pieces))


def add_in_tree(gradients: Iterable[Gradient]) -> Gradient:
    """Add neighbours, then neighbours of those, keeping only log2 of the gradients in memory.

    Halves of a power of two have sums of their own, whoever computes them.
    """
    heap: list[tuple[int, Gradient]] = []
    for gradient in gradients:
        height = 0
        total = gradient
        while heap and heap[-1][0] == height:
            left = heap.pop()[1]
            left.add(total)
            total, height = left, height + 1
        heap.append((height, total))
    if not heap:
        raise ValueError("a step without a piece")
    total = heap.pop()[1]
    while heap:
        left = heap.pop()[1]
        left.add(total)
        total = left
    return total


@contextlib.contextmanager
def open_runner(
    device: torch.device, *, amp: bool, num_pieces: int, is_compiled: bool
) -> Iterator[Runner]:
    """Run pieces in as many threads as the CPU has cores; on other devices one by one."""
    num_threads = torch.get_num_threads()
    num_workers = min(num_threads, num_pieces)
    if device.type != "cpu" or is_compiled or num_workers < 1:
        yield Runner(device, amp=amp)
        return
    # Cores that a small batch leaves idle help within the operations.
    with intra_op_threads(num_threads // num_workers), ThreadPoolExecutor(num_workers) as pool:
        yield Runner(device, amp=amp, pool=pool, num_workers=num_workers)
