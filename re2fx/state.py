"""The state that operations run under, and which tracing in Python leaves out of the graph.

A ``with torch.autocast(...)`` in a forward is Python: it runs while the forward is traced, and the
graph holds the operations without it. So the state is compared with what it was when the forward
began; where operations come under another one, tracing stops.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch.utils import _device

_PLUMBING = tuple(
    os.path.join(*place)
    for place in (
        ("torch", "random.py"), ("torch", "_compile.py"), ("_dynamo", "eval_frame.py"),
        ("contextlib.py",),
    )
)  # fmt: skip
_KINDS = ("cpu", "cuda")
Stop = Callable[[str], Exception]


def _autocast() -> tuple[Any, ...]:
    # An inner autocast that changes nothing here may change something in a caller's autocast.
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    states = [(torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in _KINDS]
    return depth, torch.is_autocast_cache_enabled(), states


def _function_modes() -> tuple[int, Any]:
    size = torch._C._len_torch_function_stack()
    return size, torch._C._get_function_stack_at(size - 1) if size else None


def _dispatch_modes() -> tuple[int, Any]:
    size = torch._C._len_torch_dispatch_stack()
    return size, torch._C._get_dispatch_stack_at(size - 1) if size else None


@_disable_dynamo
def attention_kernels() -> tuple[Any, ...]:
    """Which kernels of attention are allowed, and in which order they are preferred."""
    return _kernels()


def _kernels() -> tuple[Any, ...]:
    core: Any = torch._C
    return (
        core._get_cudnn_sdp_enabled(),
        core._get_flash_sdp_enabled(),
        core._get_mem_efficient_sdp_enabled(),
        core._get_math_sdp_enabled(),
        core._get_overrideable_sdp_enabled(),
        tuple(core._get_sdp_priority_order()),
    )


@_disable_dynamo
def allow_attention_kernels(allowed: tuple[Any, ...]) -> None:
    """Set what `attention_kernels` has given."""
    core: Any = torch._C
    core._set_sdp_use_cudnn(allowed[0])
    core._set_sdp_use_flash(allowed[1])
    core._set_sdp_use_mem_efficient(allowed[2])
    core._set_sdp_use_math(allowed[3])
    core._set_sdp_use_overrideable(allowed[4])
    core._set_sdp_priority_order(list(allowed[5]))


def _flags() -> tuple[Any, ...]:
    core: Any = torch._C
    return (
        core._get_cudnn_enabled(),
        core._get_cudnn_benchmark(),
        core._get_cudnn_deterministic(),
        core._get_mkldnn_enabled(),
        core._get_fp32_precision_getter("cuda", "matmul"),
        core._get_fp32_precision_getter("cuda", "conv"),
        core._get_fp32_precision_getter("mkldnn", "matmul"),
        torch.are_deterministic_algorithms_enabled(),
    )


READERS: dict[str, Callable[[], Any]] = {
    "autocast": _autocast,
    "gradient mode": torch.is_grad_enabled,
    "inference mode": torch.is_inference_mode_enabled,
    "default dtype": torch.get_default_dtype,
    "default device": lambda: _device.CURRENT_DEVICE,
    "torch function mode": _function_modes,
    "torch dispatch mode": _dispatch_modes,
    "choice of attention kernels": attention_kernels,
    "choice of kernels": _flags,
    "random seed": torch.default_generator.initial_seed,
}
# `torch.export` keeps autocast and gradient modes, and traces through what modes do.
LOST_BY_EXPORT = (
    "inference mode", "default dtype", "choice of attention kernels", "choice of kernels",
    "random seed",
)  # fmt: skip


class State:
    """What the state is now, to compare with later.

    Args:
        names: of `READERS`, which to look at.
    """

    def __init__(self, names: tuple[str, ...] = tuple(READERS)) -> None:
        self._readers = {name: READERS[name] for name in names}
        self._values = {name: read() for name, read in self._readers.items()}

    def changed(self) -> str | None:
        """The name of something that is not as it was."""
        for name, read in self._readers.items():
            if read() != self._values[name]:
                return name
        return None


class Switches:
    """What the operations of a graph switch, as it is now: gradients, attention, autocast."""

    def __init__(self) -> None:
        self._grad, self._kernels, self._autocast = torch.is_grad_enabled(), _kernels(), _autocast()

    def restore(self) -> None:
        """Set it back."""
        torch._C._set_grad_enabled(self._grad)
        if _kernels() != self._kernels:
            allow_attention_kernels(self._kernels)
        _leave_autocast(self._autocast)


class Settings(Switches):
    """How torch is set now: what Python may set in a forward, too."""

    def __init__(self) -> None:
        super().__init__()
        self._dtype, self._device = torch.get_default_dtype(), _device.CURRENT_DEVICE
        self._deterministic = torch.are_deterministic_algorithms_enabled()
        self._warn_only = torch.is_deterministic_algorithms_warn_only_enabled()

    def restore(self) -> None:
        """Set it back."""
        super().restore()
        torch.set_default_dtype(self._dtype)
        if _device.CURRENT_DEVICE is not self._device:
            torch.set_default_device(self._device)
        if torch.are_deterministic_algorithms_enabled() != self._deterministic:
            torch.use_deterministic_algorithms(self._deterministic, warn_only=self._warn_only)


def _leave_autocast(before: tuple[Any, ...]) -> None:
    """End the regions that were entered since."""
    if _autocast() == before:
        return
    depth, cache, states = before
    while _autocast()[0] > depth:
        torch.autocast_decrement_nesting()
    torch.set_autocast_cache_enabled(cache)
    for kind, (enabled, dtype) in zip(_KINDS, states, strict=True):
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
    if depth == 1:
        torch.clear_autocast_cache()


@contextmanager
def put_back() -> Iterator[None]:
    """What a forward sets and a stopped trace does not set back, is set back."""
    settings = Settings()
    try:
        yield
    finally:
        settings.restore()


@contextmanager
def put_back_on_error() -> Iterator[None]:
    """Where something raises, what the operations of a graph have set is set back.

    In the given model a ``with`` would have done that.
    """
    switches = Switches()
    try:
        yield
    except BaseException:
        switches.restore()
        raise


@contextmanager
def autocast_put_back() -> Iterator[None]:
    """Regions of autocast that a rerun enters and, stopped early, does not leave, are left."""
    before = _autocast()
    try:
        yield
    finally:
        _leave_autocast(before)


class _Generator:
    """torch's generator, which the code being traced may read and not set."""

    def __init__(self, generator: torch.Generator, stop: Callable[[], None]) -> None:
        self._generator, self._stop = generator, stop

    def __getattr__(self, name: str) -> Any:
        if name in ("set_state", "manual_seed", "seed"):
            self._stop()
        return getattr(self._generator, name)


