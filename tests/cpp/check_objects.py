"""Checks that no instruction or symbol of one ISA leaks out of the object that was compiled for it.

A wheel holds kernels for CPUs newer than the one it may run on. That is safe only if

- every object but those of csrc/isa/ sticks to the baseline, and those stick to their flags;
- the objects of csrc/isa/ define no weak symbol: the linker keeps one copy of an inline function
  for everyone, and it might be the one with AVX-512 in it;
- they have no static initializer: it would run on every CPU, when the library is loaded.

What an object may use follows from its flags in csrc/isas.inc.

Usage: check_objects.py ISAS.INC OBJDUMP OBJECT...
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ISA_ROW = re.compile(r'^LOWBIT_ISA\((\w+),.*"(.*)"\)')
INSTRUCTION = re.compile(r"^ *[0-9a-f]+:\t([0-9a-f ]+)\t(?:\{\w+\} )?(\S+)")

# In 64-bit code c4 and c5 always begin a VEX prefix and 62 an EVEX prefix; only segment and
# size overrides may come before.
VEX = re.compile(r"^(?:(?:2e|36|3e|26|64|65|67) )*c[45] ")
EVEX = re.compile(r"^(?:(?:2e|36|3e|26|64|65|67) )*62 ")


def families(machine: str, encoding: str, mnemonic: str) -> set[str]:
    """The instruction families beyond the baseline that an instruction belongs to."""
    found = set()
    if machine == "aarch64":
        if re.fullmatch(r"[su]dot", mnemonic):
            found.add("dotprod")
        if re.fullmatch(r"(s|u|us)mmla|usdot|sudot", mnemonic):
            found.add("i8mm")
    else:
        if VEX.match(encoding):
            found.add("avx")
        if EVEX.match(encoding):
            found.add("avx512")
        if mnemonic.startswith("vpdp"):
            found.add("avxvnni" if VEX.match(encoding) else "avx512vnni")
        if re.fullmatch(r"vpopcnt[dq]", mnemonic):
            found.add("vpopcntdq")
    return found


def allowed(flags: str) -> set[str]:
    """The families that an object compiled with these flags may use."""
    names = {"avx", "avx512", "avxvnni", "avx512vnni", "vpopcntdq", "dotprod", "i8mm"}
    return {name for name in names if name in flags}


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def check(obj: str, objdump: str, flags: str | None) -> list[str]:
    """What is wrong with an object; `flags` is None for one outside of csrc/isa/."""
    problems = []
    name = Path(obj).name
    disassembly = run(objdump, "-d", "--insn-width=16", obj)
    machine = "aarch64" if "elf64-littleaarch64" in disassembly else "x86"
    wrong: Counter[str] = Counter()
    instructions = 0
    for line in disassembly.splitlines():
        if match := INSTRUCTION.match(line):
            instructions += 1
            for family in families(machine, match[1], match[2]) - allowed(flags or ""):
                wrong[f"{family} instruction ({match[2]})"] += 1
    problems += [f"{name}: {count} x {what}" for what, count in sorted(wrong.items())]
    if flags is not None:
        if instructions == 0:
            problems.append(f"{name}: no code found, so nothing was checked")
        symbols = run(objdump, "--syms", obj)
        for line in symbols.splitlines():
            # Columns: value, then seven flag characters; 'w' is weak, 'u' unique global.
            if re.match(r"^[0-9a-f]{16} (?:.w|u.)", line) and "*UND*" not in line:
                problems.append(f"{name}: weak symbol {line.split()[-1]}")
        if ".init_array" in run(objdump, "-h", obj):
            problems.append(f"{name}: a static initializer")
    return problems


def main() -> int:
    isas_inc, objdump, *objects = sys.argv[1:]
    rows = filter(None, map(ISA_ROW.match, Path(isas_inc).read_text().splitlines()))
    flags = {row[1]: row[2] for row in rows}
    problems, isas = [], []
    for obj in objects:
        isa = Path(obj).name.split(".")[0] if Path(obj).parent.name == "isa" else None
        if isa is not None:
            isas.append(isa)
        problems += check(obj, objdump, None if isa is None else flags[isa])
    if len(isas) < 2:
        problems.append(f"only {isas} among the objects of csrc/isa/")
    print(f"{len(objects)} objects; ISAs: {', '.join(isas)}")
    print("\n".join(problems) or "no leak")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
