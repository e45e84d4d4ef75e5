"""How the source tree is built, as tests: what lies where, and who may know whom."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC, PACKAGE, TESTS = ROOT / "csrc", ROOT / "lowbit", ROOT / "tests"
if not (CSRC.is_dir() and PACKAGE.is_dir()):
    pytest.skip("the source tree is not beside the tests", allow_module_level=True)

CPP = sorted(p for p in CSRC.rglob("*") if p.suffix in (".cpp", ".h", ".inl", ".inc"))
PYTHON = sorted(PACKAGE.rglob("*.py"))
SOURCES = [
    *CPP,
    *PYTHON,
    *(p for p in TESTS.rglob("*") if p.suffix in (".py", ".cpp", ".h", ".cmake")),
    *(ROOT / "bench").rglob("*.py"),
]

MOST_LINES = 500
BANNED_IN_NAMES = ("util", "helper", "misc", "manager", "fast", "v2")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


every_source = pytest.mark.parametrize("path", SOURCES, ids=name)
every_cpp = pytest.mark.parametrize("path", CPP, ids=name)


# --- all files -----------------------------------------------------------------------------------


@every_source
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


def test_csrc_holds_sources_alone():
    kinds = {".cpp", ".h", ".inl", ".inc", ".md"}
    assert [name(p) for p in CSRC.rglob("*") if p.is_file() and p.suffix not in kinds] == []


@every_source
def test_names_say_what_a_file_is(path):
    words = re.split(r"[^a-z0-9]+", name(path).lower())
    assert not {word for word in words for banned in BANNED_IN_NAMES if word.startswith(banned)}


@every_source
def test_nothing_is_left_to_do(path):
    marks = "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK"))  # this file is read as well
    assert not re.search(rf"\b({marks})\b", path.read_text())


# --- C++ -----------------------------------------------------------------------------------------

INTRINSICS = re.compile(
    r"immintrin|arm_neon|arm_sve|\b_mm\d*_|\b__m\d{3}|__builtin_(ia32|neon|aarch64)"
    r"|\b(u?int|float)\d+x\d+_t\b"
)
# All that an ISA's file may include: C++ library code would be compiled for the ISA and might be
# the copy that the linker keeps for everyone.
ISA_INCLUDES = {"immintrin.h", "arm_neon.h", "cstddef", "cstdint"}


def code(path: Path) -> str:
    """The text of a C++ file without comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


def includes(path: Path, brackets: str = '""') -> list[str]:
    pattern = rf"^\s*#\s*include {brackets[0]}([^{brackets[1]}]+){brackets[1]}"
    return re.findall(pattern, path.read_text(), flags=re.MULTILINE)


def is_isa(path: Path) -> bool:
    return path.parent.name == "isa"


@every_cpp
def test_intrinsics_live_in_isa(path):
    if not is_isa(path):
        assert not INTRINSICS.search(code(path))


@every_cpp
def test_no_torch_and_python_in_bindings_and_direct_alone(path):
    system = includes(path, "<>")
    assert not [header for header in system if re.match(r"torch|ATen|c10", header)]
    if path.stem not in ("bindings", "bindings_program"):
        assert not [header for header in system if re.match(r"pybind11", header)]
        assert path.stem == "direct" or "Python.h" not in system


@every_cpp
def test_includes_point_downward(path):
    own = includes(path)
    if is_isa(path):
        assert {Path(header).name for header in own if header.startswith("..")} <= {
            "formats.h",
            "kernel.h",
        }
        assert set(includes(path, "<>")) <= ISA_INCLUDES
    else:
        assert not [header for header in own if "isa/" in header or header.startswith("..")]
    allowed = {
        "kernel.h": {"formats.h"},
        "formats.h": set(),
        "cpu.h": set(),
        "lowbit.h": {"formats.h"},
        "bindings.cpp": {"bindings.h", "cpu.h", "direct.h", "lowbit.h"},
        "bindings_program.cpp": {"bindings.h", "program.h"},
        "bindings.h": {"lowbit.h"},
        "direct.h": {"lowbit.h"},
    }
    assert set(own) <= allowed.get(path.name, set(own))


def test_includes_have_no_cycle():
    """A header and its source file count as one."""
    graph = {
        path.stem: {Path(header).stem for header in includes(path)} - {path.stem} for path in CPP
    }
    for path in CPP:
        graph[path.stem] |= {Path(header).stem for header in includes(path)} - {path.stem}
    tuple(TopologicalSorter(graph).static_order())


def test_every_header_is_included():
    included = {Path(header).name for path in CPP for header in includes(path)}
    assert {p.name for p in CPP if p.suffix in (".h", ".inl")} <= included


@pytest.mark.parametrize("path", [p for p in CPP if p.suffix == ".h"], ids=name)
def test_headers_are_included_once(path):
    assert "#pragma once" in path.read_text()


def test_every_isa_is_one_file_and_one_row():
    rows = re.findall(r"^LOWBIT_ISA\((\w+),", (CSRC / "isas.inc").read_text(), flags=re.MULTILINE)
    assert sorted(rows) == sorted(p.stem for p in (CSRC / "isa").glob("*.cpp"))


