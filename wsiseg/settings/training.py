"""Settings of `wsiseg pretrain` and `wsiseg finetune`."""

from dataclasses import dataclass

from wsiseg.config import setting
from wsiseg.settings.model import DiffusionConfig, UNetConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """The training loop, the same for both stages."""

    steps: int = setting(5000, "Optimizer steps.", flag="--steps", minimum=1)
    batch_size: int = setting(8, "Tiles per step.", flag="--batch-size -b", minimum=1)
    learning_rate: float = setting(
        1e-4,
        "Peak learning rate of Adam(W); the released value.",
        flag="--learning-rate --lr",
        minimum=0.0,
    )
    weight_decay: float = setting(0.0, "Decoupled weight decay.", flag=False, minimum=0.0)
    betas: tuple[float, ...] = setting((0.9, 0.999), "Adam's betas.", flag=False)
    warmup_steps: int = setting(100, "Linear warm-up, then cosine decay.", flag=False, minimum=0)
    grad_clip: float = setting(
        1.0, "Largest gradient norm; 0 switches it off.", flag=False, minimum=0.0
    )
    ema_decay: float = setting(
        0.999,
        "Decay of the moving average of the weights, which is what is saved for use.",
        flag=False,
        minimum=0.0,
        maximum=1.0,
    )
    accumulate: int = setting(1, "Batches summed into one step.", flag=False, minimum=1)
    validate_every: int = setting(
        250, "Steps between validations.", flag="--validate-every", minimum=1
    )
    save_every: int = setting(
        250, "Steps between resume points.", flag="--save-every", minimum=1, affects_result=False
    )
    patience: int = setting(
        15,
        "Validations without improvement after which training stops; 0 never stops early.",
        flag="--patience",
        minimum=0,
    )
    max_bad_steps: int = setting(
        10,
        "Steps skipped for a loss or gradient that is not finite before training gives up.",
        flag=False,
        minimum=0,
    )
    amp: bool = setting(True, "bfloat16 autocast where it pays: GPUs, CPUs with AMX.", flag=False)
    tensorboard: bool = setting(
        False,
        "Write the figures for TensorBoard, too; needs the extra 'log'.",
        flag="--tensorboard",
        affects_result=False,
    )
    compile: bool = setting(
        False, "torch.compile the network; pays on a GPU.", flag="--compile", affects_result=False
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentConfig:
    """Augmentations of the training split, applied on the device, jointly to image and label."""

    flip: bool = setting(True, "Random flips and quarter turns.", flag=False)
    stain_sigma: float = setting(
        0.05,
        "Spread of the multiplicative and additive jitter in HED space; 0 is none.",
        flag=False,
        minimum=0.0,
    )
    blur_probability: float = setting(
        0.3, "Chance of a light Gaussian blur.", flag=False, minimum=0.0, maximum=1.0
    )
    brightness: float = setting(
        0.1, "Largest relative change of brightness.", flag=False, minimum=0.0, maximum=0.9
    )
    contrast: float = setting(
        0.1, "Largest relative change of contrast.", flag=False, minimum=0.0, maximum=0.9
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """The fine-tuning loss: a weighted sum; a weight of 0 leaves the term out."""

    cross_entropy: float = setting(0.0, "Weight of cross-entropy.", flag=False, minimum=0.0)
    focal: float = setting(1.0, "Weight of the focal loss.", flag=False, minimum=0.0)
    structural: float = setting(
        1.0, "Weight of SSLoss (structural similarity).", flag=False, minimum=0.0
    )
    dice: float = setting(0.0, "Weight of the soft Dice loss.", flag=False, minimum=0.0)
    tversky: float = setting(0.0, "Weight of the Tversky loss.", flag=False, minimum=0.0)
    focal_gamma: float = setting(
        2.0, "Focusing exponent of the focal loss.", flag=False, minimum=0.0
    )
    structural_mode: str = setting(
        "per_pixel",
        "SSLoss weights each pixel's cross-entropy (as published) or its mean (as "
        "released, defect D3).",
        flag=False,
        choices=("per_pixel", "official"),
    )
    tversky_beta: float = setting(
        0.75, "Tversky: weight of false negatives.", flag=False, minimum=0.0, maximum=1.0
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainConfig:
    """What `wsiseg pretrain` does."""

    seed: int = setting(0, "Seed of every random choice.", minimum=0)
    device: str = setting("auto", "auto, cpu, cuda, cuda:0, mps.", affects_result=False)
    val_fraction: float = setting(
        0.1,
        "Share of patients held out for validation where the cohort names no split.",
        minimum=0.0,
        maximum=0.9,
    )
    sample_steps: int = setting(50, "DDIM steps of the sample grids.", flag=False, minimum=2)
    model: UNetConfig = setting(UNetConfig(), "The network.", flag=False)
    diffusion: DiffusionConfig = setting(DiffusionConfig(), "The noising process.", flag=False)
    optim: OptimConfig = setting(OptimConfig(), "The training loop.", flag=False)
    augment: AugmentConfig = setting(
        AugmentConfig(stain_sigma=0.0, blur_probability=0.0, brightness=0.0, contrast=0.0),
        "Augmentations: flips only, so that the model learns the true colours.",
        flag=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneConfig:
    """What `wsiseg finetune` does."""

    seed: int = setting(0, "Seed of every random choice.", minimum=0)
    device: str = setting("auto", "auto, cpu, cuda, cuda:0, mps.", affects_result=False)
    val_fraction: float = setting(
        0.2,
        "Share of patients held out for validation where the cohort names no split.",
        minimum=0.0,
        maximum=0.9,
    )
    timestep: int = setting(
        0,
        "Diffusion time step fed to the network for clean images; 0 as released (defect D8).",
        flag=False,
        minimum=0,
    )
    model: UNetConfig | None = setting(
        None, "The network, used with --from-scratch; otherwise the pretrained one's.", flag=False
    )
    optim: OptimConfig = setting(OptimConfig(), "The training loop.", flag=False)
    augment: AugmentConfig = setting(AugmentConfig(), "Augmentations.", flag=False)
    loss: LossConfig = setting(LossConfig(), "The loss.", flag=False)
