"""The command ``re2fx``: what the functions of the package say about a model named on a line.

    re2fx explain torchvision:resnet50
    re2fx diff timm:vit_base_patch16_224 --html diff.html
    re2fx report torchvision:swin3d_t --input 1,3,16,112,112 --plot report.png
    re2fx fit torchvision:swin3d_t --memory 2GiB --plot step.png
    re2fx verify transformers:gpt2?n_layer=4
    re2fx calibrate package.module:factory package.module:batches
    re2fx demo package.module:factory
    re2fx zoo 'timm:*swin*' --json zoo.json

Exit codes: 0 all is well; 1 there is a finding (nothing to rewire, a verdict that is not ok); 2 the
command cannot be carried out as written.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .calibration import MAX_BITS
from .cli_options import (
    ActivationName,
    ActivationOpt,
    CaptureName,
    CaptureOpt,
    CouplingOpt,
    DriftOpt,
    ExactOpt,
    HtmlOpt,
    InputOpt,
    JsonOpt,
    LeafOpt,
    MemoryOpt,
    MinChainOpt,
    MinSavingOpt,
    PlotOpt,
    ReadoutName,
    ReadoutOpt,
    SelectOpt,
    TargetArg,
    chosen,
    read_coupling,
    read_memory,
)
from .errors import Re2fxError, Re2fxWarning
from .wiring import DRIFT_TOLERANCE
from .zoo.command import zoo

FOUND, UNUSABLE = 1, 2

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Rewire residual networks into reversible form, and see what that does to them.",
    epilog="TARGET: torchvision:resnet50, timm:vit_base_patch16_224?depth=4, "
    "transformers:gpt2?n_layer=4, package.module:factory?width=8",
)


@app.command()
def explain(
    target: TargetArg,
    input: InputOpt = None,
    coupling: CouplingOpt = None,
    activation: ActivationOpt = ActivationName.branch,
    leaf: LeafOpt = None,
    capture: CaptureOpt = CaptureName.auto,
    select: SelectOpt = None,
    min_chain: MinChainOpt = 2,
    min_saving: MinSavingOpt = None,
    drift_tolerance: DriftOpt = DRIFT_TOLERANCE,
    as_json: JsonOpt = False,
) -> None:
    """List every skip-add: rewired, or refused and why, with its source line."""
    from .api import explain as explain_model
    from .targets import load

    with working(f"tracing {target}"):
        made = load(target, input or (), "meta")
        result = explain_model(
            made.model,
            made.inputs,
            coupling=read_coupling(coupling),
            activation=activation.value,
            **chosen(leaf, capture, select, min_chain, min_saving, drift_tolerance),
        )
    show(result, as_json)
    raise typer.Exit(0 if result.plan.chains else FOUND)


@app.command()
def diff(
    target: TargetArg,
    other: Annotated[
        str | None, typer.Argument(help="Compare with this model instead of the rewired one.")
    ] = None,
    input: InputOpt = None,
    coupling: CouplingOpt = None,
    readout: ReadoutOpt = ReadoutName.mean,
    exact: ExactOpt = False,
    activation: ActivationOpt = ActivationName.branch,
    leaf: LeafOpt = None,
    capture: CaptureOpt = CaptureName.auto,
    select: SelectOpt = None,
    min_chain: MinChainOpt = 2,
    min_saving: MinSavingOpt = None,
    drift_tolerance: DriftOpt = DRIFT_TOLERANCE,
    as_json: JsonOpt = False,
    html: HtmlOpt = None,
    steps: Annotated[
        bool, typer.Option("--steps", help="Let the page show every pass of the rewiring too.")
    ] = False,
    dot: Annotated[
        Path | None, typer.Option("--dot", metavar="FILE", help="Write both graphs as DOT.")
    ] = None,
) -> None:
    """Show what rewiring changes in a model's graph, or how two models differ."""
    from .diff import diff as compare
    from .diff import history
    from .targets import load

    with working(f"comparing {target}"):
        made = load(target, input or (), "meta")
        if other is not None:
            after = load(other, input or (), "meta").model
        else:
            choice = chosen(leaf, capture, select, min_chain, min_saving, drift_tolerance) | {
                "exact": exact
            }
            after = rewired(made, coupling, readout, activation, choice)
        result = compare(made.model, after, example_inputs=made.inputs)
        if html is not None:
            result.to_html(html, history(after) if steps and other is None else ())
        if dot is not None:
            dot.write_text(result.to_dot())
    if (html is None and dot is None) or as_json:
        show(result, as_json)
    for path in filter(None, (html, dot)):
        note(f"wrote {path}")


