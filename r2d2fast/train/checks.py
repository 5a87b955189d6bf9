"""Which numbers a configuration may hold: all checks that need no more than the configuration and the size of the data."""

from dataclasses import fields

import torch

from r2d2fast.data import mixed_steps, shuffled_steps
from r2d2fast.train.config import SEEDS, Config
from r2d2fast.train.errors import ConfigError
from r2d2fast.train.methods import METHODS

LARGEST = torch.finfo(torch.float32).max


def check_values(config: Config, shape: tuple[int, ...], ranks: int) -> None:
    """Raise ConfigError for the first value that lies outside its range, of all stages that ``config`` runs.

    ``shape``: (C, H, W) of images, (D,) of embeddings. ``ranks``: the number of processes.
    """
    one, two, three = config.stage1, config.stage2, config.stage3
    from_zero: dict[str, tuple[float, ...]] = {
        "--alpha": (config.alpha,),
        "--beta": (config.beta,),
        "--label-lr": (config.label_lr,),
        "--weight-decay": (config.weight_decay,),
    }
    from_one: dict[str, int] = {"--log-interval": config.log_interval, "--bn-groups": config.bn_groups}
    multiples: dict[str, int] = {}
    if 1 in config.stages:
        from_zero["--stage1.lr"] = (one.lr,)
        from_one |= {"--stage1.epochs": one.epochs, "--stage1.batch": one.batch}
    if 2 in config.stages:
        from_zero["--stage2.lrs"] = two.lrs
        from_one |= {
            "--stage2.epochs": two.epochs,
            "--stage2.unlabelled-batch": two.unlabelled_batch,
            "--stage2.labelled-batch": two.labelled_batch,
        }
        multiples = {name: from_one[name] for name in ("--stage2.unlabelled-batch", "--stage2.labelled-batch")}
        if two.weight_decay is not None:
            from_zero["--stage2.weight-decay"] = (two.weight_decay,)
        if two.labelled_error_limit is not None:
            from_zero["--stage2.labelled-error-limit"] = (two.labelled_error_limit,)
        other = config.unlabelled
        from_zero |= {"--unlabelled.weight": (other.weight,), "--unlabelled.eps": (other.eps,)}
        for flag, share in {"--unlabelled.ramp": other.ramp, "--unlabelled.threshold": other.threshold}.items():
            _require(0 <= share <= 1, flag, share, "0 to 1")
    if 3 in config.stages:
        from_zero["--stage3.lr"] = (three.lr,)
        from_one |= {"--stage3.epochs": three.epochs, "--stage3.batch": three.batch}

    for flag, values in from_zero.items():
        good = all(0 <= value <= LARGEST for value in values)
        _require(good, flag, ",".join(map(str, values)), "at least 0, and finite as float32")
    _require(0 < config.label_scale <= LARGEST, "--label-scale", config.label_scale, "above 0, and finite as float32")
    _require(0 <= config.momentum < 1, "--momentum", config.momentum, "at least 0 and below 1")
    if config.optimizer == "adamw":
        usual = Config.momentum
        _require(
            config.momentum == usual, "--momentum", config.momentum, f"{usual} with --optimizer adamw, which has none"
        )
    _require(0 <= config.ema < 1, "--ema", config.ema, "at least 0 and below 1")
    if len(shape) > 1:
        side = min(shape[1:])
        _require(0 <= config.translate < side, "--translate", config.translate, f"0 to {side - 1} pixels")
    else:
        for flag, value in {"--translate": config.translate, "--flip": config.flip, "--cutout": config.cutout}.items():
            _require(not value, flag, value, "off for embeddings, whose augmentation is --dropout")
    _require(0 <= config.dropout < 1, "--dropout", config.dropout, "at least 0 and below 1")
    _require(0 < config.feature_length <= LARGEST, "--feature-length", config.feature_length, "above 0, and finite")
    sizes = ",".join(map(str, config.hidden_layer_sizes))
    _require(all(size > 0 for size in config.hidden_layer_sizes), "--hidden-layer-sizes", sizes, "1 or more each")
    _require(config.threads >= 0, "--threads", config.threads, "at least 0")
    _require(config.cutout >= 0, "--cutout", config.cutout, "at least 0 pixels")
    _require(config.checkpoint_minutes > 0, "--checkpoint-minutes", config.checkpoint_minutes, "above 0")
    for flag, number in {"--seed": config.seed, "--split": config.split}.items():
        _require(number is None or 0 <= number < SEEDS, flag, number, f"0 to {SEEDS - 1}")
    for flag, count in from_one.items():
        if count < 1:
            way_out = "; leave a whole stage out with --stages" if flag.startswith("--stage") else ""
            raise ConfigError(f"{flag} {count}: must be at least 1{way_out}")
    for flag, count in multiples.items():
        if count % ranks:
            raise ConfigError(
                f"{flag} {count}: must be a multiple of the {ranks} processes, or run another number of them"
            )


