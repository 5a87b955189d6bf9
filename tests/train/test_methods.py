"""The methods beside R2-D2: their losses against the definitions, what they ask of the network, and that they resume."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from r2d2fast.data import Augmentation, Embeddings
from r2d2fast.models import frozen_statistics
from r2d2fast.train.errors import ConfigError
from r2d2fast.train.method_recipes import of_method
from r2d2fast.train.methods import METHODS
from r2d2fast.train.methods.ramps import fall, rise
from r2d2fast.train.recipes import OURS, RECIPES, Recipe, flags, override, recipe_for
from r2d2fast.train.schedule import images_seen, make_schedule
from r2d2fast.train.trainer import Position
from tests.train.small_data import (
    CONFIG,
    Calling,
    assert_same_run,
    dataset,
    history_without_times,
    loaded,
    make_trainer,
    saved,
)

U, L = 24, 8
OTHERS = [name for name in METHODS if name != "r2d2"]
MIXED = [name for name in OTHERS if name != "supervised"]


def config_of(method, **changes):
    """Four epochs of four steps."""
    config = of_method(RECIPES["digits"], method).config
    stages = {"stage1": replace(CONFIG.stage1, epochs=4, cosine_epochs=4)}
    stages["stage2"] = replace(config.stage2, epochs=4, unlabelled_batch=U, labelled_batch=L)
    return replace(config, **{"split": 0, "device": "cpu", "num_labels": 8, **stages, **changes})


def cross_entropy(logits, classes):
    return -logits.log_softmax(1).gather(1, classes[:, None]).mean()


def confident(logits, taught):
    """The cross entropy of ``taught`` where ``logits`` are sure of a class, over all of them."""
    p = logits.detach().softmax(1)
    losses = [-taught.log_softmax(1)[i, p[i].argmax()] for i in range(len(p)) if p[i].max() >= 0.95]
    assert 0 < len(losses) < len(p)
    return sum(losses) / len(p)


# Of logits in float64, the labels of the labelled samples, and the logits of calls before. 3/8 of the stage are done.
def pseudo_label(logits, labels, before):
    return cross_entropy(logits[U : U + L], labels) + 0.375 / 0.4 * confident(logits[:U], logits[:U])


def pi_model(logits, labels, before):
    distance = (logits[:U].softmax(1) - logits[U + L :].softmax(1)).square().mean()
    return (cross_entropy(logits[U : U + L], labels) + 100 * distance) * L / (U + L)


def temporal_ensembling(logits, labels, before):
    p, z = logits[:U].softmax(1), 0
    for past in before:
        z = 0.6 * z + 0.4 * past[:U].softmax(1)
    distance = (p - z / (1 - 0.6 ** len(before))).square().mean() if before else 0
    return (cross_entropy(logits[U : U + L], labels) + 30 * distance) * L / (U + L)


def mean_teacher(logits, labels, before):
    distance = (logits[:U].softmax(1) - TARGET.double()).square().mean()
    return cross_entropy(logits[U : U + L], labels) * L / (U + L) + 100 * distance


def vat(logits, labels, before):
    p, q = logits[:U].softmax(1), logits[U + L :].softmax(1)
    divergence = (p.detach() * (p.detach().log() - q.log())).sum(1).mean()
    return cross_entropy(logits[U : U + L], labels) + divergence - (p * p.log()).sum(1).mean()


def fixmatch(logits, labels, before):
    return cross_entropy(logits[U : U + L], labels) + confident(logits[:U], logits[U + L :])


TARGET = torch.randn(U, 4, generator=torch.Generator().manual_seed(1)).softmax(1)
DEFINITIONS = dict(zip(MIXED, (pseudo_label, pi_model, temporal_ensembling, mean_teacher, vat, fixmatch), strict=True))


@pytest.mark.parametrize("method", MIXED)
def test_loss_and_gradient_are_those_of_the_definition(method):
    trainer = make_trainer(config_of(method))
    trainer.position = Position(1, 2)
    trainer.method.target = TARGET
    batch = trainer.batches()[2]
    loss_function = trainer.method.loss_function(trainer.schedule[1])
    before = []
    for _ in range(3):
        logits = 4 * torch.randn(U + L + (U if trainer.method.passes == 2 else 0), 4)
        leaf = logits.double().requires_grad_()
        expected = DEFINITIONS[method](leaf, trainer.labels[batch.samples[U:]], before)
        expected.backward()
        loss, grad = loss_function(logits, batch.samples, U + L)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(grad.double(), leaf.grad, rtol=1e-4, atol=1e-6)
        before.append(leaf.detach())


# --- what a step asks of the network --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", MIXED)
def test_a_step_trains_on_as_many_images_as_are_counted_and_the_second_view_is_another(method):
    trainer = make_trainer(config_of(method))
    epoch, batches = trainer.schedule[0], trainer.batches()
    views = next(trainer.method.views(batches, Augmentation(translate=1), epoch))
    assert [len(view) for view in views] == [U + L, U][: len(views)]
    if len(views) == 2:
        assert not torch.equal(views[0][:U], views[1])
    trainer.network.train()
    seen = images_seen(trainer.config, [epoch], len(trainer.labelled), len(trainer.unlabelled))
    assert len(trainer.method.forward(views)) * epoch.steps == seen


def test_fixmatch_alone_has_a_strong_view():
    weak = Augmentation(translate=1, flip=True)
    strong = replace(weak, randaugment=True, cutout=3)
    kinds = {name: make_trainer(config_of(name, cutout=3)).method.second_augmentation(weak) for name in MIXED}
    assert kinds == dict.fromkeys(MIXED, weak) | {"fixmatch": strong}


@pytest.mark.parametrize("method", ["pseudo-label", "vat"])
def test_running_statistics_are_of_labelled_samples(method):
    trainer = make_trainer(config_of(method))
    alone = make_trainer(config_of(method))
    images = next(trainer.method.views(trainer.batches(), Augmentation(), trainer.schedule[0]))[0]
    for one in (trainer, alone):
        one.network.train()
    trainer.method.forward((images,))
    alone.network(images[U:])
    for norm, expected in zip(trainer.model.modules(), alone.model.modules(), strict=True):
        if isinstance(norm, nn.BatchNorm2d):
            assert torch.equal(norm.running_var, expected.running_var)
            assert norm.track_running_stats


def test_the_teacher_predicts_the_second_view_by_averaged_weights_and_is_left_as_it_is():
    trainer = make_trainer(config_of("mean-teacher"))
    trainer.run_epoch()
    teacher = trainer.averaged.model
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    views = torch.rand(U + L, 1, 8, 8), torch.rand(U, 1, 8, 8)
    trainer.method.forward(views)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    with torch.no_grad(), frozen_statistics(teacher):
        torch.testing.assert_close(trainer.method.target, teacher.train()(views[1]).softmax(1))


def test_a_virtual_adversarial_change_is_a_power_step_of_the_given_length():
    """For softmax(Wx) the divergence's Hessian is Wᵀ(diag p − ppᵀ)W, so that r is along that times a random direction."""
    trainer = make_trainer(config_of("vat"))
    trainer.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).double()
    images = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    torch.manual_seed(3)
    direction = torch.randn_like(images).flatten(1)
    torch.manual_seed(3)
    change = trainer.method.perturbation(images).flatten(1)
    weight, p = trainer.model[1].weight.detach(), trainer.model(images).detach().softmax(1)
    for row, d, q in zip(change, direction, p, strict=True):
        along = weight.T @ (torch.diag(q) - q[:, None] * q) @ weight @ d
        torch.testing.assert_close(row, 8 * math.sqrt(64 / 3072) * along / along.norm(), rtol=1e-3, atol=1e-5)


