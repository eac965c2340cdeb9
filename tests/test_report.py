"""What training keeps, predicted: against real runs, without memory, and without a trace."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import re2fx
from re2fx.memory import live_bytes, saved_bytes
from re2fx.parts import FAMILY, part_rows
from re2fx.report import report
from re2fx.snapshot import Snapshot
from re2fx.tally import Place
from re2fx.verdict import size

from .models import Block, ConvNet, Net, Tapped
from .zoo import ZOO, one_thread

ROOT = Path(__file__).parent.parent
RNG_STATE = 5056  # bytes of the CPU generator's state
BATCH, WIDTH = 64, 32
STREAM = BATCH * WIDTH * 4


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model on example inputs as re2fx understands them, in new containers."""
    inputs = pytree.tree_map(lambda leaf: leaf, inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


@one_thread()
def compare_with_real_runs(model: nn.Module, inputs: Any, predicted: re2fx.Report) -> None:
    """Store and reversible columns, bytes for bytes."""
    store = saved_bytes(lambda: call(model, inputs), model)
    assert predicted.total.store == store.total
    rev = re2fx.transform(model, inputs)
    saved = saved_bytes(lambda: call(rev, inputs), rev)
    assert predicted.total.reversible == saved.total
    assert predicted.outside.reversible == saved.outside
    kept = [chain.kept.reversible for chain in predicted.chains]
    assert sorted(kept) == sorted(saved.chains)  # type: ignore[type-var]


def tapped_inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 8), torch.randn(BATCH, 8)


SMALL: dict[str, tuple[Any, Any]] = {
    "net": (lambda: Net(6, WIDTH), lambda: torch.randn(BATCH, 4)),
    "dropout": (lambda: Net(6, WIDTH, 0.1), lambda: torch.randn(BATCH, 4)),
    "batch norm": (lambda: ConvNet(4, 6, 0.1), lambda: torch.randn(4, 3, 16, 16)),
    "side input and tap": (Tapped, tapped_inputs),
    "float64": (lambda: Net(4, WIDTH).double(), lambda: torch.randn(8, 4).double()),
    "bfloat16": (lambda: Net(4, WIDTH).bfloat16(), lambda: torch.randn(8, 4).bfloat16()),
}


@pytest.mark.parametrize("name", SMALL)
def test_prediction_is_exact(name: str) -> None:
    build, make = SMALL[name]
    model, inputs = build(), make()
    compare_with_real_runs(model, inputs, report(model, inputs))


@pytest.mark.parametrize("name", [name for name in ZOO if name != "slowfast_r101"])
def test_prediction_is_exact_on_models_nobody_here_wrote(name: str) -> None:
    model, inputs = ZOO[name].build(), (ZOO[name].inputs(),)
    compare_with_real_runs(model, inputs, report(model, inputs))


def gpt2(**options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **options)
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model.train()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_language_model_has_its_plain_column_and_the_reason() -> None:
    model = gpt2(n_layer=FAMILY + 1, n_embd=32, n_head=2, vocab_size=64, n_positions=32)
    inputs = {"input_ids": torch.randint(0, 64, (2, 12)), "use_cache": False}
    predicted = report(model, inputs)
    assert predicted.total.store == saved_bytes(lambda: model(**inputs), model).total
    if not predicted.chains:  # as long as symbolic tracing is the only capture
        assert predicted.total.checkpoint is None
        assert predicted.total.reversible is None
        assert "Nothing can be reversed: " in str(predicted)
        assert "transformer.h" in {part.module for part in predicted.parts}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_counts(dtype: torch.dtype) -> None:
    model, inputs = Net(4, WIDTH, 0.1), torch.randn(BATCH, 4)
    with torch.autocast("cpu", dtype):
        predicted = report(model, inputs)
    # Weights that were cast stay in autocast's cache until its end, so each run gets its own.
    with torch.autocast("cpu", dtype):
        store = saved_bytes(lambda: model(inputs), model).total
    rev = re2fx.transform(model)
    with torch.autocast("cpu", dtype):
        reversible = saved_bytes(lambda: rev(inputs), rev).total
    assert predicted.total.reversible == reversible
    # Torch's shape rule gives a layer norm's statistics on the CPU in half precision, its kernel
    # in single precision where weights are wider than inputs.
    rows = 4 * BATCH * 2
    assert predicted.total.store == store - rows * 2
    assert predicted.dtype == f"float32, autocast {str(dtype).removeprefix('torch.')}"
    assert predicted.total.store != report(model, inputs).total.store


