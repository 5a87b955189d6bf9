"""Everything that decides how a run goes: one dataclass, its fields the flags of ``python -m r2d2fast.train``."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


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
    """Passes over the labelled samples. Digits: ours."""

    batch: int
    """Labelled samples in a batch. Digits: ours."""

    lr: float
    """Learning rate at the start; it falls along a cosine. Digits: reference implementation (CIFAR-10)."""

    cosine_epochs: int
    """Epochs after which the cosine reaches zero, at least --stage1.epochs; the reference implementation stops before
    (300 of 350 epochs on CIFAR-10). Digits: ours."""


@dataclass(frozen=True, kw_only=True)
class Stage2:
    """Stage 2: D2 up to the first reprediction, R2 from there on. Momentum is kept throughout."""

    epochs: int
    """Passes over the unlabelled samples, D2 and R2 together. Digits: ours."""

    unlabelled_batch: int
    """Unlabelled samples in a batch; they come first. 75 % of a batch: paper. 96: ours."""

    labelled_batch: int
    """Labelled samples in a batch, after the unlabelled ones. 25 % of a batch: paper. 32: ours."""

    repredict_epochs: Integers
    """Epochs, counted from 0 in the stage, before which the network predicts all pseudo-logits anew; comma separated,
    an empty word for plain D2. Four of them: reference implementation. Their places: ours."""

    lrs: Numbers
    """Learning rates, comma separated: before the first reprediction, then from each reprediction on. 0.12, 0.12, 0.08,
    0.04, 0.004: reference implementation (CIFAR-10)."""


@dataclass(frozen=True, kw_only=True)
class Stage3:
    """Stage 3: fine-tuning on hard labels of all samples."""

    epochs: int
    """Passes over all training samples. Digits: ours."""

    batch: int
    """Samples in a batch. Digits: ours."""

    lr: float
    """Learning rate at the start; it falls along a cosine to zero. 0.01: reference implementation (CIFAR-10)."""

    hard_labels: Literal["repredict", "pseudo"]
    """Labels of unlabelled samples. repredict, the class that the network predicts at the start of the stage: reference
    implementation. pseudo, the class of the learned pseudo-label: paper."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a network with few labels by R2-D2 (Wang & Wu, AAAI 2020), in three stages: supervised; D2 with repeated
    reprediction (R2); fine-tuning on the hard labels found."""

    dataset: str = "digits"
    """Data set, whose recipe gives the defaults below. digits: scikit-learn's 1797 images of 8x8 pixels, embedded."""

    seed: int = 0
    """Seed of initial weights, data order and augmentation."""

    split: int | None = None
    """Number of the split, that is, of the draw of labelled samples. Default: the seed."""

    num_labels: int
    """Labelled samples in all, the same number of each class. Digits: ours."""

    stages: Integers = (1, 2, 3)
    """Stages to run, comma separated: 1, 1,2 or 1,2,3 (each starts from the network of the one before)."""

    run_dir: Path | None = None
    """The run's own directory, for results, curves and checkpoints. Default: runs/DATASET-labelsN-splitN-seedN."""

    resume: bool = False
    """Go on from the last good checkpoint in the run directory; start if there is none."""

    dry_run: bool = False
    """Print the schedule as a table of epochs, and the memory of network and bank; train nothing."""

    device: str = "auto"
    """Where to train: cpu, cuda, cuda:1 ...; auto is cuda where there is one, else cpu."""

    alpha: float = 0.1
    """Weight of the class loss between prediction and pseudo-label. 0.1: paper."""

    beta: float = 0.03
    """Weight of the prediction's entropy. 0.03: paper."""

    class_loss: Literal["kl_reverse", "kl", "mse"] = "kl_reverse"
    """Distance of prediction p and pseudo-label q: kl_reverse, KL(p||q): paper; kl, KL(q||p), and mse: its ablation."""

    label_lr: float
    """Step size of the pseudo-logit update; the effective step is label_lr * alpha / batch, 0.78 in the reference
    implementation (4000 * 0.1 / 512). Digits: 1000, the same effective step for a batch of 128."""

    label_scale: float = 10.0
    """Pseudo-logit of a labelled sample's class, the others being 0. 10: paper."""

    momentum: float = 0.9
    """Nesterov momentum of SGD, every stage. 0.9: reference implementation."""

    weight_decay: float
    """L2 penalty on all parameters, every stage. Digits: ours; CIFAR-10: 2e-4, reference implementation."""

    translate: int
    """Augmentation: largest shift in pixels, down and right. Digits: ours."""

    stage1: Stage1 = field()
    stage2: Stage2 = field()
    stage3: Stage3 = field()
