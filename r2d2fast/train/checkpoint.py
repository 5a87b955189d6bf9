"""Checkpoints that survive a crash, a full disk and a damaged file."""

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

from r2d2fast.train.errors import TrainingError
from r2d2fast.train.files import write_atomically, writing

CURRENT = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"
DIGEST_BYTES = hashlib.sha256().digest_size


def save_checkpoint(directory: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain Python values) as the current checkpoint; the one before it is kept.

    Raises TrainingError where it cannot be written, on a full disk for example; the checkpoints before it stay good.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    # The digest, because a file with a flipped bit can still load, with wrong tensors.
    write_atomically(directory / CURRENT, hashlib.sha256(content).digest() + content, keep_as=directory / PREVIOUS)


def load_checkpoint(directory: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest good checkpoint in ``directory``, on the CPU, and a message for each bad one, damaged or
    unreadable, that was passed over.

    None if there is no checkpoint yet. Raises TrainingError if there are checkpoints and none is good.
    """
    messages: list[str] = []
    for name in (CURRENT, PREVIOUS):
        path = directory / name
        if not path.exists():
            continue
        try:
            content = path.read_bytes()
        except OSError as error:
            messages.append(f"the checkpoint {path} cannot be read: {error.strerror}")
            continue
        if hashlib.sha256(content[DIGEST_BYTES:]).digest() != content[:DIGEST_BYTES]:
            messages.append(f"the checkpoint {path} is damaged: {len(content)} bytes that do not fit their checksum")
            continue
        if messages:
            # In its place, or the next save would keep the bad file instead of this good one.
            with writing(directory / CURRENT):
                os.replace(path, directory / CURRENT)
            messages.append(f"going on from the one before it, {name}, renamed to {CURRENT}")
        return torch.load(io.BytesIO(content[DIGEST_BYTES:]), map_location="cpu", weights_only=True), messages
    if messages:
        raise TrainingError(
            f"{'; '.join(messages)}. No good checkpoint is left: restore one, or remove {directory} and start again."
        )
    return None, []