def test_parts_that_are_frozen_or_in_eval_mode_are_taken_as_they_are() -> None:
    model, inputs = ConvNet(4, 6), torch.randn(4, 3, 16, 16)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model.stem.requires_grad_(False)
    predicted = report(model, inputs)
    assert predicted.total.store < report(ConvNet(4, 6), inputs).total.store
    compare_with_real_runs(model, inputs, predicted)


class ByHand(nn.Module):
    """`Net`'s blocks as a user checkpoints them."""

    def __init__(self, blocks: nn.Sequential) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            assert isinstance(block, Block)
            x = x + checkpoint(self.branch, block, x, use_reentrant=False)
        return x

    @staticmethod
    def branch(block: Block, x: Tensor) -> Tensor:
        out: Tensor = block.outer(block.drop(torch.nn.functional.gelu(block.inner(block.norm(x)))))
        return out


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_allocator_agrees_with_the_checkpoint_column(dropout: float) -> None:
    blocks = Net(8, WIDTH, dropout).blocks
    x = torch.randn(BATCH, WIDTH, requires_grad=True)
    by_hand = ByHand(blocks)
    by_hand(x)
    live = live_bytes(lambda: by_hand(x))
    total = report(blocks, x).total.checkpoint
    assert total == 8 * (STREAM + RNG_STATE)
    # Of the eight inputs the first was there before; the result is there instead.
    assert live == total


def test_measured_equals_predicted() -> None:
    for model, inputs in ((Net(4, WIDTH, 0.1), torch.randn(8, 4)), (Tapped(), tapped_inputs())):
        found = report(model, inputs, measure=True)
        assert found.measured == found.total
        assert "measured" in str(found)


def test_bytes_are_put_down_to_who_keeps_them() -> None:
    """A network whose figures can be counted by hand."""
    model = nn.Sequential(
        nn.Linear(4, WIDTH), *[Tanh(WIDTH) for _ in range(3)], nn.Linear(WIDTH, 2)
    )
    found = report(model, torch.randn(BATCH, 4))
    (chain,) = found.chains
    # Each branch saves its input, the stream, and its result; the next stream is another tensor.
    assert chain.kept.store == 3 * 2 * STREAM
    assert chain.kept.checkpoint == 3 * (STREAM + RNG_STATE)
    assert chain.kept.reversible == 2 * STREAM
    assert (chain.state, chain.dtype, chain.branch) == (STREAM, "float32", 2 * STREAM)
    assert (chain.first, chain.last, chain.residuals) == ("1", "3", 3)
    parts = {(part.where, part.module): part.kept for part in found.parts}
    assert parts == {
        ("inputs", ""): re2fx.Kept(BATCH * 4 * 4, BATCH * 4 * 4, BATCH * 4 * 4),
        ("behind", "4"): re2fx.Kept(STREAM, STREAM, STREAM),
    }
    assert found.ceiling == (6 * STREAM + STREAM + BATCH * 16) / (STREAM + BATCH * 16)
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert (found.parameters, found.gradients, found.buffers) == (weights, weights, 0)
    assert found.output == BATCH * 2 * 4


class Tanh(nn.Module):
    """The smallest branch with a parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.mix(x))


class Scaled(Tanh):
    """Computes something from a parameter alone, for its branch alone."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.scale = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.mix(x)) * self.scale.exp()


def test_what_a_branch_computes_from_its_parameters_is_its_own() -> None:
    model = nn.Sequential(nn.Linear(4, WIDTH), *[Scaled(WIDTH) for _ in range(3)])
    found = report(model, torch.randn(BATCH, 4))
    (chain,) = found.chains
    assert chain.kept.store == 3 * (2 * STREAM + WIDTH * 4)
    assert chain.kept.checkpoint == 3 * (STREAM + RNG_STATE)
    assert [part.where for part in found.parts] == ["inputs"]


