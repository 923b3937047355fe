"""Run the network over many windows: reading, the device and the caller overlap.

Reader threads fetch pixels ahead of the network. On a CPU every window is then one single-threaded
call, and the cores work on different windows. That is faster than all cores on one window (1.9 x
against batches of 8, measured on two cores), and the result is the same for any number of threads,
which a sum split among threads would not be. On a GPU windows go in batches of one fixed size, the
last one filled up, since kernels are chosen by size and differ in the last bits; a batch's result
is copied back while the next one runs.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from wsiseg.inference.blend import PROBABILITY_ONE
from wsiseg.inference.meter import Meter, Use
from wsiseg.inference.symmetry import mean_over, symmetries
from wsiseg.models.device import has_fast_bf16, intra_op_threads
from wsiseg.models.inputs import to_network

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

Read = Callable[[ItemT], npt.NDArray[np.uint8]]
"""Gives the pixels uint8 (S, S, 3) of a window; called from several threads."""

Predicted = Generator[tuple[ItemT, npt.NDArray[np.int32]]]
"""Windows with their foreground probabilities, int32 (num_labels - 1, S, S) in 65535ths."""

WINDOWS_AHEAD = 6
"""Per lane or batch slot: how far reading may run ahead, so that neither a slow read nor a pause
of the caller (it resolves a row of windows in some 0.1 s) leaves the network without work."""


class Engine:
    """A segmenter on a device.

    `batch_size` counts only on a GPU, `lanes` only on a CPU; `num_readers` are threads that read
    ahead. Memory grows with each.
    """

    def __init__(
        self,
        segmenter: nn.Module,
        device: torch.device,
        *,
        batch_size: int,
        num_readers: int,
        amp: bool,
        tta: str = "none",
        lanes: int | None = None,
    ) -> None:
        """Move the segmenter to the device.

        Parameters
        ----------
        segmenter
            Logits (N, num_labels, H, W) of images (N, 3, H, W) in [-1, 1]: a `Segmenter`.
        tta
            Test-time augmentation, a name of `wsiseg.inference.symmetry`.
        lanes
            Network calls that go on at once on a CPU; one per core if None.
        """
        self._segmenter = segmenter.to(device).eval()
        self._device = device
        self._batch_size = batch_size
        self._num_readers = num_readers
        self._amp = amp and has_fast_bf16(device)
        self._symmetries = symmetries(tta)
        self._lanes = (lanes or torch.get_num_threads()) if device.type == "cpu" else 1
        self._meter = Meter(self._lanes)

    @property
    def use(self) -> Use:
        """Where the time of the last `run` went, so far."""
        return self._meter.use

    def run(self, windows: Iterable[ItemT], read: Read[ItemT]) -> Predicted[ItemT]:
        """Yield each window with its foreground probabilities, in the order given.

        The probabilities are int32 (num_labels - 1, S, S) in 65535ths.
        """
        self._meter = Meter(self._lanes)
        self._meter.begin()
        if self._device.type == "cpu":
            return self._run_in_lanes(windows, read)
        return self._run_in_batches(windows, read)

    def _read_with(self, read: Read[ItemT]) -> Read[ItemT]:
        meter = self._meter

        def timed(window: ItemT) -> npt.NDArray[np.uint8]:
            with meter.reading():
                return read(window)

        return timed

    def _run_in_lanes(self, windows: Iterable[ItemT], read: Read[ItemT]) -> Predicted[ItemT]:
        timed, meter = self._read_with(read), self._meter

        def predict(pixels: Future[npt.NDArray[np.uint8]]) -> npt.NDArray[np.int32]:
            image = pixels.result()
            with meter.network():
                probabilities: npt.NDArray[np.int32] = self._predict(image[None])[0].numpy()
            return probabilities

        with (
            intra_op_threads(1),
            ThreadPoolExecutor(self._num_readers) as readers,
            ThreadPoolExecutor(self._lanes) as lanes,
        ):

            def submit(window: ItemT) -> Future[npt.NDArray[np.int32]]:
                return lanes.submit(predict, readers.submit(timed, window))

            yield from _map_ahead(submit, windows, ahead=WINDOWS_AHEAD * self._lanes)

    def _run_in_batches(self, windows: Iterable[ItemT], read: Read[ItemT]) -> Predicted[ItemT]:
        timed = self._read_with(read)
        launched: deque[_Launched[ItemT]] = deque()
        with ThreadPoolExecutor(self._num_readers) as pool:
            pixels = _map_ahead(
                lambda window: pool.submit(timed, window),
                windows,
                ahead=WINDOWS_AHEAD * self._batch_size,
            )
            for batch in _batches(pixels, self._batch_size):
                launched.append(self._launch(batch))
                if len(launched) > 1:  # the device has the next one already
                    yield from launched.popleft().collect(self._meter)
        while launched:
            yield from launched.popleft().collect(self._meter)

    def _launch(self, batch: list[tuple[ItemT, npt.NDArray[np.uint8]]]) -> "_Launched[ItemT]":
        images = np.stack([image for _, image in batch])
        lacking = self._batch_size - len(batch)
        filled = np.concatenate([images, np.repeat(images[-1:], lacking, axis=0)])
        clock = _Clock(self._device)
        result = self._predict(filled)
        if self._device.type == "cuda":  # into pinned memory, behind the network, without waiting
            host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
            result = host.copy_(result, non_blocking=True)
        else:
            result = result.cpu()
        clock.stop()
        return _Launched([window for window, _ in batch], result, clock)

    @torch.inference_mode()
    def _predict(self, images: npt.NDArray[np.uint8]) -> torch.Tensor:
        """Return int32 (N, num_labels - 1, S, S) of uint8 (N, S, S, 3), still on the device."""
        images_NHWC = torch.from_numpy(images)
        if self._device.type == "cuda":
            images_NHWC = images_NHWC.pin_memory()
        x_NCHW = to_network(images_NHWC.to(self._device, non_blocking=True))
        return mean_over(self._symmetries, self._foreground, x_NCHW)

    def _foreground(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """Return int32 (N, num_labels - 1, H, W) probabilities in 65535ths."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._amp):
            logits_NCHW = self._segmenter(x_NCHW)
        probabilities_NCHW = torch.softmax(logits_NCHW.float(), dim=1)[:, 1:]
        return (probabilities_NCHW * PROBABILITY_ONE).round_().to(torch.int32)


