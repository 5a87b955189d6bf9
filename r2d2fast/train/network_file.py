"""What ``network.safetensors`` says of its network: all that it takes to use it where the run is not."""

import json

from r2d2fast.train.build import network_arguments
from r2d2fast.train.trainer import Trainer


def describe_network(trainer: Trainer) -> dict[str, str]:
    """The metadata of the file.

    ``backbone`` and ``arguments`` (JSON), of :func:`r2d2fast.models.make_model`; ``classes`` (JSON), the name of each;
    ``preprocessing`` (JSON), of :class:`r2d2fast.data.Preprocessing`; ``precision``, the numbers in which the run evaluated;
    ``dataset``.
    """
    config, data = trainer.config, trainer.data
    return {
        "backbone": config.backbone,
        "arguments": json.dumps(network_arguments(config, data.train.shape, data.num_classes)),
        "classes": json.dumps(list(data.class_names)),
        "preprocessing": data.train.preprocessing.to_json(),
        "precision": trainer.precision.name,
        "dataset": config.dataset,
    }
