"""Within an epoch the host reads no value of a tensor, for which it would have to wait were the tensor on a GPU."""

from dataclasses import replace

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.train.small_data import CONFIG, make_trainer


class ReadByTheHost(TorchDispatchMode):
    """The operations for whose values the host would wait, were the tensors on a GPU."""

    READING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        if name.startswith(self.READING):
            self.found.append(name)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("position", [0, 2, 6])
def test_between_two_looks_at_the_loss_the_host_reads_nothing(position, precision):
    found = {}
    for interval in (1, 1000):
        trainer = make_trainer(replace(CONFIG, log_interval=interval, precision=precision))
        trainer.go_to(position)
        epoch, batches = trainer.schedule[position], trainer.batches()
        with ReadByTheHost() as reading:
            trainer.train(batches)
        found[interval] = len(reading.found)
    # The operator for CPU tensors reads the scale of float16, twice a step; a GPU's kernel does so by itself.
    assert found[1000] == (2 * epoch.steps if epoch.stage == 2 and precision == "float16" else 0)
    assert found[1] > found[1000]
