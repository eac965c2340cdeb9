"""Models by name: ``torchvision:resnet50``, ``timm:vit_tiny_patch16_224?depth=4``, ``module:name``.

What stands behind ``?`` are keyword arguments, separated by ``&``, written as Python literals.
Weights are random: what re2fx says about a model does not depend on their values.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import TargetError
from .torchvision_shim import ensure_torchvision

FORMS = (
    "torchvision:resnet50",
    "timm:vit_base_patch16_224",
    "transformers:gpt2?n_layer=4",
    "package.module:factory?depth=12",
)
TOKENS = 128


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
    build = _SOURCES.get(source, _from_module)
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


def read_input(text: str, device: str = "cpu") -> tuple[str | None, torch.Tensor]:
    """``[NAME=]SIZES[:DTYPE]``: ``2,3,224,224``, ``input_ids=1,128:int64``, ``1,16:bfloat16``."""
    name, equals, rest = text.partition("=")
    sizes, _, kind = (rest if equals else text).partition(":")
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
    return (name if equals else None), example(shape, dtype, device)


def example(shape: Iterable[int], dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """Random numbers that do not move the global generator."""
    shape = list(shape)
    if device == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2, shape, generator=generator, dtype=dtype)


def on(inputs: Any, device: str) -> Any:
    """Inputs on a device; on ``meta`` they take no memory."""
    if device != "meta":
        return inputs
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), inputs)


Built = tuple[nn.Module, "tuple[Any, ...] | dict[str, Any] | None"]


def _from_torchvision(source: str, name: str, options: dict[str, Any], device: str) -> Built:
    library = _library(source)
    names = library.models.list_models()
    _check_name(source, name, names)
    with torch.device(device):
        model = library.models.get_model(name, **options)
    video = "video" in type(model).__module__ or "3d" in name or "mvit" in name
    return model, (example((1, 3, 16, 112, 112) if video else (1, 3, 224, 224)),)


def _from_timm(source: str, name: str, options: dict[str, Any], device: str) -> Built:
    library = _library(source)
    _check_name(source, name.partition(".")[0], library.list_models())
    with torch.device(device):
        model = library.create_model(name, **options)
    size = options.get("img_size")
    sizes = model.default_cfg.get("input_size", (3, 224, 224))
    if size is not None:
        sizes = (sizes[0], *((size, size) if isinstance(size, int) else size))
    sizes = (options.get("in_chans", sizes[0]), *sizes[1:])
    return model, (example((1, *sizes)),)


def _from_transformers(source: str, name: str, options: dict[str, Any], device: str) -> Built:
    library = _library(source)
    _check_name(source, name, library.CONFIG_MAPPING.keys())
    config = library.AutoConfig.for_model(name, **options)
    language = type(config) in library.MODEL_FOR_CAUSAL_LM_MAPPING
    factory = library.AutoModelForCausalLM if language else library.AutoModel
    translates = type(config) in library.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    if translates and config.is_encoder_decoder:
        factory = library.AutoModelForSeq2SeqLM
    with torch.device(device):
        model = factory.from_config(config)
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return model, {"pixel_values": example((1, config.num_channels, height, width))}
    tokens = min(TOKENS, getattr(config, "max_position_embeddings", TOKENS))
    ids = example((1, tokens), torch.int64)
    inputs = {model.main_input_name: ids}
    if translates and config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return model, {**inputs, **({"use_cache": False} if language or translates else {})}


def _from_module(source: str, name: str, options: dict[str, Any], device: str) -> Built:
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(source)
    except ModuleNotFoundError as error:
        raise TargetError(f"{source}: {error}; write one of {', '.join(FORMS)}") from error
    finally:
        sys.path.remove(os.getcwd())
    factory = getattr(module, name, None)
    if factory is None:
        raise TargetError(f"{source} has no {name!r}{_suggest(name, dir(module))}")
    with torch.device(device):
        made = factory if isinstance(factory, nn.Module) else factory(**options)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise TargetError(
            f"{source}:{name} gives a {type(model).__name__}; expected a module, or a module and "
            "a tuple or dict of its inputs"
        )
    return model, inputs if isinstance(inputs, (tuple, dict, type(None))) else (inputs,)


_SOURCES: dict[str, Callable[[str, str, dict[str, Any], str], Built]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "transformers": _from_transformers,
}


def _library(name: str) -> Any:
    try:
        if importlib.util.find_spec("torchvision"):  # the others import it if it is there
            ensure_torchvision()
        return importlib.import_module(name)
    except ImportError as error:
        raise TargetError(f"{name} is not installed: pip install {name}") from error


def _check_name(source: str, name: str, names: Iterable[str]) -> None:
    names = list(names)
    if name not in names:
        raise TargetError(f"{source} has no model {name!r}{_suggest(name, names)}")


def _suggest(name: str, names: Iterable[str]) -> str:
    """The nearest names, if any is near."""
    near = difflib.get_close_matches(name, list(names), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""
