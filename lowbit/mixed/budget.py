"""What a search has to keep to: bytes, time, or a floor of quality."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from lowbit.schemes import Scheme
from lowbit.tasks.metric import METRICS, metric_of

_BYTES = {"B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
FORMS = (
    "a size ('2.4MB'), a share of the float model's bytes ('30%') or of a scheme's ('50% of "
    "w8a8'), a time ('3ms'), or a quality to keep ('20dB', 'top1_agreement>=0.93', "
    "'kl_divergence<=0.01')"
)


@dataclass(frozen=True)
class Budget:
    """A limit.

    Attributes:
        kind: "bytes" (parameters and buffers of the whole model), "seconds" (of the first batch,
            on this machine) or "quality".
        value: the limit, in bytes, seconds or the unit of the metric; of a share the share.
        of: what a number of bytes is a share of: "float", or the name of a scheme; None for bytes.
        metric: name of the figure of a "quality".
    """

    kind: str
    value: float
    of: str | None = None
    metric: str | None = None

    @classmethod
    def parse(cls, text: str | int | float | Budget) -> Budget:
        """From text (see `FORMS`); a number is bytes.

        Raises:
            ValueError: it is none of these; the message lists them.
        """
        if isinstance(text, Budget):
            return text
        if isinstance(text, (int, float)) and not isinstance(text, bool):
            return cls._checked("bytes", float(text), text)
        if not isinstance(text, str):
            raise ValueError(f"a budget is {FORMS}, or a number of bytes, not {text!r}")
        stripped = text.strip()
        share = re.fullmatch(rf"{_NUMBER}\s*%(?:\s*of\s+(\S+))?", stripped)
        if share:
            of = "float" if share[2] in (None, "float", "float32") else Scheme.parse(share[2]).name
            return cls._checked("bytes", float(share[1]) / 100, text, of)
        compared = re.fullmatch(r"([A-Za-z_]\w*)\s*([<>]=)\s*([-+.\deE]+)(%?)", stripped)
        if compared:
            name, sign, number, percent = compared.groups()
            return cls._floor(name, sign, number, percent, text)
        plain = re.fullmatch(rf"{_NUMBER}\s*([A-Za-z]+)", stripped)
        if plain and plain[2] in _BYTES:
            return cls._checked("bytes", float(plain[1]) * _BYTES[plain[2]], text)
        if plain and plain[2] in _SECONDS:
            return cls._checked("seconds", float(plain[1]) * _SECONDS[plain[2]], text)
        if plain and plain[2] == "dB":
            return cls("quality", float(plain[1]), metric="sqnr_db")
        raise ValueError(f"a budget is {FORMS}, not {text!r}")

    @classmethod
    def _checked(cls, kind: str, value: float, text: object, of: str | None = None) -> Budget:
        if not 0 < value < math.inf:
            raise ValueError(f"a budget has to be more than 0, not {text!r}")
        return cls(kind, value, of)

    @classmethod
    def _floor(cls, name: str, sign: str, number: str, percent: str, text: str) -> Budget:
        try:
            value = float(number) / (100 if percent else 1)
        except ValueError:
            raise ValueError(f"a budget is {FORMS}, not {text!r}") from None
        better = metric_of(name).higher_is_better
        if name in METRICS and better != (sign == ">="):
            wanted = ">=" if better else "<="
            raise ValueError(f"{name} is better when {'higher' if better else 'lower'}: {wanted}")
        return cls("quality", value, metric=name)

    def meets(self, figures: dict[str, float]) -> bool:
        """Whether a quality's figures keep to a "quality".

        Raises:
            ValueError: there is no such figure.
        """
        assert self.metric is not None
        if self.metric not in figures:
            raise ValueError(
                f"there is no figure {self.metric!r} to keep to; this task has {', '.join(figures)}"
            )
        value = figures[self.metric]
        return value >= self.value if self._higher else value <= self.value

    @property
    def _higher(self) -> bool:
        return metric_of(self.metric or "").higher_is_better

    def __str__(self) -> str:
        if self.kind == "bytes":
            if self.of is not None:
                return f"{100 * self.value:g} % of the bytes of {self.of}"
            return f"{self.value / 1e6:.3f} MB"
        if self.kind == "seconds":
            return f"{self.value * 1e3:g} ms"
        return f"{self.metric} {'>=' if self._higher else '<='} {self.value:g}"