class _Clock:
    """Time that a device spends on what is launched between creation and `stop`."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._began_s = time.perf_counter()
        self._seconds = 0.0
        if self._is_cuda:
            self._first, self._last = (
                torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                for _ in range(2)
            )
            self._first.record()

    def stop(self) -> None:
        """Mark the end of what was launched; elsewhere than on CUDA it has ended by now."""
        if self._is_cuda:
            self._last.record()
        else:
            self._seconds = time.perf_counter() - self._began_s

    def wait(self) -> float:
        """Wait for the end and return the seconds."""
        if not self._is_cuda:
            return self._seconds
        self._last.synchronize()
        return float(self._first.elapsed_time(self._last)) / 1e3


@dataclass(frozen=True, slots=True)
class _Launched(Generic[ItemT]):
    """A batch under way on the device: (N, num_labels - 1, S, S), filled up beyond its windows."""

    windows: list[ItemT]
    result: torch.Tensor  # on the CPU once `clock` has ended
    clock: _Clock

    def collect(self, meter: Meter) -> Iterator[tuple[ItemT, npt.NDArray[np.int32]]]:
        """Wait for the batch and yield its windows; what fills it up is dropped."""
        seconds = self.clock.wait()
        meter.add_network(seconds, windows=len(self.windows))
        yield from zip(self.windows, self.result[: len(self.windows)].numpy(), strict=True)


def _map_ahead(
    submit: Callable[[ItemT], Future[ResultT]], items: Iterable[ItemT], *, ahead: int
) -> Generator[tuple[ItemT, ResultT]]:
    """Yield (item, its result) in order, with up to `ahead` of them under way."""
    waiting: deque[tuple[ItemT, Future[ResultT]]] = deque()
    try:
        for item in items:
            waiting.append((item, submit(item)))
            if len(waiting) >= ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:  # also when the caller stops listening
        for _, future in waiting:
            future.cancel()


def _batches(items: Iterable[ItemT], size: int) -> Iterator[list[ItemT]]:
    batch: list[ItemT] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
