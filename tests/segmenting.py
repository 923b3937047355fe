"""Small slides whose truth is known and networks that are quick and real; shared by the tests."""

import numpy as np
import torch
from PIL import Image
from torch import nn

from wsiseg.classes import ClassTable
from wsiseg.grid import TileGrid
from wsiseg.inference.blend import PROBABILITY_ONE
from wsiseg.inference.engine import Engine
from wsiseg.inference.predict import predict_slide
from wsiseg.inference.window import blend_weights
from wsiseg.models.checkpoint import save_checkpoint
from wsiseg.models.inputs import to_network
from wsiseg.models.unet import UNet
from wsiseg.progress import SilentProgress
from wsiseg.runinfo import RunInfo
from wsiseg.settings.model import UNetConfig
from wsiseg.slides.tissue import TissueMask
from wsiseg.store.masks import SlideMask

NETWORK = UNetConfig(dim=8, mults=(1, 2), blocks=1, groups=4, attention="none")

GLASS = (240, 240, 240)
STAINED = (200, 120, 180)
DARK = (90, 40, 130)

CLASSES = ClassTable.of_names(["Dark", "Pale"])


class ByColour(nn.Module):
    """Labels each pixel by its own red value: dark 1, glass 2, stained 0."""

    def forward(self, x_NCHW):
        red = 127.5 * (x_NCHW[:, :1] + 1)
        return torch.cat([torch.zeros_like(red), (145 - red) / 4, (red - 220) / 4], dim=1)


def random_network(num_labels=3, seed=0, scale=1.0):
    """A U-Net of the real kind with random weights, as a segmenter of time step 0."""
    torch.manual_seed(seed)
    unet = UNet(NETWORK, out_channels=num_labels)
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # not in its stubs

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, x_NCHW):
            return scale * self.unet(x_NCHW, torch.zeros(x_NCHW.shape[0]))

    return Network().eval()


def engine(network, *, batch_size=4, num_readers=2, tta="none"):
    return Engine(
        network,
        torch.device("cpu"),
        batch_size=batch_size,
        num_readers=num_readers,
        amp=False,
        tta=tta,
    )


def random_image(width, height, seed=0):
    """Colours that vary smoothly and some noise: uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 12 + 2, width // 12 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noise = rng.integers(-20, 21, smooth.shape)
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)


def write_image(path, image):
    Image.fromarray(image).save(path)
    return path


def everywhere(raster):
    return TissueMask(np.ones((raster.height_px, raster.width_px), bool), raster)


def windows_of(slide, mpp, *, size=32, overlap=0.25, tissue=None):
    grid = TileGrid.covering(
        slide.meta.raster(mpp), tile_size_px=size, overlap_px=int(size * overlap)
    )
    return grid if tissue is None else grid.select(tissue.fractions(grid) > 0)


def begin_mask(path, slide, windows, *, chunk_px=48, classes=CLASSES, overwrite=False):
    return SlideMask.create(
        path,
        raster=windows.raster,
        slide=slide.meta.to_dict(),
        classes=classes,
        run=RunInfo(stage="segment", config={}, inputs={"slide": "00"}),
        model_digest="ab",
        with_probability=True,
        chunk_px=chunk_px,
        overwrite=overwrite,
    )


def write_mask(
    path, slide, network, windows, *, tissue=None, progress=None, chunk_px=48, **options
):
    """Predict a slide into a finished mask; return it and what the engine spent."""
    with begin_mask(path, slide, windows, chunk_px=chunk_px) as writer:
        uses = predict_slide(
            slide,
            engine(network, **options),
            writer,
            windows,
            tissue=tissue or everywhere(windows.raster),
            progress=progress or SilentProgress(),
        )
        writer.finish()
    return SlideMask.open(path), uses


def whole_slide(image, network, windows, *, is_tissue=None):
    """The definition of a mask in plain numpy, with the whole raster in memory.

    `image` is the raster's pixels. Returns labels and probability, uint8 (H, W).
    """
    size = windows.tile_size_px
    height, width = image.shape[:2]
    padded = np.full((max(height, size), max(width, size), 3), 255, np.uint8)
    padded[:height, :width] = image
    weights = blend_weights(size).astype(np.int64)
    sums, weight = None, np.zeros(padded.shape[:2], np.int64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for x, y in windows.origins.tolist():
            part = np.s_[y : y + size, x : x + size]
            pixels = torch.from_numpy(np.ascontiguousarray(padded[part]))
            with torch.inference_mode():
                p = torch.softmax(network(to_network(pixels[None])), dim=1)[0].numpy()
            p = np.rint(p * np.float32(PROBABILITY_ONE)).astype(np.int64)
            p[0] = PROBABILITY_ONE - p[1:].sum(axis=0)
            sums = np.zeros((len(p), *weight.shape), np.int64) if sums is None else sums
            sums[(slice(None), *part)] += p * weights
            weight[part] += weights
    finally:
        torch.set_num_threads(threads)
    assert sums is not None
    is_seen = weight > 0
    if is_tissue is not None:
        is_seen[:height, :width] &= is_tissue
    total = np.maximum(weight, 1) * PROBABILITY_ONE
    labels = np.where(is_seen, sums.argmax(axis=0), 255)
    probability = np.where(is_seen, (255 * sums.max(axis=0) + total // 2) // total, 0)
    return labels[:height, :width].astype(np.uint8), probability[:height, :width].astype(np.uint8)


def write_model(folder, *, seed=0, mpp=0.5, tile_size_px=64, names=("Gland",)):
    """Write a segmenter's run folder with random weights."""
    torch.manual_seed(seed)
    classes = ClassTable.of_names(list(names))
    save_checkpoint(
        folder,
        kind="segmenter",
        unet_config=NETWORK,
        out_channels=classes.num_labels,
        state=UNet(NETWORK, out_channels=classes.num_labels).state_dict(),
        mpp=mpp,
        tile_size_px=tile_size_px,
        timestep=0,
        classes=classes,
        diffusion=None,
        metrics={},
        run=RunInfo(stage="finetune", config={}),
    )
    return folder
