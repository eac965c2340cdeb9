"""Random residual programs, from small descriptions.

A `Program` is plain data. `Network` makes an ordinary module of it, whose forward is written the
way people write residual networks; `tests.reference` reads the same description.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from re2fx import Coupling

Shape = tuple[int, ...]
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Block:
    """One residual.

    Attributes:
        branches: kinds of its branch, two for parallel branches.
        spelling: how the addition is written.
        behind: what follows the addition: an activation, a norm, ``"half"`` (times 0.5) or nothing.
        side: what the branch reads besides the stream.
        link: a shape-only operation before the block.
        tap: how the value after the block is used elsewhere, if it is.
        shared: use the branches of the block before, where shapes and number agree.
    """

    branches: tuple[str, ...] = ("linear",)
    spelling: str = "x + f"
    behind: str | None = None
    side: str | None = None
    link: str | None = None
    tap: str | None = None
    shared: bool = False


@dataclass(frozen=True)
class Stage:
    """Blocks behind an opening that no stream passes."""

    opening: str | None
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Program:
    """A residual network, and the shape of its input."""

    shape: Shape
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Sides:
    """What branches read besides the stream: an input, and a value computed from the input."""

    cond: Tensor
    context: Tensor


def add_in_place(x: Tensor, f: Tensor) -> Tensor:
    """A user's helper with an augmented assignment."""
    x += f
    return x


def same(x: Tensor) -> Tensor:
    """Nothing done."""
    return x


def helper(x: Tensor, f: Tensor) -> Tensor:
    """A user's helper with the operands the other way round."""
    return f + x


@dataclass(frozen=True)
class Spelling:
    """A way to write ``skip * x + scale * f``."""

    add: Callable[..., Tensor]
    skip: float = 1.0
    scale: float = 1.0


SPELLINGS = {
    "x + f": Spelling(lambda x, f: x + f),
    "f + x": Spelling(helper),
    "x += f": Spelling(add_in_place),
    "f += x": Spelling(lambda x, f: add_in_place(f, x)),
    "operator.add(x, f)": Spelling(operator.add),
    "torch.add(x, f)": Spelling(lambda x, f: torch.add(x, f)),
    "torch.add(input=x, other=f)": Spelling(lambda x, f: torch.add(input=x, other=f)),
    "torch.add(x, f, alpha=0.5)": Spelling(lambda x, f: torch.add(x, f, alpha=0.5), scale=0.5),
    "torch.add(f, x, alpha=0.75)": Spelling(lambda x, f: torch.add(f, x, alpha=0.75), skip=0.75),
    "x.add(f)": Spelling(lambda x, f: x.add(f)),
    "x.add(other=f)": Spelling(lambda x, f: x.add(other=f)),
    "x.add_(f)": Spelling(lambda x, f: x.add_(f)),
    "x.add_(f, alpha=0.5)": Spelling(lambda x, f: x.add_(f, alpha=0.5), scale=0.5),
    "f.add_(x)": Spelling(lambda x, f: f.add_(x)),
    "x * 0.9 + f": Spelling(lambda x, f: x * 0.9 + f, skip=0.9),
    "f + 1.1 * x": Spelling(lambda x, f: f + 1.1 * x, skip=1.1),
    "x / 2 + f": Spelling(lambda x, f: x / 2 + f, skip=0.5),
}
PARALLEL = {
    "x + a + m": Spelling(lambda x, a, m: x + a + m),
    "x + (a + m)": Spelling(lambda x, a, m: x + (a + m)),
    "(a + m) + x": Spelling(lambda x, a, m: (a + m) + x),
    "a + x + m": Spelling(lambda x, a, m: a + x + m),
    "a + (x + m)": Spelling(lambda x, a, m: a + (x + m)),
    "x += a; x += m": Spelling(lambda x, a, m: add_in_place(add_in_place(x, a), m)),
    "x * 0.9 + a + m": Spelling(lambda x, a, m: x * 0.9 + a + m, skip=0.9),
}
IN_PLACE = {"x += f", "x.add_(f)", "x.add_(f, alpha=0.5)", "x += a; x += m"}  # writes to the stream
BEHIND: dict[str, Function] = {
    "half": lambda x: x * 0.5,
    "F.relu": F.relu,
    "relu_": lambda x: x.relu_(),
    "F.gelu": F.gelu,
    "torch.tanh": torch.tanh,
    "F.silu in place": lambda x: F.silu(x, inplace=True),
}
NORMS: dict[str, Function] = {"layer norm": lambda x: F.layer_norm(x, x.shape[-1:])}
LINKS: dict[str, Callable[[int], Function]] = {  # by rank
    "transpose": lambda rank: lambda x: x.transpose(1, rank - 1),
    "permute": lambda rank: lambda x: x.permute(0, *range(2, rank), 1),
    "permute, contiguous": lambda rank: lambda x: x.permute(0, *range(2, rank), 1).contiguous(),
    "flatten": lambda rank: lambda x: x.flatten(1),
    "flatten, transpose": lambda rank: lambda x: torch.flatten(x, 2).transpose(1, 2),
    "unflatten": lambda rank: lambda x: x.unflatten(1, (2, -1)),
    "reshape": lambda rank: lambda x: x.reshape(x.shape[0], -1),
    "view": lambda rank: lambda x: x.contiguous().view(x.size(0), -1),
    "clone": lambda rank: lambda x: x.clone(),
}


