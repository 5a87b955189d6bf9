"""The console command: the same programs as ``python -m``, by shorter names."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from r2d2fast import command

START = "import sys; sys.argv[0] = 'r2d2fast'; from r2d2fast.command import main; sys.exit(main())"


def run(*arguments: str, before: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", before + START, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_help_imports_no_pytorch(arguments):
    shown = run(*arguments, before="import sys; sys.modules['torch'] = sys.modules['numpy'] = None;")
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()[3:]
    assert [line.split()[0] for line in lines] == list(command.COMMANDS)


def test_an_unknown_command_is_named_beside_those_accepted(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["r2d2fast", "learn"])
    assert command.main() == 2
    assert "r2d2fast: learn: no command; accepted: train, predict, embed" in capsys.readouterr().err


@pytest.mark.parametrize("name", command.COMMANDS)
def test_a_command_runs_its_module_with_the_arguments_that_follow(name, monkeypatch):
    ran = []
    monkeypatch.setattr(sys, "argv", ["r2d2fast", name, "--flag", "value"])
    monkeypatch.setattr(command, "_started", False)
    monkeypatch.setattr("runpy.run_module", lambda module, **how: ran.append((module, how["run_name"], sys.argv[1:])))
    assert command.main() == 0
    assert ran == [(command.COMMANDS[name][0], "__main__", ["--flag", "value"])]
    assert find_spec(ran[0][0]) is not None
    assert command.as_called(name) == f"r2d2fast {name}"


@pytest.mark.slow  # each imports PyTorch anew
@pytest.mark.parametrize("name", ["train", "embed", "experiments"])
def test_a_command_calls_itself_as_it_was_called(name):
    shown = run(name, "--help")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith(f"usage: r2d2fast {name}")
    assert "python -m" not in shown.stdout


@pytest.mark.slow
def test_exit_status_and_message_are_those_of_the_program():
    by_name = run("train", "--dataset", "moons")
    by_module = subprocess.run(
        [sys.executable, "-m", "r2d2fast.train", "--dataset", "moons"], capture_output=True, text=True, check=False
    )
    assert by_name.returncode == by_module.returncode == 2
    assert by_name.stderr.startswith("r2d2fast train: --dataset moons: unknown")
    assert by_module.stderr == by_name.stderr.replace("r2d2fast train", "python -m r2d2fast.train")