@app.command()
def report(
    target: TargetArg,
    input: InputOpt = None,
    coupling: CouplingOpt = None,
    readout: ReadoutOpt = ReadoutName.mean,
    exact: ExactOpt = False,
    activation: ActivationOpt = ActivationName.branch,
    leaf: LeafOpt = None,
    capture: CaptureOpt = CaptureName.auto,
    select: SelectOpt = None,
    min_chain: MinChainOpt = 2,
    min_saving: MinSavingOpt = None,
    drift_tolerance: DriftOpt = DRIFT_TOLERANCE,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run the model too, and compare.")
    ] = False,
    as_json: JsonOpt = False,
    plot: PlotOpt = None,
) -> None:
    """Predict the bytes kept for the backward: now, checkpointed and rewired."""
    from .report import report as report_on
    from .targets import load

    with working(f"counting bytes of {target}"):
        made = load(target, input or (), "cpu" if measure else "meta")
        result = report_on(
            made.model,
            made.inputs,
            measure=measure,
            coupling=read_coupling(coupling),
            readout=readout.value,
            activation=activation.value,
            exact=exact,
            **chosen(leaf, capture, select, min_chain, min_saving, drift_tolerance),
        )
        if plot is not None:
            result.plot(plot)
    show(result, as_json)
    if plot is not None:
        note(f"wrote {plot}")


@app.command()
def fit(
    target: TargetArg,
    memory: MemoryOpt = "lowest",
    input: InputOpt = None,
    coupling: CouplingOpt = None,
    readout: ReadoutOpt = ReadoutName.mean,
    exact: ExactOpt = False,
    activation: ActivationOpt = ActivationName.branch,
    leaf: LeafOpt = None,
    capture: CaptureOpt = CaptureName.auto,
    select: SelectOpt = None,
    min_chain: MinChainOpt = 2,
    min_saving: MinSavingOpt = None,
    drift_tolerance: DriftOpt = DRIFT_TOLERANCE,
    as_json: JsonOpt = False,
    plot: PlotOpt = None,
) -> None:
    """Fit a training step into memory: which frames are stored, run again, and in slices."""
    from .course import memory_course
    from .targets import load

    with working(f"planning a step of {target}"):
        made = load(target, input or (), "meta")
        result = memory_course(
            made.model,
            made.inputs,
            memory=read_memory(memory),
            coupling=read_coupling(coupling),
            readout=readout.value,
            activation=activation.value,
            exact=exact,
            **chosen(leaf, capture, select, min_chain, min_saving, drift_tolerance),
        )
        if plot is not None:
            result.plot(plot)
    show(result, as_json)
    if plot is not None:
        note(f"wrote {plot}")


@app.command()
def verify(
    target: TargetArg,
    input: InputOpt = None,
    coupling: CouplingOpt = None,
    readout: ReadoutOpt = ReadoutName.mean,
    exact: ExactOpt = False,
    activation: ActivationOpt = ActivationName.branch,
    leaf: LeafOpt = None,
    capture: CaptureOpt = CaptureName.auto,
    select: SelectOpt = None,
    min_chain: MinChainOpt = 2,
    min_saving: MinSavingOpt = None,
    drift_tolerance: DriftOpt = DRIFT_TOLERANCE,
    as_json: JsonOpt = False,
    plot: PlotOpt = None,
) -> None:
    """Compare reversible with stored execution: gradients, states, buffers, random numbers."""
    from .targets import load
    from .verify import verify as verify_model

    with working(f"verifying {target}"):
        made = load(target, input or ())
        choice = chosen(leaf, capture, select, min_chain, min_saving, drift_tolerance) | {
            "exact": exact
        }
        rev = rewired(made, coupling, readout, activation, choice)
        result = verify_model(rev, made.inputs)
        if plot is not None:
            result.plot(plot)
    show(result, as_json)
    if plot is not None:
        note(f"wrote {plot}")
    raise typer.Exit(0 if result.ok else FOUND)


