"""How near the inner loops of the AArch64 kernels are to the limit of the unit that multiplies.

Speed cannot be timed under emulation. This reads object files instead: it disassembles them, takes
the loop of every function that multiplies most, counts its instructions, and lets llvm-mca
schedule it on models of the cores. The limit is the same loop's products alone.

    python bench/mca.py BUILD/CMakeFiles/lowbit_kernels.dir/csrc/isa/neon*.o --out bench/aarch64.md

Loads are taken to hit the first cache, branches to be predicted, and loops to go on for ever.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

# Multiply-accumulates of an instruction, 16 bytes wide; of `cnt`, of single bits.
PRODUCTS = {
    r"[su]dot|usdot": 16,
    r"usmmla|smmla|ummla": 32,
    r"[su]mull2?|[su]mlal2?": 8,
}
BITS = {"cnt": 128}

# LLVM schedules cortex-a76 by the tables of Cortex-A57 (3 wide, one load); Neoverse N1 is its core
# with a larger cache, and has tables of its own.
CORES = {
    "neon": ["cortex-a53", "cortex-a72"],
    "neondot": ["cortex-a76", "neoverse-n1", "neoverse-v1"],
    "neoni8mm": ["neoverse-n2", "neoverse-v1"],
}
ATTRIBUTES = "+dotprod,+i8mm"
ITERATIONS = 200


@dataclass
class Loop:
    """The instructions of one innermost loop."""

    name: str
    lines: list[str]
    products: list[str] = field(default_factory=list)
    macs: int = 0
    loads: int = 0
    spills: int = 0


def run(*command: str, text: str | None = None) -> str:
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{command[0]}: {result.stderr.strip()}")
    return result.stdout


def functions(objdump: str, obj: str) -> dict[str, list[tuple[int, str]]]:
    """Address and text of the instructions of every function, by demangled name."""
    found: dict[str, list[tuple[int, str]]] = {}
    name = ""
    for line in run(objdump, "-dC", "--no-show-raw-insn", obj).splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            name = head[1]
            found[name] = []
        elif (item := re.match(r" +([0-9a-f]+):\t(.*)", line)) and name:
            found[name].append((int(item[1], 16), item[2].split("//")[0].strip()))
    return found


def innermost(code: list[tuple[int, str]]) -> list[list[str]]:
    """The bodies of loops without a loop in them."""
    begin = {address: i for i, (address, _) in enumerate(code)}
    spans = []
    for i, (_, text) in enumerate(code):
        branch = re.match(r"(?:b\.\w+|b|cbn?z|tbn?z)\t(?:.*, )?([0-9a-f]+) <", text)
        if branch and (target := begin.get(int(branch[1], 16), i + 1)) <= i:
            spans.append((target, i))
    inner = [s for s in spans if not any(s != o and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [[text for _, text in code[a : b + 1]] for a, b in inner]


def macs_of(text: str, table: dict[str, int]) -> int:
    mnemonic = text.split()[0]
    return next((n for pattern, n in table.items() if re.fullmatch(pattern, mnemonic)), 0)


def hot_loop(name: str, code: list[tuple[int, str]]) -> Loop | None:
    """The loop that multiplies most: of bytes, or else of bits."""
    best = None
    for body in innermost(code):
        for table in (PRODUCTS, BITS):
            products = [text for text in body if macs_of(text, table)]
            if products:
                break
        macs = sum(macs_of(text, table) for text in products)
        if macs and (best is None or macs > best.macs):
            loads = sum(bool(re.match(r"ld", text)) for text in body)
            spills = sum(bool(re.match(r"(ld|st)\S*\s+\{?[vqd]\d.*\[sp", text)) for text in body)
            best = Loop(name, body, products, macs, loads, spills)
    return best


def cycles(mca: str, core: str, lines: list[str]) -> float:
    """Cycles of one iteration."""
    text = "\n".join(re.sub(r"[0-9a-f]+ <.*>", "0", line) for line in lines)
    out = run(mca, "-mtriple=aarch64", f"-mcpu={core}", f"-mattr={ATTRIBUTES}",
              f"-iterations={ITERATIONS}", text=text)
    return int(re.search(r"Total Cycles: +(\d+)", out)[1]) / ITERATIONS


def limit(mca: str, core: str, loop: Loop) -> float:
    """Cycles of the products alone, each on a register of its own as often as there are."""
    return min(cycles(mca, core, loop.products), cycles(mca, core, loop.lines))


def short(name: str) -> str:
    name = name.replace("lowbit::(anonymous namespace)::", "").replace("void ", "")
    return re.sub(r"\(.*\)", "", name).replace(" [clone .constprop.0]", "").strip()


def report(args: argparse.Namespace) -> str:
    lines: list[str] = []
    for obj in args.objects:
        isa = Path(obj).name.split(".")[0]
        cores = args.cores.split(",") if args.cores else CORES[isa]
        lines += ["", f"## {isa}", ""]
        columns = "".join(f" {core}, MAC/cycle, of limit |" for core in cores)
        lines += [f"| loop | MAC | instructions | products | loads | spills |{columns}",
                  "|---|---|---|---|---|---|" + "---|" * len(cores)]
        loops = [hot_loop(short(n), code) for n, code in functions(args.objdump, obj).items()]
        for loop in sorted((x for x in loops if x), key=lambda x: x.name):
            if not re.search(args.only, loop.name):
                continue
            cells = ""
            for core in cores:
                need = cycles(args.mca, core, loop.lines)
                cells += f" {loop.macs / need:.1f}, {limit(args.mca, core, loop) / need:.0%} |"
            lines.append(f"| `{loop.name}` | {loop.macs} | {len(loop.lines)} | "
                         f"{len(loop.products)} | {loop.loads} | {loop.spills} |{cells}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("objects", nargs="+", help="object files of csrc/isa/, cross compiled")
    parser.add_argument("--objdump", default="aarch64-linux-gnu-objdump")
    parser.add_argument("--mca", default="llvm-mca-19")
    parser.add_argument("--cores", default="", help="comma-separated; default: those of the ISA")
    parser.add_argument("--only", default="", help="regular expression of names of functions")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    text = report(args)
    if args.out:
        args.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
