"""The command `lowbit`: demo, info, compare, report, sensitivity, search, convert, bench.

Results go to standard output (as text, or with `--json` as one JSON document); progress and errors
go to standard error. Exit codes: 0 done, 1 failed, 2 wrong usage. Whatever is heavy is imported by
the command that needs it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from lowbit.argument_types import number, numbers, seconds
from lowbit.comparison import finite
from lowbit.errors import one_line
from lowbit.model_argument import (
    CommandError,
    UsageError,
    build,
    find,
    model_and_inputs,
    read_inputs,
    read_labels,
)

DESCRIPTION = "INT8, INT4, INT2, ternary and binary inference for PyTorch models on CPUs."
MODEL_HELP = "package.module:factory, a callable that returns the model, or the model itself"


class Progress:
    """One line on a terminal that says what is going on, and is gone at the end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown = stream.isatty()

    def __call__(self, stage: str, share: float | None = None) -> None:
        if self._shown:
            percent = "" if share is None else f" {100 * share:.0f} %"
            self._stream.write(f"\r\x1b[K{stage}{percent}")
            self._stream.flush()

    def clear(self) -> None:
        """Removes the line."""
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments without the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as exit_:  # argparse has printed its message
        return int(exit_.code or 0)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)
    if arguments.command is None:
        parser.print_help()
        return 2
    progress = Progress(sys.stderr)
    try:
        # What a model prints while it is built or run must not get into the result.
        with _one_line_warnings(progress), contextlib.redirect_stdout(sys.stderr):
            threads = getattr(arguments, "threads", None)
            if threads is not None:
                import torch

                torch.set_num_threads(threads)
            result = arguments.run(arguments, progress)
        progress.clear()
        text = json.dumps(finite(result.data), indent=2) if arguments.json else result.text
        print(text, flush=True)
    except KeyboardInterrupt:
        progress.clear()
        print("lowbit: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        progress.clear()
        if arguments.debug:
            traceback.print_exc()
        print(f"lowbit: error: {_message(error, arguments.debug)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


class Output:
    """What a command prints: as text, or the same as JSON."""

    def __init__(self, text: str, data: Any) -> None:
        self.text = text
        self.data = data


def _info(arguments: argparse.Namespace, progress: Progress) -> Output:
    from lowbit.info import cpu_info, describe

    info = cpu_info()
    return Output(describe(info), info)


def _demo(arguments: argparse.Namespace, progress: Progress) -> Output:
    from lowbit.demo.run import run
    from lowbit.html.command import write

    _check_plot(arguments.plot)
    _check_page(arguments.html)
    result = run(
        budget_seconds=arguments.seconds, details=arguments.html is not None, progress=progress
    )
    if arguments.plot is not None:
        result.comparison.plot(arguments.plot)
    text, data = write(result.comparison, arguments, "36 views of 6 photographs")
    return Output(f"{result}{text}", result.to_dict() | data)


def _compare(arguments: argparse.Namespace, progress: Progress) -> Output:
    from lowbit.compare import compare
    from lowbit.html.command import write
    from lowbit.mixed.command import task_of

    schemes, task = _schemes(arguments.schemes), task_of(arguments.task)
    _check_plot(arguments.plot)
    _check_page(arguments.html)
    labels = None if arguments.labels is None else read_labels(arguments.labels)
    on_inputs = str(arguments.calibration) == "inputs"
    calibration = "inputs" if on_inputs else _calibration(arguments.calibration, schemes)
    model, inputs, described = model_and_inputs(arguments)
    comparison = compare(
        model,
        schemes,
        inputs,
        budget_seconds=arguments.seconds,
        torch_int8=not arguments.no_torch_int8,
        details=arguments.html is not None,
        labels=labels,
        task=task,
        progress=progress,
        calibration=calibration,
    )
    if arguments.plot is not None:
        comparison.plot(arguments.plot)
    data = json.loads(comparison.to_json()) | {"inputs": described}
    if arguments.calibration is not None:
        data["calibration"] = str(arguments.calibration)
        described += f"; calibrated on {'these' if on_inputs else arguments.calibration}"
    text, page = write(comparison, arguments, described)
    return Output(f"inputs: {described}\n\n{comparison}{text}", data | page)


def _convert(arguments: argparse.Namespace, progress: Progress) -> Output:
    from lowbit.convert import quantize
    from lowbit.report import size_text, summary
    from lowbit.serialize import save_file

    scheme: str | None = None
    if arguments.scheme is not None or arguments.schemes is None:
        scheme, *more = _schemes(arguments.scheme or "w8a8")
        if more:
            raise UsageError("--scheme takes one scheme; --override gives a layer another one")
    overrides = dict(map(_override, arguments.override))
    if arguments.schemes is not None:
        overrides |= {
            name: chosen
            for name, chosen in _read_schemes(arguments.schemes).items()
            if name not in overrides
        }
    _check_writable(arguments.output)
    given = [recipe for recipe in (scheme, *overrides.values()) if recipe is not None]
    calibration = _calibration(arguments.calibration, given)
    model = build(find(arguments.model), arguments.model)
    progress("converting")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no layer was converted")  # an error here
        quantized = quantize(model, scheme, overrides=overrides, calibration=calibration)
    report = summary(quantized)
    if not report.converted:
        reasons = [f"{row.name}: {row.note}" for row in report.kept[:3] if row.note]
        why = "; ".join(reasons) or "the model has no layer that can be converted"
        raise CommandError(f"no layer was converted, nothing was written ({why})")
    save_file(quantized, arguments.output)
    size = arguments.output.stat().st_size
    closing = (
        f"wrote {arguments.output} ({size_text(size)}); to load it:\n"
        f"  model = lowbit.load_file(float_model, {str(arguments.output)!r})"
    )
    data = report.to_dict() | {"file": str(arguments.output), "file_bytes": size}
    return Output(f"{report}\n\n{closing}", data)


def _sensitivity(arguments: argparse.Namespace, progress: Progress) -> Output:
    from lowbit.mixed import command

    _check_writable(arguments.resume)
    return Output(*command.sensitivity(arguments, progress))


def _search(arguments: argparse.Namespace, progress: Progress) -> Output:
    from lowbit.mixed import command

    _check_writable(arguments.output)
    _check_writable(arguments.resume)
    return Output(*command.search(arguments, progress))


def _calibration(path: Path | None, schemes: Sequence[str]) -> Any:
    """The batches of a file, where these schemes ask for some; None where they do not."""
    from lowbit.schemes import Scheme

    learning = [name for name in schemes if Scheme.parse(name).learns]
    if path is None and learning:
        raise UsageError(f"{learning[0]} learns from example data: give --calibration FILE")
    return None if path is None else read_inputs(path, "--calibration")[0]


def _bench(arguments: argparse.Namespace, progress: Progress) -> Output:
    from lowbit.benchmark.command import options
    from lowbit.benchmark.run import run

    _check_plot(arguments.plot)
    try:
        chosen = options(arguments)
        chosen.check()
    except ValueError as error:
        raise UsageError(str(error)) from error
    result = run(chosen, progress)
    if arguments.plot is not None:
        from lowbit.benchmark.plot import plot

        plot(result, arguments.plot)
    return Output(str(result), result.to_dict())


def _schemes(text: str) -> list[str]:
    from lowbit.schemes import Scheme

    names = [name.strip() for name in text.split(",") if name.strip()]
    try:
        for name in names:
            Scheme.parse(name)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not names:
        raise UsageError("no scheme given: use e.g. w8a8 or w4a8-g128")
    return names


def _read_schemes(path: Path) -> dict[str, str | None]:
    from lowbit.mixed.found import read_schemes

    try:
        return read_schemes(path)
    except FileNotFoundError:
        raise CommandError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise CommandError(f"--schemes: {error}") from error


def _override(text: str) -> tuple[str, str | None]:
    # From the right: a regular expression may hold a "=", a recipe never does.
    name, separator, recipe = text.rpartition("=")
    if not (name and separator):
        raise UsageError(f"--override is NAME=RECIPE or NAME=float, not {text!r}")
    return name, None if recipe == "float" else _schemes(recipe)[0]


def _check_writable(path: Path | None) -> None:
    """Refuses a file that cannot be written before minutes were spent on its contents."""
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{path} is a directory, not a file")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no directory {path.parent}; create it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise CommandError(f"{path}: no permission to write there")


def _check_plot(path: Path | None) -> None:
    _check_writable(path)
    if path is not None:
        from lowbit.figures import check_suffix

        try:
            check_suffix(path)
        except ValueError as error:
            raise UsageError(f"--plot: {error}") from error


def _check_page(path: Path | None) -> None:
    _check_writable(path)
    if path is not None:
        from lowbit.html.packages import check_packages

        check_packages()


def _message(error: Exception, debug: bool) -> str:
    """One line (or what a CommandError says), with the way to learn more."""
    if isinstance(error, CommandError):
        return str(error)
    known = isinstance(error, (ValueError, ImportError, RuntimeError, OSError))
    text = str(error).strip() if known else ""
    first, *more = (text or one_line(error)).splitlines()
    hint = "" if debug or (text and not more) else " (--debug shows the traceback)"
    return first + hint


@contextlib.contextmanager
def _one_line_warnings(progress: Progress) -> Iterator[None]:
    def show(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        progress.clear()
        print(f"lowbit: warning: {str(message).strip().splitlines()[0]}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lowbit", description=DESCRIPTION)
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON document")
    common.add_argument("--debug", action="store_true", help="print the traceback of an error")

    def command(name: str, run: Callable[..., Output], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, parents=[common])
        made.set_defaults(run=run)
        if name != "bench":  # which takes several numbers of threads
            made.add_argument(
                "--threads", type=number, metavar="N", help="threads (default: torch's choice)"
            )
        return made

    from lowbit.html.command import add_argument
    from lowbit.mixed.command import add_search, add_sensitivity

    demo = command("demo", _demo, "Show every width on a real network and real photographs.")
    _add_plot(demo)
    add_argument(demo, "--html")
    _add_seconds(demo, 12.0)
    command("info", _info, "Show the CPU, the kernels in use, the threads and the versions.")
    compare = command("compare", _compare, "Compare a model's widths: speed, size and quality.")
    _add_comparison(compare)
    add_argument(compare, "--html")
    report = command(
        "report", _compare, "Write such a comparison, layer by layer, as an HTML page."
    )
    _add_comparison(report)
    add_argument(report, "-o", "--output", default=Path("report.html"))
    for name, run, add, text in (
        ("sensitivity", _sensitivity, add_sensitivity, "Measure what each layer loses, and takes."),
        ("search", _search, add_search, "Choose a scheme for each layer, within a budget."),
    ):
        made = command(name, run, text)
        made.add_argument("model", metavar="MODEL", help=MODEL_HELP)
        _add_inputs(made)
        add(made)
    convert = command("convert", _convert, "Convert a model and write it to a file.")
    convert.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    convert.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE.safetensors", help="write it here"
    )
    convert.add_argument("--scheme", help="recipe (default: w8a8; with --schemes: float)")
    convert.add_argument(
        "--schemes", type=Path, metavar="FILE.json", help="each layer's, as `lowbit search` wrote"
    )
    convert.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="NAME=RECIPE",
        help="another recipe, or 'float', for a layer: its name, or re: and a regular expression",
    )
    _add_calibration(convert)
    bench = command("bench", _bench, "Time one layer in every width against other engines.")
    from lowbit.benchmark.command import add_arguments

    add_arguments(bench)
    _add_plot(bench)
    _add_seconds(bench, None)
    return parser


class _Version(argparse.Action):
    """Prints the version; a plain `version=` would read it for every command."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        from lowbit.info import version

        print(f"lowbit {version()}")
        parser.exit()


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    inputs = parser.add_mutually_exclusive_group()
    inputs.add_argument("--input-shape", type=numbers, metavar="1,3,224,224", help="random normal")
    inputs.add_argument("--inputs", type=Path, metavar="FILE", help=".pt, .npy or .safetensors")
    parser.add_argument("--seed", type=int, default=0, help="of random inputs (default: 0)")


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    from lowbit.mixed.command import add_task

    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--schemes", default="w8a8,w4a8", help="recipes (default: %(default)s)")
    _add_inputs(parser)
    _add_calibration(parser, "; 'inputs' takes the inputs themselves")
    add_task(parser)
    parser.add_argument("--no-torch-int8", action="store_true", help="leave torch's INT8 out")
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="names of the classes, one a line, for the page"
    )
    _add_plot(parser)
    _add_seconds(parser, 10.0)


def _add_calibration(parser: argparse.ArgumentParser, more: str = "") -> None:
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help=f"batches for schemes that learn: .pt, .npy or .safetensors{more}",
    )


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the result (.png, .svg)")


def _add_seconds(parser: argparse.ArgumentParser, default: float | None) -> None:
    usual = "of one shape, M and thread count" if default is None else "(default: %(default)s)"
    parser.add_argument(
        "--seconds", type=seconds, default=default, metavar="S", help=f"for the timing {usual}"
    )


if __name__ == "__main__":
    sys.exit(main())
