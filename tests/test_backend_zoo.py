"""The backend on models nobody here wrote: transform's plans, stored gradients."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from re2fx.plan import Plan

from .test_dynamo import planned
from .zoo import EACH_KIND, ZOO, Animal

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def plan_of(model: nn.Module, run: Callable[[Any], Any]) -> Plan:
    """The plan for what Dynamo captures of a call; nothing runs."""
    from re2fx.dynamo import lift

    found: list[Plan] = []

    class Seen(Exception):
        pass

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        found.append(planned(lift(module, inputs)))
        raise Seen

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        run(torch.compile(model, backend=backend, fullgraph=True))
    return found[0]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("animal", [ZOO[name] for name in EACH_KIND], ids=EACH_KIND)
def test_the_plan_is_the_one_of_transform(animal: Animal, training: bool) -> None:
    model = animal.build()
    rev = animal.rewire(model)
    model.train(training)
    plan = plan_of(model, lambda compiled: compiled(animal.inputs()))
    assert plan.signature() == rev.plan.signature()
    assert len(plan.refusals) == len(rev.plan.refusals)


def language_model(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(
            n_layer=4, n_embd=32, n_head=2, vocab_size=64, n_positions=32,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model: nn.Module = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            num_hidden_layers=4, hidden_size=32, intermediate_size=64, num_attention_heads=2,
            num_key_value_heads=1, vocab_size=64, attention_dropout=0.1,
            attn_implementation="eager",
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    return model.double().train()


def language_step(run: Any, model: nn.Module) -> dict[str, Tensor]:
    """Gradients of one step on fixed tokens."""
    model.zero_grad()
    torch.manual_seed(1)
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(2))
    logits = run(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_language_models_train(name: str) -> None:
    model = language_model(name)
    ids = torch.zeros(1, 4, dtype=torch.long)
    plan = plan_of(model, lambda compiled: compiled(input_ids=ids, use_cache=False))
    assert [len(chain) for chain in plan.chains] == [8]
    gradients = {}
    for memory in ("store", "reversible"):
        torch.compiler.reset()
        options: dict[str, Any] = {"compiler": "aot_eager", "memory": memory}
        run = torch.compile(model, backend="re2fx", fullgraph=True, options=options)
        gradients[memory] = language_step(run, model)
    assert gradients["store"].keys() == gradients["reversible"].keys()
    for key, expected in gradients["store"].items():
        error = (gradients["reversible"][key] - expected).abs().max() / expected.abs().max()
        assert error <= 1e-10, f"{key}: {error}"


CHILD = """
import sys
import torch
import runpy
shim = runpy.run_path("re2fx/torchvision_shim.py")
shim["ensure_torchvision"]()
import timm, torchvision
assert "re2fx" not in sys.modules
options = {"compiler": "aot_eager"}
models = {
    "vit": timm.create_model("vit_tiny_patch16_224", depth=4, img_size=32, num_classes=5),
    "resnet50": torchvision.models.resnet50(num_classes=5),
    "swin_t": torchvision.models.swin_t(num_classes=5),
}
for name, model in models.items():
    assert "re2fx" not in sys.modules or name != "vit"
    compiled = torch.compile(model, backend="re2fx", fullgraph=True, options=options)
    x = torch.randn(2, 3, 32 if name == "vit" else 64, 32 if name == "vit" else 64)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimiser.zero_grad()
        loss = compiled(x).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in model.parameters()), name
    print(name, "re2fx" in sys.modules, losses)
"""


def test_a_process_that_never_imports_the_package_trains() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert [line.split()[:2] for line in run.stdout.splitlines()] == [
        ["vit", "True"],
        ["resnet50", "True"],
        ["swin_t", "True"],
    ]
