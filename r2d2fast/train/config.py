"""Everything that decides how a run goes: one dataclass, its fields the flags of ``python -m r2d2fast.train``.

Where a recipe has each of its numbers from is said in recipes.py, and by ``--dry-run``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from r2d2fast.data.photographs.load import Decoder, OnBadImage


def _comma_separated(convert: Callable[[str], Any]) -> Any:
    """How tyro reads and shows a tuple given as one word: ``1,2,3``; an empty word is an empty tuple."""
    name = convert.__name__.upper()
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{name},{name},...",
        instance_from_str=lambda words: tuple(convert(part) for part in words[0].split(",") if part),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(str(part) for part in value)],
    )


Integers = Annotated[tuple[int, ...], _comma_separated(int)]
Numbers = Annotated[tuple[float, ...], _comma_separated(float)]


@dataclass(frozen=True, kw_only=True)
class Stage1:
    """Stage 1: supervised, labelled samples only."""

    epochs: int
    """Passes over the labelled samples."""

    batch: int
    """Labelled samples in a batch, of all ranks together."""

    lr: float
    """Learning rate at the start; it falls along a cosine."""

    cosine_epochs: int
    """Epochs after which the cosine reaches zero, at least --stage1.epochs."""


@dataclass(frozen=True, kw_only=True)
class Stage2:
    """Stage 2: D2 up to the first reprediction, R2 from there on. Momentum is kept throughout."""

    epochs: int
    """Passes over the unlabelled samples, D2 and R2 together."""

    unlabelled_batch: int
    """Unlabelled samples in a batch, of all ranks together; they come first."""

    labelled_batch: int
    """Labelled samples in a batch, of all ranks together, after the unlabelled ones; the paper takes 25 % of a batch."""

    repredict_epochs: Integers
    """Epochs, counted from 0 in the stage, before which the network predicts all pseudo-logits anew; comma separated,
    an empty word for plain D2."""

    repredict: bool
    """Predict anew before --stage2.repredict-epochs; without, only the learning rate changes there (paper, Table 1)."""

    lrs: Numbers
    """Learning rates, comma separated: before the first reprediction, then from each reprediction on."""


@dataclass(frozen=True, kw_only=True)
class Stage3:
    """Stage 3: fine-tuning on hard labels of all samples."""

    epochs: int
    """Passes over all training samples."""

    batch: int
    """Samples in a batch, of all ranks together."""

    lr: float
    """Learning rate at the start; it falls along a cosine to zero."""

    hard_labels: Literal["repredict", "pseudo"]
    """Labels of unlabelled samples. repredict, the class that the network predicts at the start of the stage: reference
    implementation. pseudo, the class of the learned pseudo-label: paper."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a network with few labels by R2-D2 (Wang & Wu, AAAI 2020), in three stages: supervised; D2 with repeated
    reprediction (R2); fine-tuning on the hard labels found. Defaults are those of the data set's recipe; --dry-run shows
    where each is from."""

    dataset: str = "digits"
    """Data set, whose recipe gives the defaults below: digits (scikit-learn's 1797 images of 8x8 pixels, embedded), mnist,
    fashion-mnist, svhn, cifar10, cifar100, imagenet, or folder (your own images and a file of labels)."""

    data_dir: Path = Path("data")
    """Where the data set's files are; what belongs there is said where they are missing."""

    download: bool = False
    """Download the data set into --data-dir where it is not there and torchvision may."""

    seed: int = 0
    """Seed of initial weights, data order and augmentation."""

    split: int | None = None
    """Number of the split, that is, of the draw of labelled samples. Default: the seed."""

    split_file: Path | None = None
    """Labelled samples from a file instead, a line of file name and class each; --num-labels then is their number."""

    num_labels: int
    """Labelled samples in all, the same number of each class; 0 takes every label there is."""

    stages: Integers = (1, 2, 3)
    """Stages to run, comma separated: 1, 1,2 or 1,2,3 (each starts from the network of the one before). With the network of a
    run of stage 1 as --pretrained also 2 or 2,3, which go on as if they had run stage 1 themselves."""

    run_dir: Path | None = None
    """The run's own directory, for results, curves and checkpoints. Default: runs/DATASET-labelsN-splitN-seedN."""

    resume: bool = False
    """Go on from the last good checkpoint in the run directory; start if there is none."""

    eval_only: bool = False
    """Print the test error of the last checkpoint's network, and train nothing."""

    dry_run: bool = False
    """Print schedule, settings, memory and an estimate of the time, from a few steps of each stage; train nothing."""

    runs: int = 1
    """Runs one after the other, with seeds (and splits) from --seed (and --split) on, and a table of mean and std at the end."""

    device: str = "auto"
    """Where to train: cpu, cuda, cuda:1 ...; auto is cuda where there is one, else cpu. Under torchrun: cpu, cuda or auto."""

    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the network's arithmetic, by autocast; float16 with a GradScaler. auto: bfloat16 on GPUs that have it, float16 on
    others, float32 on CPUs."""

    compile: bool = False
    """Compile the network with torch.compile, on a GPU with CUDA graphs."""

    deterministic: bool = False
    """Only operations that give the same bits on every run; an error where there is none. Slower on a GPU."""

    workers: int = 0
    """Processes that load images, of each rank, for imagenet and folder (others are in memory); 0: the trainer itself."""

    on_bad_image: OnBadImage = "error"
    """What an image that cannot be decoded does (imagenet, folder): stop the run, or be replaced and counted."""

    decoder: Decoder = "cpu"
    """What decodes and resizes images (imagenet, folder): cpu, the loader processes; dali, the GPU by NVIDIA DALI, for which they
    only read (pip install "r2d2fast[dali]")."""

    log_interval: int = 50
    """Steps between two looks at the loss, each of which makes the host wait for the device."""

    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints in epochs longer than that; there is one at the end of an epoch, too."""

    tensorboard: bool = False
    """Write metrics for TensorBoard, too, into the run directory (pip install "r2d2fast[tensorboard]")."""

    profile: bool = False
    """Write trace-stage1.json and so on, of a few steps of each stage, into the run directory, for chrome://tracing or
    ui.perfetto.dev."""

    onnx: bool = False
    """Write network.onnx, too, at the end (pip install "r2d2fast[onnx]")."""

    backbone: str
    """Network: small, lenet2d, convlarge, shake26-96, resnet18, torchvision:NAME or timm:NAME."""

    pretrained: Path | None = None
    """Weights to start from, safetensors or a PyTorch state_dict; a classifier of other classes is left out."""

    bn_groups: int = 1
    """Parts of a batch that batch norm normalises apart, in training; 4 as the reference implementation's four GPUs do."""

    alpha: float = 0.1
    """Weight of the class loss between prediction and pseudo-label."""

    beta: float = 0.03
    """Weight of the prediction's entropy."""

    class_loss: Literal["kl_reverse", "kl", "mse"] = "kl_reverse"
    """Distance of prediction p and pseudo-label q: kl_reverse, KL(p||q): paper; kl, KL(q||p), and mse: its ablation."""

    label_lr: float
    """Step size of the pseudo-logit update; the effective step is label_lr * alpha / batch, 0.78 in the reference
    implementation (4000 * 0.1 / 512)."""

    label_scale: float = 10.0
    """Pseudo-logit of a labelled sample's class, the others being 0."""

    bank_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the pseudo-logits; the 16-bit ones round stochastically, so that small steps add up."""

    bank_storage: str = "device"
    """Where the pseudo-logits are: device; pinned, host memory that the GPU's kernel works in; or, on a CPU, a path, a mapped
    file."""

    momentum: float = 0.9
    """Nesterov momentum of SGD, every stage."""

    weight_decay: float
    """L2 penalty on all parameters, every stage."""

    translate: int = 0
    """Augmentation: largest shift in pixels, down and right (images held in memory)."""

    border: Literal["background", "reflect"] = "background"
    """What a shift brings in: empty pixels, or the image mirrored."""

    flip: bool = False
    """Augmentation: mirror half of the images left to right."""

    cutout: int = 0
    """Augmentation of stages 1 and 3: side of a square that is set to the mean, clipped at the border; 0 for none."""

    image_size: int = 224
    """Side of the square that the network sees, in pixels (imagenet, folder); cut at random from scale 0.08 to 1 in training."""

    resize: int = 256
    """Shorter side of an image from whose centre evaluation cuts the square, in pixels (imagenet, folder)."""

    stage1: Stage1 = field()
    stage2: Stage2 = field()
    stage3: Stage3 = field()
