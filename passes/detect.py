r"""Find every skip-add: an addition whose one operand is an ancestor of all the others.

    x -------------------.
     \                    +  -> add        skip = x, branch = f, region = everything between
      `-- norm -- ... -- f'

Sums of several operands, ``x + a + m`` or ``(a + m) + x``, are one residual with parallel
branches; a difference ``x - f`` is a sum with the factor -1. A region is found by walking back from
the branch and never above the skip, so the cost of a block is its length. Nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn
from torch.fx import Node

from re2fx import ops
from re2fx.aliases import Aliases
from re2fx.graph import Flow
from re2fx.legality import first_refusal
from re2fx.match import Detection, Match, Term, refuse
from re2fx.plan import Refusal

Leaves = Sequence[str | type[nn.Module]]


def detect(flow: Flow, leaves: Leaves = ()) -> Detection:
    """Classify every addition of a normalised graph.

    Args:
        flow: the dataflow of the graph.
        leaves: module paths or classes whose residuals are left alone.
    """
    found = Detection()
    aliases = Aliases(flow)
    taken: set[Node] = set()
    for add in reversed(flow.nodes):
        if add in taken or flow.is_shape(add) or flow.is_constant(add):
            continue
        if ops.is_fused_addition(add):
            refusal = fused(flow, add)
            found.refusals += [refusal] if refusal is not None else []
            continue
        match = best_match(flow, add) if ops.is_sum(add) else None
        if match is None:
            if ops.is_add(add):  # a difference is no sum gone wrong
                classify_other(flow, add, found)
            continue
        taken.update(match.dropped)
        refusal = kept_whole(flow, match, leaves) or object_to(flow, match, aliases)
        if refusal is not None:
            found.refusals.append(refusal)
            continue
        passengers, _ = flow.passengers(match.region, {add, *match.dropped})
        found.matches.append(replace(match, passengers=tuple(passengers)))
    found.matches.reverse()
    found.refusals.reverse()
    found.misses.sort(key=nearness)
    return found


def kept_whole(flow: Flow, match: Match, leaves: Leaves) -> Refusal | None:
    """The residual lies in a module that the user wants left alone."""
    stack = (match.add.meta.get("nn_module_stack") or {}).values()
    for path, kind in stack:
        if path in leaves or kind in leaves:
            return refuse(flow, match.add, "leaf", f"leaves=[...] keeps {path} whole")
    return None


def object_to(flow: Flow, match: Match, aliases: Aliases) -> Refusal | None:
    """Why a match cannot be rewired, if it cannot."""
    if ops.is_inplace(match.add, flow.root):
        return refuse(
            flow,
            match.add,
            "in-place write",
            "the addition writes in place into memory that is read elsewhere; write x = x + f",
        )
    if match.skip.scale == 0:
        return refuse(flow, match.add, "zero scale", "the skip is multiplied by zero")
    return first_refusal(flow, match, aliases)


def best_match(flow: Flow, add: Node) -> Match | None:
    """The reading of a sum, two operands first, that is a residual."""
    for terms, inner in spellings(flow, add):
        for index, skip in enumerate(terms):
            branches = (*terms[:index], *terms[index + 1 :])
            match = match_skip(flow, add, skip, branches, inner)
            if match is not None:
                return match
    return None


def match_skip(
    flow: Flow, add: Node, skip: Term, branches: tuple[Term, ...], inner: tuple[Node, ...]
) -> Match | None:
    """A match if every branch derives from the skip and some parameter is trained between.

    A parameter or a constant among the terms goes along with the branches.
    """
    skip = unwrapped(flow, skip)
    if flow.is_constant(skip.value) or flow.is_independent(skip.value):
        return None
    ends = [branch.value for branch in branches if not flow.is_constant(branch.value)]
    if not all(flow.between(skip.value, [end]) for end in ends):
        return None
    region = flow.between(skip.value, ends)
    if not any(flow.trains(node) for node in region):
        return None
    return Match(add, skip, branches, inner, tuple(region), tuple(flow.private(region)))


def spellings(flow: Flow, add: Node) -> Iterator[tuple[tuple[Term, ...], tuple[Node, ...]]]:
    """The operands of a sum, flattened ever deeper, and the inner additions flattened away.

    Only additions that nobody else reads are flattened.
    """
    terms = operands(flow, add)
    inner: tuple[Node, ...] = ()
    while len(terms) >= 2:
        yield terms, inner
        index = next((i for i, t in enumerate(terms) if absorbable(flow, t)), None)
        if index is None:
            return
        node, scale = terms[index].value, terms[index].scale
        opened = (replace(term, scale=scale * term.scale) for term in operands(flow, node))
        terms = (*terms[:index], *opened, *terms[index + 1 :])
        inner = (*inner, node)


def absorbable(flow: Flow, term: Term) -> bool:
    """An out-of-place sum of two values that only the enclosing sum reads."""
    node = term.value
    plain = ops.is_sum(node) and not ops.is_inplace(node, flow.root)
    return plain and len(flow.users(node)) == 1 and len(operands(flow, node)) == 2


def operands(flow: Flow, add: Node) -> tuple[Term, ...]:
    """The two operands of a sum with their constant scales; empty if one is no node."""
    arguments = [*add.args, *(add.kwargs[k] for k in ("input", "other") if k in add.kwargs)]
    nodes = [value for value in arguments if isinstance(value, Node)]
    alpha = add.kwargs.get("alpha", 1)
    if len(arguments) != 2 or len(nodes) != 2 or not isinstance(alpha, (int, float)):
        return ()
    left, right = (flow.source(node) for node in nodes)
    if ops.subtracts_from_second(add):
        return Term(right), Term(left, -float(alpha))
    return Term(left), Term(right, -float(alpha) if ops.is_subtraction(add) else float(alpha))


def unwrapped(flow: Flow, term: Term) -> Term:
    """Look through constant factors, copies and ``+ 0`` that only this sum reads."""
    node = term.value
    inner = ops.wrapped(node)
    if inner is None or len(flow.users(node)) != 1 or ops.is_inplace(node, flow.root):
        return term
    value, factor = inner
    return unwrapped(flow, Term(flow.source(value), term.scale * factor, (*term.spelled, node)))


def fused(flow: Flow, node: Node) -> Refusal | None:
    """A skip-add that is spelled as one operation with a product in it."""
    values = [flow.source(n) for n in node.all_input_nodes]
    name = getattr(node.target, "__name__", str(node.target))
    mixes = "lerp" in name
    for skip in values[: 2 if mixes else 1]:
        region = flow.between(skip, [value for value in values if value is not skip])
        if flow.is_constant(skip) or not any(flow.trains(n) for n in (*region, node) if region):
            continue
        if mixes and not isinstance(node.args[-1], (int, float)):
            return product_of_skip(flow, node, skip, node)
        sentence = (
            f"{name} multiplies and adds to {skip.name} in one operation; write the sum with +"
        )
        return refuse(flow, node, "fused addition", sentence)
    return None


def product_of_skip(flow: Flow, add: Node, skip: Node, product: Node) -> Refusal:
    """The inverse would divide by what may be zero."""
    return refuse(
        flow,
        add,
        "scaled skip",
        f"the skip {skip.name} is multiplied by a value that is not a constant "
        f"({product.name}); its inverse would divide by it",
    )


def classify_other(flow: Flow, add: Node, found: Detection) -> None:
    """An addition without a skip: a projection, or no residual at all."""
    terms = operands(flow, add)
    if len(terms) != 2:
        found.misses.append(refuse(flow, add, "one operand", "a number or a scaled value is added"))
        return
    left, right = (t.value for t in terms)
    if any(flow.is_constant(value) or flow.is_independent(value) for value in (left, right)):
        found.misses.append(
            refuse(
                flow, add, "constant", "one operand is a parameter or a constant, not an activation"
            )
        )
        return
    source = flow.common_source(left, right)
    if source is None:
        found.misses.append(
            refuse(flow, add, "two sources", "the operands come from different inputs of the model")
        )
        return
    sides = [flow.between(source, [value]) for value in (left, right)]
    trained = [any(flow.trains(node) for node in side) for side in sides]
    if not any(trained):
        found.misses.append(
            refuse(
                flow,
                add,
                "nothing trained",
                f"no trained operation lies between {source.name} and the addition",
            )
        )
        return
    found.refusals.append(not_an_identity(flow, add, left, right, source, sides))


def not_an_identity(
    flow: Flow, add: Node, left: Node, right: Node, source: Node, sides: list[list[Node]]
) -> Refusal:
    """Both operands transform the common source; say what is in the way of an identity skip."""
    for value in (left, right):
        if ops.is_product(value) and source in flow.inputs(value):
            return product_of_skip(flow, add, source, value)
    paths = [[node for node in side if not flow.is_shape(node)] for side in sides]
    steps = min(paths, key=lambda side: (any(map(flow.trains, side)), len(side)))
    if steps and all(map(ops.is_slice, steps)):
        return refuse(
            flow,
            add,
            "sliced skip",
            f"the skip is a part of {source.name} only: it passes through {steps[-1].name}",
        )
    if steps and all(map(ops.is_cast, steps)):
        return refuse(
            flow,
            add,
            "type change",
            f"the skip passes through {ops.type_change(steps[-1])}",
        )
    named = ", ".join(node.name for node in steps[:3]) or source.name
    through = named if len(steps) <= 3 else f"{len(steps)} operations, first {named}"
    sentence = f"the skip is not an identity: it passes through {through}"
    return refuse(flow, add, "projection", sentence)


def nearness(miss: Refusal) -> int:
    """Order of misses: the more of a residual it has, the nearer."""
    order = ("nothing trained", "two sources", "constant", "one operand")
    return order.index(miss.rule)
