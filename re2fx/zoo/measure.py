"""What re2fx does with one model, and whether it is right.

build      the model in fp64, with generic parameters, and a step of it as it is
capture    the graphs, by the route that loses least
plan       and rewire them; how much of what is kept lies in the chains
compare    a reversible step with a stored one, and with the gradients the given model gets
"""

from __future__ import annotations

import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..api import counter, take, weigher
from ..capture import Captured
from ..columns import Route, Run, predict_stored
from ..consistency import agree
from ..coupling import Coupling
from ..errors import CaptureError, Re2fxError
from ..fake import Fakes, fake_twin
from ..graph import copy_graph, same_graph
from ..inputs import split
from ..module import Executors, Rewired, RewiredModule
from ..options import Options
from ..passes.mark import mark
from ..passes.outline import outline
from ..pieces import Pieces
from ..piecewise import Account, merged_plan, pieces_of
from ..pipeline import make_plan, rewire_plan
from ..plan import Plan, Refusal
from ..tally import mark_places
from ..targets import load
from .catalogue import Entry
from .census import overlooked, skip_adds
from .results import PARTS, Row
from .steps import Step, awaken, gradient_errors, output_error, seeded, step

OPTIONS = Options(Coupling.re2tal(), "mean", "branch", "reversible")


def measure(entry: Entry, seed: int = 0) -> Row:
    """Build a model of the catalogue and try re2fx on it.

    Whatever is raised on the way becomes part of the row.
    """
    row = Row.of(entry)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Trial(row, seed).run()
    except _Over as end:
        row.status, row.reason = end.status, end.reason
    except Exception as error:  # a result like any other: the next model is in another process
        row.status, row.reason = "failed", told(error)
    row.judge()
    return row


