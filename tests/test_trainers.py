"""The trainers people use finetune a rewired model as they do any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import re2fx
from re2fx.memory import live_bytes
from re2fx.torchvision_shim import ensure_torchvision

from .models import Net
from .test_routes_zoo import IDS, make

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers' own making


@pytest.fixture(autouse=True)
def fresh() -> Any:
    ensure_torchvision()
    yield
    torch.compiler.reset()


def language_model() -> tuple[Any, dict[str, Any]]:
    model, inputs = make("gpt2")
    return model.float(), inputs


def assert_saves(model: nn.Module, rev: Any, *args: Any, **inputs: Any) -> None:
    """What a forward keeps for its backward, outputs included, is less than half."""
    kept = {}
    for rev.memory in ("store", "reversible"):
        kept[rev.memory] = live_bytes(lambda: model(*args, **inputs))
    assert 2 * kept["reversible"] < kept["store"], kept


@pytest.mark.parametrize("adapted", ["before", "after"])
def test_peft(adapted: str) -> None:
    """Without `Members`, adapters added after the transform are no part of the network."""
    peft = pytest.importorskip("peft")
    options = {"r": 2, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    lora = peft.LoraConfig(**options, lora_dropout=0.1, init_lora_weights=False)
    model, inputs = language_model()
    torch.manual_seed(0)
    if adapted == "before":
        trained: Any = re2fx.transform(peft.get_peft_model(model, lora), inputs)
        rev = trained
    else:
        rev = re2fx.transform(model, inputs)
        trained = peft.get_peft_model(rev, lora)
    trained.train()
    gradients: dict[str, dict[str, Tensor]] = {}
    for rev.memory in ("store", "reversible"):
        trained.zero_grad()
        torch.manual_seed(1)
        trained(**inputs).logits.square().mean().backward()
        named = ((name, p.grad) for name, p in trained.named_parameters())
        gradients[rev.memory] = {name: grad for name, grad in named if grad is not None}
    wanted = {name for name, p in trained.named_parameters() if p.requires_grad}
    assert len(wanted) == 16
    assert all("lora" in name for name in wanted)
    assert gradients["store"].keys() == gradients["reversible"].keys() == wanted
    for name, expected in gradients["store"].items():
        error = (gradients["reversible"][name] - expected).norm() / expected.norm()
        assert error <= 1e-4, f"{name}: {error}"
    assert_saves(trained, rev, **inputs)


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """With a column that the model does not take, as data sets have them."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(0, 32, (12,), generator=torch.Generator().manual_seed(index % 2))
        return {"input_ids": ids, "labels": ids, "text": ids}


@pytest.mark.parametrize(
    "options", [{}, {"bf16": True, "gradient_accumulation_steps": 2}], ids=["fp32", "bf16"]
)
def test_the_trainer_of_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    """Trains, evaluates, and saves checkpoints that the original class loads."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    losses: dict[str, list[float]] = {}
    for memory in ("store", "reversible"):
        model, _ = language_model()
        inputs = {"input_ids": IDS, "labels": IDS, "use_cache": False}
        rev: Any = re2fx.transform(model, inputs)
        rev.memory = memory
        arguments = transformers.TrainingArguments(
            str(tmp_path / memory), max_steps=4, per_device_train_batch_size=2, logging_steps=1,
            report_to=[], use_cpu=True, save_steps=4, seed=3, eval_strategy="steps", eval_steps=4,
            disable_tqdm=True, learning_rate=1e-2, **options,
        )  # fmt: skip
        trainer = transformers.Trainer(rev, arguments, train_dataset=Rows(), eval_dataset=Rows())
        trainer.train()
        assert not torch.is_autocast_enabled("cpu")
        log = trainer.state.log_history
        losses[memory] = [row[key] for row in log for key in ("loss", "eval_loss") if key in row]
        saved = tmp_path / memory / "checkpoint-4"
        again = transformers.GPT2LMHeadModel.from_pretrained(saved).state_dict()
        assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    assert len(losses["store"]) == 5
    assert losses["reversible"] == pytest.approx(losses["store"], rel=1e-2 if options else 1e-5)
    assert losses["store"][3] < losses["store"][0]
    assert_saves(rev, rev, **inputs)


def test_a_wrapped_forward_is_entered_once() -> None:
    """Without `run_uncompiled` calling the class's, autocast stays on after a new capture."""
    rev: Any = re2fx.transform(Net(3), torch.randn(2, 5, 4), capture="dynamo")
    entered = []

    def double(*args: Any, **kwargs: Any) -> Any:
        entered.append(torch.is_autocast_enabled("cpu"))
        return 2 * type(rev).forward(rev, *args, **kwargs)

    rev.forward = torch.autocast("cpu", torch.bfloat16)(double)
    rev.double()
    x = torch.randn(2, 7, 4).double()
    first = rev(x)
    assert entered == [True]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(first, 2 * type(rev).forward(rev, x))
    assert not torch.is_autocast_enabled("cpu")