def test_a_model_may_write_into_the_list_it_is_given() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(3, WIDTH)

        def forward(self, xs: list[Tensor]) -> Tensor:
            xs[0] = self.net.stem(xs[0])
            out: Tensor = self.net.head(self.net.blocks(xs[0]))
            return out

    given = [torch.randn(BATCH, 4)]
    inputs = (given,)
    found = report(Listed(), inputs, measure=True)
    assert found.measured == found.total
    assert given[0].shape == (BATCH, 4)


def test_the_loss_is_a_part() -> None:
    model, inputs = Net(4, WIDTH), torch.randn(BATCH, 4)
    target = torch.randint(0, 3, (BATCH,))

    def loss(output: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target)

    found = report(model, inputs, loss=loss, measure=True)
    (part,) = [part for part in found.parts if part.where == "loss"]
    # The log-probabilities, the targets and the total weight.
    assert part.kept.store == BATCH * 3 * 4 + BATCH * 8 + 4
    assert found.measured == found.total
    real = saved_bytes(lambda: loss(model(inputs)), model)
    assert found.total.store == real.total


# without a trace


def state(model: nn.Module) -> dict[str, Any]:
    """All of a model that a report could touch."""
    return {
        "members": {k: (id(v), v._version) for k, v in model.state_dict(keep_vars=True).items()},
        "grads": [None if p.grad is None else id(p.grad) for p in model.parameters()],
        "flags": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "names": [sorted(vars(module)) for module in model.modules()],
    }


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_touched(measure: bool, training: bool) -> None:
    model = ConvNet(4, 6, 0.3).train(training)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    x = torch.randn(2, 3, 8, 8)
    version = x._version
    before, seed, python = state(model), torch.get_rng_state(), random.getstate()
    with torch.no_grad():
        found = report(model, x, measure=measure)
        assert not torch.is_grad_enabled()
    assert found.total.store > 0
    assert found.mode == "train"
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), seed)
    assert random.getstate() == python
    assert x._version == version
    assert x.grad is None


def test_hooks_stay_on_the_given_model_and_run_on_copies() -> None:
    model = Net(4, WIDTH)
    seen: list[nn.Module] = []
    model.head.register_forward_hook(lambda module, args, output: seen.append(module))
    report(model, torch.randn(2, 4))
    assert seen
    assert all(module is not model.head for module in seen)


CHILD = """
import resource, sys, time
import torch
sys.path.insert(0, {root!r})
import re2fx
{build}
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
found = re2fx.report(model, inputs)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(found.total.store, grown, time.monotonic() - start)
"""

VIDEO = """
from benchmarks.torchvision_shim import ensure_torchvision
ensure_torchvision()
import torchvision
with torch.device("meta"):
    model = torchvision.models.video.swin3d_b()
    inputs = torch.empty(8, 3, 32, 224, 224)
"""

LANGUAGE = """
from benchmarks.torchvision_shim import ensure_torchvision
ensure_torchvision()
import transformers
config = transformers.GPT2Config(
    n_layer=20, n_embd=1600, n_head=25, bos_token_id=0, eos_token_id=0
)
with torch.device("meta"):
    model = transformers.GPT2LMHeadModel(config).train()
    ids = torch.zeros(16, 1024, dtype=torch.long)
inputs = dict(input_ids=ids, labels=ids, use_cache=False)
"""


@pytest.mark.parametrize("build", [VIDEO, LANGUAGE], ids=["video swin-b", "gpt2 xl of 20 layers"])
def test_models_larger_than_the_machine(build: str) -> None:
    """The process grows by less than 500 MiB at its highest, and it takes less than a minute."""
    code = CHILD.format(root=str(ROOT), build=build)
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr[-2000:]
    store, grown, seconds = map(float, child.stdout.split()[-3:])
    assert store > 32 * 2**30
    assert grown < 500 * 2**10  # ru_maxrss is in KiB
    assert seconds < 60


