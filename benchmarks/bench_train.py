"""Images/s of training and of inference: the default preset against parity as released.

    python benchmarks/bench_train.py [--size 256] [--device auto]

Both have 64 channels (`base` and `parity`), the same tiles, machine and run. Parity runs as the
released code does: eagerly, in float32, contiguous, the whole batch in one call. Ours runs as
`wsiseg pretrain` and `wsiseg segment` run it. Rounds alternate; medians count. On a GPU the
matrix products of a step, counted from its operations, are held against those of a large
bfloat16 product of the same run.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from wsiseg.models.device import has_fast_bf16, resolve_device
from wsiseg.models.diffusion import Diffusion
from wsiseg.models.unet import UNet
from wsiseg.settings.model import UNET_PRESETS, DiffusionConfig
from wsiseg.training.pieces import Piece, Runner, open_runner
from wsiseg.training.tasks import CPU_PIECE_PIXELS

ROUNDS = 3
"""Of each side, after one that warms up."""

Step = Callable[[], None]


def sync(device: torch.device) -> None:
    """Wait for what a GPU still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Side:
    """A network with its optimizer and a batch; knows one training step and one prediction."""

    def __init__(self, preset: str, device: torch.device, *, size: int, batch: int) -> None:
        torch.manual_seed(0)
        self.device = device
        self.unet = UNet(UNET_PRESETS[preset], out_channels=3).to(device)
        self.diffusion = Diffusion(DiffusionConfig()).to(device)
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), lr=1e-4, fused=device.type == "cuda"
        )
        self.x = torch.rand(batch, 3, size, size, device=device) * 2 - 1
        self.noise = torch.randn_like(self.x)
        self.t = torch.randint(0, 1000, (batch,), device=device)

    def loss(self, part: slice = slice(None)) -> torch.Tensor:
        """Return the summed loss of some tiles."""
        x, t, noise = self.x[part], self.t[part], self.noise[part]
        return self.diffusion.loss(self.unet, x, t, noise).sum()

    def train(self) -> None:
        """Take a step as the released code does."""
        self.optimizer.zero_grad()
        self.loss().backward()  # type: ignore[no-untyped-call] # untyped in torch
        self.optimizer.step()

    @torch.inference_mode()
    def predict(self) -> None:
        """Predict the batch in one call."""
        self.unet(self.x, torch.zeros_like(self.t))


class Ours(Side):
    """The same with what our loop and engine do."""

    def __init__(self, device: torch.device, *, size: int, batch: int, runner: Runner) -> None:
        super().__init__("base", device, size=size, batch=batch)
        self.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # not in its stubs
        self.x = self.x.to(memory_format=torch.channels_last)
        piece = max(1, CPU_PIECE_PIXELS // size**2) if device.type == "cpu" else batch
        self.parts = [slice(i, i + piece) for i in range(0, batch, piece)]
        self.runner = runner

    def train(self) -> None:
        """Take a step as our loop does."""

        def piece(part: slice) -> Piece:
            return lambda model: (self.loss(part), float(len(self.x[part])))

        gradient = self.runner.gradient(self.unet, [piece(part) for part in self.parts])
        for parameter, grad in zip(self.unet.parameters(), gradient.of_parameters, strict=True):
            parameter.grad = grad.div_(gradient.count)
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()

    def predict(self) -> None:
        """Predict the tiles as the inference engine does, one by one on a CPU."""

        @torch.inference_mode()
        def call(part: slice) -> None:
            self.unet(self.x[part], torch.zeros_like(self.t[part]))

        for _ in self.runner.map(call, self.parts):
            pass


def rates(
    steps: Sequence[Step], device: torch.device, *, batch: int, rounds: int
) -> list[list[float]]:
    """Return images/s of each step in each round; they take turns, after one to warm up."""
    found: list[list[float]] = [[] for _ in steps]
    for round_ in range(rounds + 1):
        for step, kept in zip(steps, found, strict=True):
            sync(device)
            began = time.perf_counter()
            step()
            sync(device)
            if round_:
                kept.append(batch / (time.perf_counter() - began))
    return found


def peak_flops(device: torch.device) -> float:
    """Return the operations/s of a large product in the type that is used there."""
    dtype = torch.bfloat16 if has_fast_bf16(device) else torch.float32
    num = 8192 if device.type == "cuda" else 3072
    a = torch.randn(num, num, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):
        sync(device)
        began = time.perf_counter()
        a @ a
        sync(device)
        seconds.append(time.perf_counter() - began)
    return 2 * num**3 / statistics.median(seconds[1:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="side of the tiles in px")
    parser.add_argument("--batch", type=int, default=0, help="tiles; default 2, 32 on a GPU")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="after one that warms up")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = resolve_device(options.device)
    batch = options.batch or (32 if device.type == "cuda" else 2)
    peak = peak_flops(device)
    parity = Side("parity", device, size=options.size, batch=batch)
    ours = Ours(device, size=options.size, batch=batch, runner=Runner(device, amp=True))
    print(f"{device}, {options.size} px, batches of {batch}, images/s: min median max")
    for name, steps in (
        ("training", (parity.train, "train")),
        ("inference", (parity.predict, "predict")),
    ):
        compare(
            name,
            steps[0],
            steps[1],
            ours,
            device=device,
            batch=batch,
            peak=peak,
            rounds=options.rounds,
        )


def compare(
    name: str, released: Step, ours_name: str, ours: Ours, *,
    device: torch.device, batch: int, peak: float, rounds: int,
) -> None:  # fmt: skip
    """Print both sides of a comparison, their ratio and our share of the peak."""

    def step() -> None:
        with open_runner(device, amp=True, num_pieces=batch, is_compiled=False) as ours.runner:
            getattr(ours, ours_name)()

    theirs, own = rates((released, step), device, batch=batch, rounds=rounds)
    for side, values in (("parity, eager float32", theirs), ("base, as wsiseg runs it", own)):
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"  {name:10s} {side:26s} {low:8.3f} {middle:8.3f} {high:8.3f}")
    ratio = statistics.median(own) / statistics.median(theirs)
    with FlopCounterMode(display=False) as counter:
        ours.runner = Runner(device, amp=True)
        getattr(ours, ours_name)()
    share = counter.get_total_flops() / batch * statistics.median(own) / peak
    print(f"  {name:10s} ratio {ratio:.2f}; {share:.0%} of a large matrix product ({peak:.3g}/s)")


if __name__ == "__main__":
    main()
