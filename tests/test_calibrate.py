"""How far couplings move a model: what is measured, what is recommended, and no trace of it."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import re2fx
from re2fx.calibrate import calibrate
from re2fx.candidates import side_bits

from .models import Block, ConvNet, Net, Tapped
from .test_blocks import Encoder
from .zoo import one_thread

C = re2fx.Coupling
DEPTH, WIDTH, BATCH = 6, 16, 32
ORDERED = [
    re2fx.Candidate("re2tal", C.re2tal()),
    re2fx.Candidate("quarter", C.consistent(1 / 4)),
    re2fx.Candidate("eighth", C.consistent(1 / 8)),
]


def labelled(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Points of a plane in four dimensions, in the class of their largest of three sums."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(count, BATCH, 4, generator=generator)
    return [(x, x[:, :3].add(x[:, 1:]).argmax(-1)) for x in points]


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A residual network that has learnt something, so that its output means something."""
    with torch.random.fork_rng(), one_thread():
        torch.manual_seed(0)
        model = Net(DEPTH, WIDTH)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for x, y in labelled(60):
            loss = cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def right(output: Tensor, batch: Any) -> Tensor:
    """Accuracy."""
    return (output.argmax(-1) == batch[1]).double().mean()


# what is measured


def test_the_smaller_b_the_nearer(trained: nn.Module) -> None:
    found = calibrate(trained, labelled(), candidates=ORDERED)
    re2tal, quarter, eighth = (row.distance for row in found.rows)
    assert 0 < eighth < quarter < re2tal