def fits(link: str, shape: Shape) -> bool:
    """Whether a link applies to a shape."""
    if "transpose" in link or "permute" in link:
        return len(shape) >= (4 if "flatten" in link else 3)
    return link != "unflatten" or (shape[1] % 2 == 0 and len(shape) < 4)


# Modules.


class Gated(nn.Module):
    """Two linear layers, one a gate, times a learned layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value, self.gate = nn.Linear(width, width), nn.Linear(width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * (self.value(x) * torch.sigmoid(self.gate(x)))


class Attention(nn.Module):
    """Single-head attention over the second dimension, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        out: Tensor = self.proj((q @ k.transpose(-2, -1)).softmax(-1) @ v)
        return out


class DeadElement(nn.Module):
    """A module that returns a tuple, of which one element is never used."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.attention(x, x, x)
        return out


class ShapeReader(nn.Module):
    """A branch full of shape reads, with an assertion."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = math.prod(shape[1:])
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.shape[0] > 0, "an empty batch")
        flat: Tensor = self.linear(x.reshape(x.size(0), -1))
        return flat.view(x.shape) * torch.ones_like(x)


class StochasticDepth(nn.Module):
    """A linear layer, dropped for whole samples."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        f: Tensor = self.linear(x)
        if self.training:
            mask = f.new_empty((f.shape[0],) + (1,) * (f.ndim - 1)).bernoulli_(0.7)
            f = f * mask.div_(0.7)
        return f


class Squeeze(nn.Module):
    """A linear layer under a gate that is the same for a whole sample."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.gate = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1, -2).mean(1) if x.dim() > 2 else x.mean(0, keepdim=True)
        gate = torch.sigmoid(self.gate(mean)).view(-1, *(1,) * (x.dim() - 2), x.shape[-1])
        return self.linear(x) * gate


class Halves(nn.Module):
    """Views of both halves of the last dimension, one written in place, put together again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        f: Tensor = self.linear(x)
        cut = (f.shape[-1] + 1) // 2
        first, second = f.split([cut, f.shape[-1] - cut], -1)
        return torch.cat([second.sigmoid(), first.mul(0.5)], -1).add_(f.flip(-1))


class Broadcast(nn.Module):
    """One value per sample for the whole stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.tanh()).mean(-1, keepdim=True).expand_as(x) * 0.5


class Nested(nn.Module):
    """A norm, and residuals of its own."""

    def __init__(self, shape: Shape, number: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape[-1])
        self.inner = nn.ModuleList(Residual(Block(("mlp",)), shape) for _ in range(number))

    def forward(self, x: Tensor, sides: Sides, inner: Inner) -> Tensor:
        return inner(self.norm(x), list(self.inner), sides)  # type: ignore[arg-type]


def layers(kind: str, shape: Shape) -> nn.Module:
    """The inside of a branch; kinds that do not fit the shape give way to an MLP."""
    width, rank = shape[-1], len(shape)
    if kind == "linear":
        return nn.Linear(width, width)
    if kind == "pre-norm":
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
    if kind == "in place":
        return nn.Sequential(nn.Linear(width, 5), nn.ReLU(inplace=True), nn.Linear(5, width))
    if kind == "saved output":
        return nn.Sequential(nn.Linear(width, width), nn.Sigmoid())
    if kind == "layer scale":
        return Gated(width)
    if kind == "conv" and rank == 4:
        conv = nn.Conv2d(shape[1], shape[1], 1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(shape[1]), nn.SiLU(inplace=True))
    if kind == "attention" and rank == 3:
        return Attention(width)
    if kind == "dead element" and rank == 3:
        return DeadElement(width)
    if kind == "shape reader":
        return ShapeReader(shape)
    if kind == "dropout":
        return nn.Sequential(nn.Dropout(0.2), nn.Linear(width, width), nn.Dropout(0.3))
    wide = {
        "stochastic depth": StochasticDepth,
        "squeeze": Squeeze,
        "halves": Halves,
        "broadcast": Broadcast,
    }
    if kind in wide:
        return wide[kind](width)
    mlp = nn.Sequential(nn.Linear(width, 5), nn.GELU(), nn.Linear(5, width))
    return nn.Sequential(nn.Identity(), mlp, nn.Identity())


