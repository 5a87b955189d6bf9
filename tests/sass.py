"""Reads kernels' machine code: nvdisasm's control flow graph, and the little that needs to be known about its instructions."""

import hashlib
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import networkx as nx  # PyTorch needs it, too

from bench.occupancy import Kernel, kernels
from r2d2fast.cuda_toolkit import find_cuda_tool

# Those of setup.py: any warning of the compiler, of ptxas or of the host's is an error.
FLAGS = ["-std=c++17", "-O3", "-Werror", "all-warnings"]


def cannot_compile(arch: int) -> str | None:
    nvcc = find_cuda_tool("nvcc")
    if nvcc is None:
        return "there is no nvcc here"
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


def loops(blocks: dict[str, Block]) -> list[set[str]]:
    """The blocks of each loop. A jump back goes to a block that every way to the jump passes, the head of its loop."""
    entry = next(iter(blocks))
    jumps = nx.DiGraph((name, following) for name, block in blocks.items() for following in block.successors)
    jumps.add_node(entry)
    jumps = jumps.subgraph({entry} | nx.descendants(jumps, entry))
    dominator = nx.immediate_dominators(jumps, entry)

    def dominates(above: str, name: str) -> bool:
        while name not in (above, entry):
            name = dominator[name]
        return name == above

    found: dict[str, set[str]] = {}
    back = [(name, head) for name, head in jumps.edges if dominates(head, name)]
    for name, head in back:
        rest = jumps.subgraph(set(jumps) - {head})  # what leads to the jump back without passing the head
        found.setdefault(head, {head}).update({name} | nx.ancestors(rest, name) if name != head else ())
    onward = nx.DiGraph(jumps)
    onward.remove_edges_from(back)
    assert nx.is_directed_acyclic_graph(onward), "a loop with two heads"
    return list(found.values())
