"""One function per model, although Dynamo compiles it again for each mode, shape and option.

Each compilation plans on its own. What two plans of one model have in common must be rewired alike;
a residual that only one of them runs (an early exit, an optional branch) is no contradiction.
"""

from __future__ import annotations

from collections import Counter
from weakref import WeakKeyDictionary

from torch import nn

from .errors import ModeMismatchError
from .origin import Origin
from .plan import Location, Plan
from .text import count

Key = tuple[str, int, int]
Places = dict[Key, tuple[Key | None, str]]

_seen: WeakKeyDictionary[nn.Module, dict[object, list[tuple[bool, Places]]]] = WeakKeyDictionary()


def check_consistency(origin: Origin, options: object, plan: Plan) -> None:
    """Compare a plan with all earlier ones of the same module, code and options.

    Args:
        origin: what was compiled; without a module it cannot be recognised.
        options: how it is rewired; another ``torch.compile`` may rewire it otherwise.
        plan: of the graph at hand.

    Raises:
        ModeMismatchError: names the first residual that is treated differently.
    """
    root, name = origin.owner, origin.name
    if root is None:
        return
    earlier = _seen.setdefault(root, {}).setdefault((origin.code, options), [])
    now = places(plan)
    for training, before in earlier:
        modes = (mode(training), mode(root.training))
        compare(name, before, now, modes)
        if training != root.training and rewires(before) != rewires(now):
            raise mismatch(name, f"the model has chains in {modes[rewires(now)]} only")
    entry = (root.training, now)
    if entry not in earlier:
        earlier.append(entry)


def places(plan: Plan) -> Places:
    """Per residual where it stands: the residual before it in its chain, or that it is refused."""
    times: Counter[tuple[str, int]] = Counter()
    found: Places = {}

    def key(location: Location) -> Key:
        place = (location.module, location.line)
        times[place] += 1
        return (*place, times[place])

    for chain in plan.chains:
        before: Key | None = None
        for residual in chain.residuals:
            here = key(residual.location)
            found[here] = (before, "rewired")
            before = here
    for refusal in plan.refusals:
        found[key(refusal.location)] = (None, "refused")
    return found


def rewires(found: Places) -> bool:
    """Whether anything is rewired."""
    return any(state == "rewired" for _, state in found.values())


def compare(name: str, before: Places, now: Places, modes: tuple[str, str]) -> None:
    """Every residual that both know must stand in the same place."""
    for key in before.keys() & now.keys():
        if before[key] != now[key]:
            raise mismatch(
                name,
                f"the residual in {key[0] or 'the model itself'}, line {key[1]}, was "
                f"{say(before[key])} when the model was compiled in {modes[0]}, and is "
                f"{say(now[key])} now, in {modes[1]}",
            )


def say(place: tuple[Key | None, str]) -> str:
    """A place in words."""
    before, state = place
    if state == "refused":
        return state
    return f"rewired behind {before[0]}, line {before[1]}" if before else "the first of its chain"


def mode(training: bool) -> str:
    """The name of a mode."""
    return "train mode" if training else "eval mode"


def mismatch(name: str, detail: str) -> ModeMismatchError:
    """The error."""
    return ModeMismatchError(
        f"{name} would be rewired differently in two compilations, which would make two different "
        f"networks of it: {detail}. Keep the modules that differ whole with "
        "options={'leaves': [...]}, or rewire once: "
        "torch.compile(re2fx.transform(model), backend='re2fx')."
    )


def agree(name: str, train: Plan, eval_: Plan) -> None:
    """One function in train and in eval mode, or none at all."""
    if train.signature() == eval_.signature():
        return
    for number, (a, b) in enumerate(zip(train.signature(), eval_.signature(), strict=False)):
        if a != b:
            detail = f"chain {number} is {a} in train mode and {b} in eval mode"
            break
    else:
        detail = (
            f"{count(len(train.chains), 'chain')} in train mode, {len(eval_.chains)} in eval mode"
        )
    raise ModeMismatchError(
        f"{name} would be rewired differently in train and in eval mode, which "
        f"would make two different networks of it: {detail}. Keep the modules that differ whole "
        "with leaves=[...]."
    )