def test_lightning(tmp_path: Path) -> None:
    lightning: Any = pytest.importorskip("lightning")

    class Task(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self, rev: nn.Module) -> None:
            super().__init__()
            self.net = rev
            self.losses: list[float] = []

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    torch.manual_seed(0)
    x = torch.randn(16, 40, 4)
    data = torch.utils.data.TensorDataset(x, x[..., :3].sin())
    losses = {}
    for memory in ("store", "reversible"):
        torch.manual_seed(1)
        rev: Any = re2fx.transform(Net(8, dropout=0.1), memory=memory)
        task = Task(rev)
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=True, default_root_dir=tmp_path / memory,
        )  # fmt: skip
        trainer.fit(task, torch.utils.data.DataLoader(data, 4))
        losses[memory] = task.losses
        checkpoint = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=False)
        names = {f"net.{name}" for name in Net(8).state_dict()}
        assert checkpoint["state_dict"].keys() == names
    assert len(losses["store"]) == 8
    assert losses["reversible"] == pytest.approx(losses["store"], rel=1e-4)
    assert losses["store"][-1] < losses["store"][0]
    assert_saves(rev, rev, x)


# schedules of couplings

START, END = re2fx.Coupling(0.5, 0.5, 1), re2fx.Coupling(0, 1, 1)


class Watched(re2fx.Schedule):
    """Notes the coupling of every step."""

    seen: list[Any]

    def step(self) -> None:
        self.__dict__.setdefault("seen", []).append(self.coupling)
        super().step()


class Regressor(Net):
    """With the loss in its result, as `transformers.Trainer` wants it."""

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"loss": nn.functional.mse_loss(super().forward(x), labels)}


class Points(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Something to regress."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.randn(4, generator=torch.Generator().manual_seed(index))
        return {"x": x, "labels": x[:3].sin()}


def scheduled(model: nn.Module, by: Any, over: int, inputs: Any = None) -> tuple[Any, Watched]:
    rev: Any = re2fx.transform(model, inputs)
    return rev, Watched(rev, START, END, over=over, by=by)


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize(("by", "over"), [("step", 8), ("epoch", 4)])
def test_the_trainer_of_transformers_moves_the_coupling(
    by: str, over: int, restore: bool, tmp_path: Path
) -> None:
    """8 steps in 4 epochs, interrupted after half of them, in the middle of an epoch."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def run(steps: int, resume: Any = None) -> tuple[Any, Watched]:
        rev, schedule = scheduled(Regressor(4), by, over)
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=8, per_device_train_batch_size=2, save_steps=5, report_to=[],
            gradient_accumulation_steps=2, use_cpu=True, seed=3, disable_tqdm=True,
            save_strategy="steps", restore_callback_states_from_checkpoint=restore,
        )  # fmt: skip

        class Stop(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
            def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                control.should_training_stop = state.global_step == steps

        callbacks = [re2fx.trainers.hugging_face_callback(schedule), Stop()]
        trainer = transformers.Trainer(rev, arguments, train_dataset=Points(), callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        return rev, schedule

    rev, whole = run(8)
    assert whole.seen == [
        re2fx.Coupling(0.5 - i / over / 2, 0.5 + i / over / 2, 1) for i in range(over)
    ]
    assert rev.coupling == END
    rev, resumed = run(8, str(tmp_path / "checkpoint-5"))
    done = 5 if by == "step" else 2
    assert resumed.seen == whole.seen[done:]
    assert rev.coupling == END
    assert re2fx.trainers.hugging_face_callback(resumed).state()["attributes"]["progress"][
        "count"
    ] == over  # fmt: skip


def test_two_schedules_under_one_name() -> None:
    transformers = pytest.importorskip("transformers")
    _, schedule = scheduled(Net(4), "step", 4)
    callbacks = [re2fx.trainers.hugging_face_callback(schedule) for _ in range(2)]
    state = transformers.TrainerState(stateful_callbacks=callbacks)
    with pytest.raises(re2fx.OptionError, match="two schedules have it"):
        callbacks[0].on_train_begin(None, state, None)
    callbacks[1] = re2fx.trainers.hugging_face_callback(schedule, name="other")
    state = transformers.TrainerState(stateful_callbacks=callbacks)
    callbacks[0].on_train_begin(None, state, None)
    for callback in (re2fx.trainers.hugging_face_callback, re2fx.trainers.lightning_callback):
        with pytest.raises(re2fx.OptionError, match=r"schedule=None: expected a re2fx\.Schedule"):
            callback(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("by", "over"), [("step", 8), ("epoch", 4)])
def test_lightning_moves_the_coupling(by: str, over: int, tmp_path: Path) -> None:
    """Two optimizer steps of two batches each an epoch; resumed after the second epoch."""
    lightning: Any = pytest.importorskip("lightning")

    class Task(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self, rev: nn.Module) -> None:
            super().__init__()
            self.net = rev

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-2)

    x = torch.randn(16, 5, 4)
    data = torch.utils.data.TensorDataset(x, x[..., :3].sin())

    def run(epochs: int, resume: Any = None) -> tuple[Any, Watched]:
        rev, schedule = scheduled(Net(4), by, over)
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, accumulate_grad_batches=2, default_root_dir=tmp_path,
            callbacks=[
                re2fx.trainers.lightning_callback(schedule),
                lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1),
            ],
        )  # fmt: skip
        batches = torch.utils.data.DataLoader(data, 4)
        trainer.fit(Task(rev), batches, ckpt_path=resume, weights_only=False)
        return rev, schedule

    rev, whole = run(4)
    assert whole.seen == [
        re2fx.Coupling(0.5 - i / over / 2, 0.5 + i / over / 2, 1) for i in range(over)
    ]
    assert rev.coupling == END
    rev, resumed = run(4, str(tmp_path / "epoch=1.ckpt"))
    assert resumed.seen == whole.seen[over // 2 :]
    assert rev.coupling == END