def test_statistics_are_frozen_only_while_asked_for():
    norm = nn.BatchNorm2d(2)
    images = torch.randn(6, 2, 3, 3)
    with frozen_statistics(norm):
        frozen = norm(images)
    assert not norm.running_mean.any()
    assert norm.num_batches_tracked == 0
    assert torch.equal(frozen, norm(images))
    assert norm.running_mean.all()


# --- ramps ----------------------------------------------------------------------------------------------------------


def test_ramps_against_hand_computed_values():
    assert [rise(t, 0.4) for t in (0, 0.2, 0.4, 1)] == pytest.approx([math.exp(-5), math.exp(-1.25), 1, 1])
    assert rise(0.5, 0) == 1
    assert [fall(t, 0.5) for t in (0, 0.5, 0.75, 1)] == pytest.approx([1, 1, math.exp(-3.125), math.exp(-12.5)])


@pytest.mark.parametrize(
    ("method", "progress", "lr", "beta1"),
    [
        ("supervised", 0.5, 1.0, None),
        ("pseudo-label", 0.5, math.cos(7 * math.pi / 32), None),
        ("fixmatch", 1.0, math.cos(7 * math.pi / 16), None),
        ("mean-teacher", 1.0, 0.5 * (1 + math.cos(math.pi * 6 / 7)), None),
        ("pi-model", 0.0, math.exp(-5), 0.9),
        ("pi-model", 0.5, 1.0, 0.9),
        ("temporal-ensembling", 11 / 12, math.exp(-12.5 / 4), 0.5 + 0.4 * math.exp(-12.5 / 4)),
        ("vat", 0.5, 1.0, 0.9),
        ("vat", 0.96, 0.5, 0.5),
    ],
)
def test_learning_rates_are_the_authors_own(method, progress, lr, beta1):
    group = make_trainer(config_of(method)).method.param_group(1.0, progress)
    assert group["lr"] == pytest.approx(lr)
    assert group.get("betas", (None,))[0] == pytest.approx(beta1)


