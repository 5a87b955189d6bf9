"""Reads kernels' machine code: nvdisasm's control flow graph, and the little that needs to be known about its instructions."""

import hashlib
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bench.occupancy import Kernel, kernels
from r2d2fast.machine import find_cuda_tool

# Those of setup.py: any warning of the compiler, of ptxas or of the host's is an error.
FLAGS = ["-std=c++17", "-O3", "-Werror", "all-warnings"]


def cannot_compile(arch: int) -> str | None:
    nvcc = find_cuda_tool("nvcc")
    if nvcc is None:
        return "no nvcc is here"
    known = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    return None if f"sm_{arch}" in known else f"{nvcc} does not know sm_{arch}"


def included(source: Path) -> set[Path]:
    """A source and the project's headers that it needs."""
    names = re.findall(r'^#include "(.+)"', source.read_text(), re.MULTILINE)
    return {source}.union(*(included(source.parent / name) for name in names))


def compile_cubin(source: Path, arch: int, cache: Path) -> Path:
    """The machine code of a source; kept for as long as neither it, a header nor the compiler changes."""
    nvcc = find_cuda_tool("nvcc")
    assert nvcc, "no nvcc"
    version = subprocess.run([nvcc, "--version"], check=True, capture_output=True).stdout
    texts = [path.read_bytes() for path in sorted(included(source))]
    digest = hashlib.sha256(b"\0".join([version, *map(str.encode, FLAGS), *texts])).hexdigest()[:20]
    target = cache / f"{source.stem}-{digest}.sm_{arch}.cubin"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.tmp")
        command = [nvcc, *FLAGS, f"-arch=sm_{arch}", "-cubin", str(source), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"nvcc does not compile {source.name} for sm_{arch}:\n{done.stderr[-4000:]}"
        partial.replace(target)
    return target


class Instruction(NamedTuple):
    text: str
    opcode: str
    """Such as LDG.E.128, less what says how an access is cached and ordered."""


@dataclass
class Block:
    """Instructions with no jump but at the end, and no label but at the start."""

    instructions: list[Instruction] = field(default_factory=list)
    successors: set[str] = field(default_factory=set)


@dataclass
class Code:
    kernel: Kernel
    blocks: dict[str, Block]
    """The first is the entry."""
    called: list[Instruction]
    """Instructions of the subroutines in the same file, divisions and the like: whose they are is not looked into."""

    def instructions(self) -> Iterator[Instruction]:
        for block in self.blocks.values():
            yield from block.instructions


def _instruction(text: str) -> Instruction:
    operation = text.split(" ", 2)[1 if text.startswith("@") else 0]
    return Instruction(text, re.sub(r"\.(CONSTANT|STRONG|GPU|SYS|EF|LU|EL|NA)(?=\.|$)", "", operation))


def destination(load: Instruction) -> set[str]:
    """The registers that a 128-bit load fills."""
    found = re.match(r"(?:@\S+ )?\S+ R(\d+)", load.text)
    assert found, load
    return {f"R{int(found[1]) + part}" for part in range(4)}


def extract(binary: Path, folder: Path) -> dict[int, Path]:
    """The cubins in a library, by architecture."""
    cuobjdump = find_cuda_tool("cuobjdump")
    assert cuobjdump, "no cuobjdump"
    subprocess.run([cuobjdump, "-xelf", "all", str(binary.resolve())], check=True, capture_output=True, cwd=folder)
    named = ((re.search(r"\.sm_(\d+)\.cubin$", path.name), path) for path in folder.iterdir())
    return {int(found[1]): path for found, path in named if found}


def ptx(binary: Path) -> list[int]:
    """Architectures that a library has PTX for."""
    cuobjdump = find_cuda_tool("cuobjdump")
    assert cuobjdump, "no cuobjdump"
    text = subprocess.run([cuobjdump, "-lptx", str(binary)], check=True, capture_output=True, text=True).stdout
    return [int(arch) for arch in re.findall(r"\.sm_(\d+)\.ptx$", text, re.MULTILINE)]


def read(cubin: Path) -> list[Code]:
    nvdisasm = find_cuda_tool("nvdisasm")
    assert nvdisasm, "no nvdisasm"
    dot = subprocess.run([nvdisasm, "-bbcfg", str(cubin)], check=True, capture_output=True, text=True).stdout
    graphs = _graphs(dot)
    subroutines = [blocks for name, blocks in graphs.items() if name.startswith("$")]
    called = [instruction for blocks in subroutines for block in blocks.values() for instruction in block.instructions]
    arch = re.search(r"\.sm_(\d+)\.cubin$", cubin.name)
    assert arch, cubin
    return [Code(kernel, graphs[kernel.symbol], called) for kernel in kernels(cubin, int(arch[1]))]


def _graphs(dot: str) -> dict[str, dict[str, Block]]:
    """nvdisasm -bbcfg writes a subgraph a function; a node is a label of lines that end in \\l, its ports in <> between |."""
    graphs: dict[str, dict[str, Block]] = {}
    blocks: dict[str, Block] = {}
    for line in dot.replace('"\n[label=', '" [label=').splitlines():
        if found := re.match(r'subgraph "cluster_(.*)" {', line):
            blocks = graphs.setdefault(found[1], {})
        elif found := re.match(r'"([^"]*)" \[label="\{(.*)\}"\]', line):
            plain = re.sub(r"(?<!\\)\||(?<!\\)<\w+(?<!\\)>", "", found[2])
            lines = (line.strip() for line in re.sub(r"\\(.)", r"\1", plain.replace("\\l", "\n")).split("\n"))
            code = [_instruction(line) for line in lines if line.endswith(";")]
            blocks.setdefault(found[1], Block()).instructions = code
        elif found := re.match(r'"([^"]*)":\w+:\w+ -> "([^"]*)":', line):
            blocks.setdefault(found[1], Block()).successors.add(found[2])
            blocks.setdefault(found[2], Block())
    return graphs


# ------------------------------------------------------------------------------------------- ways through a kernel


class Ways:
    """How a thread can go through a kernel: the blocks in order, and the loops, each with one head that all jumps back go to."""

    def __init__(self, blocks: dict[str, Block]) -> None:
        self.blocks, self.entry = blocks, next(iter(blocks))
        self.order, dominator = _dominators(blocks, self.entry)
        position = {name: number for number, name in enumerate(self.order)}

        def dominates(above: str, name: str) -> bool:
            while name not in (above, self.entry):
                name = dominator[name]
            return name == above

        self.onward: dict[str, list[str]] = {}
        back: dict[str, set[str]] = {}
        for name in self.order:
            self.onward[name] = []
            for following in blocks[name].successors:
                if dominates(following, name):
                    back.setdefault(following, set()).add(name)
                else:
                    # Else there would be a cycle left, and no longest way.
                    assert position[following] > position[name], "a loop with two heads"
                    self.onward[name].append(following)
        self.loops = {head: self._loop(head, ends) for head, ends in back.items()}

    def _loop(self, head: str, ends: set[str]) -> set[str]:
        """The head and what leads from it to a jump back."""
        before: dict[str, list[str]] = {}
        for name in self.order:
            for following in self.blocks[name].successors:
                before.setdefault(following, []).append(name)
        inside, waiting = {head}, list(ends)
        while waiting:
            name = waiting.pop()
            if name not in inside:
                inside.add(name)
                waiting += before[name]
        return inside

    def depth(self, name: str) -> int:
        """How many loops a block is in."""
        return sum(name in loop for loop in self.loops.values())

    def most(self, wanted: str) -> int:
        """The most instructions of an opcode that a thread can meet between entry and exit, if it goes round no loop twice."""
        most: dict[str, int] = {}
        for name in reversed(self.order):
            code = self.blocks[name].instructions
            ends = [most[following] for following in self.onward[name] if following in most]
            ends += [0 for instruction in code if instruction.opcode == "EXIT"]
            if ends:  # else every way on leads back to a loop's head
                most[name] = max(ends) + sum(instruction.opcode == wanted for instruction in code)
        return most[self.entry]


def _dominators(blocks: dict[str, Block], entry: str) -> tuple[list[str], dict[str, str]]:
    """Blocks in reverse postorder, and of each the last one that every way to it passes (Cooper, Harvey and Kennedy)."""
    postorder, seen, stack = [], {entry}, [(entry, iter(sorted(blocks[entry].successors)))]
    while stack:
        name, following = stack[-1]
        successor = next((other for other in following if other not in seen), None)
        if successor is None:
            postorder.append(name)
            stack.pop()
        else:
            seen.add(successor)
            stack.append((successor, iter(sorted(blocks[successor].successors))))
    order = postorder[::-1]
    position = {name: number for number, name in enumerate(order)}
    before: dict[str, list[str]] = {name: [] for name in order}
    for name in order:
        for successor in blocks[name].successors:
            before[successor].append(name)
    dominator, changed = {entry: entry}, True
    while changed:
        changed = False
        for name in order[1:]:
            new, *others = (other for other in before[name] if other in dominator)
            for other in others:
                while other != new:
                    if position[other] > position[new]:
                        other = dominator[other]
                    else:
                        new = dominator[new]
            changed |= dominator.get(name) != new
            dominator[name] = new
    return order, dominator
