"""Kernels compiled for chips that are not here: registers, spills, shared memory, matrix instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from headfold.backends.triton.keys import settle_key

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that one program may take. The compiler does not hold its results to this.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# Registers of one multiprocessor.
REGISTERS = {"sm_80": 65536, "sm_90": 65536, "sm_100": 65536, "gfx942": 131072}
# Matrix instructions by name, in the assembly that is looked at, the one that a chip is to use first.
MATRIX = {
    "sm_80": ("mma.sync",),
    "sm_90": ("wgmma.mma_async", "mma.sync"),
    "sm_100": ("tcgen05.mma", "mma.sync"),
    "gfx942": ("v_mfma",),
}
# Of the instructions of a loop with products, the share that may have to do with spilled bytes: a reload or two.
AGAIN = 0.01
# Rows of a product that the latest matrix instructions want; smaller tiles use earlier ones.
WIDE_PRODUCT = 64
VERSION = triton.__version__
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Specimen:
    """A kernel as some call would have it compiled.

    types: of every argument that is not a constant, as "*bf16", "i32" or "fp64"; a trailing ":16" says that the value
    is a multiple of 16, as pointers and most strides are.   constants: arguments by value: tl.constexpr ones, None,
    and strides of 1.   matrix: whether it has to use the tensor cores.   narrow: whether its tiles are too small for
    the chip's first instruction, so that an older one will do.   registers: the most that a thread may take, where that
    is not left to the compiler.   aside: bytes that it may keep out of them, nearly all of them outside of loops with
    products.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    matrix: bool = True
    narrow: bool = False
    registers: int | None = None
    aside: int = 0


@dataclass(frozen=True)
class Compiled:
    """What the compiler made: registers a thread, spilled bytes, shared bytes, and counts of matrix instructions.

    serial: whether the assembler lets no two of a product's asynchronous matrix instructions overlap.
    again: of the instructions of a loop with products, the largest share that has to do with spilled bytes.
    """

    registers: int
    spilled: int
    shared: int
    matrix: dict[str, int]
    seconds: float
    serial: bool = False
    again: float = 0.0

    def breaches(self, specimen: Specimen, arch: str) -> list[str]:
        """Return what is wrong with it, each in a few words."""
        found = []
        if self.spilled > specimen.aside:
            found.append(f"spills {self.spilled} bytes")
        if self.again > AGAIN:
            found.append(f"has {self.again:.1%} of a loop with products do with spilled bytes")
        if self.shared > SHARED[arch]:
            found.append(f"needs {self.shared} bytes of shared memory, {arch} has {SHARED[arch]}")
        accepted = MATRIX[arch] if specimen.narrow else MATRIX[arch][:1]
        if specimen.matrix and not any(name in self.matrix for name in accepted):
            found.append(f"has no {accepted[0]}")
        if self.serial:
            found.append("waits for each of its matrix instructions before the next")
        return found

    def programs_per_core(self, specimen: Specimen, arch: str) -> int:
        """Return how many programs fit one multiprocessor, by registers and shared memory."""
        threads = specimen.num_warps * TARGETS[arch].warp_size
        granted = -(-self.registers // 8) * 8
        return int(min(REGISTERS[arch] // (threads * granted), self.programs_by_shared(arch)))

    def programs_by_shared(self, arch: str) -> int:
        """Return how many programs' shared memory fits one multiprocessor."""
        return SHARED[arch] // (self.shared + 1024) if arch != "gfx942" else SHARED[arch] // max(1, self.shared)

    def registers_for_one_more(self, specimen: Specimen, arch: str) -> int | None:
        """Return the most registers a thread with which one more program fits, or None where shared memory does not."""
        programs = self.programs_per_core(specimen, arch) + 1
        if programs > self.programs_by_shared(arch):
            return None
        return int(REGISTERS[arch] // (programs * specimen.num_warps * TARGETS[arch].warp_size) // 8 * 8)


def compile_specimen(specimen: Specimen, arch: str) -> Compiled:
    """Compile for an architecture, without a GPU; the result is cached where Triton caches."""
    names = list(specimen.kernel.arg_names)
    missing = set(names) - set(specimen.types) - set(specimen.constants)
    if missing:
        raise ValueError(f"{specimen.name}: types and constants must name every argument, got none for {missing}.")
    signature = {n: specimen.types[n].split(":")[0] if n in specimen.types else "constexpr" for n in names}
    constants = {(names.index(n),): value for n, value in specimen.constants.items()}
    aligned = {(names.index(n),): ALIGNED for n, kind in specimen.types.items() if kind.endswith(":16")}
    source = ASTSource(fn=specimen.kernel, signature=signature, constexprs=constants, attrs=aligned)
    settle_key(specimen.kernel)  # what is launched in this process later then has the key that others know
    options = {"num_warps": specimen.num_warps, "num_stages": specimen.num_stages}
    if specimen.registers is not None and TARGETS[arch].backend == "cuda":
        options["maxnreg"] = specimen.registers
    began = time.perf_counter()
    kernel = triton.compile(source, target=TARGETS[arch], options=options)
    return _inspect(kernel, arch, time.perf_counter() - began)


def _inspect(kernel: Any, arch: str, seconds: float) -> Compiled:
    shared = kernel.metadata.shared
    if arch == "gfx942":
        assembly = kernel.asm["amdgcn"]
        registers, spilled = _field(assembly, r"\.vgpr_count"), _field(assembly, r"\.vgpr_spill_count")
        serial, again = False, 0.0
    else:
        assembly = kernel.asm["ptx"]
        registers, spilled = _usage(kernel.asm["cubin"])
        asynchronous = "wgmma.mma_async" in assembly
        sass = _cuobjdump(kernel.asm["cubin"], "--dump-sass") if asynchronous or spilled else ""
        serial, again = asynchronous and _is_serial(assembly, sass), _spilling(sass)
    counts = {name: len(re.findall(r"\b" + re.escape(name), assembly)) for name in MATRIX[arch]}
    matrix = {name: n for name, n in counts.items() if n}
    return Compiled(registers, spilled, shared, matrix, seconds, serial, again)


def _is_serial(ptx: str, sass: str) -> bool:
    """Whether instructions that were to be in flight together wait for one another: more groups of them than asked for.

    The assembler may repeat a loop, so that shares are compared and not counts.
    """
    asked, products = ptx.count("wgmma.fence"), ptx.count("wgmma.mma_async")
    return sass.count("WARPGROUP.ARRIVE") * products > asked * sass.count("HGMMA")


def _spilling(sass: str) -> float:
    """Return of each loop that multiplies matrices, up to its jump back, what share spills or reloads; the largest."""
    code, largest = [(int(at, 16), said) for at, said in re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;]*);", sass)], 0.0
    for at, said in code:
        back = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", said)
        if back is not None and int(back[1], 16) < at:
            loop = [said for place, said in code if int(back[1], 16) <= place <= at]
            if any("MMA." in said for said in loop):
                largest = max(largest, sum(bool(re.search(r"\b(LDL|STL)\b", said)) for said in loop) / len(loop))
    return largest


def _field(assembly: str, name: str) -> int:
    found = re.search(name + r":\s*(\d+)", assembly)
    if found is None:
        raise RuntimeError(f"the assembly names no {name}")
    return int(found[1])


def _usage(cubin: bytes) -> tuple[int, int]:
    """Return registers and spilled bytes (stack and local memory) of a cubin."""
    said = _cuobjdump(cubin, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {said!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _cuobjdump(cubin: bytes, what: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), what, file.name], capture_output=True, text=True, check=True).stdout