@contextmanager
def seeds_stop(stop: Stop, is_library: Callable[[str], bool]) -> Iterator[None]:
    """Code of a model that seeds torch's generator, or sets it back, raises.

    Args:
        stop: makes the exception of a reason.
        is_library: whether a file is none of a model's.
    """
    random: Any = torch.random
    seed = random._manual_seed_impl

    def check() -> None:
        frame = sys._getframe(2)
        while frame.f_back is not None and frame.f_code.co_filename.endswith(_PLUMBING):
            frame = frame.f_back
        if not is_library(frame.f_code.co_filename):
            raise stop("it seeds or sets back the random generator, which tracing would lose")

    def checked(*args: Any, **kwargs: Any) -> Any:
        check()
        return seed(*args, **kwargs)

    generator = _Generator(random.default_generator, check)
    names = {"default_generator": generator, "_manual_seed_impl": checked}
    with ExitStack() as stack:
        for name, value in names.items():
            stack.enter_context(swapped(random, name, value))
        yield


@contextmanager
def saving_stops(stop: Stop) -> Iterator[None]:
    """Hooks on saved tensors raise, but those of checkpoints, which change no value."""
    hooks = torch.autograd.graph.saved_tensors_hooks
    original = hooks.__enter__

    def enter(self: Any) -> None:
        if type(self).__module__ != "torch.utils.checkpoint":
            raise stop("it sets hooks on the tensors saved for the backward, which tracing loses")
        original(self)

    with swapped(hooks, "__enter__", enter):
        yield


@contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give a class or a module another member for a while."""
    own = owner.__dict__.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own) if own is not None else delattr(owner, name)
