"""Settings of `wsiseg evaluate`."""

from dataclasses import dataclass

from wsiseg.config import setting


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """How a prediction is held against the truth."""

    mpp: float | None = setting(
        None,
        "um per pixel of mask images, and of level 0 under GeoJSON, where no mask store says it; "
        "without it there are no figures in um.",
        minimum=0.01,
        maximum=100.0,
    )
    bootstrap: int = setting(1000, "Resamples of the confidence intervals over images.", minimum=0)
    seed: int = setting(0, "Seed of the bootstrap.", minimum=0)
    instances: str = setting(
        "components",
        "How objects are made from a semantic mask for the object metrics.",
        choices=("components", "watershed", "none"),
    )
