"""A loop of one's own on two processes: a sampler and a bank that belong together (data/sharded.py)."""

import copy
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset, TensorDataset

from r2d2fast import (
    BankError,
    FusedD2Loss,
    PseudoLabelBank,
    ShardedBatchSampler,
    ShardedPseudoLabelBank,
    d2_step,
    with_index,
)
from r2d2fast.data import BatchSampler
from tests.processes import starting

SAMPLES, CLASSES, UNLABELLED_EACH, LABELLED_EACH, STEPS = 101, 7, 6, 2, 2
"""STEPS: batches of a process that are accumulated before a step of the optimizer."""


def make_data():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SAMPLES, 5, generator=generator)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    labels[torch.rand(SAMPLES, generator=generator) < 0.8] = -1
    return x, labels


def make_network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, CLASSES))


def train(network, bank, sampler, epochs=2):
    """The loop of the documentation, on this process's batches; the bank is repredicted at each epoch."""
    x, _ = make_data()
    data = with_index(TensorDataset(x))
    criterion = FusedD2Loss(bank, label_lr=300.0, gradient_accumulation_steps=STEPS)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2)
    for epoch in range(epochs):
        own = bank.repartition(epoch)
        with torch.no_grad():
            for inputs, index in DataLoader(Subset(data, own), 16):
                bank.predict_(index, network(inputs))
        sampler.set_epoch(epoch)
        for step, (inputs, index) in enumerate(DataLoader(data, batch_sampler=sampler)):
            (criterion(network(inputs), index) / STEPS).backward()
            if step % STEPS == STEPS - 1:
                optimizer.step()
                optimizer.zero_grad()


def train_alone(network, epochs=2):
    """The same in one process with a whole bank: both processes' batches are one."""
    x, labels = make_data()
    bank = PseudoLabelBank(labels, CLASSES)
    criterion = FusedD2Loss(bank, label_lr=300.0, gradient_accumulation_steps=STEPS)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2)
    samplers = [ShardedBatchSampler(labels, UNLABELLED_EACH, LABELLED_EACH, 1, rank, 2) for rank in (0, 1)]
    for epoch in range(epochs):
        with torch.no_grad():
            bank.predict_(torch.arange(SAMPLES), network(x))
        for sampler in samplers:
            sampler.partition.deal(epoch)
            sampler.set_epoch(epoch)
        for step, batches in enumerate(zip(*samplers, strict=True)):
            index = torch.tensor([*batches[0], *batches[1]])
            (criterion(network(x[index]), index) / STEPS).backward()
            if step % STEPS == STEPS - 1:
                optimizer.step()
                optimizer.zero_grad()
    return bank


