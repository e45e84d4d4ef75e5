"""What a model is for, and the figures that tell whether it still does that.

Wherever a `task` is asked for, it is one of

    "classification"  scores of classes: top-1 and top-5 agreement, KL divergence, probability shift
    "detection"       boxes, scores and labels: matched boxes, mean IoU, score shift
    "generation"      images: PSNR, SSIM, distinct levels
    "embeddings"      vectors: mean cosine, rank correlation of their similarities
    "language"        scores of tokens: perplexity, KL divergence and agreement per token
    "other"           no more than the figures that every output has
    a function        `function(reference, output)` or `function(reference, output, batch)`: a
                      number, a tensor of numbers, or a mapping from names to these; the mean over
                      all numbers of all batches is the figure
    a Task            one of the classes below, with other settings
    None              a classification where the output looks like one, else "other"

The reference is the float model's output: the figures say what the quantization changed.
"""

from lowbit.tasks.detection import Detection
from lowbit.tasks.embeddings import Embeddings
from lowbit.tasks.function import Function
from lowbit.tasks.generation import Generation
from lowbit.tasks.language import Language
from lowbit.tasks.metric import METRICS, Metric
from lowbit.tasks.task import Meter, Task

__all__ = [
    "METRICS",
    "TASKS",
    "Detection",
    "Embeddings",
    "Function",
    "Generation",
    "Language",
    "Meter",
    "Metric",
    "Task",
    "find",
]

_CLASSES: dict[str, type[Task]] = {
    task.name: task for task in (Detection, Generation, Embeddings, Language)
}
TASKS = ("classification", *_CLASSES, "other")
"""The names that a `task` may have."""


def find(task: object) -> Task | str | None:
    """A Task, or "classification", "other" or None, which `QualityMeter` serves itself.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name, a function nor a Task.
    """
    if task is None or task in ("classification", "other"):
        return None if task is None else str(task)
    if isinstance(task, Task):
        return task
    if isinstance(task, str):
        if task not in _CLASSES:
            known = ", ".join(TASKS)
            raise ValueError(f"unknown task {task!r}: expected one of {known}, a function, or None")
        return _CLASSES[task]()
    if callable(task):
        return Function(task)
    raise TypeError(f"a task is a name, a function or a lowbit.tasks.Task, not {task!r}")
