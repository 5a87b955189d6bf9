"""Lightning's Trainer: ``python -m r2d2fast.examples.lightning --directory DIR``, or the same under ``torchrun``.

What matters: the criterion is a submodule, so that Lightning's checkpoints carry the bank. The sampler shares the samples out by
itself: ``use_distributed_sampler=False``. Reprediction comes at the end of an epoch, before Lightning saves and makes the next
epoch's batches. Lightning divides the loss by ``accumulate_grad_batches``; the criterion has to know the number for the bank.
"""

from argparse import Namespace

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from r2d2fast import FusedD2Loss, ShardedPseudoLabelBank
from r2d2fast.examples.digits import (
    CLASSES,
    LABEL_LR,
    PROCESSES,
    Digits,
    learning_rate,
    options,
    predict,
    predicts,
    pretrained,
    sgd,
    shifted,
)


class R2D2(lightning.LightningModule):
    def __init__(self, network: nn.Module, digits: Digits, chosen: Namespace) -> None:
        super().__init__()
        self.network = network
        self.digits = digits
        self.chosen = chosen

    def setup(self, stage: str) -> None:
        # Here, because the processes know of each other now.
        self.sampler = self.digits.sampler(self.chosen.accumulate, self.chosen.seed)
        self.bank = ShardedPseudoLabelBank(self.sampler, CLASSES)
        self.criterion = FusedD2Loss(self.bank, label_lr=LABEL_LR, gradient_accumulation_steps=self.chosen.accumulate)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.digits.train, batch_sampler=self.sampler)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.network, learning_rate(0, self.chosen.epochs))

    def on_train_start(self) -> None:
        if self.current_epoch == 0:
            predict(self.network, self.bank, self.digits, 0)

    def on_train_epoch_start(self) -> None:
        self.sampler.set_epoch(self.current_epoch)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = learning_rate(self.current_epoch, self.chosen.epochs)

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        images, index = batch
        step = self.current_epoch * len(self.sampler) + number + 1
        return self.criterion(self.network(shifted(images, step)), index)

    def on_train_epoch_end(self) -> None:
        if predicts(self.current_epoch + 1, self.chosen.epochs):
            predict(self.network, self.bank, self.digits, self.current_epoch + 1)


def main(arguments: list[str] | None = None) -> tuple[nn.Module, ShardedPseudoLabelBank]:
    chosen = options(arguments, __doc__)
    digits = Digits(chosen.seed)
    network = pretrained(digits, chosen.seed, chosen.stage1_epochs)
    trainer = lightning.Trainer(
        max_epochs=chosen.epochs,
        accelerator="cpu",
        devices=PROCESSES,
        strategy="ddp" if PROCESSES > 1 else "auto",
        precision="bf16-mixed" if chosen.bf16 else "32-true",
        accumulate_grad_batches=chosen.accumulate,
        use_distributed_sampler=False,
        callbacks=[ModelCheckpoint(chosen.directory, filename="last", enable_version_counter=False)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = chosen.directory / "last.ckpt"
    module = R2D2(network, digits, chosen)
    trainer.fit(
        module,
        ckpt_path=last if last.exists() else None,
        weights_only=True if last.exists() else None,
    )
    if trainer.is_global_zero:
        print(f"test error {digits.test_error(network):.2f} %")
    return network, module.bank


if __name__ == "__main__":
    main()