class Sharing(nn.Module):
    """Tied parameters, a view of a parameter's memory, and tensors outside the registries."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)
        self.blocks = nn.Sequential(*[Block(WIDTH) for _ in range(3)])
        self.head = nn.Linear(WIDTH, 16, bias=False)
        self.head.weight = self.embed.weight
        self.rows = self.mix.weight.detach()[:4]
        self.extra = [torch.randn(WIDTH)]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.blocks(self.mix(self.embed(ids) * self.extra[0]))
        out: Tensor = self.head(x + self.rows.sum(0))
        return out


def test_sharing_is_kept() -> None:
    model, ids = Sharing(), torch.randint(0, 16, (2, 6))
    found = report(model, ids)
    assert found.parameters == sum(4 * p.numel() for p in model.parameters())
    compare_with_real_runs(model, ids, found)


def test_a_twin_has_no_memory_and_shares_what_its_model_shares() -> None:
    from torch._subclasses.fake_tensor import FakeTensor

    from re2fx.fake import Fakes, fake_twin

    model = Sharing()
    twin = fake_twin(model, Fakes())
    assert isinstance(twin, Sharing)
    assert all(type(x) is FakeTensor for x in (*twin.state_dict().values(), *twin.extra))
    assert twin.head.weight is twin.embed.weight
    assert twin.rows.untyped_storage()._cdata == twin.mix.weight.untyped_storage()._cdata
    assert twin.rows.shape == (4, WIDTH)
    assert [p.requires_grad for p in twin.parameters()] == [True] * len(list(model.parameters()))


class Recurrent(nn.Module):
    """Its kernel on the CPU keeps a workspace that torch's shape rule says is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)[0]
        return out


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN's kernels")
def test_what_torch_does_not_tell_is_said() -> None:
    found = report(Recurrent(), torch.randn(3, 2, 8), measure=True)
    assert found.untold == ("a recurrent layer on the CPU",)
    assert found.measured is not None
    assert found.measured.store > found.total.store
    assert "leave out the workspace of a recurrent layer on the CPU" in str(found)


class Ties(nn.Module):
    """Identities, dead shape reads, parallel branches and a scaled one."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(4)])
        self.a = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])
        self.b = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])
        self.drop = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for norm, a, b in zip(self.norms, self.a, self.b, strict=True):
            inner = norm(x)
            rows, _ = inner.shape
            x = x + self.drop(torch.tanh(a(inner)).reshape(rows, -1)) + 0.5 * torch.tanh(b(inner))
        return x


def test_parallel_and_scaled_branches() -> None:
    model, x = Ties(), torch.randn(BATCH, WIDTH)
    found = report(model, x)
    assert [chain.residuals for chain in found.chains] == [4]
    compare_with_real_runs(model, x, found)
    assert found.chains[0].kept.checkpoint == 3 * STREAM + 4 * RNG_STATE  # the first is the input


def test_inputs_on_meta_and_fake_ones_are_as_good_as_real_ones() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, shape = Net(4, WIDTH, 0.1), (BATCH, 4)
    with FakeTensorMode():
        fake = torch.empty(shape)
    expected = report(model, torch.randn(shape))
    assert report(model, torch.empty(shape, device="meta")) == expected
    assert report(model, fake) == expected
    with torch.device("meta"):
        same = Net(4, WIDTH, 0.1)
    assert report(same, fake) == expected


class Counting(nn.Module):
    """Residuals with running statistics, which are put back after a trial run."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for stage, norm in zip(self.stages, self.norms, strict=True):
            x = x + norm(stage(x))
        return x


def test_a_model_on_meta_may_have_running_statistics() -> None:
    expected = report(Counting().train(), torch.empty(BATCH, WIDTH))
    with torch.device("meta"):
        model = Counting().train()
    assert report(model, torch.empty(BATCH, WIDTH, device="meta")) == expected
    before = {name: id(buffer) for name, buffer in model.named_buffers()}
    Snapshot(model, {}).restore()  # as after a trial run, which compares values
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == before


# what cannot be reversed, and what cannot be reported


class Control(nn.Module):
    """Cannot be traced; and asks for a value if told to."""

    def __init__(self, value: bool = False) -> None:
        super().__init__()
        self.body, self.value = nn.Linear(4, 4), value

    def forward(self, x: Tensor) -> Tensor:
        if self.value and bool(x.sum() > 0):
            return torch.tanh(self.body(x))
        out: Tensor = torch.tanh(self.body(x)) if x.sum().shape == () and len(x) > 1 else x
        return out


