"""What a verification found, as plain data, and how it reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from .errors import VerificationError
from .text import count

Severity = Literal["error", "warning", "note"]
Verdict = Literal["ok", "inexact", "wrong"]
SEVERITIES: tuple[str, ...] = get_args(Severity)

GRADIENTS_SHOWN = 5


@dataclass(frozen=True)
class Finding:
    """One thing the user should know.

    Attributes:
        severity: ``"error"`` if reversible execution computes something else than stored execution,
            ``"warning"`` if it is less exact than asked for, ``"note"`` if nothing need be done.
        where: the blocks with their source line, the parameter, or the part of the step.
        sentence: what was found.
        remedy: what to do about it.
    """

    severity: Severity
    where: str
    sentence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.sentence} {self.remedy}"


@dataclass(frozen=True)
class GradientError:
    """How far one gradient of reversible execution is from that of stored execution.

    Attributes:
        name: the parameter's name, or ``"input x"``.
        error: norm of the difference over the norm of the stored gradient; a gradient below one
            per cent of the largest counts as one of that norm, since it may be zero but for
            rounding. Infinite if only one of the two executions has a gradient.
        norm: of the stored gradient.
    """

    name: str
    error: float
    norm: float


@dataclass(frozen=True)
class BlockError:
    """How well the input of one block was reconstructed.

    Attributes:
        where: module path and source line.
        error: norm of the error over the norm of the true state; None if the walk did not get
            this far.
    """

    where: str
    error: float | None


@dataclass(frozen=True)
class ChainErrors:
    """How well the inputs of a chain's blocks were reconstructed.

    Attributes:
        number: of the chain in the plan.
        dtype: of its streams.
        blocks: in the order they run in; the input of the last is stored and so has no error.
    """

    number: int
    dtype: str
    blocks: tuple[BlockError, ...]

    @property
    def worst(self) -> BlockError:
        """The block whose input was reconstructed least well."""
        return max(self.blocks, key=lambda block: -1.0 if block.error is None else block.error)

    @property
    def complete(self) -> bool:
        """Whether every block's input was reconstructed."""
        return all(block.error is not None for block in self.blocks)


@dataclass(frozen=True)
class Verification:
    """Reversible against stored execution of one training step; print it.

    Attributes:
        name: the model's class.
        conditions: mode, device and dtypes it holds for, in words.
        tolerance: the relative error allowed in outputs, gradients and reconstructed states.
        findings: errors first, then warnings, then notes.
        output_error: relative error of the outputs, infinite if there are none.
        gradients: of every parameter and differentiable input that has one, worst first; without
            those that cannot be compared (a finding names them), and empty if the backward failed.
        chains: reconstruction errors, chain by chain.
    """

    name: str
    conditions: str
    tolerance: float
    findings: tuple[Finding, ...]
    output_error: float
    gradients: tuple[GradientError, ...]
    chains: tuple[ChainErrors, ...]

    @property
    def verdict(self) -> Verdict:
        """``"wrong"`` after an error, ``"inexact"`` after a warning, else ``"ok"``."""
        severities = {finding.severity for finding in self.findings}
        if "error" in severities:
            return "wrong"
        return "inexact" if "warning" in severities else "ok"

    @property
    def ok(self) -> bool:
        """Whether nothing worse than a note was found."""
        return self.verdict == "ok"

    @property
    def shown_gradients(self) -> tuple[GradientError, ...]:
        """The worst few, without those that are equal to the bit."""
        return tuple(g for g in self.gradients[:GRADIENTS_SHOWN] if g.error > 0)

    def raise_for_findings(self) -> None:
        """Do nothing if all is well.

        Raises:
            VerificationError: with the findings, if the verdict is not ``"ok"``.
        """
        if not self.ok:
            raise VerificationError(str(self))

    def to_dict(self) -> dict[str, Any]:
        """Everything as dicts, lists, strings and numbers."""
        return {"verdict": self.verdict, **asdict(self)}

    def plot(self, path: Any = None) -> Any:
        """Draw the reconstruction error of every chain against depth, with matplotlib.

        Args:
            path: where to save the picture; its suffix tells the format.

        Returns:
            the `matplotlib.figure.Figure`.

        Raises:
            OptionError: matplotlib is not installed.
        """
        from .verification_views import draw

        return draw(self, path)

    def __str__(self) -> str:
        return "\n".join(
            (
                self.headline(),
                *(line for finding in self.findings for line in _paragraph(finding)),
                *self._gradient_lines(),
                *self._chain_lines(),
            )
        )

    def headline(self) -> str:
        """The verdict in one line."""
        means = {
            "ok": "reversible execution does what stored execution does",
            "inexact": "reversible execution is less exact than asked for",
            "wrong": "reversible execution does not do what stored execution does",
        }
        return (
            f"{self.name}: {self.verdict}: {means[self.verdict]} "
            f"({self.conditions}; tolerance {self.tolerance:.1g})"
        )

    def _gradient_lines(self) -> list[str]:
        if not self.gradients:
            return []
        total, shown = count(len(self.gradients), "gradient"), self.shown_gradients
        lines = [f"relative error of {total}, the worst first:"]
        if not shown:
            lines = [f"{total}: equal to the bit"]
        lines += [f"    {g.error:8.1e}  {g.name}" for g in shown]
        return [*lines, f"relative error of the outputs: {figure(self.output_error)}"]

    def _chain_lines(self) -> list[str]:
        return ["relative error of reconstructed states:"] * bool(self.chains) + [
            f"    {summary(chain)}" for chain in self.chains
        ]

    def __rich__(self) -> Any:
        from .verification_views import rich_view

        return rich_view(self)

    def _repr_html_(self) -> str:
        from .verification_views import html_view

        return html_view(self)


def summary(chain: ChainErrors) -> str:
    """One line about a chain."""
    reached = [block for block in chain.blocks if block.error is not None]
    what = f"chain {chain.number}, {count(len(chain.blocks), 'block')}, {chain.dtype} streams"
    if not reached:
        return f"{what}: not reconstructed"
    worst = f"{what}: none"
    if chain.worst.error:
        number = chain.blocks.index(chain.worst)
        worst = f"{what}: at most {chain.worst.error:.1e}, at block {number}, {chain.worst.where}"
    if chain.complete:
        return worst
    return f"{worst}; the last {len(reached)} blocks only, then the walk failed"


def figure(error: float) -> str:
    """An error in two digits, and ``none`` for equality to the bit."""
    return f"{error:.1e}" if error else "none"


def _paragraph(finding: Finding) -> list[str]:
    return [
        f"{finding.severity}: {finding.where}",
        f"    {finding.sentence}",
        f"    -> {finding.remedy}",
    ]