def test_the_original_coupling_does_not_move_the_output(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    last = list(model.modules())[-2]
    assert isinstance(last, nn.Linear), "the end of the last branch"
    nn.init.zeros_(last.weight)  # the last two states are one, and so is their mean
    nn.init.zeros_(last.bias)
    original = re2fx.Candidate("original", C.original(), options={"memory": "store"})
    (row,) = calibrate(model, labelled(), candidates=[original], metric=right).rows
    assert row.distance == pytest.approx(0, abs=1e-6)
    assert row.agreement == 1
    assert row.refusal
    assert row.kept is None


def test_figures_are_what_the_definition_says(trained: nn.Module) -> None:
    data = [*labelled(), tuple(x[:5] for x in labelled(1)[0])]  # a short one at the end
    found = calibrate(trained, data, candidates=ORDERED[:1], metric=right)
    rev = re2fx.transform(copy.deepcopy(trained)).eval()
    distance = agreement = metric = base = 0.0
    with torch.no_grad():
        for batch in data:
            x, y = batch
            true, got = trained.eval()(x), rev(x)
            distance += len(x) * float((got - true).norm() / true.norm())
            agreement += float((got.argmax(-1) == true.argmax(-1)).sum())
            metric += float((got.argmax(-1) == y).sum())
            base += float((true.argmax(-1) == y).sum())
    samples = 3 * BATCH + 5
    (row,) = found.rows
    assert (found.batches, found.samples) == (4, samples)
    assert row.distance == pytest.approx(distance / samples, rel=1e-5)
    assert row.agreement == pytest.approx(agreement / samples)
    assert row.metric == pytest.approx(metric / samples)
    assert found.metric == pytest.approx(base / samples)


def test_bytes_are_those_of_the_report(trained: nn.Module) -> None:
    sums = re2fx.Candidate("re2tal", C.re2tal(), "sum")
    found = calibrate(trained, labelled(), candidates=[ORDERED[0], sums])
    for row, readout in zip(found.rows, ("mean", "sum"), strict=True):
        x = labelled()[0][0].clone()  # not a view of all of them
        expected = re2fx.report(trained, x, readout=readout).total  # type: ignore[arg-type]
        assert row.kept == expected.reversible
        assert (found.now, found.checkpoint) == (expected.store, expected.checkpoint)


def test_bytes_are_those_of_the_flags_it_is_trained_with() -> None:
    model, x = Net(4, WIDTH, 0.1).train(), torch.randn(BATCH, 4)
    everything = re2fx.report(model, x).total.store
    model.blocks.eval()  # keeps no masks
    now = calibrate(model, [x], candidates=ORDERED).now
    assert now == re2fx.report(model, x).total.store
    assert now < everything


def test_it_is_measured_in_eval_mode() -> None:
    model, x = Net(4, WIDTH, 0.5).train(), torch.randn(BATCH, 4)
    trained = calibrate(model, [x], candidates=ORDERED, metric=lambda output, _: output.sum())
    assert trained.metric == pytest.approx(float(model.eval()(x).detach().sum()))
    assert calibrate(model, [x], candidates=ORDERED).rows[0].distance == trained.rows[0].distance


def test_only_the_first_batches(trained: nn.Module) -> None:
    endless = iter(lambda: labelled(1)[0], None)
    assert calibrate(trained, endless, candidates=ORDERED, batches=2).batches == 2


@pytest.mark.parametrize(
    ("b", "bits"),
    [(1.0, 0), (-1.0, 0), (0.5, 1), (0.25, 2), (-0.125, 3), (0.7, None), (2.0, None), (0.0, None)],
)
def test_side_bits(b: float, bits: int | None) -> None:
    assert side_bits(C(0.5, b, 1.0)) == bits


def test_bytes_are_asked_for_once_per_kind(
    trained: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def report(model: nn.Module, inputs: Any, **options: Any) -> re2fx.Report:
        asked.append(options)
        return re2fx.report(model, inputs)

    monkeypatch.setattr(sys.modules["re2fx.calibrate"], "report", report)
    unit = [re2fx.Candidate("a", C.re2tal()), re2fx.Candidate("b", C(0.0, -1.0, 1.0))]
    near = [re2fx.Candidate("c", C.consistent(1 / 2)), re2fx.Candidate("d", C.original())]
    calibrate(trained, labelled(1), candidates=[*unit, *near])
    assert [options.get("coupling") for options in asked] == [
        unit[0].coupling, unit[0].coupling, near[0].coupling
    ]  # fmt: skip


def test_a_candidate_that_fails_is_infinitely_far_and_the_others_are_measured(
    trained: nn.Module,
) -> None:
    seen: list[nn.Module] = []

    def forward(model: nn.Module, batch: Any) -> Any:
        if isinstance(model, re2fx.RewiredModule):
            seen.append(model)
            if model is seen[0]:
                raise re2fx.StreamError("a number does not fit")
        return model(batch[0])

    found = calibrate(trained, labelled(), candidates=ORDERED[:2], forward=forward, metric=right)
    failed, other = found.rows
    assert math.isinf(failed.distance)
    assert (failed.agreement, failed.metric) == (None, None)
    assert failed.obstacle() == failed.refusal == "a number does not fit"
    assert found.recommended is other
    assert other.distance < 1


def test_a_step_of_two_branches_costs_twice_as_much() -> None:
    assert ORDERED[0].step == pytest.approx(4 / 3)
    assert replace(ORDERED[0], branches=2).step == pytest.approx(8 / 3)


# batches and outputs


class Keywords(Net):
    def forward(self, x: Tensor, shift: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        hidden = self.blocks(self.stem(x if shift is None else x + shift))
        return {"logits": self.head(hidden), "hidden": hidden}


def test_kinds_of_batches() -> None:
    model = Keywords(4)
    x, shift, y = torch.randn(8, 4), torch.randn(8, 4), torch.arange(8)
    kinds: list[Any] = [
        {"x": x, "shift": shift},
        ({"x": x, "shift": shift}, y),
        [(x, shift), y],
        ((x, shift), y, "more"),
    ]
    found = [calibrate(model, [batch], candidates=ORDERED) for batch in kinds]
    assert found[0].rows[0].distance > 0
    assert found[0].rows[0].agreement is not None, "an output with logits has class scores"
    for other in found[1:]:
        assert other == found[0]


def test_forward_calls_the_model() -> None:
    model = Keywords(4)
    batch = {"features": torch.randn(8, 4), "by": torch.randn(8, 4)}
    found = calibrate(
        model,
        [batch],
        candidates=ORDERED,
        forward=lambda network, given: network(given["features"], shift=given["by"])["logits"],
        metric=lambda output, given: float(output.shape == (8, 3) and given is batch),
    )
    direct = calibrate(model, [{"x": batch["features"], "shift": batch["by"]}], candidates=ORDERED)
    assert found.rows[0].agreement == direct.rows[0].agreement
    assert found.rows[0].kept == direct.rows[0].kept
    assert found.metric == found.rows[0].metric == 1


def test_outputs_that_are_no_class_scores() -> None:
    data = [((torch.randn(4, 8), torch.randn(4, 8)),)]
    (row,) = calibrate(Tapped(), data, candidates=ORDERED[:1]).rows
    assert row.agreement is None
    assert row.distance > 0, "all tensors of the output count"
    assert "top-1" not in str(calibrate(Tapped(), data, candidates=ORDERED[:1]))


def test_an_output_that_is_not_finite_is_infinitely_far() -> None:
    class Exploding(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1e30 * self.outer(x.exp().repeat(1, 2))

    model = Net(4, 8, block=Exploding)
    (row,) = calibrate(model, [torch.randn(4, 4)], candidates=ORDERED[:1]).rows
    assert math.isinf(row.distance)
    assert row.obstacle() == "its output is not finite"
    assert row.to_dict()["distance"] is None


# no trace


class Noisy(nn.Module):
    """Draws in eval mode, counts its calls, and writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(4, 8)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        out: Tensor = self.net(x.mul_(2) + torch.randn_like(x))
        return out


@pytest.mark.parametrize("build", [lambda: ConvNet(3, 6, 0.2), Noisy], ids=["batch norm", "noise"])
def test_the_model_is_untouched(build: Any) -> None:
    model = build().train()
    next(model.children()).eval()
    x = torch.randn(4, 3, 8, 8) if isinstance(model, ConvNet) else torch.randn(4, 4)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    given, state, hooks = x.clone(), torch.get_rng_state(), dict(model._forward_pre_hooks)
    calibrate(model, [x], candidates=ORDERED)
    assert torch.equal(x, given)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags
    assert dict(model._forward_pre_hooks) == hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(bool((p.grad == 1).all()) for p in model.parameters() if p.grad is not None)
    assert torch.is_grad_enabled()


def test_everybody_gets_the_same_noise() -> None:
    original = re2fx.Candidate("original", C.original())
    nearly = re2fx.Candidate("nearly", C(1.0, 1e-6, 1.0))
    rows = calibrate(Noisy(), [torch.randn(4, 4)], candidates=[original, nearly]).rows
    assert rows[0].distance == pytest.approx(rows[1].distance, rel=1e-2)
    assert rows[0].distance < 0.2, "other noise would move the output as far as itself"


def test_data_that_draws_numbers_draws_new_ones() -> None:
    seen: list[Tensor] = []

    def stream() -> Iterator[Tensor]:
        for _ in range(3):
            seen.append(torch.randn(4, 4))
            yield seen[-1]

    assert calibrate(Net(4), stream(), candidates=ORDERED).batches == 3
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


# what is not recommended


def test_nothing_to_recommend(trained: nn.Module) -> None:
    found = calibrate(trained, labelled(1), candidates=[C.original()])
    assert found.recommended is None
    assert found.frontier == ()
    assert "b = 0 cannot be inverted" in found.recommendation


def test_ill_conditioned_couplings_are_measured_and_not_recommended() -> None:
    deep = Net(30, 8)
    ill = re2fx.Coupling.consistent(2.0**-20)
    found = calibrate(deep, [torch.randn(8, 4)], candidates=[re2fx.Coupling.re2tal(), ill])
    row = next(row for row in found.rows if row.candidate.coupling == ill)
    assert "rounding grows" in row.refusal
    assert row.distance < 1
    assert found.recommended is not None
    assert not found.recommended.refusal


def test_couplings_under_which_nothing_can_be_rewired_are_left_out() -> None:
    """Norms behind additions are only for couplings that take whole blocks."""
    model = Encoder()
    found = calibrate(model, [torch.randn(512, 4)])
    assert [row.name for row in found.rows] == [
        "consistent(1/4) read by mean", "consistent(1/4) read by last",
        "consistent(1/8) read by last",
    ]  # fmt: skip
    assert "re2tal read by mean" in found.left_out
    assert found.recommended is not None
    assert found.checkpoint is not None
    assert found.now is not None
    assert found.recommended.kept is not None
    assert found.recommended.kept < found.checkpoint < found.now
    assert "With re2tal read by mean, re2tal read by sum" in str(found).replace("\n", " ")
    assert found.to_dict()["left_out"] == found.left_out
    with pytest.raises(re2fx.NoResidualError, match="post-norm"):
        calibrate(model, [torch.randn(8, 4)], candidates=[re2fx.Coupling.re2tal()])


# errors


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def test_what_cannot_be_calibrated() -> None:
    model, data = Net(4), [torch.randn(8, 4)]
    with pytest.raises(re2fx.OptionError, match="no batch"):
        calibrate(model, [])
    with pytest.raises(re2fx.NoResidualError):
        calibrate(Plain(), data)
    with pytest.raises(re2fx.OptionError, match="rewired already"):
        calibrate(re2fx.transform(model), data)
    with pytest.raises(re2fx.OptionError, match="candidates is empty"):
        calibrate(model, data, candidates=[])
    with pytest.raises(re2fx.OptionError, match=r"expected re2fx\.Candidate"):
        calibrate(model, data, candidates=["re2tal"])  # type: ignore[list-item]
    with pytest.raises(re2fx.OptionError, match="batches=0"):
        calibrate(model, data, batches=0)
    with pytest.raises(re2fx.OptionError, match="metric= must give one number"):
        calibrate(model, data, metric=lambda output, batch: output)
    with pytest.raises(re2fx.OptionError, match="batch of type str"):
        calibrate(model, ["text"])
    with pytest.raises(re2fx.OptionError, match="must call the model"):
        calibrate(model, data, forward=lambda network, batch: batch)
    with pytest.raises(re2fx.OptionError, match="no floating-point tensor"):
        calibrate(model, data, forward=lambda network, batch: network(batch).argmax(-1))


def test_flags_come_back_after_an_error() -> None:
    model = Net(4).train()
    with pytest.raises(re2fx.OptionError):
        calibrate(model, [torch.randn(8, 4)], metric=lambda output, batch: None)
    assert all(module.training for module in model.modules())


# progress


def test_a_bar_if_it_is_wanted(
    trained: nn.Module, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a terminal
    calibrate(trained, labelled(), candidates=ORDERED)
    assert capsys.readouterr() == ("", "")
    assert calibrate(trained, labelled(), candidates=ORDERED, progress=True).batches == 3
    assert "calibrate" in capsys.readouterr().err
