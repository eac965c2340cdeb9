"""Which kind every frame of a program is: stored, reversed, checkpointed, run in slices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.fx import Graph

from .body import Body
from .codegen import compile_graph
from .framing import Framing
from .program import Program, RunBlock, Segment, Step


@dataclass(frozen=True)
class Frames:
    """The kinds of a program's frames.

    Attributes:
        stored: per chain, how many of its last blocks are stored; the others are reversed.
        checkpointed: the steps outside the chains that are checkpoints, the others are stored; and
            the blocks of chains in front of which the state is kept.
        slices: in how many slices the parts of the frame run that makes most on the way, of those
            that can be cut; smaller ones run in fewer, so that their slices make as much.
        apart: frames that make at least this part of what the largest makes are brought back part
            by part; none at 0.
    """

    stored: tuple[int, ...]
    checkpointed: frozenset[int]
    slices: int = 1
    apart: float = 0


@dataclass(frozen=True)
class Framed:
    """How to make the program of a graph with frames of some kinds.

    Attributes:
        values: examples of the values of the graph by the names of its nodes, on ``meta``.
        frames: the kinds.
    """

    values: Mapping[str, Any]
    frames: Frames

    def program(
        self, outline: Callable[..., Program], graph: Graph, root: nn.Module, wirings: Any
    ) -> Program:
        """The program.

        Args:
            outline: cuts a graph into what the eager executor runs.
            graph: what to cut.
            root: the module its targets are looked up in.
            wirings: where its chains lie.
        """
        framing = Framing(self.values, root)
        return framed(outline(graph, root, wirings, compile_graph, framing), self.frames)


def blocks(program: Program) -> list[int]:
    """How many blocks each chain has."""
    counts: dict[int, int] = {}
    for step in program.steps:
        if isinstance(step, RunBlock):
            counts[step.chain] = counts.get(step.chain, 0) + 1
    return [counts[chain] for chain in sorted(counts)]


def checkpoints(program: Program) -> list[int]:
    """The steps that may be checkpoints."""
    steps = enumerate(program.steps)
    return [i for i, step in steps if isinstance(step, Segment) and step.frame is not None]


def framed(program: Program, frames: Frames) -> Program:
    """The program with frames of the given kinds.

    Args:
        program: every part of it that can be a frame is one.
        frames: what they are to be.
    """
    left = blocks(program)
    most = max((body.made for body in bodies(program) if body.sliced), default=0)
    large = max((body.made for body in bodies(program)), default=0) * frames.apart

    def in_parts(body: Body) -> Body:
        return cut(body, frames.slices, most, apart=0 < large <= body.made)

    def step(index: int, given: Step) -> Step:
        if isinstance(given, Segment):
            if given.frame is None or index not in frames.checkpointed:
                return replace(given, frame=None)
            checkpoint = replace(given.frame, body=in_parts(given.frame.body))
            return replace(given, frame=checkpoint)
        if not isinstance(given, RunBlock):
            return given
        stored = left[given.chain] <= frames.stored[given.chain]
        left[given.chain] -= 1
        parts = given.frame.body
        body = None if stored or parts is None else in_parts(parts)
        kept = index in frames.checkpointed
        kinds = replace(given.frame, stored=stored, body=body, checkpoint=kept)
        return replace(given, frame=kinds)

    return replace(program, steps=tuple(step(i, given) for i, given in enumerate(program.steps)))


def bodies(program: Program) -> list[Body]:
    """What the frames of a program run, where it is in parts."""
    found = (step.frame for step in program.steps if isinstance(step, (RunBlock, Segment)))
    return [frame.body for frame in found if frame is not None and frame.body is not None]


def cut(body: Body, slices: int, most: int, apart: bool = False) -> Body:
    """The body with its parts run in slices.

    Args:
        body: whose parts know how they may be cut.
        slices: how many those of the largest body run in; smaller ones in fewer.
        most: bytes that the largest body makes.
        apart: whether its other parts are brought back one by one.
    """
    own = -(-slices * body.made // max(most, 1))
    parts = []
    for part in body.parts:
        if part.slicing is not None:
            number = min(own, part.slicing.slices)
            slicing = replace(part.slicing, slices=number) if number > 1 else None
            part = replace(part, slicing=slicing)
        parts.append(replace(part, apart=apart))
    other = body.otherwise and cut(body.otherwise, slices, most, apart)
    return replace(body, parts=tuple(parts), otherwise=other)
