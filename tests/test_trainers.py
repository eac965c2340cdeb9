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