def train_on_two(arguments):
    """What each of the two processes does; it writes what it has at the end."""
    kind, rank, directory = arguments[0], int(arguments[1]), Path(arguments[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    _, labels = make_data()
    network = make_network()
    if kind == "ddp":
        network = DistributedDataParallel(network)
    else:
        fully_shard(network, mesh=dist.init_device_mesh("cpu", (2,)))
    sampler = ShardedBatchSampler(labels, UNLABELLED_EACH, LABELLED_EACH, seed=1)
    bank = ShardedPseudoLabelBank(sampler, CLASSES, full_state_dict=False)
    train(network, bank, sampler)
    weights = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in network.parameters()]
    own = bank.partition.samples
    outcome = {"weights": weights, "own": own, "rows": bank.logits(own), "hard": bank.hard_labels()}
    dcp.save({"criterion": FusedD2Loss(bank).state_dict()}, checkpoint_id=directory / "checkpoint")
    sampler = ShardedBatchSampler(labels, UNLABELLED_EACH, LABELLED_EACH, seed=1)
    again = ShardedPseudoLabelBank(sampler, CLASSES, full_state_dict=False)
    state = {"criterion": FusedD2Loss(again).state_dict()}
    dcp.load(state, checkpoint_id=directory / "checkpoint")
    FusedD2Loss(again).load_state_dict(state["criterion"])
    outcome["loaded"] = again.logits(own)
    bank.full_state_dict = True
    outcome["state"] = FusedD2Loss(bank).state_dict()
    # A whole bank says what it does wrong here, once.
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        whole = PseudoLabelBank(labels, CLASSES)
        for _ in range(2):
            d2_step(torch.zeros(1, CLASSES), torch.tensor([0]), whole)
        d2_step(torch.zeros(1, CLASSES), own[:1], bank)
    outcome["warnings"] = [str(warning.message) for warning in caught]
    torch.save(outcome, directory / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def start():
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with starting(__name__) as start:
        yield start


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does(kind, start, tmp_path, one_thread):
    processes = [start(train_on_two, kind, rank, tmp_path) for rank in (0, 1)]
    network = make_network()
    bank = train_alone(network)
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    outcomes = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for outcome in outcomes:
        for ours, expected in zip(outcome["weights"], network.parameters(), strict=True):
            torch.testing.assert_close(ours, expected.detach())
        torch.testing.assert_close(outcome["rows"], bank.logits(outcome["own"]))
        assert torch.equal(outcome["hard"], bank.hard_labels())
        assert torch.equal(outcome["loaded"], outcome["rows"])
        (warning,) = outcome["warnings"]
        assert "2 processes" in warning
        assert "ShardedPseudoLabelBank" in warning
    together = torch.cat([outcome["own"] for outcome in outcomes])
    assert sorted(together.tolist()) == (make_data()[1] < 0).nonzero()[:, 0].tolist()

    # Either process alone has what one process, or two others, need to go on: as frameworks write it.
    for outcome in outcomes:
        alone = ShardedPseudoLabelBank(ShardedBatchSampler(make_data()[1], 6, 2, seed=1), CLASSES)
        FusedD2Loss(alone).load_state_dict(outcome["state"])
        torch.testing.assert_close(alone.logits(torch.arange(SAMPLES)), bank.logits(torch.arange(SAMPLES)))

    # One process takes the checkpoint of both over.
    sampler = ShardedBatchSampler(make_data()[1], UNLABELLED_EACH, LABELLED_EACH, seed=1)
    loaded = ShardedPseudoLabelBank(sampler, CLASSES)
    state = {"criterion": FusedD2Loss(loaded).state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    FusedD2Loss(loaded).load_state_dict(state["criterion"])
    torch.testing.assert_close(loaded.logits(torch.arange(SAMPLES)), bank.logits(torch.arange(SAMPLES)))


class TestAlone:
    """What one process shows of one of two."""

    def make(self, rank=0, **options):
        sampler = ShardedBatchSampler(make_data()[1], 6, 2, seed=1, rank=rank, ranks=2)
        return sampler, ShardedPseudoLabelBank(sampler, CLASSES, **options)

    def test_batches_are_those_of_the_trainer_s_sampler(self):
        _, labels = make_data()
        sampler, bank = self.make(rank=1)
        bank.repartition(3)
        sampler.set_epoch(4)
        labelled, unlabelled = (labels >= 0).nonzero()[:, 0], (labels < 0).nonzero()[:, 0]
        expected = BatchSampler(labelled, unlabelled, 1, 1, 2).mixed((12, 4), 4, 4, 3)
        batches = list(sampler)
        assert batches == [batch.samples.tolist() for batch in expected]
        assert len(batches) == len(sampler)
        assert all((labels[batch] < 0).tolist() == [True] * 6 + [False] * 2 for batch in batches)

    def test_the_memory_is_shared_out(self):
        _, bank = self.make()
        assert len(bank) == SAMPLES
        assert len(bank.pseudo_logits) == -(-int((make_data()[1] < 0).sum()) // 2)

    def test_a_repartition_leaves_no_row_to_another_sample(self):
        _, bank = self.make()
        before = bank.partition.samples.tolist()
        bank.pseudo_logits.normal_()
        own = bank.repartition(1)
        assert own != before
        assert not bank.pseudo_logits.any()
        bank.predict_(torch.tensor(own[:1]), torch.ones(1, CLASSES))
        assert torch.equal(bank.logits(torch.tensor(own[:1])), torch.ones(1, CLASSES))

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_samples_of_other_processes_are_named(self, dtype):
        _, bank = self.make()
        foreign = self.make(rank=1)[1].partition.samples[0]
        own = bank.partition.samples[0]
        for number, message in (
            (foreign, rf"index\[1\] is sample {foreign}, whose pseudo-label another process owns"),
            (SAMPLES, rf"index\[1\] is {SAMPLES}, but the bank holds samples 0 … {SAMPLES - 1}"),
            (-1, r"index\[1\] is -1"),
        ):
            index = torch.tensor([own, number], dtype=dtype)
            for call in (
                lambda index: FusedD2Loss(bank)(torch.ones(2, CLASSES), index),
                lambda index: FusedD2Loss(bank).step(torch.ones(2, CLASSES), index),
                lambda index: d2_step(torch.ones(2, CLASSES), index, bank),
                lambda index: bank.predict_(index, torch.ones(2, CLASSES)),
                lambda index: bank.probs(index),
            ):
                with pytest.raises(IndexError, match=message):
                    call(index)
        assert not bank.pseudo_logits.any()

    def test_a_compiled_step_takes_the_data_set_s_numbers(self):
        outcomes = []
        for compiled in (False, True):
            _, bank = self.make()
            criterion = FusedD2Loss(bank, label_lr=100.0)
            call = torch.compile(criterion, fullgraph=True, backend="aot_eager") if compiled else criterion
            loss = call(torch.linspace(0, 1, 4 * CLASSES).view(4, CLASSES), bank.partition.samples[-4:])
            outcomes.append((loss, bank.pseudo_logits))
        for ours, expected in zip(*outcomes, strict=True):
            torch.testing.assert_close(ours, expected)
        assert outcomes[0][1][-4:].any(1).all()

    def test_the_update_is_divided_by_the_global_batch(self):
        _, bank = self.make()
        own, logits = bank.partition.samples[:4], torch.randn(4, CLASSES)
        FusedD2Loss(bank, label_lr=100.0)(logits, own)
        whole = PseudoLabelBank(make_data()[1], CLASSES)
        FusedD2Loss(whole, label_lr=100.0, update_normalizer=8.0)(logits, own)
        assert torch.equal(bank.logits(own), whole.logits(own))

    def test_check_names_the_data_set_s_sample(self):
        _, bank = self.make(rank=1)
        bank.pseudo_logits[2, 0] = float("nan")
        with pytest.raises(BankError, match=f"first that of sample {bank.partition.samples[2]};"):
            bank.check()

    def test_a_copy_of_one_in_a_file_has_its_rows_on_the_device(self, tmp_path):
        _, bank = self.make(storage=tmp_path / "bank")
        bank.pseudo_logits.normal_()
        for copied in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
            assert (bank.storage, copied.storage) == (tmp_path / "bank", "device")
            assert torch.equal(copied.logits(bank.partition.samples), bank.pseudo_logits)

    def test_a_move_takes_the_numbers_along(self):
        _, bank = self.make()
        bank.to("meta")
        assert bank.partition.local.device.type == "meta"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"rank": 2, "ranks": 2}, r"rank is 2 of 2 processes; it must be 0 … 1"),
            ({"batch_size": 0}, "batch_size is 0"),
            ({"labelled_batch_size": -1}, "labelled_batch_size is -1"),
            ({"batch_size": 1000}, "batch_size 1000 on each of 1 processes: .* fill not one batch"),
            ({"labels": [-1] * 20}, "labelled_batch_size is 2, of 0 labelled samples"),
        ],
    )
    def test_batches_that_cannot_be_made_are_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            ShardedBatchSampler(**{"labels": make_data()[1], "batch_size": 6, "labelled_batch_size": 2, **arguments})

    def test_the_state_of_another_seed_or_kind_is_refused(self):
        _, labels = make_data()
        one, other = (ShardedPseudoLabelBank(ShardedBatchSampler(labels, 6, 2, seed=seed), CLASSES) for seed in (1, 2))
        with pytest.raises(BankError, match="other labels or another seed"):
            one.load_state_dict(other.state_dict())
        with pytest.raises(BankError, match="no sharded bank's"):
            one.load_state_dict(PseudoLabelBank(labels, CLASSES).state_dict())
        one.repartition(5)
        one.pseudo_logits.normal_()
        other = ShardedPseudoLabelBank(ShardedBatchSampler(labels, 6, 2, seed=1), CLASSES)
        other.load_state_dict(one.state_dict())
        assert torch.equal(other.logits(torch.arange(SAMPLES)), one.logits(torch.arange(SAMPLES)))

    def test_a_plain_bank_says_which_kind_takes_the_state(self):
        sampler = ShardedBatchSampler(make_data()[1], 6, 2, seed=1)
        state = ShardedPseudoLabelBank(sampler, CLASSES).state_dict()
        plain = PseudoLabelBank(make_data()[1], CLASSES)
        with pytest.raises(BankError, match=r"of a ShardedPseudoLabelBank.* any number of processes") as refused:
            plain.load_state_dict(state)
        assert "other labels" not in str(refused.value)

    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_process_takes_its_part_of_a_bank_of_one(self, rank):
        one = ShardedPseudoLabelBank(ShardedBatchSampler(make_data()[1], 6, 2, seed=1), CLASSES)
        one.repartition(5)
        one.pseudo_logits.normal_()
        _, bank = self.make(rank=rank)
        state = one.state_dict()
        bank.load_state_dict(state)
        own = bank.partition.samples
        assert bank.partition.prediction == 5
        assert torch.equal(bank.logits(own), one.logits(own))
