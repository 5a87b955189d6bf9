"""``python -m r2d2fast.doctor``: the report of a healthy machine, and whether a broken backend is found."""

import functools
import json
from collections import Counter

import pytest
import torch
from rich.console import Console

from r2d2fast import machine
from r2d2fast._backends import cpu
from r2d2fast.doctor import cli, findings, speed, text
from r2d2fast.doctor.behaviour import CHECKS
from r2d2fast.doctor.inputs import StepInputs, step_inputs

SMALL = [inputs for inputs in step_inputs(quick=True) if inputs.batch * inputs.classes < 6000]
expected_once = functools.cache(cli._expected)
needs_cpu_kernels = pytest.mark.skipif(not cpu.status().available, reason="the C++ kernels are not built here")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Small cases: a pool of threads only waits where other programs use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """(exit status, JSON, text) of a quick run of everything that is here."""
    file = tmp_path_factory.mktemp("doctor") / "report.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_expected", expected_once)
        console = Console(record=True, width=130, highlight=False)
        patch.setattr(cli, "Console", lambda **_: console)
        status = cli.main(["--quick", "--device", "cpu", "--json", str(file)])
    return status, json.loads(file.read_text()), console.export_text()


def test_a_healthy_machine_passes(report):
    status, found, shown = report
    assert status == 0
    assert found["passed"]
    assert not [check for check in found["checks"] if check["problem"] is not None]
    for target in found["examined"]:
        assert f"right  {target}" in shown
    assert "wrong" not in shown


def test_the_json_is_complete(report):
    _, found, _ = report
    assert set(found) == {"passed", "quick", "environment", "backends", "examined", "checks", "speed"}
    assert {"r2d2fast", "python", "torch", "triton", "cpu", "gpu_driver", "gpus", "nvcc", "compiler"} <= set(
        found["environment"]
    )
    assert list(found["backends"]) == ["reference", "cpu", "cuda", "triton"]
    assert all(set(status) == {"available", "detail"} for status in found["backends"].values())
    counts = {target: Counter() for target in found["examined"]}
    for check in found["checks"]:
        counts[f"{check['backend']} on {check['device']}"][check["kind"]] += 1
    for count in counts.values():
        hard = {"duplicates", "labelled rows", "rows not finite", "gaps of 1e4", "stochastic rounding"}
        assert hard | {"random"} | set(CHECKS) <= set(count)
    errors = [check["error"] for check in found["checks"] if check["error"] is not None]
    assert max(errors) <= 1 < 2 * max(errors)


def test_speed_is_a_fraction_of_a_copy_and_kernels_are_not_guessed(report):
    _, found, shown = report
    assert [one["backend"] for one in found["speed"]] == [target.split()[0] for target in found["examined"]]
    for one in found["speed"]:
        assert one["bytes"] == 16 * one["batch"] * one["classes"]
        assert one["gb_per_second"] == pytest.approx(one["bytes"] / one["seconds"] * 1e-9)
        assert one["copy_fraction"] > 0
        assert one["kernels"] is None
        assert one["kernels_note"] == "no GPU"
    assert "of copy's speed" in shown


def test_backends_that_are_not_here_are_named_with_what_to_do(report):
    _, found, shown = report
    for name, status in found["backends"].items():
        assert status["detail"]
        if not status["available"]:
            assert f"{name} " in shown
            assert "not available" in shown


def wrong_gradient(step, logits, index, bank, p, statistics, out):
    loss, grad = step(logits, index, bank, p, statistics, out)
    return loss, grad * 1.01


def wrong_last_row(step, logits, index, bank, p, statistics, out):
    loss, grad = step(logits, index, bank, p, statistics, out)
    grad[-1:] = grad[:1]
    return loss, grad


def sixteen_bit_gradient(step, logits, index, bank, p, statistics, out):
    loss, grad = step(logits, index, bank, p, statistics, out)
    return loss, grad.bfloat16().to(grad.dtype)


def wrong_loss(step, logits, index, bank, p, statistics, out):
    loss, grad = step(logits, index, bank, p, statistics, out)
    return loss * (1 + 1e-5), grad


def forgotten_update(step, logits, index, bank, p, statistics, out):
    bank.updates += p.update
    return step(logits, index, bank, p._replace(update=False), statistics, out)


def update_too_far(step, logits, index, bank, p, statistics, out):
    return step(logits, index, bank, p._replace(label_lr=p.label_lr * 1.01), statistics, out)


