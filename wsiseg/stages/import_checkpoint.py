"""A checkpoint of the released code to a run folder of ours."""

from dataclasses import dataclass
from pathlib import Path

from wsiseg.classes import ClassTable
from wsiseg.config import to_dict
from wsiseg.errors import CheckpointError
from wsiseg.models.checkpoint import Kind, model_digest, save_checkpoint
from wsiseg.models.released import ReleasedWeights, read_released
from wsiseg.runinfo import RunInfo
from wsiseg.settings.model import UNET_PRESETS, DiffusionConfig
from wsiseg.settings.released import ImportConfig
from wsiseg.training.runs import open_run

NOISE_CHANNELS = 3
"""A network with as many outputs as an image has channels predicts noise, unless classes are
named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportSummary:
    """What came of it. `epoch` : of the released training, if the file says."""

    output: str
    kind: str
    classes: str
    parameters: int
    epoch: int | None
    digest: str


def run(
    config: ImportConfig,
    *,
    checkpoint: Path,
    output: Path,
    classes: ClassTable | None = None,
    overwrite: bool = False,
) -> ImportSummary:
    """Write the network of a released checkpoint as the run folder `output`.

    It computes the same, within rounding: a segmentation network is given images in [0, 1] at
    time step 0, as it was trained (defects D7, D8).

    Parameters
    ----------
    classes
        What the outputs of a segmentation network mean, background aside. Without it a network
        of 3 outputs is the pretrained one, and classes of any other are only numbered.

    Raises
    ------
    CheckpointError
        `checkpoint` is not one of the released code, or has another number of outputs than
        `classes` needs.
    OutputExistsError
        `output` holds another run.
    """
    weights = read_released(checkpoint)
    if classes is None and weights.out_channels != NOISE_CHANNELS:
        classes = _numbered(weights.out_channels - 1)
    if classes is not None and classes.num_labels != weights.out_channels:
        msg = (
            f"released checkpoint '{checkpoint}': has {weights.out_channels} outputs, background "
            f"and {len(classes.classes)} classes need {classes.num_labels}"
        )
        raise CheckpointError(msg)
    settings = {**to_dict(config), "classes": classes.to_dict() if classes else None}
    info = RunInfo.of("import-checkpoint", settings, {"checkpoint": weights.sha256})
    kind: Kind = "segmenter" if classes else "pretrain"
    with open_run(output, info, config, section=info.stage, overwrite=overwrite) as folder:
        if not folder.is_finished:
            _save(weights, config, classes, kind, output, info)
    return ImportSummary(
        output=str(output),
        kind=kind,
        classes=", ".join(classes.names[1:]) if classes else "",
        parameters=sum(tensor.numel() for tensor in weights.state_dict.values()),
        epoch=weights.epoch,
        digest=model_digest(output),
    )


def _save(
    weights: ReleasedWeights,
    config: ImportConfig,
    classes: ClassTable | None,
    kind: Kind,
    output: Path,
    info: RunInfo,
) -> None:
    save_checkpoint(
        output,
        kind=kind,
        unet_config=UNET_PRESETS["parity"],
        out_channels=weights.out_channels,
        state=weights.state_dict,
        mpp=config.mpp,
        tile_size_px=config.tile_size_px,
        timestep=0,
        classes=classes,
        diffusion=None if classes else to_dict(DiffusionConfig()),
        metrics={} if weights.epoch is None else {"epoch": weights.epoch},
        run=info,
        input_range="unit" if classes else "symmetric",
    )


def _numbered(num: int) -> ClassTable:
    names = [f"Label {i}" for i in range(1, num + 1)]
    return ClassTable.of_names(names if num > 1 else ["Foreground"])
