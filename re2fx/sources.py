"""Where models come from: what each library calls them, and what they are called with by default.

A source is a function ``(source, name, options, device)`` that gives a model, and inputs of the
size that its library says it takes, or None where the library says nothing.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from .errors import TargetError
from .torchvision_shim import ensure_torchvision

FORMS = (
    "torchvision:resnet50",
    "timm:vit_base_patch16_224",
    "transformers:gpt2?n_layer=4",
    "transformers:BertForMaskedLM?num_hidden_layers=4",
    "pytorchvideo:slowfast?model_depth=50",
    "package.module:factory?depth=12",
)
TOKENS = 128

Built = tuple[nn.Module, "tuple[Any, ...] | dict[str, Any] | None"]
Source = Callable[[str, str, dict[str, Any], str], Built]


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
    """A model by its type (``bert``), with the head that trains it, or by its class."""
    library = _library(source)
    if name in library.CONFIG_MAPPING:
        config = library.AutoConfig.for_model(name, **options)
        factory = _factory(library, config)
        with torch.device(device):
            model = factory.from_config(config)
    else:
        kind = _class(library, name, "config_class")
        if kind is None:
            _check_name(source, name, [*library.CONFIG_MAPPING.keys(), *dir(library)])
            raise TargetError(f"{source}:{name} is no model; name its type or its class")
        with torch.device(device):
            model = kind._from_config(kind.config_class(**options))
    return model, _called_with(library, model)


def _factory(library: Any, config: Any) -> Any:
    """The class with the head that a model of this type is trained with, as far as it is known."""
    if type(config) in library.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING and config.is_encoder_decoder:
        return library.AutoModelForSeq2SeqLM
    if type(config) in library.MODEL_FOR_CAUSAL_LM_MAPPING:
        return library.AutoModelForCausalLM
    return library.AutoModel


def _called_with(library: Any, model: Any) -> dict[str, Any] | None:
    """Named inputs of a Hugging Face model, and the switches that training sets.

    With a cache, keys and values leave every attention block.
    """
    config, main = model.config, model.main_input_name
    language = type(config) in library.MODEL_FOR_CAUSAL_LM_MAPPING
    translates = type(config) in library.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    switches = {"use_cache": False} if language or translates else {}
    if main == "pixel_values":
        size = getattr(config, "image_size", None)
        if size is None:
            return {**switches} or None
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": example((1, config.num_channels, height, width))}
    if main != "input_ids":
        return None
    most = getattr(config, "max_position_embeddings", TOKENS)
    tokens = min(TOKENS, most if most > 0 else TOKENS)  # -1 means any number
    inputs = {main: example((1, tokens), torch.int64)}
    if translates and config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs[main]
    return {**inputs, **switches}


def _from_pytorchvideo(source: str, name: str, options: dict[str, Any], device: str) -> Built:
    """A model of the library's hub, or one that a function ``create_<name>`` makes."""
    models = _library(f"{source}.models")
    makers = dict(_makers(models))
    _check_name(source, name, makers)
    with torch.device(device):
        made = makers[name](**options)
    return made, None


def _makers(models: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    for module in pkgutil.iter_modules(models.__path__, models.__name__ + "."):
        functions = vars(importlib.import_module(module.name))
        for name, value in functions.items():
            if name.startswith("create_") and callable(value):
                yield name.removeprefix("create_"), value
    for name, value in vars(importlib.import_module(models.__name__ + ".hub")).items():
        if callable(value):
            yield name, value


def _from_diffusers(source: str, name: str, options: dict[str, Any], device: str) -> Built:
    library = _library(source)
    kind = _class(library, name, "config_name")
    if kind is None:
        _check_name(source, name, dir(library))
        raise TargetError(f"{source}:{name} is no model; name a class such as UNet2DModel")
    with torch.device(device):
        return kind(**options), None


def member(source: str, name: str) -> Any:
    """What a module that can be imported, from the working directory too, has by a name.

    Raises:
        TargetError: there is no such module, or it has no such name.
    """
    sys.path.insert(0, os.getcwd())
    try:
        if source.partition(".")[0] in SOURCES:
            _library(source.partition(".")[0])
        module = importlib.import_module(source)
    except ModuleNotFoundError as error:
        raise TargetError(f"{source}: {error}; write one of {', '.join(FORMS)}") from error
    finally:
        sys.path.remove(os.getcwd())
    found = getattr(module, name, None)
    if found is None:
        raise TargetError(f"{source} has no {name!r}{_suggest(name, dir(module))}")
    return found


def _from_module(source: str, name: str, options: dict[str, Any], device: str) -> Built:
    factory = member(source, name)
    with torch.device(device):
        made = factory if isinstance(factory, nn.Module) else factory(**options)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise TargetError(
            f"{source}:{name} gives a {type(model).__name__}; expected a module, or a module and "
            "a tuple or dict of its inputs"
        )
    return model, inputs if isinstance(inputs, (tuple, dict, type(None))) else (inputs,)


SOURCES: dict[str, Source] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "transformers": _from_transformers,
    "pytorchvideo": _from_pytorchvideo,
    "diffusers": _from_diffusers,
}


def build(source: str, name: str, options: dict[str, Any], device: str) -> Built:
    """The model a name stands for in a library, or in a module of one's own."""
    return SOURCES.get(source, _from_module)(source, name, options, device)


def _class(library: Any, name: str, mark: str) -> Any:
    """A model class of a library by its name; None if there is no such class."""
    kind = None
    with suppress(AttributeError, ImportError):
        kind = getattr(library, name)
    is_model = isinstance(kind, type) and issubclass(kind, nn.Module)
    return kind if is_model and getattr(kind, mark, None) is not None else None


def _library(name: str) -> Any:
    package = name.partition(".")[0]
    try:
        if importlib.util.find_spec("torchvision"):  # the others import it if it is there
            ensure_torchvision()
        return importlib.import_module(name)
    except ImportError as error:
        raise TargetError(f"{package} is not installed: pip install {package}") from error


def _check_name(source: str, name: str, names: Iterable[str]) -> None:
    names = list(names)
    if name not in names:
        raise TargetError(f"{source} has no model {name!r}{_suggest(name, names)}")


def _suggest(name: str, names: Iterable[str]) -> str:
    """The nearest names, if any is near."""
    near = difflib.get_close_matches(name, list(names), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""
