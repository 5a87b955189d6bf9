"""A loop with Accelerate: ``python -m r2d2fast.examples.accelerate --directory DIR``, or the same under ``torchrun``.

What matters: ``prepare`` network and optimizer, not the loader, whose sampler shares the samples out by itself; register the
criterion for checkpointing, with which ``save_state`` and ``load_state`` carry the bank. ``accelerator.backward`` divides the
loss by the accumulated batches; the criterion has to know their number for the bank. ``accumulate`` goes on over
the end of an epoch where only a prepared loader would tell it of that: batches that make no step of their own are left out.
"""

import shutil
from itertools import islice

from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from r2d2fast import FusedD2Loss, ShardedPseudoLabelBank
from r2d2fast.examples.digits import (
    CLASSES,
    LABEL_LR,
    Digits,
    learning_rate,
    options,
    predict,
    predicts,
    pretrained,
    sgd,
    shifted,
)


def main(arguments: list[str] | None = None) -> tuple[nn.Module, ShardedPseudoLabelBank]:
    chosen = options(arguments, __doc__)
    accelerator = Accelerator(
        cpu=True,
        mixed_precision="bf16" if chosen.bf16 else "no",
        gradient_accumulation_steps=chosen.accumulate,
    )
    digits = Digits(chosen.seed)
    network = pretrained(digits, chosen.seed, chosen.stage1_epochs)
    sampler = digits.sampler(chosen.accumulate, chosen.seed)
    bank = ShardedPseudoLabelBank(sampler, CLASSES)
    criterion = FusedD2Loss(bank, label_lr=LABEL_LR, gradient_accumulation_steps=chosen.accumulate)
    loader = DataLoader(digits.train, batch_sampler=sampler)
    model, optimizer = accelerator.prepare(network, sgd(network, learning_rate(0, chosen.epochs)))
    accelerator.register_for_checkpointing(criterion)

    first = 0
    saved = sorted(chosen.directory.glob("epoch-*"))
    if saved:
        accelerator.load_state(saved[-1])
        first = int(saved[-1].name.removeprefix("epoch-"))
    for epoch in range(first, chosen.epochs):
        if predicts(epoch, chosen.epochs):
            predict(network, bank, digits, epoch)
        sampler.set_epoch(epoch)
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch, chosen.epochs)
        batches = len(loader) // chosen.accumulate * chosen.accumulate
        for step, (images, index) in enumerate(islice(loader, batches), 1):
            with accelerator.accumulate(model):
                loss = criterion(model(shifted(images, epoch * len(loader) + step)), index)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        # Whole or not there: it gets its name when all processes have written.
        temporary = chosen.directory / "temporary"
        accelerator.save_state(temporary)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            temporary.rename(chosen.directory / f"epoch-{epoch + 1:04}")
            shutil.rmtree(chosen.directory / f"epoch-{epoch:04}", ignore_errors=True)
    accelerator.print(f"test error {digits.test_error(network):.2f} %")
    accelerator.end_training()
    return network, bank


if __name__ == "__main__":
    main()
