"""Settings of `wsiseg segment`."""

from dataclasses import dataclass

from wsiseg.config import setting
from wsiseg.settings.tile import TissueConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentConfig:
    """How a model is run over a slide. Resolution and classes come from the model."""

    slide_mpp: float | None = setting(
        None,
        "Resolution of the slide at level 0 in um/px, overriding its metadata.",
        minimum=0.01,
        maximum=100.0,
    )
    window: int | None = setting(
        None,
        "Side of the square the network sees, in pixels; default: the model's tile size.",
        minimum=16,
        maximum=8192,
    )
    overlap: float = setting(
        0.25,
        "Share of a window that it has in common with its neighbour.",
        flag="--window-overlap",
        minimum=0.0,
        maximum=0.75,
    )
    tta: str = setting(
        "none",
        "Test-time augmentation: mean over 'flips' (4 network calls per window), over 'dihedral' "
        "flips and quarter turns (8), or 'none'.",
        choices=("none", "flips", "dihedral"),
    )
    batch_size: int = setting(
        8,
        "Windows per network call on a GPU; a CPU takes one per core.",
        flag="--batch-size -b",
        minimum=1,
        affects_result=False,
    )
    lanes: int | None = setting(
        None,
        "Windows that a CPU predicts at once, which takes memory for each; default: one per core.",
        flag=False,
        minimum=1,
        maximum=1024,
        affects_result=False,
    )
    num_workers: int = setting(
        2,
        "Threads that read ahead.",
        flag="--num-workers -n",
        minimum=1,
        maximum=256,
        affects_result=False,
    )
    chunk: int = setting(
        1024,
        "Side of a chunk of the slide mask in pixels.",
        flag=False,
        minimum=128,
        maximum=16384,
        affects_result=False,
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:0, mps.", affects_result=False)
    amp: bool = setting(True, "bfloat16 autocast where it pays: GPUs, CPUs with AMX.", flag=False)
    probabilities: bool = setting(
        True,
        "Keep the probability of the predicted class (uint8), for the measurements of each "
        "polygon.",
        flag="--probabilities/--no-probabilities",
    )
    min_tissue: float = setting(
        0.0, "Windows with this fraction of tissue or less are not read.", minimum=0.0, maximum=1.0
    )
    tissue: TissueConfig = setting(TissueConfig(), "How the tissue mask is made.", flag=False)