class _Over(Exception):
    """There is no more to find out about a model."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass
class Trial:
    """One model on its way through."""

    row: Row
    seed: int
    input_gradients: bool = True

    def run(self) -> None:
        """All stages in their order."""
        with self.clock("build"):
            model, inputs = self.build()
        with self.clock("original"):
            original = self.given_step(model, inputs)
        inputs = at_precision(self.row.dtype, inputs)
        pieces, captured = self.take(model, inputs)
        rev = pieces.module
        if rev is None:
            assert captured is not None, "a model of no parts has a graph"
            rev = self.rewire(model, inputs, captured, pieces.account)
        else:
            self.describe_pieces(rev, pieces.account)
        if rev is None:
            self.row.status = "refused" if self.row.refusals else "no residual"
            return
        with self.clock("steps"):
            self.compare(rev, inputs, original)
        self.row.status = "rewired"

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        """Note how long a stage took, also one that failed."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - begin
            self.row.seconds[stage] = round(self.row.seconds.get(stage, 0.0) + spent, 3)

    def build(self) -> tuple[nn.Module, Any]:
        """The model in train mode with generic parameters, and its inputs."""
        try:
            with seeded(self.seed):
                made = load(self.row.target, self.row.inputs)
            awaken(made.model, self.seed)
        except Exception as error:  # libraries raise what they like
            raise _Over("unusable", told(error)) from error
        if made.inputs is None:
            raise _Over("unusable", "the catalogue gives no inputs, and the library says of none")
        return made.model, made.inputs

    def given_step(self, model: nn.Module, inputs: Any) -> Step:
        """A step of the model as it is, at the precision it can be run in.

        In fp64 with gradients of the inputs if it can. Some models change what their inputs
        require, and some make constants, or call kernels, of fp32 only.
        """
        reason = ""
        for dtype in ("float64", "float32"):
            model.to(getattr(torch, dtype))
            args, kwargs = split(at_precision(dtype, inputs))
            for self.input_gradients in (True, False):
                try:
                    done = self.step(model, args, kwargs)
                except Exception as error:  # models raise what they like
                    reason = reason or told(error)
                else:
                    self.row.dtype = dtype
                    return done
        raise _Over("unusable", f"a step of the model as it is: {reason}")

    def step(self, model: nn.Module, args: Any, kwargs: Any) -> Step:
        """One training step, always from the same state."""
        return step(model, args, kwargs, self.seed, input_gradients=self.input_gradients)

    def take(self, model: nn.Module, inputs: Any) -> tuple[Pieces, Captured | None]:
        """The graphs, or rewired parts; what choosing between routes spends on planning is not
        counted.
        """
        choosing: list[float] = []
        count = counter(model, OPTIONS, ())

        def found(captured: Captured) -> tuple[int, ...]:
            begin = time.perf_counter()
            number = count(captured)
            choosing.append(time.perf_counter() - begin)
            return number

        try:
            with self.clock("capture"):
                taken = take(model, inputs, OPTIONS, found=found)
        except CaptureError as error:
            self.describe_parts(error)
            raise _Over("refused" if self.row.found else "not captured", sentence(error)) from error
        self.row.seconds["capture"] = round(self.row.seconds["capture"] - sum(choosing), 3)
        return taken

    def describe_parts(self, error: CaptureError) -> None:
        """Write down what is refused in the parts of a model, of which none is rewired."""
        self.note(PARTS, error.failures)
        if error.plan is not None and error.plan.found:
            self.describe(error.plan)

    def describe_pieces(self, rev: nn.Module, account: Account) -> None:
        """Write down what was rewired and refused in the parts of a model."""
        self.note(account.route, account.failures)
        self.row.parts = dict(account.routes)
        self.describe(Plan.merged([merged_plan(rev), *account.refused]))

    def note(self, route: str, failures: dict[str, str]) -> None:
        """Write down how a model was captured."""
        self.row.route = route
        self.row.routes_failed = {k: first_line(v) for k, v in failures.items()}

    def rewire(
        self, model: nn.Module, inputs: Any, captured: Captured, account: Account
    ) -> RewiredModule | None:
        """The rewired model, or None if nothing in it is rewired."""
        self.note(captured.route, captured.failures)
        self.row.nodes = len(captured.train.nodes)
        self.row.kept_whole = {k: first_line(v) for k, v in captured.leaves.items()}
        self.row.hidden = [
            path for path in captured.leaves if holds_blocks(model.get_submodule(path))
        ]
        plan, rewired = self.plan(model, inputs, captured, account)
        if plan.chains:
            inputs_, constants, run = captured.inputs, captured.constants, Executors(outline, mark)
            return RewiredModule(model, *rewired, inputs_, constants, OPTIONS.memory, run)
        if self.row.hidden and not account.refused:
            raise _Over("not captured", hiding(self.row))
        return None

    def plan(
        self, model: nn.Module, inputs: Any, captured: Captured, account: Account
    ) -> tuple[Plan, tuple[Rewired, Rewired]]:
        """Plan and rewire both graphs; find out what the plan leaves out and what it holds."""
        options = OPTIONS
        with self.clock("plan"):
            weigh = weigher(model, inputs, captured, options.activation)
            plan_graph = partial(make_plan, model=model, policy=options.policy, weigh=weigh)
            flow, plan = plan_graph(captured.train)
            train = rewire_plan(flow, plan, options)
            if same_graph(captured.train, captured.eval):
                rewired = train, replace(train, graph=copy_graph(train.graph))
            else:
                eval_flow, eval_plan = plan_graph(captured.eval)
                agree(type(model).__name__, plan, eval_plan)
                rewired = train, rewire_plan(eval_flow, eval_plan, options)
        self.describe(Plan.merged([plan, *account.refused]))
        with self.clock("census"):
            self.row.overlooked = overlooked(flow.graph, model, plan)
            numbers = [len(skip_adds(g, model)) for g in (captured.train, flow.graph)]
        if numbers[0] > numbers[1]:
            lost = numbers[0] - numbers[1]
            self.row.overlooked.append(f"{lost} that normalisation made no addition any more")
        if plan.chains:
            regions = mark_places(flow.graph, model, plan)
            with self.clock("share"):
                self.weigh(model, inputs, Route(plan, captured, flow.graph, regions))
        return plan, rewired

    def describe(self, plan: Plan) -> None:
        """Write the plan down."""
        row = self.row
        row.found, row.chains = plan.found, [len(chain) for chain in plan.chains]
        row.refusals = list(grouped(plan.refusals))
        row.misses = dict(Counter(miss.rule for miss in plan.misses))

    def weigh(self, model: nn.Module, inputs: Any, route: Route) -> None:
        """How much of what ordinary training keeps lies in the chains."""
        fakes = Fakes()
        twin = fake_twin(model, fakes)
        run = Run(twin, fakes.tree(split(inputs)), route.with_constants(fakes), None)
        try:
            kept = predict_stored(run, fakes)
        except Re2fxError as error:
            self.row.findings.append(f"what it keeps cannot be predicted: {first_line(str(error))}")
            return
        self.row.stored = kept.total()
        self.row.in_chains = sum(size for place, size in kept.items() if place.chain >= 0)

    def compare(self, rev: Any, inputs: Any, original: Step) -> None:
        """A reversible step against a stored one."""
        args, kwargs = split(inputs)
        pieces = pieces_of(rev).values()
        for piece in pieces:
            piece.memory = "store"
        stored = self.step(rev, args, kwargs)
        for piece in pieces:
            piece.memory = "reversible"
        reversible = self.step(rev, args, kwargs)
        row, errors = self.row, gradient_errors(reversible, stored)
        row.output_error = output_error(reversible, stored)
        row.worst = max(errors, key=errors.__getitem__, default="")
        row.gradient_error = errors.get(row.worst, 0.0)
        row.without_gradient = [
            name
            for name, gradient in original.gradients.items()
            if gradient is not None and reversible.gradients.get(name) is None
        ]
        row.disturbed = [
            name
            for name, buffer in stored.buffers.items()
            if not torch.equal(buffer.nan_to_num(), reversible.buffers[name].nan_to_num())
        ]
        if not torch.equal(stored.random_state, reversible.random_state):
            row.disturbed.append("the random state")


