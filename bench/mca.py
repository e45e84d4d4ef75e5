"""How near the inner loops of the AArch64 kernels are to the limit of the units that multiply.

Speed cannot be timed under emulation. This reads the object files of a cross compilation instead:
it disassembles them, takes of every microkernel the loop that multiplies most, counts its
instructions, and lets llvm-mca schedule it on models of the cores.

    cmake -S . -B build -G Ninja -DLOWBIT_BUILD_PYTHON=OFF -DCMAKE_BUILD_TYPE=Release \
      -DCMAKE_TOOLCHAIN_FILE=tests/cpp/aarch64-linux-gnu.cmake && ninja -C build
    python bench/mca.py build/CMakeFiles/lowbit_kernels.dir/csrc/isa/neon*.o --out bench/aarch64.md

Other engines' loops come from object files too: --peer 'NAME=FILE.o:REGULAR EXPRESSION'.
"""

from __future__ import annotations

import argparse
import functools
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Multiply-accumulates of an instruction on 16 bytes; of `cnt`, those of single bits.
PRODUCTS = {
    r"[su]dot|usdot": 16,
    r"usmmla|smmla": 32,
    r"smull2?|smlal2?": 8,
}
BITS = {"cnt": 128}
# What no xnor kernel can do without beside `cnt`.
WITH_CNT = ("eor", "add")

CORES = {
    "neon": ["cortex-a72", "cortex-a53"],
    "neondot": ["neoverse-n1", "neoverse-v1", "cortex-a76"],
    "neoni8mm": ["neoverse-n2", "neoverse-v1"],
}
LIMITS = [
    ("cortex-a72", "smlal v0.8h, v30.8b, v31.8b", 8),
    ("neoverse-n1", "sdot v0.4s, v30.16b, v31.16b", 16),
    ("neoverse-v1", "sdot v0.4s, v30.16b, v31.16b", 16),
    ("neoverse-n2", "usmmla v0.4s, v30.16b, v31.16b", 32),
    ("neoverse-v1", "usmmla v0.4s, v30.16b, v31.16b", 32),
]
ATTRIBUTES = "+dotprod,+i8mm"
ITERATIONS = 200

TEXT = """# The AArch64 kernels, estimated

Made by `bench/mca.py` with {mca} and {compiler}. Nothing here was timed on a CPU.

A row is the inner loop of a microkernel, as compiled: rows x channels of its tile,
multiply-accumulates (MAC) and instructions of an iteration, the share of these that multiply, loads
for each that does, registers spilled in the loop. `of limit` is the time that its products alone
need over that of the loop. What a core can do at most: {limits}. For W1A1 the limit is three
operations for 128 bits, `eor`, `cnt` and `add`: no fewer count them. Depthwise: taps across x
quads of rows of the kernel, rows of outputs x channels; with a known number of taps, an iteration
also writes the outputs of a pixel.

Where fewer than 80 % are reached with 8 rows or more, other work needs the same ports:

- `neoni8mm`, 8 rows: a register of weights serves 4 `usmmla`, and costs 1 (W8), 1.4 (W1), 1.5 (W4)
  or 1.75 (W2) operations of the vector units, a `zip` among them, which the one layout asks for. So
  no more than 80, 74, 73 and 70 % are possible. With 16 rows it serves 8: 89, 85, 84 and 82 %.
- Depthwise: 4 outputs of a 3x3 kernel are 3 products by `sdot`, and beside them a conversion, a
  multiplication with the scale and a store, 3 to 4 slots of the vector units: 43 to 50 % at most,
  with 10 products (5x5, two quads of rows) 71 to 77 %. On `neon`, which multiplies in one unit of
  two, the rest finds room in the other.
- Grouped: each product needs a `tbl` of its own, which takes the same ports: 50 % at most.

What comes before and after a loop is left out: quantizing, the scales of a tile, and where K has
groups, those of each group. That is some 250 (`neondot`) and 300 instructions (`neoni8mm`, counted
in the emulator) for 8 rows x 8 channels, where the products of 32 k of W4 take 182 and 122.

The models take loads to hit the first cache, branches to be predicted and loops to go on for ever.
LLVM has no tables for Cortex-A76 and takes those of Cortex-A57 (3 instructions a cycle, one load);
Neoverse N1 is the same core made for servers, and has its own. Cortex-A53 runs in order.

"""

PANELS_TEXT = """## Unpacking included

A panel is 16 channels. For many rows it is unpacked once, and that takes time, too: the share of
the limit that unpacking and all tiles of 8 rows reach together, on the first core of each table.
Beside it the loops above that unpack in registers, which is what runs for up to 16 rows.
"""

PEERS_TEXT = """
## Other engines

Loops of theirs, compiled here, in the same estimate. {note}
"""


@dataclass
class Loop:
    """The instructions of an innermost loop, and which of them multiply."""

    lines: list[str]
    products: list[str]
    macs: int

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, text)) for text in self.lines)

    @property
    def loads(self) -> int:
        return self.count(r"ld")

    @property
    def spills(self) -> int:
        return self.count(r"(ld|st)\S*\s+[vqd]\d.*\[sp")


