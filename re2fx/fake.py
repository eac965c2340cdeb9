"""Twins of a model: one without memory to predict on, and one to run without touching the model.

A fake tensor has shape, strides, dtype and device, and no data. A model whose tensors are fake runs
through the same kernels' choices and builds the same autograd graph, so what it would keep for the
backward can be counted without computing or allocating any of it.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import CaptureError

Convert = Callable[[torch.Tensor], torch.Tensor]


class Fakes:
    """Makes fake tensors of real ones; what shares memory or is one tensor stays so.

    Tensors on ``meta``, or on a device that this machine lacks, are taken to be on the CPU.

    Attributes:
        mode: the fake mode they belong to.
        untold: operators met whose shape rule leaves out what their kernel keeps.
    """

    def __init__(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        # An operator without a shape rule would be run on zeros of the full size: an error is
        # better than that, since the model may be larger than the machine.
        self.mode = FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False)
        self._made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._storages: dict[int, torch.UntypedStorage] = {}
        self.untold: set[str] = set()

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fake of a tensor, the same one each time."""
        if id(tensor) not in self._made:
            self._made[id(tensor)] = (tensor, self._make(tensor))  # held, so that its id stays its
        return self._made[id(tensor)][1]

    def tree(self, value: Any) -> Any:
        """The value with every tensor in it replaced."""
        return pytree.tree_map_only(torch.Tensor, self, value)

    def _make(self, tensor: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            if _is_plain(tensor):
                fake = self._strided(tensor)
            else:
                fake = self.mode.from_tensor(tensor, static_shapes=True).detach()
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, tensor.requires_grad)
        return fake.requires_grad_(tensor.requires_grad)

    def _strided(self, tensor: torch.Tensor) -> torch.Tensor:
        device = tensor.device if _is_here(tensor.device) else torch.device("cpu")
        real = tensor.untyped_storage()
        with self.mode:
            if real._cdata not in self._storages:
                block = torch.empty(real.nbytes(), dtype=torch.uint8, device=device)
                self._storages[real._cdata] = block.untyped_storage()
            place = (tensor.storage_offset(), tensor.shape, tensor.stride())
            fake = torch.empty(0, dtype=tensor.dtype, device=device)
            return fake.set_(self._storages[real._cdata], *place)


def _is_here(device: torch.device) -> bool:
    """Whether this machine could run on a device: its kernels and its generator are asked for."""
    if device.type in ("cpu", "meta"):
        return device.type == "cpu"
    return bool(torch.get_device_module(device).is_available())


def _is_plain(tensor: torch.Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    known = type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer, FakeTensor)
    flagged = tensor.is_conj() or tensor.is_neg() or tensor.is_quantized
    return known and tensor.layout == torch.strided and not flagged


class _Convert(TorchFunctionMode):
    """While a model is copied, tensors are converted instead of cloned."""

    def __init__(self, convert: Convert) -> None:
        super().__init__()
        self._convert = convert

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.__deepcopy__, torch.Tensor.clone):
            return self._convert(args[0])
        return func(*args, **(kwargs or {}))


def fake_twin(model: nn.Module, fakes: Fakes) -> nn.Module:
    """A copy of a model whose tensors are fake.

    Args:
        model: any module; not changed, and none of its memory is copied.
        fakes: makes the tensors.

    Raises:
        CaptureError: the model cannot be copied.
    """
    memo = {id(tensor): fakes(tensor) for tensor in (*model.parameters(), *model.buffers())}
    with _Convert(fakes):
        return _copied(model, memo)


def private_twin(model: nn.Module) -> nn.Module:
    """A copy with the very parameters of a model, and with buffers of its own to write into.

    Raises:
        CaptureError: the model cannot be copied.
    """
    return _copied(model, {id(parameter): parameter for parameter in model.parameters()})


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied, which predicting needs: "
            f"{type(error).__name__}: {error}. Report the part of it that copy.deepcopy takes."
        ) from error


# Their rules say that the workspace, which the backward needs, is empty.
UNTOLD = {"mkldnn_rnn_layer": "a recurrent layer on the CPU"}


class _Noise(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Under a fake mode: random operators move their generator, and real tensors stay real.

    The executor keeps a generator's state where a branch has moved it, and fake operators move
    none. Generator states themselves are real; what is asked of them is answered for real.
    """

    def __init__(self, fakes: Fakes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fakes = fakes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks for a device, as often as anything is computed
            return func(*args, **kwargs)
        if not any(type(x) is FakeTensor for x in args) and _are_real((args, kwargs), FakeTensor):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in UNTOLD:
            self._fakes.untold.add(UNTOLD[name])
        result = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
            outputs = [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
            with unset_fake_temporarily():
                torch.rand((), device=outputs[0].device if outputs else "cpu")
        return result


def _are_real(values: Any, fake: type) -> bool:
    """Whether there are tensors among some values, and none of them is fake."""
    tensors = [x for x in pytree.tree_leaves(values) if isinstance(x, torch.Tensor)]
    return bool(tensors) and not any(isinstance(tensor, fake) for tensor in tensors)


@contextmanager
def predicting(fakes: Fakes, name: str) -> Iterator[None]:
    """Run fake tensors in here; gradients are on, and the random generators are put back.

    Args:
        fakes: made the tensors.
        name: what to call the model in an error.

    Raises:
        CaptureError: the model asks for the value of a tensor, or calls an operator that has no
            shape rule.
    """
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedFakeTensorException,
        UnsupportedOperatorException,
    )

    try:
        with undisturbed(), fakes.mode, _Noise(fakes):
            yield
    except (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedFakeTensorException,
        UnsupportedOperatorException,
    ) as error:
        raise CaptureError(
            f"{name}: what it keeps depends on values, not on shapes alone "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0]}), so it cannot be "
            "predicted. Measure it: re2fx.memory.saved_bytes(lambda: model(x), model)."
        ) from error


@contextmanager
def undisturbed() -> Iterator[None]:
    """Run a model in here as training would; the random generators are put back afterwards."""
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if started else ()
    python = random.getstate()
    with ExitStack() as stack:
        stack.callback(random.setstate, python)
        stack.enter_context(torch.random.fork_rng(devices=list(devices)))
        stack.enter_context(torch.inference_mode(False))  # which switches gradients on
        yield