def test_a_model_that_cannot_be_captured_has_its_plain_column_and_the_reason() -> None:
    model, x = nn.Sequential(Control(), nn.Linear(4, 4)), torch.randn(BATCH, 4)
    alone, whole = report(Control(), x), report(model, x)
    for found, given in ((alone, Control()), (whole, model)):
        real = saved_bytes(lambda: given(x), given)  # noqa: B023
        assert found.total == re2fx.Kept(real.total, None, None)
        assert "Nothing can be reversed: " in str(found)
    assert "cannot be traced symbolically" in alone.reason
    assert "0 is kept whole" in whole.reason


def test_refusals_are_the_reason() -> None:
    class PostNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixes = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
            self.norm = nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            for mix in self.mixes:
                x = self.norm(x + torch.tanh(mix(x)))
            return x

    found = report(PostNorm(), torch.randn(2, 8))
    assert not found.chains
    assert "post-norm" in found.reason
    assert found.refused == (("post-norm", 3),)


def test_an_ill_conditioned_coupling_is_the_reason() -> None:
    coupling = re2fx.Coupling.consistent(0.001)
    found = report(Net(40, WIDTH), torch.randn(2, 4), coupling=coupling)
    assert "would be reconstructed with a relative" in found.reason
    assert found.total.reversible is None
    assert found.total.checkpoint is not None
    assert found.chains[0].residuals == 40


def test_values_cannot_be_predicted() -> None:
    with pytest.raises(re2fx.CaptureError, match=r"Control: .* Measure it"):
        report(Control(value=True), torch.randn(2, 4))


def test_what_no_report_can_be_made_of() -> None:
    model, x = Net(4, WIDTH), torch.randn(2, 4)
    with pytest.raises(re2fx.OptionError, match="rewired already"):
        report(re2fx.transform(model), x)
    with pytest.raises(re2fx.OptionError, match="holds no tensor"):
        report(model, None)
    with pytest.raises(re2fx.OptionError, match="without a shape"):
        report(nn.Sequential(nn.LazyLinear(4)), x)
    with pytest.raises(re2fx.OptionError, match="'meta'"):
        report(model, x.to("meta"), measure=True)
    with pytest.raises(re2fx.OptionError, match="readout="):
        report(model, x, readout="median")  # type: ignore[arg-type]
    with pytest.raises(re2fx.InputError):
        report(model, (x, x))


# how it reads


@pytest.fixture(scope="module")
def resnet() -> re2fx.Report:
    with torch.device("meta"):
        model = ZOO["resnet50"].full()
    return report(model, torch.empty(8, 3, 224, 224, device="meta"))


def test_it_says_where_reversing_does_not_pay(resnet: re2fx.Report) -> None:
    text = str(resnet)
    assert [chain.pays for chain in resnet.chains] == [False, True, True, False]
    assert "Chain 0 (2 residuals) does not pay: reversing keeps 49.0 MiB there" in text
    assert "Chain 1" not in text
    assert "leaves the model's function as it is. Prefer it." in text
    assert "rewiring alone can reach at most 2.3 times less" in text
    where = {part.module: part.where for part in resnet.parts}
    assert where["layer2.0"] == "projection"
    assert (where["bn1"], where["fc"]) == ("before", "behind")
    assert "Skip-adds left as they are: 4 x projection." in text


def test_it_says_where_reversing_pays() -> None:
    found = report(Net(12, WIDTH), torch.empty(2048, 4, device="meta"))
    assert found.chains[0].pays
    assert "times less than checkpointing." in str(found)
    assert "does not pay" not in str(found)


def test_columns_are_aligned(resnet: re2fx.Report) -> None:
    lines = str(resnet).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("kept for the backward"))
    table = lines[start : lines.index("", start)]
    assert len({len(line) for line in table}) == 1
    assert table[-1].split() == ["total", "655.6", "MiB", "410.6", "MiB", "422.8", "MiB"]


def test_rows_add_up(resnet: re2fx.Report) -> None:
    kept = [chain.kept for chain in resnet.chains] + [part.kept for part in resnet.parts]
    for way in ("store", "checkpoint", "reversible"):
        assert resnet.total.of(way) == sum(row.of(way) or 0 for row in kept)