@app.command()
def calibrate(
    target: TargetArg,
    data: Annotated[
        str, typer.Argument(help="Batches of your data, or what makes them, as MODULE:NAME.")
    ],
    metric: Annotated[
        str | None,
        typer.Option("--metric", metavar="MODULE:NAME", help="A function of output and batch."),
    ] = None,
    batches: Annotated[
        int | None, typer.Option("--batches", metavar="N", help="Take so many batches.")
    ] = None,
    max_bits: Annotated[
        int, typer.Option("--max-bits", metavar="N", help="Side bits that are acceptable.")
    ] = MAX_BITS,
    activation: ActivationOpt = ActivationName.branch,
    leaf: LeafOpt = None,
    capture: CaptureOpt = CaptureName.auto,
    select: SelectOpt = None,
    min_chain: MinChainOpt = 2,
    min_saving: MinSavingOpt = None,
    as_json: JsonOpt = False,
    plot: PlotOpt = None,
) -> None:
    """Measure how far each coupling moves a pretrained model's output on your data, untrained."""
    from .calibrate import calibrate as calibrate_model
    from .targets import load, load_object

    with working(f"building {target}"):
        made, given = load(target), load_object(data)
        rate = load_object(metric) if metric is not None else None
    result = calibrate_model(
        made.model,
        given() if callable(given) else given,
        metric=rate,
        batches=batches,
        max_bits=max_bits,
        progress=True,
        activation=activation.value,
        **chosen(leaf, capture, select, min_chain, min_saving),
    )
    if plot is not None:
        result.plot(plot)
    show(result, as_json)
    if plot is not None:
        note(f"wrote {plot}")
    raise typer.Exit(0 if result.recommended else FOUND)


@app.command()
def demo(
    target: Annotated[
        str, typer.Argument(help="The model, as SOURCE:NAME?option=value.")
    ] = "torchvision:resnet18?num_classes=10",
    input: InputOpt = None,
    coupling: CouplingOpt = None,
    readout: ReadoutOpt = ReadoutName.mean,
    exact: ExactOpt = False,
    activation: ActivationOpt = ActivationName.branch,
    leaf: LeafOpt = None,
    capture: CaptureOpt = CaptureName.auto,
    select: SelectOpt = None,
    min_chain: MinChainOpt = 2,
    min_saving: MinSavingOpt = None,
    drift_tolerance: DriftOpt = DRIFT_TOLERANCE,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Training steps of each.")] = 10,
    as_json: JsonOpt = False,
) -> None:
    """Train the model and its rewired form for a few steps on random data, and compare."""
    from .demonstration import demonstrate
    from .targets import load

    with working(f"building {target}"):
        made = load(target, input or ())
        choice = chosen(leaf, capture, select, min_chain, min_saving, drift_tolerance) | {
            "exact": exact
        }
        rev = rewired(made, coupling, readout, activation, choice)
    result = demonstrate(made.model, rev, made.inputs, steps, console())
    show(result, as_json)


app.command()(zoo)


def rewired(
    made: Any,
    coupling: str | None,
    readout: ReadoutName,
    activation: ActivationName,
    choice: dict[str, Any],
) -> Any:
    """The target's rewired form; nothing to rewire is an error here."""
    from .api import transform

    return transform(
        made.model,
        made.inputs,
        coupling=read_coupling(coupling),
        readout=readout.value,
        activation=activation.value,
        **choice,
        strict=True,
    )


def console() -> Console:
    """For progress and notes: standard error, so that standard output can be piped."""
    return Console(stderr=True)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show that something goes on."""
    with console().status(what):
        yield


def note(text: str) -> None:
    """Say something beside the result."""
    console().print(text, highlight=False)


def show(result: Any, as_json: bool) -> None:
    """Print a result for a person, or as JSON."""
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
    elif hasattr(result, "__rich__"):
        Console().print(result, highlight=False)
    else:
        typer.echo(result.text(color=sys.stdout.isatty()))


def main() -> None:
    """Run the command; errors of re2fx are messages, not tracebacks."""
    with warnings.catch_warnings():
        plain = warnings.showwarning

        def shown(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, Re2fxWarning):
                note(f"warning: {message}")
            else:
                plain(message, category, *place, **more)

        warnings.showwarning = shown
        try:
            app()
        except Re2fxError as error:
            console().print(f"[bold red]error:[/] {type(error).__name__}:", end=" ")
            console().print(str(error), markup=False, highlight=False)
            sys.exit(UNUSABLE)


if __name__ == "__main__":
    main()