# --- runs -----------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


@pytest.mark.parametrize("method", OTHERS)
def test_a_run_stopped_within_an_epoch_goes_on_to_the_same_bits_and_learns(method):
    config = config_of(method)
    whole = make_trainer(config)
    whole.fit()
    stopped = make_trainer(config)

    def stop():
        if stopped.position == (2, 1):
            raise Stopped

    stopped.callback = Calling(stop)
    with pytest.raises(Stopped):
        stopped.fit()
    resumed = loaded(config, saved(stopped))
    resumed.fit()
    assert_same_run(resumed, whole)
    assert [row["stage"] for row in whole.history] == [max(config.stages)] * 4
    losses = [row["train_loss"] for row in history_without_times(whole)]
    assert all(math.isfinite(loss) for loss in losses)
    assert len(set(losses)) == 4


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_network_in_16_bits_has_a_virtual_adversarial_change_too(precision):
    trainer = make_trainer(config_of("vat", precision=precision))
    assert math.isfinite(trainer.run_epoch()["train_loss"])


# --- recipes and refusals -------------------------------------------------------------------------------------------

ADAM = {"optimizer": "adamw", "weight_decay": 0.0, "ema": 0.0}
AUTHORS = {
    "pseudo-label": {"unlabelled.ramp": 0.4, "unlabelled.threshold": 0.95, "stage2.lrs": (0.03,), "weight_decay": 5e-4},
    "pi-model": ADAM | {"unlabelled.weight": 100.0, "unlabelled.ramp": 80 / 300, "stage2.lrs": (0.003,)},
    "temporal-ensembling": ADAM | {"unlabelled.weight": 30.0, "stage2.epochs": 300, "stage2.lrs": (0.003,)},
    "mean-teacher": {"unlabelled.weight": 100.0, "ema": 0.97, "stage2.lrs": (0.05,), "stage2.epochs": 180},
    "vat": ADAM | {"unlabelled.eps": 8.0, "stage2.lrs": (0.001,)},
    "fixmatch": {"unlabelled.threshold": 0.95, "ema": 0.999, "stage2.lrs": (0.03,), "weight_decay": 5e-4},
}