class Branch(nn.Module):
    """One branch, modulated by a side input if there is one."""

    def __init__(self, kind: str, side: str | None, shape: Shape) -> None:
        super().__init__()
        nested = {"nested": 2, "nested one": 1}.get(kind)
        self.body = layers(kind, shape) if nested is None else Nested(shape, nested)
        self.side, self.ones = side, (1,) * (len(shape) - 1)

    def forward(self, x: Tensor, sides: Sides, inner: Inner) -> Tensor:
        nested = isinstance(self.body, Nested)
        f: Tensor = self.body(x, sides, inner) if nested else self.body(x)
        if self.side is not None:
            f = f * (1 + getattr(sides, self.side).view(-1, *self.ones))
        return f


class Residual(nn.Module):
    """A block of a program; `link` is applied by the caller, before it."""

    def __init__(self, block: Block, shape: Shape, before: Residual | None = None) -> None:
        super().__init__()
        self.block = block
        self.link = LINKS[block.link](len(shape)) if block.link else same
        self.shape = tuple(self.link(torch.empty(shape)).shape)
        spelled = (SPELLINGS if len(block.branches) == 1 else PARALLEL)[block.spelling]
        self.add, self.skip, self.scale = spelled.add, spelled.skip, spelled.scale
        self.after = {**BEHIND, **NORMS}[block.behind] if block.behind else same
        old = before.branches if before is not None and before.shape == self.shape else ()
        again = block.shared and len(old) == len(block.branches)
        self.branches: nn.ModuleList = before.branches if before and again else self.fresh()

    def fresh(self) -> nn.ModuleList:
        """Branches of its own."""
        block = self.block
        return nn.ModuleList(Branch(kind, block.side, self.shape) for kind in block.branches)

    def forward(self, x: Tensor, sides: Sides, inner: Inner) -> Tensor:
        return self.after(self.add(x, *[f(x, sides, inner) for f in self.branches]))


Inner = Callable[[Tensor, Sequence[Residual], Sides], Tensor]
Run = Callable[[Tensor, Sequence[Residual], Sides], Iterable[Tensor]]


def in_turn(x: Tensor, residuals: Sequence[Residual], sides: Sides) -> Iterator[Tensor]:
    """The residuals as the user wrote them; the value after each."""
    for residual in residuals:
        x = residual(residual.link(x), sides, last_in_turn)
        yield x


def last_in_turn(x: Tensor, residuals: Sequence[Residual], sides: Sides) -> Tensor:
    """The same, the value at the end."""
    return list(in_turn(x, residuals, sides))[-1]


class Opening(nn.Module):
    """What no stream passes, with additions that are refused."""

    def __init__(self, kind: str, shape: Shape) -> None:
        super().__init__()
        width = shape[-1]
        self.kind, self.shape = kind, (*shape[:-1], 4)
        self.f, self.proj = nn.Linear(width, 4), nn.Linear(width, 4)
        self.mix, self.g = nn.Linear(8, 4), nn.Parameter(torch.linspace(0.5, 1.5, width))
        if kind == "learned skip":
            self.f, self.shape = nn.Linear(width, width), shape

    def forward(self, x: Tensor) -> Tensor:
        f: Tensor = self.f(x)
        if self.kind == "projection":
            return self.proj(x) + f
        if self.kind == "learned skip":
            return x * self.g + f
        if self.kind == "concat":
            return self.mix(torch.cat([self.proj(x), f], -1))
        return f.relu_() if self.kind == "relu" else f


class Network(nn.Module):
    """A program as a module; returns its output and its taps."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.openings, self.stages = nn.ModuleList(), nn.ModuleList()
        shape = program.shape
        for stage in program.stages:
            opening = Opening(stage.opening, shape) if stage.opening else nn.Identity()
            self.openings.append(opening)
            shape = opening.shape if isinstance(opening, Opening) else shape
            residuals: list[Residual] = []
            for block in stage.blocks:
                residuals.append(Residual(block, shape, residuals[-1] if residuals else None))
                shape = residuals[-1].shape
            self.stages.append(nn.ModuleList(residuals))
        sides = {block.side for stage in program.stages for block in stage.blocks}
        self.context = "context" in sides

    def forward(self, x: Tensor, cond: Tensor) -> tuple[Tensor, ...]:
        return self.run(x, cond, in_turn)

    def run(self, x: Tensor, cond: Tensor, run: Run) -> tuple[Tensor, ...]:
        """The forward, with a way to run the residuals of a stage."""
        context = torch.tanh(x).flatten(1).mean(1) if self.context else cond
        sides = Sides(cond, context)
        taps = []
        for opening, stage in zip(self.openings, self.stages, strict=True):
            x = opening(x)
            residuals = [r for r in stage.children() if isinstance(r, Residual)]
            for residual, x in zip(residuals, run(x, residuals, sides), strict=True):  # noqa: B020
                if residual.block.tap is not None:
                    taps.append(x if residual.block.tap == "raw" else x.sin())
        return (x, *taps)


def build(program: Program) -> tuple[Network, Tensor, Tensor]:
    """The module in fp64 and eval mode, and its two inputs; the same for the same program."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Network(program).double().eval()
        x, cond = torch.randn(program.shape), torch.randn(program.shape[0])
    return network, x.double(), cond.double()


