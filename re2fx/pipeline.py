"""The passes in their order on one page: normalize, detect, chain, rewire, cleanup."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from torch.fx import Graph

from .capture import Captured, Leaves
from .choice import Weigh
from .conditioning import annotated
from .consistency import agree
from .couplings import PerChain, check_blocks, check_branches, check_drawn, resolve
from .exact import fixed
from .graph import Flow, copy_graph, forget_examples, same_graph
from .module import Rewired
from .options import Options
from .passes.chain import chain
from .passes.cleanup import cleanup
from .passes.detect import detect
from .passes.normalize import normalize
from .passes.rewire import rewire
from .plan import Plan
from .policy import Policy


def make_plan(
    graph: Graph,
    model: nn.Module,
    activation: str = "branch",
    leaves: Leaves = (),
    policy: Policy | None = None,
    weigh: Weigh | None = None,
) -> tuple[Flow, Plan]:
    """What would be done with a captured graph, and the normalised graph it speaks of.

    Args:
        graph: the captured graph; left as it is.
        model: the module its targets are looked up in.
        activation: where an activation behind an addition goes.
        leaves: modules to leave alone in a graph that was traced into them.
        policy: what is rewired of that which can be; everything by default.
        weigh: predicts what chains keep; the same for the graphs of both modes.
    """
    flow = Flow(normalize(graph, model), model)  # one spelling of add, writes as dataflow
    found = detect(flow, leaves)  # find skip-adds
    return flow, chain(flow, found, activation, policy or Policy(), weigh)  # group and choose


def rewire_graph(
    graph: Graph,
    model: nn.Module,
    options: Options,
    leaves: Leaves = (),
    weigh: Weigh | None = None,
    like: Rewired | None = None,
) -> Rewired:
    """The passes in their order.

    Args:
        graph: the captured graph; left as it is.
        model: the module its targets are looked up in.
        options: how to rewire.
        leaves: modules to leave alone in a graph that was traced into them.
        weigh: as for `make_plan`.
        like: the train mode, with which this one, eval mode, must agree.
    """
    flow, plan = make_plan(graph, model, options.activation, leaves, options.policy, weigh)
    if like is not None:
        agree(type(model).__name__, like.plan, plan)
        options = replace(options, coupling=like.couplings)
    rewired = rewire_plan(flow, plan, options, training=like is None)
    history = (("captured", graph), ("normalized", flow.graph), *rewired.history)
    for _, step in (*history, ("final", rewired.graph)):
        forget_examples(step)
    return replace(rewired, history=history)


def rewire_plan(flow: Flow, plan: Plan, options: Options, training: bool = True) -> Rewired:
    """Rewire what was planned; in eval mode a drawn coupling leaves the given network, stored."""
    couplings, point = resolve(options.coupling, plan.chains), options.point
    check_branches(couplings)
    check_blocks(couplings, plan.chains)
    for coupling in couplings:
        coupling.check_readout(options.readout)
    drawn = check_drawn(couplings)
    used = tuple(
        fixed(coupling if training else coupling.expected, point) for coupling in couplings
    )
    how = options.readout, options.activation
    rewired, wirings = rewire(flow, plan, used, *how)  # the two-stream form
    kept = wirings if training or not drawn else ()
    wirings = tuple(replace(wiring, tolerance=options.drift_tolerance) for wiring in kept)
    before = copy_graph(rewired)
    cleanup(rewired)  # dead tuple elements and shape reads
    plan, history = annotated(flow.root, plan, wirings), (("rewired", before),)
    return Rewired(
        rewired, plan, wirings, history, couplings, *how, point, options.drift_tolerance, training
    )


def recouple(rewired: Rewired, model: nn.Module, couplings: PerChain) -> Rewired:
    """One mode of a network with another coupling per chain, by the plan that it has."""
    how = rewired.readout, rewired.activation
    options = Options(
        couplings, *how, "store", exact=rewired.point or False, drift_tolerance=rewired.tolerance
    )
    flow = Flow(rewired.normalized, model)
    made = rewire_plan(flow, rewired.plan, options, rewired.training)
    for _, step in (*made.history, ("final", made.graph)):
        forget_examples(step)
    return replace(made, history=(*rewired.history[:2], *made.history))


def rewire_modes(
    model: nn.Module,
    captured: Captured,
    options: Options,
    leaves: Leaves = (),
    weigh: Weigh | None = None,
) -> tuple[Rewired, Rewired]:
    """The rewired graphs of train and eval mode; planned once if the captured ones are equal.

    Raises:
        ModeMismatchError: they would be rewired differently.
    """
    equal = same_graph(captured.train, captured.eval)  # before rewiring, which looks at examples
    train = rewire_graph(captured.train, model, options, leaves, weigh)
    if equal and not check_drawn(train.couplings):
        forget_examples(captured.eval)
        history = (("captured", captured.eval), *train.history[1:])
        graph = copy_graph(train.graph)
        return train, replace(train, graph=graph, history=history, training=False)
    eval_ = rewire_graph(captured.eval, model, options, leaves, weigh, train)
    return train, eval_
