"""Models by name: ``torchvision:resnet50``, ``timm:vit_tiny_patch16_224?depth=4``, ``module:name``.

What stands behind ``?`` are keyword arguments, separated by ``&``, written as Python literals.
Weights are random: what re2fx says about a model does not depend on their values.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import TargetError
from .sources import FORMS, build, example, member


@dataclass(frozen=True)
class Target:
    """A model and what to call it with.

    Attributes:
        name: as it was written.
        model: in train mode, with random weights.
        inputs: keyword arguments if a dict, else positional ones.
    """

    name: str
    model: nn.Module
    inputs: tuple[Any, ...] | dict[str, Any] | None


def load(text: str, inputs: Iterable[str] = (), device: str = "cpu") -> Target:
    """Build the model a text names, and inputs for it.

    Args:
        text: one of `FORMS`.
        inputs: one text per input, as `read_input` takes them; without any, what the model's
            library says its input is.
        device: ``"meta"`` builds it without memory where the model allows that.

    Raises:
        TargetError: the text has another form, names nothing, or the model cannot be built.
    """
    source, _, rest = text.partition(":")
    name, _, query = rest.partition("?")
    if not source or not name:
        raise TargetError(f"{text!r} names no model; write one of {', '.join(FORMS)}")
    options = read_options(query)
    given = read_inputs(inputs, device)
    try:
        try:
            model, default = build(source, name, options, device)
        except NotImplementedError:  # something that a tensor without values cannot do
            if device != "meta":
                raise
            model, default = build(source, name, options, "cpu")
    except (NotImplementedError, TypeError, ValueError) as error:
        if isinstance(error, TargetError):
            raise
        raise TargetError(f"{text} cannot be built: {type(error).__name__}: {error}") from error
    return Target(text, model.train(), joined(given, on(default, device)))


def load_object(text: str) -> Any:
    """What ``module:name`` stands for: data, a function, anything.

    Raises:
        TargetError: the text has another form, or names nothing.
    """
    source, _, name = text.partition(":")
    if not source or not name:
        raise TargetError(f"{text!r} names nothing; write package.module:name")
    return member(source, name)


def joined(given: Any, default: Any) -> Any:
    """The given inputs, with the switches that the library's model is called with by default."""
    if not isinstance(given, dict) or not isinstance(default, dict):
        return given or default
    switches = {k: v for k, v in default.items() if not isinstance(v, torch.Tensor)}
    return {**switches, **given}


def read_options(query: str) -> dict[str, Any]:
    """``depth=4&bias=False`` as keyword arguments."""
    options: dict[str, Any] = {}
    for item in filter(None, query.split("&")):
        name, equals, value = item.partition("=")
        if not equals:
            raise TargetError(f"?{query}: {item!r} is not of the form name=value")
        options[name] = literal(value)
    return options


def literal(text: str) -> Any:
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def read_inputs(texts: Iterable[str], device: str) -> tuple[Any, ...] | dict[str, Any] | None:
    """Inputs as tensors: positional ones, or all by keyword."""
    read = [read_input(text, device) for text in texts]
    names = [name for name, _ in read if name]
    if names and len(names) != len(read):
        raise TargetError("--input: give all inputs by name or none")
    if names:
        return {str(name): value for name, value in read}
    return tuple(value for _, value in read) or None


def read_input(text: str, device: str = "cpu") -> tuple[str | None, Any]:
    """``[NAME=]SIZES[:DTYPE]``, and ``+`` between the members of a list of tensors.

    ``2,3,224,224``, ``input_ids=1,128:int64``, ``1,16:bfloat16``, ``1,3,8,64,64+1,3,32,64,64``.
    """
    name, equals, rest = text.partition("=")
    members = (rest if equals else text).split("+")
    values = [_read_tensor(text, member, device) for member in members]
    return (name if equals else None), values if len(values) > 1 else values[0]


def _read_tensor(text: str, member: str, device: str) -> torch.Tensor:
    sizes, _, kind = member.partition(":")
    dtype = getattr(torch, kind or "float32", None)
    try:
        shape = [int(size) for size in sizes.split(",")]
    except ValueError:
        shape = [-1]
    if min(shape) < 0 or not isinstance(dtype, torch.dtype):
        raise TargetError(
            f"--input {text}: expected sizes such as 2,3,224,224, with a type such as "
            "1,128:int64 and a name such as input_ids=1,128:int64 if need be"
        )
    made: torch.Tensor = example(shape, dtype, device)
    return made


def on(inputs: Any, device: str) -> Any:
    """Inputs on a device; on ``meta`` they take no memory."""
    if device != "meta":
        return inputs
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), inputs)
