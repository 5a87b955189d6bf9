"""The Trainer of Transformers: ``python -m r2d2fast.examples.transformers --directory DIR``, or the same under ``torchrun``.

What matters: the Trainer is given the criterion by ``compute_loss`` and the loader as it is, since the sampler shares the samples
out by itself. The Trainer's checkpoints hold the network in safetensors, which have no place for the bank: a callback writes the
criterion beside it, last, so that a checkpoint without it is one that was cut short. The Trainer divides the loss by
``gradient_accumulation_steps``; the criterion has to know the number for the bank.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

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

CRITERION = "criterion.pt"


class R2D2Trainer(Trainer):
    def __init__(self, network: nn.Module, digits: Digits, accumulate: int, arguments: TrainingArguments) -> None:
        self.sampler = digits.sampler(accumulate, arguments.seed)
        steps, epochs = -(-len(self.sampler) // accumulate), int(arguments.num_train_epochs)
        optimizer = sgd(network, 1.0)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step // steps, epochs))
        super().__init__(network, arguments, train_dataset=digits.train, optimizers=(optimizer, rates))
        self.digits = digits
        self.batches = 0
        self.bank = ShardedPseudoLabelBank(self.sampler, CLASSES)
        self.criterion = FusedD2Loss(self.bank, label_lr=LABEL_LR, gradient_accumulation_steps=accumulate)
        self.add_callback(Epochs(self, network, digits))

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.digits.train, batch_sampler=self.sampler)

    def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Tensor:
        images, index = inputs
        self.batches += 1
        return self.criterion(model(shifted(images, self.batches)), index)


class Epochs(TrainerCallback):
    def __init__(self, trainer: R2D2Trainer, network: nn.Module, digits: Digits) -> None:
        self.trainer = trainer
        self.network = network
        self.digits = digits

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        epoch, sampler, epochs = round(state.epoch), self.trainer.sampler, int(args.num_train_epochs)
        if predicts(epoch, epochs):
            predict(self.network, self.trainer.bank, self.digits, epoch)
        sampler.set_epoch(epoch)
        self.trainer.batches = epoch * len(sampler)

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        criterion = self.trainer.criterion.state_dict()  # on all processes
        if state.is_world_process_zero:
            path = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / CRITERION
            torch.save(criterion, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)


def main(arguments: list[str] | None = None) -> tuple[nn.Module, ShardedPseudoLabelBank]:
    chosen = options(arguments, __doc__)
    digits = Digits(chosen.seed)
    settings = TrainingArguments(
        str(chosen.directory),
        num_train_epochs=chosen.epochs,
        gradient_accumulation_steps=chosen.accumulate,
        max_grad_norm=0.0,
        seed=chosen.seed,
        bf16=chosen.bf16,
        use_cpu=True,
        ddp_backend="gloo" if PROCESSES > 1 else None,
        save_strategy="epoch",
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    network = pretrained(digits, chosen.seed, chosen.stage1_epochs)
    trainer = R2D2Trainer(network, digits, chosen.accumulate, settings)
    whole = [path.parent for path in chosen.directory.glob(f"checkpoint-*/{CRITERION}")]
    last = max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)
    if last is not None:
        trainer.criterion.load_state_dict(torch.load(last / CRITERION, weights_only=True))
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if trainer.is_world_process_zero():
        print(f"test error {digits.test_error(network):.2f} %")
    return network, trainer.bank


if __name__ == "__main__":
    main()