def run(*command: str, text: str | None = None) -> str:
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{command[0]}: {result.stderr.strip()}")
    return result.stdout


def functions(objdump: str, obj: str) -> dict[str, list[tuple[int, str]]]:
    """Address and text of the instructions of every function, by demangled name."""
    found: dict[str, list[tuple[int, str]]] = {}
    code: list[tuple[int, str]] = []
    for line in run(objdump, "-dC", "--no-show-raw-insn", obj).splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            code = found.setdefault(short(head[1]), [])
        elif item := re.match(r" +([0-9a-f]+):\t(.*)", line):
            code.append((int(item[1], 16), item[2].split("//")[0].strip()))
    return found


def short(name: str) -> str:
    name = name.replace("lowbit::(anonymous namespace)::", "").replace("void ", "")
    return re.sub(r"\(.*", "", name).strip()


def innermost(code: list[tuple[int, str]]) -> list[list[str]]:
    """The bodies of the loops without a loop in them."""
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


def hot_loop(code: list[tuple[int, str]]) -> Loop | None:
    """The loop that multiplies most: bytes, or else bits."""
    loops = []
    for body in innermost(code):
        for table in (PRODUCTS, BITS):
            products = [text for text in body if macs_of(text, table)]
            if products:
                macs = sum(macs_of(text, table) for text in products)
                loops.append(Loop(body, products, macs))
                break
    return max(loops, key=lambda loop: loop.macs, default=None)


@functools.cache
def cycles(mca: str, core: str, text: str) -> float:
    """Cycles of one iteration."""
    text = re.sub(r"[0-9a-f]+ <.*>", "0", text)
    out = run(mca, "-mtriple=aarch64", f"-mcpu={core}", f"-mattr={ATTRIBUTES}",
              f"-iterations={ITERATIONS}", text=text)  # fmt: skip
    match = re.search(r"Total Cycles: +(\d+)", out)
    assert match, out
    return int(match[1]) / ITERATIONS


def need(mca: str, core: str, loop: Loop) -> float:
    return cycles(mca, core, "\n".join(loop.lines))


def limit(mca: str, core: str, loop: Loop) -> float:
    """Cycles of the loop's products alone, as if no two added to the same register."""
    total = 0.0
    for text in loop.products:
        one = [text]
        if not macs_of(text, PRODUCTS):
            one += [f"{mnemonic} v0.16b, v30.16b, v31.16b" for mnemonic in WITH_CNT]
        total += throughput(mca, core, one)
    return total


def throughput(mca: str, core: str, lines: list[str]) -> float:
    """Cycles of instructions that wait for nothing."""
    copies = 24  # registers to write to
    apart = [re.sub(r"\bv\d+", f"v{i}", line, count=1) for i in range(copies) for line in lines]
    apart = [re.sub(r", v\d+", ", v31", line) for line in apart]
    return cycles(mca, core, "\n".join(apart)) / copies


# Names of the microkernels to what a reader knows; `first` sorts.
def label(name: str) -> tuple[tuple[int, ...], str] | None:
    if m := re.match(r"(Lane|Long)Dot<(\d), \d, (\d), (\d)(, false)?>::add_steps", name):
        bits, rows, regs = int(m[2]), int(m[3]), int(m[4])
        if rows not in (1, 2, 4, 8):
            return None
        return (rows, -bits), f"{width(bits)}, {rows} x {regs * 4}"
    if m := re.match(r"MatrixDot<(\d), \d, (\d+), (\d), (?:true|false)>::add_steps", name):
        bits, rows, regs = int(m[1]), int(m[2]), int(m[3])
        if rows not in (4, 8, 12, 16):
            return None
        return (rows, -bits), f"{width(bits)}, {rows} x {regs * 4}"
    if m := re.match(r"Xnor<false>::add_steps<([124])>", name):
        return (int(m[1]), 1), f"W1A1, {m[1]} x 16"
    if m := re.match(r"sum_run<(\d), (\d), (\d), true, PutOutputs<", name):
        taps, quads, rows = (int(m[i]) or "any" for i in (1, 2, 3))
        return (90, int(m[1]), int(m[3])), f"depthwise, {taps} x {quads} taps, {rows} x 4"
    if name == "grouped_tile":
        return (100,), "grouped, 4 x 16"
    return None


def width(bits: int) -> str:
    return f"W{bits}" if bits else "unpacked"


def table(args: argparse.Namespace, cores: list[str], loops: dict[str, Loop]) -> list[str]:
    columns = "".join(f" {core}: MAC/cycle, of limit |" for core in cores)
    lines = [f"| loop | MAC | instructions | that multiply | loads each | spills |{columns}",
             "|---|---|---|---|---|---|" + "---|" * len(cores)]  # fmt: skip
    for text, loop in loops.items():
        cells = ""
        for core in cores:
            time = need(args.mca, core, loop)
            cells += f" {loop.macs / time:.1f}, {limit(args.mca, core, loop) / time:.0%} |"
        n = len(loop.products)
        lines.append(f"| {text} | {loop.macs} | {len(loop.lines)} | {n / len(loop.lines):.0%} | "
                     f"{loop.loads / n:.2f} | {loop.spills} |{cells}")  # fmt: skip
    return lines


