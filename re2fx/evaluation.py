"""Running a model and its rewired forms on a batch, and leaving no trace of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .errors import InputError, OptionError, Re2fxError
from .inputs import split
from .snapshot import Snapshot

Forward = Callable[[nn.Module, Any], Any]


class Subject:
    """A model, and how it is called with a batch.

    Args:
        model: the given model.
        forward: calls a model with a batch.
    """

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        self.model, self.forward = model, forward
        tensors = [*model.parameters(), *model.buffers()]
        self._devices = {tensor.device for tensor in tensors}

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Buffers, attributes, flags and random states are put back when the block ends."""
        self._snapshot = Snapshot(self.model, {}, self._devices)
        try:
            with torch.inference_mode(False):
                yield
        finally:
            self._snapshot.restore()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """In eval mode; the flags are put back when the block ends."""
        flags = [(module, module.training) for module in self.model.modules()]
        try:
            self.model.eval()
            yield
        finally:
            for module, training in flags:
                module.training = training

    def inputs(self, batch: Any) -> Any:
        """What the model is called with, as `re2fx.transform` takes it: read off a call.

        Raises:
            OptionError: ``forward`` does not call the model.
        """
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(copied((args, kwargs)))

        handle = self.model.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
        try:
            for _ in self.outputs([self.model], batch):
                pass
        finally:
            handle.remove()
        if not calls:
            raise OptionError("forward= must call the model it is given")
        args, kwargs = calls[0]
        if not kwargs:
            return args
        if args:
            kwargs = dict(inspect.signature(self.model.forward).bind(*args, **kwargs).arguments)
        return kwargs

    def outputs(self, models: Sequence[nn.Module], batch: Any) -> Iterator[Any]:
        """The models' outputs, one after another, each on a copy and with the same noise.

        A rewired model may raise instead, as one in fixed point whose numbers do not fit.
        """
        for model in models:
            states = [source.read() for source in self._snapshot.sources]
            try:
                with torch.no_grad():
                    output = self.forward(model, copied(batch))
            except InputError:
                raise
            except Re2fxError as error:
                if model is self.model:
                    raise
                output = error.with_traceback(None)
            for source, state in zip(self._snapshot.sources, states, strict=True):
                source.write(state)
            yield output


def copied(value: Any) -> Any:
    """The value in new containers with new tensors: a model may write into what it is given."""
    return pytree.tree_map_only(torch.Tensor, torch.clone, value)


def call(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch, or with the first item of one that is a tuple or a list.

    Raises:
        OptionError: that is no tensor, mapping, tuple or list.
    """
    given = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if isinstance(given, Mapping):
        given = dict(given)
    empty = isinstance(given, (tuple, list)) and not given
    if empty or not isinstance(given, (torch.Tensor, dict, tuple, list)):
        raise OptionError(
            f"a batch of type {type(batch).__name__} is not understood; pass forward=, called "
            "with a model and a batch"
        )
    args, kwargs = split(given)
    return model(*args, **kwargs)


@contextmanager
def shown(progress: bool, total: int | None) -> Iterator[Callable[[], None]]:
    """What moves a bar on by one, if a bar is wanted."""
    if not progress:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("calibrate", total=total)
        yield lambda: bar.advance(task)
