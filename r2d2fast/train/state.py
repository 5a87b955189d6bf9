"""What a checkpoint holds: everything on which the rest of a run depends."""

from typing import Any

import torch

from r2d2fast.train.errors import ConfigError
from r2d2fast.train.trainer import Position, Trainer


def tensors(trainer: Trainer) -> dict[str, Any]:
    """The tensors of the state, which share memory with the trainer's; rows of samples in the order of the partition."""
    state = trainer.optimizer.state
    names = trainer.model.named_parameters()
    optimizer = {f"{name}.{key}": tensor for name, p in names for key, tensor in state.get(p, {}).items()}
    return {
        "network": trainer.model.state_dict(),
        "optimizer": optimizer,
        "averaged": {} if trainer.averaged is None else trainer.averaged.model.state_dict(),
        **trainer.method.tensors(),
    }


def values(trainer: Trainer) -> dict[str, Any]:
    """The rest of the state, as plain values for JSON."""
    return {
        "position": trainer.position,
        "history": trainer.history,
        "losses": trainer.mean_losses().tolist(),
        "method": trainer.method.values(),
        "seconds": trainer.seconds(),
        "scaler": trainer.precision.scaler.state_dict(),
        "precision": trainer.precision.name,
        "threads": trainer.threads,
        "ranks": trainer.ranks.count,
        "classes": list(trainer.data.class_names),
    }


def load_values(trainer: Trainer, values: dict[str, Any]) -> None:
    """Take over what :func:`values` gave; then the tensors can be loaded into those that :func:`tensors` gives.

    Raises ConfigError where --threads is not the number with which the run began.
    """
    # On another number of ranks the last bits are others anyway.
    if values["ranks"] == trainer.ranks.count:
        if trainer.config.threads not in (0, values["threads"]):
            raise ConfigError(
                f"--threads {trainer.config.threads}: this run began with {values['threads']}, on which its results depend; "
                "go on without the flag, or name another --run-dir"
            )
        trainer.threads = values["threads"]
    trainer.history = values["history"]
    epoch, step = values["position"]
    trainer.go_to(epoch)
    # On another number of ranks an epoch can be a step or two shorter.
    step = min(step, len(trainer.losses))
    trainer.position = Position(epoch, step)
    trainer.losses[:step] = torch.tensor(values["losses"][:step])
    trainer.seconds_before = values["seconds"]
    trainer.method.load_values(values["method"])
    if values["scaler"]:  # not if auto was another precision on the machine before
        trainer.precision.scaler.load_state_dict(values["scaler"])