def of_isa(args: argparse.Namespace, obj: str) -> dict[str, Loop]:
    """The loops of an ISA's object by label, in order."""
    found: dict[str, tuple[tuple[int, ...], Loop]] = {}
    for name, code in functions(args.objdump, obj).items():
        named, loop = label(name), hot_loop(code)
        if named and loop:
            found.setdefault(named[1], (named[0], loop))
    return {text: loop for text, (_, loop) in sorted(found.items(), key=lambda x: x[1][0])}


def panels(args: argparse.Namespace, obj: str, core: str, loops: dict[str, Loop]) -> list[str]:
    """Share of the limit with unpacking, by width and rows."""
    tile = loops["unpacked, 8 x 8"]
    isa = Path(obj).name.split(".")[0]
    lines = ["", f"| {isa}, {core} | in registers, M = 8 | M = 16 | unpacked, M = 24 | M = 48 |",
             "|---|---|---|---|---|"]  # fmt: skip
    for bits in (8, 4, 2, 1):
        unpack = unpack_loop(args, obj, bits)
        if unpack is None:
            continue
        eight = f"{width(bits)}, 8 x 8"
        row = f"| W{bits} |"
        for direct in (loops[eight], loops.get(f"{width(bits)}, 16 x 4", loops[eight])):
            row += f" {limit(args.mca, core, direct) / need(args.mca, core, direct):.0%} |"
        time, macs = need(args.mca, core, unpack[0]), unpack[1]
        for rows in (24, 48):
            tiles = macs * rows / tile.macs
            total = time + tiles * need(args.mca, core, tile)
            row += f" {tiles * limit(args.mca, core, tile) / total:.0%} |"
        lines.append(row)
    return lines


def unpack_loop(args: argparse.Namespace, obj: str, bits: int) -> tuple[Loop, int] | None:
    """The loop that unpacks a panel, and the weights that an iteration stores."""
    for name, code in functions(args.objdump, obj).items():
        if re.match(rf"Dot<{bits}, \d>::unpack_panel", name):
            body = max(innermost(code), key=len)
            stored = sum(
                16 * (2 if text.startswith("stp") else 1)
                for text in body
                if re.match(r"stu?[pr]\s+q", text)
            )
            return Loop(body, [], 0), stored
    return None


def peers(args: argparse.Namespace) -> list[str]:
    by_cores: dict[str, dict[str, Loop]] = {}
    for peer in args.peer:
        name, _, where = peer.partition("=")
        obj, _, pattern = where.partition(":")
        code = functions(args.objdump, obj)
        loops = {n: hot_loop(c) for n, c in code.items() if re.search(pattern, n)}
        best = max((x for x in loops.values() if x), key=lambda x: x.macs)
        isa = "neoni8mm" if any("mmla" in text for text in best.products) else "neondot"
        by_cores.setdefault(isa, {})[name] = best
    lines: list[str] = []
    for isa, loops in by_cores.items():
        lines += ["", *table(args, CORES[isa][:2], loops)]
    return lines


def report(args: argparse.Namespace) -> str:
    limits = "; ".join(
        f"{core} {macs / throughput(args.mca, core, [text]):.0f} MAC a cycle (`{text.split()[0]}`)"
        for core, text, macs in LIMITS
    )
    version = re.search(r"LLVM version \S+", run(args.mca, "--version"))
    compiler = run(args.cxx, "--version").splitlines()[0]
    text = TEXT.format(mca=f"llvm-mca ({version[0]})", compiler=compiler, limits=limits)
    lines, whole = [text.rstrip(), ""], []
    for obj in args.objects:
        isa = Path(obj).name.split(".")[0]
        loops = of_isa(args, obj)
        lines += [f"## `{isa}`", "", *table(args, CORES[isa], loops), ""]
        if "unpacked, 8 x 8" in loops:
            whole += panels(args, obj, CORES[isa][0], loops)
    lines += [PANELS_TEXT.strip(), *whole]
    if args.peer:
        lines += [PEERS_TEXT.format(note=args.note).rstrip(), *peers(args)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("objects", nargs="+", help="object files of csrc/isa/, cross compiled")
    parser.add_argument("--objdump", default="aarch64-linux-gnu-objdump")
    parser.add_argument("--cxx", default="aarch64-linux-gnu-g++", help="for its name alone")
    parser.add_argument("--mca", default="llvm-mca-19", help="LLVM 17 or later")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FILE:FUNCTION")
    parser.add_argument("--note", default="", help="of the peers: versions, what their loops do")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    text = report(args)
    if args.out:
        args.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