@pytest.mark.parametrize("path", [p for p in CPP if is_isa(p) and p.suffix == ".cpp"], ids=name)
def test_isa_files_refuse_the_wrong_flags(path):
    """Each stops the compiler where a feature that it needs is not switched on."""
    if path.stem == "scalar":
        assert not INTRINSICS.search(code(path))
    else:
        assert re.search(r"#if[^\n]*\b__\w+.*?#error", code(path), flags=re.DOTALL)


# Files whose tests have another name than test_<file>.
CPP_TESTED_IN = {
    "activations": "test_linear.py",
    "arena": "test_program.py",
    "bindings_program": "test_program_errors.py",
    "code_steps": "test_program.py",
    "conv_step": "test_program.py",
    "pool_steps": "test_program.py",
    "step": "test_program.py",
    "step_check": "test_program_errors.py",
    "bindings": "test_linear.py",
    "cpu": "test_dispatch.py",
    "channel_rows": "test_conv2d.py",
    "depthwise": "test_conv2d.py",
    "fit": "test_quantizers.py",
    "gemm": "test_linear.py",
    "grouped": "test_conv2d.py",
    "pages": "cpp/test_pages.cpp",
    "plane_depthwise": "test_conv2d.py",
    "im2col": "test_conv2d.py",
    "images": "test_conv2d.py",
    "probe": "test_dispatch.py",
    "reference": "cpp/test_linear.cpp",
}


def test_every_cpp_file_is_tested():
    for path in CPP:
        if path.suffix == ".cpp" and not is_isa(path):
            assert (TESTS / CPP_TESTED_IN.get(path.stem, f"test_{path.stem}.py")).exists(), path
    assert set(CPP_TESTED_IN) <= {path.stem for path in CPP}


def test_the_map_of_csrc_is_complete():
    text = (CSRC / "README.md").read_text()
    for path in CPP:
        if not is_isa(path):
            assert f"{path.stem}." in text, f"{name(path)} is not on the map of csrc/README.md"


# --- Python --------------------------------------------------------------------------------------

# What runs a model. The rest (converting, reporting, measuring, the command line) may import it;
# it imports none of the rest.
RUNTIME = (
    "_core",
    "direct",
    "formats",
    "inputs",
    "packed",
    "phases",
    "quantizers",
    "schemes",
    "ops",
    "nn",
)


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in PYTHON} | {"lowbit._core": None}


def imported(statements: list[ast.stmt], package: str) -> set[str]:
    """Modules of lowbit that import statements name; a name in a module counts as its module."""
    found = set()
    for node in statements:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{package}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
    return found & MODULES.keys()


def test_modules_have_no_cycle():
    """Imports at the top of a module; its package's __init__ runs before it in any case."""
    graph = {
        mod: imported(ast.parse(path.read_text()).body, mod) - {mod, "lowbit"}
        for mod, path in MODULES.items()
        if path and mod != "lowbit"
    }
    tuple(TopologicalSorter(graph).static_order())


def is_runtime(mod: str) -> bool:
    return mod.split(".")[1:2] != [] and mod.split(".")[1] in RUNTIME


@pytest.mark.parametrize("mod", [mod for mod, path in MODULES.items() if path and is_runtime(mod)])
def test_the_runtime_knows_nothing_above_it(mod):
    tree = ast.parse(MODULES[mod].read_text())
    below = {other for other in imported(list(ast.walk(tree)), mod) if is_runtime(other)}
    assert imported(list(ast.walk(tree)), mod) == below


# Modules that users reach through another one, and whose tests are that one's.
PYTHON_TESTED_IN = {
    "lowbit.__main__": "test_cli.py",
    "lowbit.container": "test_serialize.py",
    "lowbit.dataflow": "test_fuse.py",
    "lowbit.model_argument": "test_cli.py",
    "lowbit.norms": "test_fuse.py",
    "lowbit.packed": "test_ops.py",
    "lowbit.plan": "test_convert.py",
}


def test_every_module_is_tested():
    """By a file of its name, or by a test that imports it or the package that it is a part of."""
    files = [path for path in TESTS.rglob("*.py") if path != Path(__file__).resolve()]
    names = {path.stem for path in files}
    used = set()
    for path in files:
        used |= imported(list(ast.walk(ast.parse(path.read_text()))), path.stem)
        used |= {f"lowbit.{dotted}" for dotted in re.findall(r"lowbit\.([\w.]+)", path.read_text())}
    used.discard("lowbit")
    used |= {mod for mod, tests in PYTHON_TESTED_IN.items() if (TESTS / tests).exists()}
    missing = [
        mod
        for mod, path in MODULES.items()
        if path and path.name != "__init__.py"
        if f"test_{path.stem}" not in names and not used & {mod, mod.rpartition(".")[0]}
    ]
    assert not missing
    assert set(PYTHON_TESTED_IN) <= MODULES.keys()
