"""What the commands of ``re2fx`` take, and what it means to the functions behind them."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import OptionError


class ReadoutName(str, Enum):
    """Values of --readout."""

    mean = "mean"
    sum = "sum"
    last = "last"


class ActivationName(str, Enum):
    """Values of --activation."""

    branch = "branch"
    stream = "stream"
    block = "block"


TargetArg = Annotated[str, typer.Argument(help="The model, as SOURCE:NAME?option=value.")]
InputOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--input", "-i", metavar="SIZES", help="2,3,224,224 or NAME=1,128:int64; once per input."
    ),
]
CouplingOpt = Annotated[
    str | None,
    typer.Option(
        "--coupling",
        metavar="NAME|A,B,C",
        help="re2tal (default), consistent:B, momentum:G, dr2net:ALPHA,BETA, midpoint:B,H, double, "
        "bdia (with --readout last), or the coefficients.",
    ),
]
ReadoutOpt = Annotated[ReadoutName, typer.Option("--readout", help="How the streams become one.")]
ExactOpt = Annotated[
    bool,
    typer.Option("--exact", help="Carry the streams in fixed point: reconstructed to the bit."),
]
ActivationOpt = Annotated[
    ActivationName,
    typer.Option("--activation", help="Where an activation behind an addition goes."),
]
LeafOpt = Annotated[
    list[str] | None, typer.Option("--leaf", metavar="PATH", help="A module to keep whole.")
]


class CaptureName(str, Enum):
    """Values of --capture."""

    auto = "auto"
    symbolic = "symbolic"
    dynamo = "dynamo"


CaptureOpt = Annotated[
    CaptureName, typer.Option("--capture", help="How the model becomes a graph.")
]
SelectOpt = Annotated[
    list[str] | None,
    typer.Option("--select", metavar="PATTERN", help="Rewire these module paths; ! excludes."),
]
MinChainOpt = Annotated[
    int, typer.Option("--min-chain", metavar="N", help="Leave shorter chains alone.")
]
MinSavingOpt = Annotated[
    str | None,
    typer.Option("--min-saving", metavar="BYTES|SHARE", help="Leave chains that save less alone."),
]
DriftOpt = Annotated[
    float,
    typer.Option(
        "--drift-tolerance", metavar="ERROR", help="Relative error a reconstructed state may have."
    ),
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]
HtmlOpt = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write a page that needs no network.")
]
PlotOpt = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Write a picture (.png or .svg).")
]
MemoryOpt = Annotated[
    str,
    typer.Option(
        "--memory", "-m", metavar="lowest|BYTES", help="lowest, or a budget such as 6GiB or 500MB."
    ),
]


def read_coupling(text: str | None) -> Any:
    """A coupling by the name of its constructor, or by its coefficients."""
    from .coupling import Coupling

    if text is None:
        return None
    makers: dict[str, Callable[..., Any]] = {
        name: getattr(Coupling, name)
        for name in ("re2tal", "consistent", "midpoint", "momentum", "dr2net", "double", "bdia")
    }
    name, _, numbers = text.partition(":")
    try:
        if name in makers:
            return makers[name](*map(float, filter(None, numbers.split(","))))
        a, b, c = map(float, text.split(","))
        return Coupling(a, b, c)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(
            f"{text!r}; write {', '.join(makers)} with its numbers, such as consistent:0.5, "
            "or three coefficients, such as 0,1,1",
            param_hint="--coupling",
        ) from error


def chosen(
    leaf: list[str] | None,
    capture: CaptureName,
    select: list[str] | None,
    min_chain: int,
    min_saving: str | None,
    drift_tolerance: float | None = None,
) -> dict[str, Any]:
    """The options that say what is captured and what is rewired of it."""
    drift = {} if drift_tolerance is None else {"drift_tolerance": drift_tolerance}
    return {
        "leaves": tuple(leaf or ()),
        "capture": capture.value,
        "select": select or None,
        "min_chain": min_chain,
        "min_saving": None if min_saving is None else read_saving(min_saving),
        **drift,
    }


def read_memory(text: str) -> str | int:
    """The name, or a budget; a number without a unit is one of bytes."""
    from .budget import checked_memory

    try:
        return checked_memory(int(text) if text.isdecimal() else text)
    except OptionError as error:
        raise typer.BadParameter(str(error), param_hint="--memory") from error


def read_saving(text: str) -> int | float:
    """Bytes as a whole number, or a share with a point."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r}; write bytes as a whole number, such as 1048576, or a share, such as 0.5",
            param_hint="--min-saving",
        ) from error
