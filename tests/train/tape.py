"""A stand-in for CUDA graphs that runs on a CPU: what is captured has no effect until it is replayed, and a replay does again
what was captured, in the same memory and with the numbers that Python had then. Memory that was there before it keeps no more
alive than a graph does: a replay that would read what has been freed fails."""

from contextlib import contextmanager

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from r2d2fast import FusedD2Loss


class Borrowed:
    """A tensor in memory that somebody else has to keep."""

    def __init__(self, tensor):
        self.memory = StorageWeakRef(tensor.untyped_storage())
        self.dtype, self.place = tensor.dtype, (tensor.storage_offset(), tensor.shape, tensor.stride())

    def tensor(self):
        assert not self.memory.expired(), "what a captured step reads has been freed"
        storage = torch.UntypedStorage._new_with_weak_ptr(self.memory.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.place)


class Tape:
    """Takes the place of ``torch.cuda.CUDAGraph``."""

    def __init__(self):
        self.calls = []
        self.replays = 0
        self.own = set()  # the memory of what was made while it was captured, which is kept

    def record(self, function, arguments, keywords):
        given = tree_map(self.borrowed, (arguments, keywords))
        outputs = function(*arguments, **keywords)
        before = {
            one.untyped_storage().data_ptr()
            for one in tree_flatten((arguments, keywords))[0]
            if isinstance(one, torch.Tensor)
        }
        for one in tree_flatten(outputs)[0]:
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in before:
                self.own.add(one.untyped_storage().data_ptr())
        self.calls.append((function, given, outputs))
        return outputs

    def borrowed(self, argument):
        if isinstance(argument, torch.Tensor) and argument.untyped_storage().data_ptr() not in self.own:
            return Borrowed(argument)
        return argument

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for function, given, outputs in self.calls:
            arguments, keywords = tree_map(lambda one: one.tensor() if isinstance(one, Borrowed) else one, given)
            fresh = function(*arguments, **keywords)
            for tensor, value in zip(tree_flatten(outputs)[0], tree_flatten(fresh)[0], strict=True):
                # A view, or an argument that was written to, is up to date already; an empty one is filled by a later call.
                if isinstance(tensor, torch.Tensor) and value.numel() and tensor.data_ptr() != value.data_ptr():
                    tensor.copy_(value)


class _Recording(TorchDispatchMode):
    def __init__(self, tape, keep):
        super().__init__()
        self.tape, self.keep = tape, keep

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        # The running statistics of batch norm are written to without a word in the schema.
        if function._schema.is_mutable or function is torch.ops.aten.native_batch_norm.default:
            for argument in tree_flatten((arguments, keywords))[0]:
                self.keep(argument)
        return self.tape.record(function, arguments, keywords or {})


@contextmanager
def capture(tape, stream=None, capture_error_mode=None):
    """Takes the place of ``torch.cuda.graph``. All that is written to meanwhile is put back in the end."""
    before = {}

    def keep(argument):
        if isinstance(argument, torch.Tensor) and argument.untyped_storage().data_ptr() not in before:
            storage = argument.untyped_storage()
            before[storage.data_ptr()] = storage, storage.clone()

    d2_step = FusedD2Loss.step

    def step(loss, logits, index, grad_scale=1.0, out=None):
        # The kernel is no operator of PyTorch's; and what the loss is given may be other numbers by the time of the replay.
        options = loss._options(grad_scale)

        def call(logits, index):
            now, loss._options = loss._options, lambda _: options
            try:
                return d2_step(loss, logits, index, grad_scale, None if out is None else logits)
            finally:
                loss._options = now

        with _disable_current_modes():
            for tensor in (loss.bank.pseudo_logits, loss.bank.updates, loss.statistics):
                keep(tensor)
            return tape.record(call, (logits.detach(), index), {})

    FusedD2Loss.step = step
    try:
        with torch.random.fork_rng(devices=[]), _Recording(tape, keep):
            yield
    finally:
        FusedD2Loss.step = d2_step
        for storage, values in before.values():
            storage.copy_(values)