def touches_another_row(step, logits, index, bank, p, statistics, out):
    result = step(logits, index, bank, p, statistics, out)
    others = torch.ones(len(bank.pseudo_logits), dtype=torch.bool)
    others[bank.slots[index.clamp(0, len(bank.slots) - 1).long()].clamp_min(0).long()] = False
    bank.pseudo_logits[others] += 1e-3
    return result


def step_not_counted(step, logits, index, bank, p, statistics, out):
    result = step(logits, index, bank, p, statistics, out)
    bank.updates.zero_()
    return result


def first_duplicate_wins(step, logits, index, bank, p, statistics, out):
    loss, grad = step(logits.flip(0), index.flip(0), bank, p, statistics, out)
    return loss, grad.flip(0)


def hides_bad_rows(step, logits, index, bank, p, statistics, out):
    loss, grad = step(logits, index, bank, p, statistics, out)
    return loss, grad.nan_to_num()


def rounds_to_nearest(step, logits, index, bank, p, statistics, out):
    rounding, bank.rounding = bank.rounding, "nearest"
    try:
        return step(logits, index, bank, p, statistics, out)
    finally:
        bank.rounding = rounding


def ignores_scalars_in_tensors(step, logits, index, bank, p, statistics, out):
    return step(logits, index, bank, p._replace(beta=0.0) if isinstance(p.beta, torch.Tensor) else p, statistics, out)


