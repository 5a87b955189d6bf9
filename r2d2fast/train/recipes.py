"""The published and our own recipes: a complete configuration for each data set, the defaults of its command line."""

from r2d2fast.train.config import Config, Stage1, Stage2, Stage3

# Where each number comes from is said beside its meaning, in the field's docstring in config.py.
RECIPES: dict[str, Config] = {
    "digits": Config(
        dataset="digits",
        num_labels=50,
        label_lr=1000.0,
        weight_decay=1e-3,
        translate=1,
        stage1=Stage1(epochs=200, batch=25, lr=0.05, cosine_epochs=200),
        stage2=Stage2(
            epochs=120,
            unlabelled_batch=96,
            labelled_batch=32,
            repredict_epochs=(60, 75, 90, 105),
            lrs=(0.12, 0.12, 0.08, 0.04, 0.004),
        ),
        stage3=Stage3(epochs=15, batch=128, lr=0.01, hard_labels="repredict"),
    ),
}
