"""A trained network as bytes, for other programs to use."""

import copy
import json
from collections.abc import Mapping

import safetensors.torch
import torch
from torch import nn


def export_safetensors(model: nn.Module, metadata: Mapping[str, str]) -> bytes:
    """The ``state_dict`` as the content of a ``.safetensors`` file; :func:`load_pretrained` reads it.

    Args:
        model: on any device, in any memory format.
        metadata: written to the file's header, for people and programs: backbone, classes, normalisation.

    Returns:
        The same bytes for the same network and metadata.
    """
    # Each a copy of its own: the format knows neither strides nor tensors that share memory.
    tensors = {
        key: torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format).copy_(tensor)
        for key, tensor in model.state_dict().items()
    }
    content = safetensors.torch.save(tensors)
    # The library writes metadata in a random order. The header's length, 8 bytes, comes first; then the header, padded so that
    # tensors are aligned; then the tensors, from whose beginning their offsets count.
    end = 8 + int.from_bytes(content[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(content[8:end])}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(content)[end:]])


def export_onnx(model: nn.Module, shape: tuple[int, ...]) -> bytes:
    """The network in eval mode as the content of an ``.onnx`` file, up to 2 GB.

    Its input is ``images``, float32 ``[batch, C, H, W]`` with any number of images, or ``embeddings``, ``[batch, D]``; its output
    ``logits`` ``[batch, N]``.

    Args:
        model: on any device; it is left as it is.
        shape: (C, H, W) or (D,).

    Raises:
        ImportError: without the packages that PyTorch needs for it.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("ONNX needs onnx and onnxscript: pip install 'r2d2fast[onnx]'") from error
    # Here and not in torch.onnx, which would write a fixed number of images where it finds no other way. Two images in the
    # example, because one would be taken for a constant.
    program = torch.export.export(
        copy.deepcopy(model).cpu().eval(),
        (torch.zeros(2, *shape),),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    exported = torch.onnx.export(
        program,
        input_names=["images" if len(shape) == 3 else "embeddings"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
        dynamo=True,
        verbose=False,
    )
    assert exported is not None
    return exported.model_proto.SerializeToString()
