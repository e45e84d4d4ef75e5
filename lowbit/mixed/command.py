"""`lowbit sensitivity` and `lowbit search`: their arguments, and what they run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowbit.model_argument import UsageError, find, model_and_inputs, read_inputs

Progress = Callable[[str, float], None]
Printed = tuple[str, Any]
"""As text, and the same as JSON takes it."""


def add_task(parser: argparse.ArgumentParser) -> None:
    """The option --task, for `task_of`."""
    parser.add_argument(
        "--task",
        metavar="NAME",
        help="classification, detection, generation, embeddings, language, other, or "
        "package.module:function (default: told by the output)",
    )


def task_of(name: str | None) -> Any:
    """The task that --task names.

    Raises:
        UsageError: there is none.
    """
    from lowbit import tasks

    if name is not None and ":" in name:
        return find(name)
    try:
        return tasks.find(name)
    except ValueError as error:
        raise UsageError(str(error)) from error


def add_sensitivity(parser: argparse.ArgumentParser) -> None:
    """The arguments of `lowbit sensitivity` besides its model and inputs."""
    _add_common(parser, "w8a8,w4a8")
    parser.add_argument(
        "--no-accumulated",
        action="store_true",
        help="measure layers alone, not with all layers up to each",
    )
    parser.add_argument("--no-latency", action="store_true", help="measure no times")


def add_search(parser: argparse.ArgumentParser) -> None:
    """The arguments of `lowbit search` besides its model and inputs."""
    parser.add_argument(
        "--budget",
        required=True,
        metavar="LIMIT",
        help="2.4MB, 30%% (of float), '50%% of w8a8', 3ms, 20dB, or 'top1_agreement>=0.93'",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.json", help="write the schemes")
    _add_common(parser, "w8a8,w4a8,w4a8-g32,w2a8-g32")
    parser.add_argument(
        "--allow-slower", action="store_true", help="layers may become slower than in float"
    )
    parser.add_argument(
        "--rounds", type=int, default=2, metavar="N", help="of refinement (default: %(default)s)"
    )
    parser.add_argument(
        "--front",
        type=int,
        default=8,
        metavar="N",
        help="choices measured for the Pareto front alone (default: %(default)s)",
    )


def _add_common(parser: argparse.ArgumentParser, schemes: str) -> None:
    parser.add_argument("--schemes", default=schemes, help="recipes (default: %(default)s)")
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="other inputs, for schemes that learn"
    )
    parser.add_argument(
        "--resume", type=Path, metavar="FILE", help="keep what is measured, and go on from it"
    )
    add_task(parser)


def sensitivity(arguments: argparse.Namespace, progress: Progress) -> Printed:
    """Runs `lowbit sensitivity`."""
    from lowbit.mixed import sensitivity as module

    model, inputs, described, settings = _prepare(arguments, progress)
    found = module.sensitivity(
        model,
        inputs,
        _names(arguments.schemes),
        accumulated=not arguments.no_accumulated,
        latency=not arguments.no_latency,
        **settings,
    )
    data = json.loads(found.to_json()) | {"inputs": described}
    return f"inputs: {described}\n\n{found}", data


def search(arguments: argparse.Namespace, progress: Progress) -> Printed:
    """Runs `lowbit search`."""
    from lowbit.mixed import search as module
    from lowbit.mixed.budget import Budget

    try:
        budget = Budget.parse(arguments.budget)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if arguments.rounds < 0 or arguments.front < 0:
        raise UsageError("--rounds and --front are at least 0")
    model, inputs, described, settings = _prepare(arguments, progress)
    found = module.search(
        model,
        inputs,
        budget,
        _names(arguments.schemes),
        allow_slower=arguments.allow_slower,
        rounds=arguments.rounds,
        front=arguments.front,
        **settings,
    )
    data = json.loads(found.to_json()) | {"inputs": described}
    text = f"inputs: {described}\n\n{found}"
    if arguments.output is not None:
        found.save(arguments.output)
        text += (
            f"\n\nwrote {arguments.output}; to use it:\n"
            f"  lowbit convert {arguments.model} --schemes {arguments.output} -o FILE.safetensors"
        )
    return text, data


def _prepare(
    arguments: argparse.Namespace, progress: Progress
) -> tuple[Any, Any, str, dict[str, Any]]:
    """The model, its inputs and their description, and the arguments that both commands share."""
    _names(arguments.schemes)
    task = task_of(arguments.task)
    calibration = None
    if arguments.calibration is not None:
        calibration, _ = read_inputs(arguments.calibration, "--calibration")
    model, inputs, described = model_and_inputs(arguments)
    settings = {
        "task": task,
        "calibration": calibration,
        "resume": arguments.resume,
        "progress": progress,
    }
    return model, inputs, described, settings


def _names(text: str) -> list[str]:
    from lowbit.mixed.layers import parse_schemes

    try:
        return list(parse_schemes([name.strip() for name in text.split(",") if name.strip()]))
    except ValueError as error:
        raise UsageError(str(error)) from error
