"""How the recipe for embeddings follows the numbers of samples and labels, for R2D2Classifier and the command line alike."""

import math
from dataclasses import replace

from r2d2fast.train.config import Config

# Passes over the labelled samples in stage 1, and steps, of which there are at least so many.
STAGE1_EPOCHS, STAGE1_STEPS = 20, 300
# The learning rate of stage 2. At that of a linear classifier hidden layers can make all samples one class.
STAGE2_LR = {"linear": 1.0, "mlp": 0.3}
# Steps of a pass over the unlabelled samples, where these are enough for that many batches of this size.
STAGE2_STEPS, SMALL_BATCH = 20, 64


def fit_to_samples(config: Config, labelled: int, unlabelled: int, num_classes: int) -> Config:
    """The recipe ``config``, perhaps with other values, for so many samples.

    Stage 1 gets longer where labels are few. Of fewer samples batches are smaller, with the same share of labelled ones, and the
    label step with them. Predictions divide stage 2 into as many parts as it has learning rates, of which the first counts. Its
    weight decay, which harms where many samples are labelled, is 10 / L of stage 1's, with L the labelled samples a class, but no
    larger and at least a tenth. Where all samples are labelled there is stage 1 alone.
    """
    from r2d2fast.data import shuffled_steps  # it brings PyTorch with it, for which no --help needs to wait

    one, two = config.stage1, config.stage2
    epochs = max(STAGE1_EPOCHS, math.ceil(STAGE1_STEPS / max(shuffled_steps(labelled, one.batch, 1), 1)))
    batch = two.unlabelled_batch + two.labelled_batch
    unlabelled_batch = max(min(two.unlabelled_batch, unlabelled // STAGE2_STEPS), min(unlabelled, SMALL_BATCH), 1)
    labelled_batch = max(round(unlabelled_batch * two.labelled_batch / two.unlabelled_batch), 1)
    phases = len(two.lrs)
    starts = sorted({two.epochs * phase // phases for phase in range(1, phases)} - {0})
    return replace(
        config,
        stages=config.stages if unlabelled else (1,),
        label_lr=config.label_lr * (unlabelled_batch + labelled_batch) / batch,
        stage1=replace(one, epochs=epochs, cosine_epochs=epochs),
        stage2=replace(
            two,
            unlabelled_batch=unlabelled_batch,
            labelled_batch=labelled_batch,
            repredict_epochs=tuple(starts),
            lrs=two.lrs[:1] * (len(starts) + 1),
            weight_decay=config.weight_decay * min(max(10 * num_classes / labelled, 0.1), 1.0),
        ),
    )