@pytest.mark.parametrize("method", MIXED)
def test_a_recipe_has_the_authors_numbers_and_names_them(method):
    recipe = of_method(RECIPES["cifar10"], method)
    values = flags(recipe.config)
    assert {flag: values[flag] for flag in AUTHORS[method]} == AUTHORS[method]
    assert all(recipe.sources[flag] != OURS for flag in AUTHORS[method].keys() - {"ema"})
    assert not any(flag.startswith(("alpha", "label_lr", "stage1.", "stage3.")) for flag in recipe.sources)
    two = recipe.config.stage2
    assert two.unlabelled_batch + two.labelled_batch == 512
    assert two.labelled_batch / 512 == pytest.approx(METHODS[method].labelled_share, abs=8 / 512)
    assert flags(of_method(RECIPES["svhn"], "vat").config)["unlabelled.eps"] == 3.5
    cosine = override(RECIPES["cifar10"].config, {"stage2.lr_schedule": "cosine"})
    assert of_method(Recipe(cosine, {}), method).config.stage2.lr_schedule == "constant"


def test_adamw_is_asked_for_beside_a_method_s_own_optimizer(tmp_path):
    assert recipe_for("digits", optimizer="adamw", method="vat").config == of_method(RECIPES["digits"], "vat").config
    assert recipe_for("digits", optimizer="adamw", method="fixmatch").config.stage2.lrs == pytest.approx((0.03 * 0.02,))
    with pytest.raises(ConfigError, match="--method vatt: unknown; accepted: r2d2, supervised, pseudo-label"):
        recipe_for("digits", method="vatt")


def test_what_a_method_cannot_learn_with_is_refused():
    embeddings = Embeddings(torch.randn(120, 6), torch.device("cpu"))
    data = replace(dataset(), train=embeddings, test=embeddings)
    on_embeddings = {"backbone": "linear", "translate": 0, "dropout": 0.5}
    for method, message in (
        ("vat", "--method vat: changes pixels by --unlabelled.eps"),
        ("fixmatch", "--method fixmatch: its strong view, RandAugment, is of images held in memory"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_trainer(config_of(method, **on_embeddings), data)
    trainer = make_trainer(config_of("pi-model", **on_embeddings), data)
    trainer.network.train()
    views = next(trainer.method.views(trainer.batches(), Augmentation(), trainer.schedule[0]))
    logits = trainer.method.forward(views)
    assert not torch.equal(logits[:U], logits[U + L :])  # by dropout, which takes the place of augmentation
    for changes, message in (
        ({"ema": 0.0}, "--ema 0: mean-teacher learns from averaged weights"),
        ({"stages": (2, 3)}, "--stages 2,3: accepted are 1,2 and 2 with --method mean-teacher"),
        ({"unlabelled": replace(CONFIG.unlabelled, ramp=1.5)}, "--unlabelled.ramp 1.5: must be 0 to 1"),
        ({"unlabelled": replace(CONFIG.unlabelled, weight=-1.0)}, "--unlabelled.weight -1.0: must be at least 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_trainer(config_of("mean-teacher", **changes))
    two = replace(config_of("vat").stage2, repredict_epochs=(2,), lrs=(0.1, 0.1))
    with pytest.raises(ConfigError, match=r"--stage2\.repredict-epochs 2: --method vat has none"):
        make_trainer(config_of("vat", stage2=two))


def test_images_seen_of_all_stages_of_r2d2():
    # 8 labelled samples twice; 4 epochs of 4 batches of 24 + 5; 120 samples twice.
    assert images_seen(CONFIG, make_schedule(CONFIG, 8, 112), 8, 112) == 16 + 464 + 240
