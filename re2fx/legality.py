"""When may a skip-add be rewired? Each rule looks at one match and returns a `Refusal` or None."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from . import ops
from .aliases import Aliases
from .contexts import crossing
from .graph import Flow
from .match import Match, refuse
from .outputs import build
from .plan import Refusal


def escapes(flow: Flow, match: Match, aliases: Aliases) -> Refusal | None:
    """A value of the branch is used outside: reconstruction would have nothing to give it."""
    doors = {match.add, *match.dropped}
    _, leak = flow.passengers(match.region, doors)
    if leak is None:
        return None
    sentence = f"{leak.name} ({flow.location(leak)}) reads a value from inside the branch"
    if leak.op == "output" or leak.target is build:
        sentence = (
            "the model returns a value from inside the branch, such as attention weights or the "
            "keys and values of a cache; ask it not to (use_cache=False)"
        )
    return refuse(flow, match.add, "branch used outside", sentence)


def writes_in_place(flow: Flow, match: Match, aliases: Aliases) -> Refusal | None:
    """An in-place write touches the skip, or the branch writes into what is not its own."""
    region = {match.skip.value, *match.region, *match.private}
    passengers, _ = flow.passengers(match.region, {match.add, *match.dropped})
    own = {*match.region, *match.private, *passengers} - {match.skip.value}
    for node in (match.skip.value, *match.region):
        dirty = aliases.dirty_write(node)
        # Scratch of the branch is made anew when it is run again.
        if dirty is not None and not all(is_own(flow, n, own) for n in aliases.of(node)):
            return refuse(
                flow,
                match.add,
                "in-place write",
                f"{dirty.name} ({flow.location(dirty)}) writes in place into memory that is read "
                "again later; write it out of place",
            )
    for node in match.region:
        if node is match.add or not ops.is_inplace(node, flow.root):
            continue
        foreign = [n for n in aliases.of(node) if n not in region or n is match.skip.value]
        foreign = [n for n in foreign if not aliases.after(n, node) and n.op != "get_attr"]
        if foreign:
            return refuse(
                flow,
                match.add,
                "in-place write",
                f"{node.name} ({flow.location(node)}) writes in place into {foreign[0].name}, "
                "which the branch does not own: running it again would write twice",
            )
    return None


def is_own(flow: Flow, node: Node, own: set[Node]) -> bool:
    """Whether a value is of the branch, or a write of such values that nobody reads."""
    if node in own:
        return True
    values = (n for n in flow.inputs(node) if not flow.is_number(n) and not flow.is_constant(n))
    writes = ops.is_inplace(node, flow.root) and not flow.users(node)
    return writes and all(value in own for value in values)


def side_input_written(flow: Flow, match: Match, aliases: Aliases) -> Refusal | None:
    """A side input is overwritten after the branch began to read it."""
    for side in match.side_inputs(flow):
        write = aliases.write_after(side, match.skip.value)
        if write is not None:
            return refuse(
                flow,
                match.add,
                "in-place write",
                f"{write.name} ({flow.location(write)}) overwrites the side input {side.name}, "
                "which the branch needs again in the backward",
            )
    return None


def changes_shape(flow: Flow, match: Match, aliases: Aliases) -> Refusal | None:
    """The branch is larger than the stream, which the sum then repeats; known if sizes are."""
    before, after = ops.example(match.skip.value), ops.example(match.add)
    if before is None or after is None:
        return None
    sizes = zip(before.shape, after.shape, strict=False)
    known = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in sizes)
    if before.dim() == after.dim() and not known:
        return None
    return refuse(
        flow,
        match.add,
        "broadcast",
        f"the sum repeats {match.skip.value.name} of shape {tuple(before.shape)} to "
        f"{tuple(after.shape)}; a stream keeps its shape",
    )


def crosses_context(flow: Flow, match: Match, aliases: Aliases) -> Refusal | None:
    """A part under autocast or without gradients holds a piece of the residual, and more."""
    inside = (*match.region, *match.private, *hanging(flow, match))
    context = crossing(flow, inside, match.add)
    if context is None:
        return None
    return refuse(
        flow,
        match.add,
        "context",
        f"{context.enter.name} ({flow.location(context.inside[0])}) switches the state that a part "
        "of the residual runs under, and something else with it; put the whole block or a part of "
        "its branch inside",
    )


def assigns(flow: Flow, match: Match, aliases: Aliases) -> Refusal | None:
    """A module in the branch keeps a tensor from one call to the next."""
    held = next((node.meta["assigns"] for node in match.region if "assigns" in node.meta), None)
    if held is None:
        return None
    sentence = f"the branch assigns a tensor to {held}: run again, it would do something else"
    return refuse(flow, match.add, "state", sentence)


def hanging(flow: Flow, match: Match) -> list[Node]:
    """Nodes that hang off the branch and go nowhere."""
    return flow.passengers(match.region, {match.add, *match.dropped})[0]


Rule = Callable[[Flow, Match, Aliases], Refusal | None]
RULES: tuple[Rule, ...] = (
    escapes,
    writes_in_place,
    side_input_written,
    changes_shape,
    crosses_context,
    assigns,
)


def first_refusal(flow: Flow, match: Match, aliases: Aliases) -> Refusal | None:
    """The first rule that objects."""
    for rule in RULES:
        refusal = rule(flow, match, aliases)
        if refusal is not None:
            return refusal
    return None


def obstacle(flow: Flow, match: Match, between: list[Node]) -> Refusal | None:
    """Why a stream cannot pass what stands between two residuals, if that is known."""

    def first(question: Callable[[Node], bool]) -> Node | None:
        return next(filter(question, between), None)

    norm = first(lambda node: ops.is_norm(node, flow.root))
    if norm is not None:
        sentence = f"the stream passes through the norm {norm.name}, which cannot be inverted"
        return refuse(flow, match.add, "post-norm", sentence)
    product = first(ops.is_product)
    if product is not None:
        sentence = (
            f"the stream is multiplied by a value that is not a constant ({product.name}); its "
            "inverse would divide by it"
        )
        return refuse(flow, match.add, "scaled skip", sentence)
    cast = first(ops.is_cast)
    if cast is not None:
        sentence = f"the stream passes through {ops.type_change(cast)}"
        return refuse(flow, match.add, "type change", sentence)
    return None