# Strategies.

SHAPES: dict[int, tuple[Shape, ...]] = {
    2: ((3, 4), (2, 6)),
    3: ((2, 3, 4), (2, 4, 4), (1, 2, 6)),
    4: ((2, 4, 2, 3), (2, 2, 3, 3)),
}
KINDS = (
    "linear", "mlp", "pre-norm", "in place", "layer scale", "conv", "attention", "dead element",
    "shape reader", "saved output",
)  # fmt: skip
OPENINGS = ("linear", "relu", "projection", "learned skip", "concat")


@st.composite
def blocks(
    draw: st.DrawFn,
    shape: Shape,
    activation: str,
    own: bool,
    sides: bool,
    insides: Sequence[str] = KINDS,
) -> tuple[Block, ...]:
    """A stage's blocks for a stream of a shape; `own`: the first may be overwritten."""
    made: list[Block] = []
    maybe = st.sampled_from((False, False, True))
    for number in range(draw(st.integers(1, 4))):
        double = draw(maybe)
        spelling = draw(st.sampled_from(sorted(PARALLEL if double else SPELLINGS)))
        if number == 0 and not own and spelling in IN_PLACE:
            spelling = "x + a + m" if double else "x + f"
        kinds = st.sampled_from(insides if double else (*insides, "nested", "nested one"))
        links = [name for name in LINKS if fits(name, shape)]
        moved = activation == "stream" and made and made[-1].behind not in (None, "half")
        link = draw(st.sampled_from(links)) if number and not moved and draw(maybe) else None
        if made and made[-1].tap == "raw" and spelling in IN_PLACE:
            made[-1] = replace(made[-1], tap="sin")
        made.append(
            Block(
                branches=tuple(draw(kinds) for _ in range(1 + double)),
                spelling=spelling,
                behind=draw(st.sampled_from(sorted(BEHIND))) if draw(maybe) else None,
                side=draw(st.sampled_from(("cond", "context"))) if sides and draw(maybe) else None,
                link=link,
                tap=draw(st.sampled_from(("raw", "sin"))) if draw(maybe) else None,
                shared=draw(maybe),
            )
        )
        shape = tuple(LINKS[link](len(shape))(torch.empty(shape)).shape) if link else shape
    return tuple(made)


@st.composite
def programs(
    draw: st.DrawFn, rank: int, activation: str = "branch", insides: Sequence[str] = KINDS
) -> Program:
    """Programs whose streams begin with a rank, for a way to move activations.

    Args:
        draw: hypothesis'.
        rank: of the input.
        activation: as for `re2fx.transform`.
        insides: the kinds of branches to choose from.
    """
    shape = start = draw(st.sampled_from(SHAPES[rank]))
    stages: list[Stage] = []
    for number in range(draw(st.integers(1, 2))):
        opening = draw(st.sampled_from(OPENINGS if number else (None, *OPENINGS)))
        shape = Opening(opening, shape).shape if opening else shape
        own = opening is not None
        sides = stages != [] or own
        made = draw(blocks(shape, activation, own=own, sides=sides, insides=insides))
        stages.append(Stage(opening, made))
        for block in made:
            shape = Residual(replace(block, branches=("linear",), spelling="x + f"), shape).shape
    return Program(start, tuple(stages))


def couplings() -> st.SearchStrategy[Coupling]:
    """The family, as far as six blocks can be inverted with ten digits left."""
    b, c = st.floats(0.4, 1.0), st.floats(-1.5, 1.5).filter(bool)
    signed = st.builds(operator.mul, st.floats(0.6, 1.2), st.sampled_from((-1.0, 1.0)))
    return st.one_of(
        st.just(Coupling.re2tal()),
        st.builds(Coupling.consistent, b),
        st.builds(Coupling.midpoint, b, c),
        st.builds(Coupling.momentum, st.floats(0.4, 0.95)),
        st.builds(Coupling.dr2net, st.floats(0.1, 1.0), b),
        st.builds(Coupling, st.floats(-1.0, 1.0), signed, c),
    )