def test_it_is_plain_data(resnet: re2fx.Report) -> None:
    data = json.loads(json.dumps(resnet.to_dict()))
    assert data["total"]["store"] == resnet.total.store
    assert data["chains"][1]["kept"]["reversible"] == resnet.chains[1].kept.reversible


def test_in_a_terminal(resnet: re2fx.Report) -> None:
    page = io.StringIO()
    pytest.importorskip("rich.console").Console(width=100, file=page).print(resnet)
    shown = page.getvalue()
    for piece in ("422.8 MiB", "chain 2: 5 residuals, layer3.1 .. 5", "Prefer it"):
        assert piece in shown


def test_in_a_notebook(resnet: re2fx.Report) -> None:
    page = resnet._repr_html_()
    assert page.count("<tr") == 1 + 4 + len(resnet.parts) + 3
    assert "422.8 MiB" in page


def test_as_a_picture(resnet: re2fx.Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = resnet.plot(tmp_path / "kept.png")
    (axis,) = figure.axes
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")
    assert [label.get_text() for label in axis.get_yticklabels()] == list(re2fx.footprint.WAYS)
    ends = [bar.get_x() + bar.get_width() for bar in axis.containers[-1]]
    totals = [(resnet.total.of(way) or 0) / 2**20 for way in re2fx.footprint.WAYS]
    assert ends == pytest.approx(totals)
    resnet.plot(tmp_path / "kept.svg")
    assert "<svg" in (tmp_path / "kept.svg").read_text()


def test_short_bars_are_magnified() -> None:
    pytest.importorskip("matplotlib")
    deep = report(Net(24, WIDTH), torch.empty(4096, 4, device="meta"))
    assert len(deep.plot().axes) == 2


def test_a_missing_library_is_named(resnet: re2fx.Report, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(re2fx.OptionError, match=r"re2fx\[bench\]"):
        resnet.plot()


def test_importing_re2fx_loads_none_of_them() -> None:
    code = """
import sys, re2fx
print([name for name in ("rich", "jinja2", "matplotlib") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_parts_are_few_and_lose_nothing() -> None:
    store = {Place("model", f"layers.{i}.{name}"): 100 for i in range(50) for name in "ab"}
    store[Place("model", "head")] = 10
    store[Place("chain", "x", 0, 0)] = 1000
    rows = part_rows(Counter(store), None, None)
    assert [(row.module, row.kept.store) for row in rows] == [("layers", 10000), ("head", 10)]
    few = Counter({Place("model", f"layers.{i}"): 100 for i in range(FAMILY)})
    assert len(part_rows(few, None, None)) == FAMILY


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (2**20, "1.0 MiB"), (3 * 2**29, "1.5 GiB"),
     (2**50, "1024.0 TiB"), (None, "")],
)  # fmt: skip
def test_sizes(number: int | None, text: str) -> None:
    assert size(number) == text


@pytest.mark.parametrize(
    ("options", "residuals"),
    [
        ({}, [6]),
        ({"select": "blocks.[1-4]"}, [4]),
        ({"select": ["blocks.*", "!blocks.2"]}, [2, 3]),
        ({"select": ["blocks.*", "!blocks.2"], "min_chain": 3}, [3]),
        ({"min_saving": 1 << 40}, []),
        ({"min_saving": 0.1}, [6]),
        ({"capture": "dynamo"}, [6]),
    ],
    ids=str,
)
def test_what_is_rewired_is_as_for_transform(options: Any, residuals: list[int]) -> None:
    x = torch.randn(BATCH, 4)
    found = report(Net(6), x, **options)
    assert [chain.residuals for chain in found.chains] == residuals


def test_the_route_is_as_for_transform() -> None:
    class Sized(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.shape[0] > 2 else -x)

    x = torch.randn(BATCH, 4)
    assert report(Sized(3), x).chains
    stopped = report(Sized(3), x, capture="symbolic")
    assert not stopped.chains
    assert "control flow" in stopped.reason
    with pytest.raises(re2fx.OptionError, match="capture='trace'"):
        report(Sized(3), x, capture="trace")
    with pytest.raises(re2fx.OptionError, match="min_chain=1"):
        report(Sized(3), x, min_chain=1)
