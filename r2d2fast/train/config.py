"""Everything that decides how a run goes: one dataclass, its fields the flags of ``python -m r2d2fast.train``.

Where a recipe has each of its numbers from is said in recipes.py, and by ``--dry-run``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from r2d2fast.help_texts import with_help_texts
from r2d2fast.image_options import TEST_FRACTION, Decoder, OnBadImage


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


SEEDS = 2**62
"""Seeds, and numbers of splits, are below it."""

TrackerName = Literal["none", "tensorboard", "wandb", "trackio", "mlflow"]
Integers = Annotated[tuple[int, ...], _comma_separated(int)]
Numbers = Annotated[tuple[float, ...], _comma_separated(float)]


@with_help_texts
@dataclass(frozen=True, kw_only=True)
class Stage1:
    """Stage 1: supervised, labelled samples only."""

    epochs: int
    """Number of passes over the labelled samples."""

    batch: int
    """Number of labelled samples in a batch, all ranks together."""

    lr: float
    """Learning rate at the start; it falls along a cosine."""

    cosine_epochs: int
    """Number of epochs after which the cosine reaches zero; it is at least --stage1.epochs."""


@with_help_texts
@dataclass(frozen=True, kw_only=True)
class Stage2:
    """Stage 2: D2 up to the first reprediction, R2 from there on. Momentum is kept throughout."""

    epochs: int
    """Number of passes over the unlabelled samples, D2 and R2 together."""

    unlabelled_batch: int
    """Number of unlabelled samples in a batch, all ranks together; they come first."""

    labelled_batch: int
    """Number of labelled samples in a batch, all ranks together; they come after the unlabelled ones. The paper takes 25 % of a
    batch."""

    repredict_epochs: Integers
    """Epochs before which the network predicts all pseudo-logits anew, counted from 0 in the stage and comma separated; an empty
    word means plain D2."""

    repredict: bool
    """Predict all pseudo-logits anew before --stage2.repredict-epochs. Without, only the learning rate changes there (paper,
    Table 1)."""

    weight_decay: float | None = None
    """The L2 penalty in this stage; None takes that of --weight-decay. Where many samples are labelled a smaller one does less
    harm: the D2 loss is only alpha times as steep as the cross entropy of the other stages."""

    distribution_alignment: bool = False
    """Before predicted logits become pseudo-logits, shift those of each class so that the mean prediction over all unlabelled
    samples stays that of the first prediction (distribution alignment, Berthelot et al., ICLR 2020). Without, the shares of
    classes can drift."""

    labelled_error_limit: float | None = None
    """End the stage, with the network of the prediction before, where the error on the labelled samples is so many points (in
    percent) above that at the beginning of the stage, or 0.3 of the error that stage 1 expects of itself (one minus its mean
    confidence); it is looked at where the network predicts, and at the end. None for never."""

    lrs: Numbers
    """Learning rates, comma separated: the first holds until the first reprediction, each other one from a reprediction on."""

    lr_schedule: Literal["constant", "cosine"] = "constant"
    """Between two predictions the learning rate stays as it is (constant), or falls along a cosine to zero (cosine), so that a
    network that has settled predicts."""


@with_help_texts
@dataclass(frozen=True, kw_only=True)
class Stage3:
    """Stage 3: fine-tuning on hard labels of all samples."""

    epochs: int
    """Number of passes over all training samples."""

    batch: int
    """Number of samples in a batch, all ranks together."""

    lr: float
    """Learning rate at the start; it falls along a cosine to zero."""

    hard_labels: Literal["repredict", "pseudo"]
    """Which labels the unlabelled samples get: with repredict the class that the network predicts at the start of the stage, as
    in the reference implementation; with pseudo the class of the learned pseudo-label, as in the paper."""


@with_help_texts
@dataclass(frozen=True, kw_only=True)
class Unlabelled:
    """The loss on unlabelled samples in stage 2, of methods other than r2d2, whose recipes set what they use."""

    weight: float = 1.0
    """Weight of this loss beside that of the labelled samples."""

    ramp: float = 0.0
    """The share of the stage, 0 to 1, over which the weight rises from next to nothing."""

    threshold: float = 0.95
    """The probability from which on a predicted class is learned (pseudo-label, fixmatch)."""

    eps: float = 8.0
    """Length of the change to an image of 3 x 32 x 32 normalised values (vat); for other sizes it is as large a value."""


@with_help_texts
@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a network with few labels by R2-D2 (Wang & Wu, AAAI 2020), in three stages: supervised; D2 with repeated
    reprediction (R2); fine-tuning on the hard labels found. Or by another --method. Defaults are those of the recipe of the data
    set and the method; --dry-run shows where each is from."""

    dataset: str = "digits"
    """The data set, whose recipe gives the defaults below: digits (scikit-learn's, installed with it), mnist, fashion-mnist,
    svhn, cifar10, cifar100, imagenet, folder (your own images and a file of labels), embeddings (numbers that a pretrained
    network gave your samples, train.npy, and train_labels.npy), or any other one: torchvision:NAME, hf:NAME."""

    method: str = "r2d2"
    """What the unlabelled samples are for: r2d2; supervised leaves them out; pseudo-label, pi-model, temporal-ensembling,
    mean-teacher, vat and fixmatch are what others have proposed, with their authors' recipes. These train in stage 2, from the
    beginning."""

    data_dir: Path = Path("data")
    """The directory of the data set's files. Where they are missing, the error says what belongs there."""

    download: bool = False
    """Download the data set into --data-dir if it is not there and torchvision can."""

    config: Path | None = None
    """A run's own config.json, whose settings are taken in place of the recipe's, so that the run is repeated; flags override
    them. By default the repetition has a run directory of its own."""

    seed: int = 0
    """The seed of initial weights, data order and augmentation."""

    split: int | None = None
    """The number of the split, by which the labelled samples are drawn. By default it is the seed."""

    split_file: Path | None = None
    """A file that names the labelled samples instead, a line of file name and class for each. Its number of lines then takes
    the place of --num-labels."""

    test_fraction: float = TEST_FRACTION
    """Of the labelled images of each class, the share that is kept for tests where a folder has no part for them; 0 for none:
    then all are trained on, and there is no test error."""

    num_labels: int
    """Number of labelled samples, the same of each class, else in proportion; 0 takes every label there is."""

    num_labels_per_class: Integers = ()
    """Number of labelled samples of each class, in place of --num-labels: one for all of them, or comma separated one for each in
    their order. An empty word means --num-labels."""

    stages: Integers = (1, 2, 3)
    """The stages to run, comma separated: 1, 1,2 or 1,2,3; each starts from the network of the one before. With the network of a
    run of stage 1 as --pretrained also 2 or 2,3, which go on as if they had run stage 1 themselves."""

    schedule_scale: float = 1.0
    """Multiply the epochs of all stages by this number, 0.1 say, and with them the length of the cosine and the epochs of the
    repredictions; learning rates stay. A stage's own --stageN.epochs takes what hangs on it along, too."""

    run_dir: Path | None = None
    """The run's own directory, for results, curves and checkpoints. By default it is runs/DATASET-labelsN-splitN-seedN, with
    the method in it where that is not r2d2."""

    resume: bool = False
    """Go on from the last good checkpoint in the run directory, or start if there is none."""

    eval_only: bool = False
    """Print the test error of the last checkpoint's network and train nothing."""

    dry_run: bool = False
    """Print schedule, settings, memory and an estimate of the time, from a few steps of each stage; train nothing."""

    runs: int = 1
    """Number of runs, one after the other, with seeds and splits from --seed and --split on; at the end a table shows mean and
    standard deviation."""

    device: str = "auto"
    """The device to train on: cpu, cuda, cuda:1 and so on; auto is cuda if there is one, else cpu. torchrun's processes take cpu,
    cuda or auto."""

    threads: int = 0
    """Number of CPU threads that compute, for each rank. 0 chooses by the work of a step, at most as many as PyTorch has (the
    cores, or OMP_NUM_THREADS). The last bits of results depend on it, so a resumed run keeps the number that it began with."""

    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The numbers in which the network computes, by autocast; float16 has a GradScaler. auto is bfloat16 on GPUs that have it,
    float16 on others, and float32 on CPUs."""

    compile: bool = False
    """Compile the network with torch.compile; on a GPU it then runs in CUDA graphs."""

    cuda_graphs: bool = False
    """Capture whole steps, from the batch of images in memory to the optimizer, as CUDA graphs: for small networks, whose steps
    are over before Python has begun the next one. Results have the same bits. Off by default, as no GPU has run it yet, and a
    process in which a capture has failed cannot go on without it."""

    deterministic: bool = False
    """Use only operations that give the same bits on every run, and stop with an error where there is none. This is slower on a
    GPU."""

    workers: int = 0
    """Number of processes that load images, for each rank, with imagenet and folder (others are in memory); with 0 the
    trainer does it itself."""

    on_bad_image: OnBadImage = "error"
    """What happens at an image that cannot be decoded (imagenet, folder): the run stops, or it is replaced and counted."""

    decoder: Decoder = "cpu"
    """What decodes and resizes images (imagenet, folder): with cpu the loader processes do; with dali they only read, and the GPU
    decodes by NVIDIA DALI (pip install "r2d2fast[dali]")."""

    log_interval: int = 50
    """Number of steps between two looks at the loss, each of which makes the host wait for the device."""

    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints within an epoch that is longer; there is one at the end of an epoch, too."""

    tracker: TrackerName = "none"
    """Give the metrics of each epoch to a tracker, too (pip install "r2d2fast[tensorboard]", "r2d2fast[wandb]" and so on).
    tensorboard writes into the run directory. Offline: WANDB_MODE=offline; trackio is; MLFLOW_TRACKING_URI=sqlite:///mlflow.db."""

    profile: bool = False
    """Write trace-stage1.json and so on, of a few steps of each stage, into the run directory, for chrome://tracing or
    ui.perfetto.dev."""

    onnx: bool = False
    """Write network.onnx, too, at the end (pip install "r2d2fast[onnx]")."""

    backbone: str
    """The network: small, conv4, lenet2d, convlarge, wrn-28-2, shake26-96, resnet18, torchvision:NAME or timm:NAME; for
    embeddings linear or mlp."""

    pretrained: Path | None = None
    """Weights to start from: a file, safetensors or a PyTorch state_dict, or default: torchvision's or timm's. Photographs have
    the size that these want; small images keep theirs; both are normalised as the weights want."""

    input_noise: bool = False
    """Add noise of standard deviation 0.15 to the images in training (convlarge only; Laine & Aila, 2017)."""

    weight_norm: bool = False
    """Learn length and direction of each weight vector apart (convlarge only; Salimans & Kingma, 2016)."""

    hidden_layer_sizes: Integers = (256,)
    """The widths of the hidden layers, comma separated (mlp only)."""

    dropout: float = 0.0
    """The share of the features that each batch leaves out in training, others every time: the augmentation of embeddings
    (linear and mlp only)."""

    feature_length: float = 10.0
    """The length that each sample is scaled to after its features are standardised (linear and mlp only)."""

    bn_groups: int = 1
    """Number of parts of a batch that batch norm normalises apart in training; 4 does as the reference implementation's four
    GPUs."""

    alpha: float = 0.1
    """The weight of the class loss between prediction and pseudo-label."""

    beta: float = 0.03
    """The weight of the prediction's entropy."""

    class_loss: Literal["kl_reverse", "kl", "mse"] = "kl_reverse"
    """The distance of prediction p and pseudo-label q: kl_reverse is the paper's KL(p||q); KL(q||p), here kl, and mse are in its
    ablation."""

    label_lr: float
    """The step size of the pseudo-logit update; the effective step is label_lr * alpha / batch, 0.78 in the reference
    implementation (4000 * 0.1 / 512)."""

    label_scale: float = 10.0
    """The pseudo-logit of a labelled sample's class; those of other classes are 0."""

    bank_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The type of the pseudo-logits; the 16-bit ones round stochastically, so that small steps add up."""

    bank_storage: str = "device"
    """Where the pseudo-logits are: with device on the device; with pinned in host memory that the GPU's kernel works in; with a
    path, on a CPU, in a file that is mapped."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """What turns gradients into steps, in every stage: SGD, or AdamW with PyTorch's own betas. With adamw the recipe has 0.02
    times the learning rates and 1000 times the weight decay of SGD, as tuned on the digits; embeddings of which many are
    labelled are better with SGD."""

    momentum: float = 0.9
    """The Nesterov momentum of SGD in every stage."""

    weight_decay: float
    """The L2 penalty on all parameters, in every stage unless --stage2.weight-decay says otherwise. That of AdamW is decoupled
    from the gradient."""

    ema: float = 0.0
    """Decay, a step, of an exponential moving average of the weights, anew in each stage, such as 0.999: the average is what
    predicts, is evaluated, and remains when the stage ends. 0 for none."""

    translate: int = 0
    """Shift images that are held in memory by up to so many pixels in each direction, as augmentation."""

    border: Literal["background", "reflect"] = "background"
    """What a shift brings in: empty pixels, or the image mirrored at its border."""

    flip: bool = False
    """Mirror half of the images left to right, as augmentation."""

    cutout: int = 0
    """Set a square of so many pixels a side to the mean, as augmentation in stages 1 and 3; it is clipped at the border, and 0
    means none."""

    image_size: int = 224
    """Side in pixels of the square that the network sees (imagenet, folder). In training it is cut at random, from 8 % of the
    image to all of it. A folder whose images all have one size of at most 64 pixels is trained on as it is."""

    resize: int = 256
    """Shorter side in pixels to which evaluation resizes an image, from whose centre it cuts the square (imagenet, folder)."""

    stage1: Stage1 = field()
    stage2: Stage2 = field()
    stage3: Stage3 = field()
    unlabelled: Unlabelled = Unlabelled()
