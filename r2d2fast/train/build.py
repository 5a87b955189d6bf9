"""What a trainer is made of, as a configuration has it."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from r2d2fast import BankError, PseudoLabelBank
from r2d2fast.data import Dataset, Embeddings
from r2d2fast.models import PretrainedError, make_model
from r2d2fast.train.config import Config
from r2d2fast.train.errors import ConfigError
from r2d2fast.train.precision import DTYPES
from r2d2fast.train.ranks import Ranks


def network_arguments(config: Config, shape: tuple[int, ...], num_classes: int) -> dict[str, Any]:
    """What :func:`make_model` is called with, the name of the backbone and weights apart.

    ``shape``: of one input, (C, H, W) of images or (D,) of embeddings.
    """
    return {
        "num_classes": num_classes,
        "in_channels": shape[0],
        "image_size": shape[1] if len(shape) > 1 else 0,
        "bn_groups": config.bn_groups,
        "input_noise": config.input_noise,
        "weight_norm": config.weight_norm,
        "hidden_layer_sizes": config.hidden_layer_sizes,
        "dropout": config.dropout,
        "feature_length": config.feature_length,
    }


def make_network(config: Config, dataset: Dataset, device: torch.device) -> nn.Module:
    """The backbone for the data set's images or embeddings. Raises ConfigError for one that is not there, or takes others."""
    try:
        model = make_model(
            config.backbone,
            **network_arguments(config, dataset.train.shape, dataset.num_classes),
            pretrained=config.pretrained,
        )
    except PretrainedError as error:
        raise ConfigError(f"--pretrained {config.pretrained}: {error}") from error
    except (ValueError, ImportError) as error:
        raise ConfigError(f"--backbone {config.backbone}: {error}") from error
    if isinstance(dataset.train, Embeddings) and config.pretrained is None:
        model.get_submodule("scaling").set_statistics(dataset.train.mean, dataset.train.std)  # type: ignore[operator]
    # Channels last: 1.2 to 1.5 times faster a step on a CPU for the digits network.
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


STORAGES = ("device", "pinned")
"""What --bank-storage takes beside a file."""


def bank_file(config: Config) -> Path | None:
    """The file that ``--bank-storage`` names; None where the bank is in memory, or has no rows as that of stage 1 by itself."""
    storage, path = config.bank_storage, Path(config.bank_storage)
    if storage in STORAGES:
        return None
    if path.is_dir():
        raise ConfigError(f"--bank-storage {storage!r} is a folder; accepted: device, pinned on a GPU, a file in it")
    if path.name == storage and not path.suffix and not path.exists():
        meant = "".join(f"; did you mean {name}?" for name in get_close_matches(storage, STORAGES, 1))
        raise ConfigError(
            f"--bank-storage {storage}: accepted: device, pinned on a GPU, or a file: ./{storage} would be one{meant}"
        )
    if not path.parent.is_dir():
        raise ConfigError(f"--bank-storage {storage}: cannot make the bank file, as there is no folder {path.parent}")
    return None if config.stages == (1,) else path


def make_bank(config: Config, labels: Tensor, num_classes: int, ranks: Ranks) -> PseudoLabelBank:
    """This rank's bank, for its own samples' labels. Raises ConfigError where it cannot be made."""
    file = bank_file(config)
    storage = str(file) if file is not None else "pinned" if config.bank_storage == "pinned" else "device"
    if file is not None and ranks.count > 1:
        storage += f".{ranks.rank}-of-{ranks.count}"  # another number of ranks has files of its own
    dtype = DTYPES[config.bank_dtype]
    try:
        bank = PseudoLabelBank(
            labels,
            num_classes,
            config.label_scale,
            dtype,
            ranks.device,
            storage,
            "nearest" if dtype == torch.float32 else "stochastic",
            config.seed,
        )
    except (ValueError, BankError) as error:
        raise ConfigError(
            f"--bank-storage {config.bank_storage}: {error}; accepted: device, pinned on a GPU, a path"
        ) from error
    bank.sharded = ranks.count > 1
    return bank


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW, whose learning rate, and weight decay if that of stage 2 is another, the trainer sets at every step.

    Its state is there before the first step, for a checkpoint to be loaded into.
    """
    # Fused: a fifth of the time for the digits network on a CPU, and on a GPU a GradScaler needs no look at the device.
    if config.optimizer == "adamw":
        adamw = torch.optim.AdamW(
            model.parameters(), lr=0.0, weight_decay=config.weight_decay, fused=True, capturable=config.cuda_graphs
        )
        for parameter in model.parameters():
            adamw.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return adamw
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=0.0,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
        fused=True,
    )
    if config.momentum > 0:
        # PyTorch leaves it uninitialised where a GradScaler skips the first step.
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
