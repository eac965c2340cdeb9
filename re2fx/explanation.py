"""What re2fx would do with a model, to read and to process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from .piecewise import Account, merged_plan
from .plan import Chain, Plan, Refusal, Residual
from .tables import Table, to_html, to_rich
from .text import MISSES_SHOWN, hints, short, shorten, span

if TYPE_CHECKING:
    from rich.console import Group
    from torch import nn

    from .capture import Captured


CHAIN_COLUMNS = ("chain>", "residuals>", "modules", "kind", "source", "code")
REFUSAL_COLUMNS = ("times>", "rule", "modules", "source", "reason")
MISS_COLUMNS = ("rule", "module", "source", "reason")


@dataclass(frozen=True)
class Explanation:
    """What re2fx would do with a model; print it.

    Attributes:
        name: the model's class.
        plan: chains, refusals and misses of the train graph.
        leaves: modules kept whole because tracing into them failed, with the reason.
        route: how the model was captured.
        failures: the routes that did not go through, with the reason.
        account: of a model of which submodules are rewired by themselves, how it came to that.
        sizes: of the inputs that the capture holds for, those that may vary as ``any``; empty if
            all may. A call with others is captured again.
    """

    name: str
    plan: Plan
    leaves: dict[str, str]
    route: str = "symbolic"
    failures: dict[str, str] = field(default_factory=dict)
    account: Account = field(default_factory=Account)
    sizes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.plan}"]
        for path, reason in self.leaves.items():
            lines.append(f"kept whole: {path} ({reason})")
        lines += self.account.lines()
        how = self.route if self.account.routes else f"{self.route} tracing"
        for route, reason in self.failures.items():
            lines.append(f"captured by {how}, because {route} failed: {reason}")
        if self.sizes:
            sizes = ", ".join(f"{name} {size}" for name, size in self.sizes.items())
            lines.append(f"captured for sizes: {sizes}")
        return "\n".join(lines)

    @property
    def headline(self) -> str:
        """One sentence: how many were found, rewired and refused, or that there are none."""
        if not self.plan.found and not self.plan.misses:
            return f"{self.name}: the graph has no addition of two activations"
        return str(self).splitlines()[0]

    def tables(self) -> Iterator[Table]:
        """Chains, refusals, nearest misses if nothing was found, and modules kept whole."""
        if self.plan.chains:
            rows = [row for item in enumerate(self.plan.chains) for row in chain_rows(*item)]
            yield Table("Rewired", CHAIN_COLUMNS, tuple(rows))
        if any(chain.notes for chain in self.plan.chains):
            rows = [(str(i), note) for i, c in enumerate(self.plan.chains) for note in c.notes]
            yield Table("What the coupling means", ("chain>", "note"), tuple(rows))
        if self.plan.refusals:
            rows = list(grouped(self.plan.refusals))
            yield Table("Refused, and left exactly as they were", REFUSAL_COLUMNS, tuple(rows))
        if remedies := hints(self.plan):
            yield Table("What may help", ("rule", "remedy"), tuple(remedies.items()))
        if not self.plan.found and self.plan.misses:
            rows = list(map(miss_row, self.plan.misses[:MISSES_SHOWN]))
            yield Table("Nearest misses", MISS_COLUMNS, tuple(rows))
        if self.leaves:
            yield Table("Kept whole", ("module", "reason"), tuple(self.leaves.items()))
        if self.account.routes:
            rows = list(self.account.routes.items())
            yield Table("Rewired by themselves", ("module", "route"), tuple(rows))
        if self.account.left:
            rows = list(self.account.left.items())
            yield Table("Run as they are written", ("module", "reason"), tuple(rows))
        if self.failures:
            title = f"Captured by {self.route} tracing, because others failed"
            yield Table(title, ("route", "reason"), tuple(self.failures.items()))
        if self.sizes:
            title = "Captured for sizes, others are captured again"
            yield Table(title, ("input", "sizes"), tuple(self.sizes.items()))

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain data for JSON."""
        return {
            "model": self.name,
            "found": self.plan.found,
            "rewired": self.plan.rewired,
            "chains": [chain_dict(chain) for chain in self.plan.chains],
            "refusals": [asdict(refusal) for refusal in self.plan.refusals],
            "misses": [asdict(miss) for miss in self.plan.misses],
            "kept_whole": dict(self.leaves),
            "route": self.route,
            "routes_failed": dict(self.failures),
            "submodules": dict(self.account.routes),
            "submodules_left": dict(self.account.left),
            "sizes": dict(self.sizes),
        }

    def __rich__(self) -> Group:
        return to_rich(self.headline, self.tables())

    def _repr_html_(self) -> str:
        return to_html(self.headline, self.tables())


def explanation(
    model: nn.Module, plan: Plan, captured: Captured, account: Account | None = None
) -> Explanation:
    """What is done with a captured model; the account says what was tried with its parts."""
    name, account = type(model).__name__, account or Account()
    plan = Plan.merged([plan, *account.refused])
    shapes = captured.inputs.shapes
    return Explanation(
        name, plan, captured.leaves, captured.route, captured.failures, account,
        shapes[0].in_words() if shapes else {},
    )  # fmt: skip


def explanation_of_pieces(name: str, module: nn.Module, account: Account) -> Explanation:
    """What is done with a model of which submodules were rewired by themselves."""
    plan = Plan.merged([merged_plan(module), *account.refused])
    return Explanation(name, plan, {}, account.route, account.failures, account)


def chain_rows(index: int, chain: Chain) -> Iterator[tuple[str, ...]]:
    """One row per distinct source line and kind, in the order they first run."""
    groups: dict[tuple[str, str, str], list[Residual]] = {}
    for residual in chain.residuals:
        key = (str(short(residual.location)), residual.location.code, residual.kind)
        groups.setdefault(key, []).append(residual)
    for (place, code, kind), residuals in groups.items():
        modules = span(residual.location.module for residual in residuals)
        yield str(index), str(len(residuals)), modules, kind, place, code


def grouped(refusals: Iterable[Refusal]) -> Iterator[tuple[str, ...]]:
    """One row per rule and source line."""

    def key(refusal: Refusal) -> tuple[str, str]:
        return refusal.rule, str(short(refusal.location))

    for (rule, place), group in groupby(sorted(refusals, key=key), key=key):
        members = list(group)
        modules = shorten(r.location.module or r.node for r in members)
        yield str(len(members)), rule, modules, place, members[0].sentence


def miss_row(miss: Refusal) -> tuple[str, ...]:
    """An addition that is no residual."""
    where = miss.location.module or miss.node
    return miss.rule, where, str(short(miss.location)), miss.sentence


def chain_dict(chain: Chain) -> dict[str, Any]:
    """A chain as plain data."""
    residuals = [{"kind": residual.kind, **asdict(residual)} for residual in chain.residuals]
    return {
        "residuals": residuals,
        "links": [list(link) for link in chain.links],
        "taps": list(chain.taps),
        "notes": list(chain.notes),
        "weight": None if chain.weight is None else asdict(chain.weight),
    }