def raises(step, logits, index, bank, p, statistics, out):
    raise RuntimeError("no such kernel image")


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("broken", "kind", "problem"),
    [
        (wrong_gradient, "random", "the gradient is wrong, first differing row 0 (sample "),
        (wrong_last_row, "random", "the gradient is wrong, first differing row 36 (sample "),
        (sixteen_bit_gradient, "random", "the gradient is wrong, first differing row 0 (sample "),
        (wrong_loss, "random", "the loss is wrong: "),
        (forgotten_update, "random", "the bank is wrong, first differing row "),
        (update_too_far, "random", "the bank is wrong, first differing row "),
        (touches_another_row, "labelled rows", "a row of no sample in the batch is wrong, first differing row "),
        (step_not_counted, "random", "the bank counts 0 updates instead of 1"),
        (first_duplicate_wins, "duplicates", "the bank is wrong, first differing row "),
        (hides_bad_rows, "rows not finite", "the gradient is wrong, first differing row 0 (sample "),
        (rounds_to_nearest, "stochastic rounding", "of the bank is rounded otherwise than the definition says"),
        (ignores_scalars_in_tensors, "scalars in tensors", "the loss is wrong: "),
        (raises, "random", "raised RuntimeError: no such kernel image"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_step_is_found(monkeypatch, capsys, tmp_path, broken, kind, problem):
    monkeypatch.setattr(cpu, "step", functools.partial(broken, cpu.step))
    status, checks, shown = examine(monkeypatch, capsys, tmp_path, rules=False)
    failed = [check for check in checks if check["problem"] is not None]
    assert status == 1
    assert problem in " ".join(check["problem"] for check in failed if check["kind"] == kind)
    assert "float32 logits, float32 bank, kl" in failed[0]["inputs"] or kind == "stochastic rounding"
    assert "wrong  cpu on cpu" in shown
    assert "failed cpu on cpu: " in shown


def forgets_upstream(grad, grad_output, grad_scale, keep):
    return grad


def predicts_nothing(bank, index, logits):
    return 0, -1


def accepts_any_index(step, logits, index, bank, p, statistics, out):
    return step(logits, index.clamp(0, len(bank.slots) - 1), bank, p, statistics, out)


def differs_from_run_to_run(step, logits, index, bank, p, statistics, out, calls=Counter()):  # noqa: B006
    loss, grad = step(logits, index, bank, p, statistics, out)
    calls["so far"] += 1
    return loss.nextafter(torch.tensor(calls["so far"] % 2 * 9.0)), grad


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("what", "broken", "kind", "problem"),
    [
        ("scale_gradient", forgets_upstream, "autograd", "with an upstream gradient of 4.0"),
        ("predict", predicts_nothing, "predict_", "the bank is wrong, first differing row "),
        ("predict", predicts_nothing, "predict_ of NaN", "did not raise ValueError"),
        ("step", functools.partial(accepts_any_index, cpu.step), "index out of range", "did not raise IndexError"),
        (
            "step",
            functools.partial(differs_from_run_to_run, cpu.step),
            "equal runs, equal bits",
            "the loss of equal steps differs",
        ),
    ],
)
def test_a_broken_rule_is_found(monkeypatch, capsys, tmp_path, what, broken, kind, problem):
    monkeypatch.setattr(cpu, what, broken)
    status, checks, _ = examine(monkeypatch, capsys, tmp_path, rules=True)
    assert status == 1
    assert problem in " ".join(check["problem"] or "" for check in checks if check["kind"] == kind)


def examine(monkeypatch, capsys, tmp_path, *, rules):
    """(exit status, checks, text) of the cpu backend in the smaller cases or by the rules, nothing timed."""
    monkeypatch.setattr(cli, "_expected", expected_once)
    monkeypatch.setattr(cli, "step_inputs", lambda quick: [] if rules else SMALL)
    monkeypatch.setattr(cli, "CHECKS", CHECKS if rules else {})
    monkeypatch.setattr(machine, "describe", lambda: {"gpus": []})
    monkeypatch.setattr(machine, "describe_toolchain", dict)
    monkeypatch.setattr(cli, "workloads", lambda *_: [])
    file = tmp_path / "report.json"
    status = cli.main(["--quick", "--device", "cpu", "--backend", "cpu", "--json", str(file)])
    return status, json.loads(file.read_text())["checks"], capsys.readouterr().out


@needs_cpu_kernels
def test_a_backend_that_fails_while_timed_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(cli, "step_inputs", lambda _: [])
    monkeypatch.setattr(cli, "CHECKS", {})
    monkeypatch.setattr(cpu, "step", functools.partial(raises, None))
    assert cli.main(["--quick", "--device", "cpu", "--backend", "cpu"]) == 1
    assert "timing, 256 x 1000, torch.float32: raised RuntimeError: no such kernel image" in " ".join(
        capsys.readouterr().out.split()
    )


@needs_cpu_kernels
def test_json_alone_on_standard_output(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "step_inputs", lambda _: [StepInputs("random", 5, 10)])
    monkeypatch.setattr(cli, "workloads", lambda *_: [])
    assert cli.main(["--backend", "cpu", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "banana"], "PyTorch cannot use device 'banana'"),
        (["--device", "meta"], "no backend has kernels for 'meta'"),
        (["--device", "cpu", "--backend", "cuda"], "backend 'cuda' cannot be used: "),
        (["--json", "nowhere/report.json"], "cannot write nowhere/report.json: No such file"),
    ],
)
def test_a_wrong_command_line_is_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_after_a_lost_gpu_no_other_backend_is_blamed(monkeypatch):
    gpu = torch.device("cuda", 0)
    targets = [
        findings.Target(name, device) for name, device in (("cpu", torch.device("cpu")), ("cuda", gpu), ("triton", gpu))
    ]

    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    found = findings.Findings(targets)
    for target in targets:
        found.run(target, "random", "", lost if target.device.type == "cuda" else lambda: 0.5)
    assert [check.problem is None for check in found.checks] == [True, False, False, False]
    assert "the GPU is lost to this process since cuda on cuda:0 failed. Try --backend triton" in str(found.checks[-1])


def test_gpus_and_kernels_are_shown(monkeypatch):
    """What only a machine with a GPU prints, from made-up findings."""
    gpu = {"device": "cuda:0", "name": "H [x]", "memory_bytes": 2**36, "architecture": "sm_90", "multiprocessors": 132}
    about = {**machine.describe(), "gpus": [gpu]}
    console = Console(record=True, width=130, highlight=False)
    text.print_environment(console, about)
    numbers = (2**20, 1e-5, 8e-6, 0.8)
    fast, slow = (
        speed.Speed("cuda", "cuda:0", 64, 1000, "float32", *numbers, kernels, 9e-6, "step") for kernels in (1.0, 2.0)
    )
    text.print_speeds(console, [fast, slow])
    shown = console.export_text()
    assert "cuda:0: H [x], 64.0 GiB, sm_90, 132 multiprocessors" in shown
    assert "2, expected 1" in shown
    assert shown.count("expected") == 1


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_kernels_that_cannot_be_counted_are_not_zero():
    kernels, seconds, note = speed.count_kernels(lambda: None, torch.device("cuda", 0))
    assert kernels is None
    assert seconds is None
    assert note.startswith("the profiler")
