"""Language models, which only Dynamo captures, through `transform`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import re2fx
from re2fx.targets import load

IDS = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(0))
SMALL = "hidden_size=32&intermediate_size=64&num_attention_heads=4&vocab_size=32"
MODELS = {
    "gpt2": ("gpt2?n_layer=4&n_embd=16&n_head=2&vocab_size=32&n_positions=32", [8]),
    "llama": (f"llama?num_hidden_layers=3&num_key_value_heads=2&{SMALL}", [6]),
    "parallel branches": (f"gpt_neox?num_hidden_layers=3&{SMALL}", [3]),
    "encoder and decoder": ("t5?num_layers=2&d_model=32&d_kv=8&d_ff=64&num_heads=4&vocab_size=32"
                            "&decoder_start_token_id=0", [4, 6]),
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def fresh() -> Any:
    yield
    torch.compiler.reset()


def make(name: str) -> tuple[Any, dict[str, Any]]:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    inputs: dict[str, Any] = {"input_ids": IDS, "use_cache": False}
    target = load(f"transformers:{MODELS[name][0]}")
    if name == "encoder and decoder":
        inputs["decoder_input_ids"] = IDS
    model = target.model
    return model.double().train(), inputs


@pytest.mark.parametrize("name", MODELS)
def test_language_models_are_rewired(name: str) -> None:
    model, inputs = make(name)
    rev = re2fx.transform(model, inputs)
    assert isinstance(rev, re2fx.RewiredModule)
    assert [len(chain) for chain in rev.plan.chains] == MODELS[name][1]
    gradients: dict[str, dict[str, Tensor]] = {}
    for rev.memory in ("store", "reversible"):
        rev.zero_grad()
        torch.manual_seed(1)
        logits = rev(**inputs).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS.flatten()).backward()
        found = ((n, p.grad) for n, p in model.named_parameters())
        gradients[rev.memory] = {n: g for n, g in found if g is not None}
    assert gradients["store"].keys() == {name for name, _ in model.named_parameters()}
    assert gradients["reversible"].keys() == gradients["store"].keys()
    for key, expected in gradients["store"].items():
        error = (gradients["reversible"][key] - expected).norm() / expected.norm()
        assert error <= 1e-9, f"{key}: {error}"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradient_checkpointing_is_on(name: str) -> None:
    """As those have it who ran out of memory; rewired, its blocks need none."""
    model, inputs = make(name)
    plain = re2fx.transform(model, inputs)
    model.gradient_checkpointing_enable()
    rev: Any = re2fx.transform(model, inputs)
    assert isinstance(plain, re2fx.RewiredModule)
    assert rev.plan.signature() == plain.plan.signature()
    gradients = []
    for module in (plain, rev):
        module.zero_grad()
        torch.manual_seed(1)
        module(**inputs).logits.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-14)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_mamba_with_its_residuals_in_fp32() -> None:
    """Casts on the skip, and a scan that Dynamo writes out in nested vmaps, half of it unread."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = "vocab_size=32&hidden_size=16&state_size=4&num_hidden_layers=2"
    model: Any = load(f"transformers:mamba?{size}").model.train()
    assert model.config.residual_in_fp32
    inputs = {"input_ids": IDS[:, :4], "use_cache": False}
    rev: Any = re2fx.transform(model, inputs)
    assert [len(chain) for chain in rev.plan.chains] == [2], str(rev.plan)
    gradients = []
    for rev.memory in ("store", "reversible"):
        rev.zero_grad()
        rev(**inputs).logits.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for stored, found in zip(*gradients, strict=True):
        assert (found - stored).norm() <= 1e-5 * stored.norm()


def test_original_coupling_is_the_original_network() -> None:
    model, inputs = make("llama")
    model.eval()
    rev = re2fx.transform(
        model, inputs, coupling=re2fx.Coupling.original(), memory="store", readout="sum"
    )
    other = {**inputs, "input_ids": torch.cat([IDS, IDS], 1)[:, :17].repeat(2, 1)}
    for given in (inputs, other):
        expected = model(**given).logits
        got = rev(**given).logits
        assert got.shape == expected.shape


def test_what_people_do_with_a_language_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, inputs = make("gpt2")
    rev = re2fx.transform(model, inputs)
    assert isinstance(rev, transformers.GPT2LMHeadModel)
    assert rev.config is model.config
    assert isinstance(rev(**inputs), type(model(**inputs)))
    rev.save_pretrained(tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float64)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0)


def test_generate() -> None:
    model, _ = make("gpt2")
    model.eval()
    positions = torch.arange(12).expand(2, -1)
    given = {"input_ids": IDS, "position_ids": positions}
    fixed = {"use_cache": False, "return_dict": True, "logits_to_keep": 1}
    rev: Any = re2fx.transform(model, {**given, **fixed})
    options = {"max_new_tokens": 4, "use_cache": False, "do_sample": False, "pad_token_id": 0}
    tokens = rev.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    expected = IDS
    for _ in range(4):
        places = torch.arange(expected.shape[1]).expand(2, -1)
        inputs = {"input_ids": expected, "position_ids": places}
        chosen = rev(**inputs, **fixed).logits[:, -1].argmax(-1)
        expected = torch.cat([expected, chosen[:, None]], 1)
    assert torch.equal(tokens, expected)


def test_a_report_of_a_language_model() -> None:
    model, inputs = make("gpt2")
    report = re2fx.report(model, inputs, measure=True)
    assert report.total.reversible is not None
    assert report.total.reversible < report.total.store
    assert report.measured is not None


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generate_with_a_batch_of_one(name: str) -> None:
    """From a single token on, with arguments that the example does not have; then training."""
    model, inputs = make(name)
    rev: Any = re2fx.transform(model, inputs)
    rev.eval()
    options = {"max_new_tokens": 4, "use_cache": False, "do_sample": False, "pad_token_id": 0}
    tokens = rev.generate(IDS[:1, :1], attention_mask=torch.ones_like(IDS[:1, :1]), **options)
    expected = IDS[:, :1]
    for _ in range(4):
        logits = rev(expected.repeat(2, 3), use_cache=False).logits[:, expected.shape[1] - 1]
        expected = torch.cat([expected, logits[:2].argmax(-1)[:, None]], 1)
    assert torch.equal(tokens, expected[:1])
    count = len(rev._variants)
    assert torch.equal(rev.generate(IDS[:1, :1], **options), tokens)
    assert len(rev._variants) == count
    loss = rev(IDS[:1], labels=IDS[:1], use_cache=False).loss
    logits = rev(IDS, use_cache=False).logits[0, :-1]
    wanted = torch.nn.functional.cross_entropy(logits.float(), IDS[0, 1:])
    torch.testing.assert_close(loss, wanted)