def check_photographs(config: Config) -> None:
    """Raise ConfigError for what images that are decoded and cropped at random cannot have."""
    _require(config.workers >= 0, "--workers", config.workers, "at least 0")
    _require(
        1 <= config.image_size <= config.resize, "--image-size", config.image_size, f"1 to --resize {config.resize}"
    )
    for flag, pixels in (("--translate", config.translate), ("--cutout", config.cutout)):
        _require(pixels == 0, flag, pixels, "0 for photographs, which are cropped at random")


def check_small_images(config: Config, side: int) -> None:
    """Raise ConfigError for what images of at most 64 pixels, which are kept as they are, cannot have."""
    defaults = {field.name: field.default for field in fields(Config)}
    for name in ("image_size", "resize"):
        flag, pixels = "--" + name.replace("_", "-"), getattr(config, name)
        if pixels not in (defaults[name], side):
            raise ConfigError(
                f"{flag} {pixels}: all images of this folder have one size of at most 64 pixels, and are trained on as they are; "
                "leave the flag out, or resize the files"
            )


def check_schedule(config: Config, labelled: int, unlabelled: int, ranks: int) -> None:
    """Raise ConfigError where numbers do not fit one another, or so many samples and processes."""
    one, two = config.stage1, config.stage2
    method = METHODS[config.method]
    with_weights = {stages for stages in method.stages if method.predicts and stages[0] == 2}
    if config.stages not in method.stages or (config.stages in with_weights and not config.pretrained):
        raise ConfigError(
            f"--stages {','.join(map(str, config.stages))}: accepted are {_listed(set(method.stages) - with_weights)}"
            + (
                f", and with --pretrained {_listed(with_weights)}"
                if with_weights
                else f" with --method {config.method}"
            )
            + "; each stage starts from the network of the one before"
        )
    if one.cosine_epochs < one.epochs:
        raise ConfigError(
            f"--stage1.cosine-epochs {one.cosine_epochs}: must be at least --stage1.epochs, {one.epochs}, "
            "or the learning rate would rise again"
        )
    for stage, batch, samples in ((1, one.batch, labelled), (3, config.stage3.batch, labelled + unlabelled)):
        if stage in config.stages and batch < 2 * ranks:
            raise ConfigError(
                f"--stage{stage}.batch {batch}: must be at least {2 * ranks}, two for each process, for batch norm"
            )
        if stage in config.stages and shuffled_steps(samples, batch, ranks) == 0:
            raise ConfigError(
                f"stage {stage} has {samples} samples, which make no batch: at least {2 * ranks} are needed, "
                "two for each process"
            )
    if 2 not in config.stages:
        return
    if mixed_steps(unlabelled, two.unlabelled_batch, ranks) == 0:
        raise ConfigError(
            f"--stage2.unlabelled-batch {two.unlabelled_batch}: there are only {unlabelled} unlabelled samples"
            + (f", dealt to {ranks} processes" if ranks > 1 else "")
            + "; take smaller batches, fewer --num-labels, or --stages 1"
        )
    starts = two.repredict_epochs
    if starts and not method.predicts:
        raise ConfigError(
            f"--stage2.repredict-epochs {','.join(map(str, starts))}: --method {config.method} has none; leave it out"
        )
    if list(starts) != sorted(set(starts)) or any(not 0 < start < two.epochs for start in starts):
        raise ConfigError(
            f"--stage2.repredict-epochs {','.join(map(str, starts))}: must rise, and lie between 1 and "
            f"{two.epochs - 1}, the last of the {two.epochs} epochs of --stage2.epochs"
        )
    if len(two.lrs) != len(starts) + 1:
        raise ConfigError(
            f"--stage2.lrs {','.join(map(str, two.lrs))}: {len(two.lrs)} learning rates, {len(starts)} repredictions; "
            f"needed are {len(starts) + 1} learning rates, one before the first reprediction and one from each on"
        )


def _listed(choices: set[tuple[int, ...]]) -> str:
    *others, last = (",".join(map(str, stages)) for stages in sorted(choices))
    return f"{', '.join(others)} and {last}" if others else last


def _require(good: bool, flag: str, value: object, accepted: str) -> None:
    if not good:
        raise ConfigError(f"{flag} {value}: must be {accepted}; without the flag it is the recipe's own")