def holds_blocks(module: nn.Module) -> bool:
    """Whether a module has a stack of blocks in it, whose skip-adds are hidden if it stays whole.

    A stack is two modules or more of one class, side by side, each made of modules that train.
    """
    for stack in module.modules():
        kinds = Counter(type(block) for block in stack.children() if made_of_many(block))
        if any(times > 1 for times in kinds.values()):
            return True
    return False


def made_of_many(module: nn.Module) -> bool:
    """Whether two submodules or more have parameters of their own."""
    own = (any(True for _ in m.parameters(recurse=False)) for m in module.modules())
    return sum(own) > 1


def hiding(row: Row) -> str:
    """Why nothing is known of most of a model."""
    kept = "; ".join(f"{path} is kept whole ({row.kept_whole[path]})" for path in row.hidden)
    failed = "".join(f"; {name}: {reason}" for name, reason in row.routes_failed.items())
    return f"{kept}{failed or '; no other route rewires more'}"


def at_precision(dtype: str, inputs: Any) -> Any:
    """The inputs with floating-point tensors of a type."""
    kind = getattr(torch, dtype)

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(kind) if tensor.is_floating_point() else tensor

    return pytree.tree_map_only(torch.Tensor, convert, inputs)


def grouped(refusals: tuple[Refusal, ...]) -> Iterator[dict[str, Any]]:
    """Refusals by rule and source line, each with the sentence of the first."""
    groups: dict[tuple[str, str], list[Refusal]] = {}
    for refusal in refusals:
        key = (refusal.rule, f"{refusal.location.file}:{refusal.location.line}")
        groups.setdefault(key, []).append(refusal)
    for (rule, _), members in groups.items():
        first = members[0]
        yield {
            "rule": rule,
            "count": len(members),
            "sentence": without_folders(first.sentence),
            "module": first.location.module or first.node,
            "code": first.location.code,
        }


def told(error: BaseException) -> str:
    """Class, first line and innermost place of an error."""
    frames = traceback.extract_tb(error.__traceback__)
    where = ""
    if frames:
        file = "/".join(frames[-1].filename.rsplit("/", 3)[-3:])
        where = f" ({file}:{frames[-1].lineno})"
    return f"{type(error).__name__}: {first_line(str(error))}{where}"


def sentence(error: CaptureError) -> str:
    """Why no route goes through, on one line."""
    lines = (line.strip() for line in str(error).splitlines() if line.strip())
    return without_folders(" ".join(lines))


def first_line(text: str) -> str:
    """The first line that says something."""
    lines = (line.strip() for line in text.splitlines() if line.strip())
    return without_folders(next(lines, "no reason given"))


def without_folders(text: str) -> str:
    """Paths of installed packages without where they are installed."""
    return re.sub(r"[^\s\"'(]*/site-packages/", "", text)
