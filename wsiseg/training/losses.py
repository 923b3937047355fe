"""The fine-tuning losses, on logits, per sample, with 255 ignored; never NaN.

Every loss is one value per sample, over its labelled pixels. Their mean over samples therefore
does not depend on how a batch is cut into pieces.

Shape letters: N batch, K labels (background and classes), H height, W width.
"""

from collections.abc import Callable

import torch
from torch.nn import functional

from wsiseg.classes import IGNORE
from wsiseg.settings.training import LossConfig

SS_BETA = 0.1
SS_C = 0.01
"""Constants of SSLoss as released: share of the largest error that counts, and stabiliser."""

SS_MAX_ERROR = 10.0
"""Standardised values of rare labels reach sqrt(H W); beyond this one pixel would rule (D4)."""

SMOOTH = 1.0
"""Pixels added to both sides of an overlap: two empty regions agree."""


class SegmentationLoss:
    """A weighted sum of losses: (logits (N, K, H, W), labels (N, H, W)) -> float32 (N,)."""

    def __init__(self, config: LossConfig, num_labels: int) -> None:
        self._num_labels = num_labels
        terms: list[tuple[str, float, Callable[[_Sample], torch.Tensor]]] = [
            ("cross_entropy", config.cross_entropy, cross_entropy),
            ("focal", config.focal, lambda s: focal(s, config.focal_gamma)),
            ("structural", config.structural, lambda s: structural(s, config.structural_mode)),
            ("dice", config.dice, lambda s: tversky(s, beta=0.5)),
            ("tversky", config.tversky, lambda s: tversky(s, beta=config.tversky_beta)),
        ]
        self._terms = [term for term in terms if term[1] > 0]

    def __call__(
        self, logits_NKHW: torch.Tensor, labels_NHW: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of each sample, float32 (N,), and its unweighted terms by name.

        0 for a sample without a labelled pixel.
        """
        with torch.autocast(logits_NKHW.device.type, enabled=False):
            sample = _Sample(logits_NKHW.float(), labels_NHW, self._num_labels)
            parts = {name: function(sample) for name, _, function in self._terms}
            total = logits_NKHW.float().sum(dim=(1, 2, 3)) * 0.0
            for name, weight, _ in self._terms:
                total = total + weight * parts[name]
            return total, parts


class _Sample:
    """What all losses need of a batch, computed once."""

    def __init__(
        self, logits_NKHW: torch.Tensor, labels_NHW: torch.Tensor, num_labels: int
    ) -> None:
        labels_NHW = labels_NHW.long()
        self.is_labelled = labels_NHW != IGNORE
        filled = torch.where(self.is_labelled, labels_NHW, 0)
        # log_softmax, not log(softmax): finite however sure the network is (defect D1).
        self.log_p_NKHW = functional.log_softmax(logits_NKHW, dim=1)
        self.p_NKHW = self.log_p_NKHW.exp()
        self.log_p_true_NHW = self.log_p_NKHW.gather(1, filled[:, None])[:, 0]
        mask = self.is_labelled[:, None]
        self.truth_NKHW = functional.one_hot(filled, num_labels).permute(0, 3, 1, 2) * mask
        self.num_labelled_N = self.is_labelled.sum(dim=(1, 2)).clamp(min=1)

    def mean(self, values_NHW: torch.Tensor) -> torch.Tensor:
        """Return the mean over labelled pixels of each sample, (N,)."""
        return torch.where(self.is_labelled, values_NHW, 0.0).sum(dim=(1, 2)) / self.num_labelled_N


def cross_entropy(sample: _Sample) -> torch.Tensor:
    """Return -log p of the true label, mean over labelled pixels: (N,)."""
    return sample.mean(-sample.log_p_true_NHW)


def focal(sample: _Sample, gamma: float) -> torch.Tensor:
    """Return (1 - p)^gamma * -log p (Lin et al. 2017); right for every gamma (defect D5)."""
    # 1 - p by expm1: exact near 0, where the power's slope would blow rounding up.
    missed = (-torch.expm1(sample.log_p_true_NHW)).clamp(min=1e-8)
    return sample.mean(missed**gamma * -sample.log_p_true_NHW)


def structural(sample: _Sample, mode: str) -> torch.Tensor:
    """Return SSLoss (Zhao et al., arXiv 1910.08711): cross-entropy where the structure is wrong.

    Structure is a map standardised over the tile; its error e counts where it exceeds `SS_BETA`
    of the largest. "per_pixel" weights each pixel's cross-entropy by e, "official" the mean one,
    as released (defect D3). A label that is absent from the tile, or fills it, has no structure
    and is left out (defect D4).
    """
    mask = sample.is_labelled[:, None]
    truth, present = _standardised(sample.truth_NKHW.float(), mask)
    guess, _ = _standardised(sample.p_NKHW, mask)
    error = (truth - guess).abs().clamp(max=SS_MAX_ERROR) * mask * present
    largest = error.amax(dim=(2, 3), keepdim=True)
    counts = (error > SS_BETA * largest).float()
    num_counted = counts.sum(dim=(1, 2, 3)).clamp(min=1)
    if mode == "official":
        return (error * counts).sum(dim=(1, 2, 3)) / num_counted * cross_entropy(sample)
    pixel_loss = torch.where(sample.is_labelled, -sample.log_p_true_NHW, 0.0)[:, None]
    # e says where to look; it is no path for the gradient, which would reward confusion.
    return (error.detach() * counts * pixel_loss).sum(dim=(1, 2, 3)) / num_counted


def _standardised(values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (v - mean + C) / (sd + C) over labelled pixels, and whether v varies: (N, K, 1, 1)."""
    count = mask.sum(dim=(2, 3), keepdim=True).clamp(min=1)
    mean = (values * mask).sum(dim=(2, 3), keepdim=True) / count
    variance = ((values - mean) * mask).square().sum(dim=(2, 3), keepdim=True) / count
    # The floor keeps the slope of the root finite where nothing varies.
    deviation = (variance + 1e-8).sqrt()
    return (values - mean + SS_C) / (deviation + SS_C), (variance > 1e-6).float()


def tversky(sample: _Sample, *, beta: float) -> torch.Tensor:
    """Return 1 - Tversky index, mean over the foreground labels that are in the tile: (N,).

    `beta` weights what was missed, 1 - beta what was wrongly claimed; 0.5 is the soft Dice loss.
    In a tile without any foreground, all foreground labels count.
    """
    mask = sample.is_labelled[:, None]
    truth = sample.truth_NKHW[:, 1:].float()
    guess = sample.p_NKHW[:, 1:] * mask
    hit = (truth * guess).sum(dim=(2, 3))
    missed = (truth * (1 - guess)).sum(dim=(2, 3))
    claimed = ((1 - truth) * guess).sum(dim=(2, 3))
    index = (hit + SMOOTH) / (hit + beta * missed + (1 - beta) * claimed + SMOOTH)
    present = (truth.sum(dim=(2, 3)) > 0).float()
    present = torch.where(present.sum(dim=1, keepdim=True) > 0, present, 1.0)
    is_any = (sample.is_labelled.sum(dim=(1, 2)) > 0).float()
    return ((1 - index) * present).sum(dim=1) / present.sum(dim=1) * is_any
