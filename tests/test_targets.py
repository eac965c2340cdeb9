"""Models by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from re2fx.errors import TargetError
from re2fx.targets import load, read_input, read_options


def factory(depth: int = 2, name: str = "a") -> nn.Module:
    return nn.Sequential(*[nn.Linear(4, 4) for _ in range(depth)])


def with_inputs() -> tuple[nn.Module, torch.Tensor]:
    return nn.Linear(4, 4), torch.zeros(2, 4)


def broken() -> int:
    return 1


instance = nn.Linear(3, 3)


def test_each_source_makes_a_model_and_its_inputs() -> None:
    made = load("torchvision:resnet18?num_classes=7")
    assert made.model.get_submodule("fc").out_features == 7
    assert isinstance(made.inputs, tuple)
    assert made.inputs[0].shape == (1, 3, 224, 224)
    made = load("timm:vit_tiny_patch16_224?depth=2&img_size=32")
    assert len(made.model.get_submodule("blocks")) == 2  # type: ignore[arg-type]
    assert isinstance(made.inputs, tuple)
    assert made.inputs[0].shape == (1, 3, 32, 32)
    made = load("transformers:gpt2?n_layer=2&n_embd=16&n_head=2&vocab_size=9&n_positions=12")
    assert isinstance(made.inputs, dict)
    assert made.inputs["input_ids"].shape == (1, 12)
    assert made.model(**made.inputs).logits.shape == (1, 12, 9)


@pytest.mark.parametrize(
    "name",
    [
        "torchvision:swin_t",
        "timm:convnext_tiny",
        "transformers:gpt2?n_layer=40&n_embd=1600&n_head=25",
    ],
)
def test_meta_takes_no_memory(name: str) -> None:
    made = load(name, device="meta")
    assert {p.device.type for p in made.model.parameters()} == {"meta"}
    values = made.inputs.values() if isinstance(made.inputs, dict) else made.inputs or ()
    assert {v.device.type for v in values if isinstance(v, torch.Tensor)} == {"meta"}


def test_a_factory_of_ones_own() -> None:
    assert len(list(load(f"{__name__}:factory?depth=5").model.children())) == 5
    assert load(f"{__name__}:factory").inputs is None
    made = load(f"{__name__}:with_inputs")
    assert isinstance(made.inputs, tuple)
    assert made.inputs[0].shape == (2, 4)
    assert load(f"{__name__}:instance").model is instance


def test_a_module_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from torch import nn\ndef make(width):\n    return nn.Linear(width, width)\n"
    (tmp_path / "models_of_mine.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    assert load("models_of_mine:make?width=3", ["1,3"]).model.in_features == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet50", r"names no model; write one of torchvision:resnet50, "),
        ("torchvision:", r"names no model"),
        ("torchvision:resnet500", r"has no model 'resnet500'; did you mean resnet50"),
        ("timm:vit_bas_patch16_224", r"did you mean vit_base_patch16_224"),
        ("transformers:gtp2", r"did you mean gpt2"),
        ("nowhere.at_all:make", r"No module named 'nowhere'; write one of"),
        (f"{__name__}:factor", r"has no 'factor'; did you mean factory"),
        (f"{__name__}:factory?width=3", r"cannot be built: TypeError: .*'width'"),
        ("transformers:gpt2?n_embd=10", r"cannot be built: ValueError: .*num_heads"),
        (f"{__name__}:broken", r"gives a int; expected a module"),
        ("transformers:BertConfig", r"BertConfig is no model; name its type or its class"),
        ("pytorchvideo:slowfest", r"did you mean slowfast"),
        (f"{__name__}:factory?depth", r"'depth' is not of the form name=value"),
    ],
)
def test_errors_say_what_to_write(text: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        load(text)


def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(TargetError, match="timm is not installed: pip install timm"):
        load("timm:resnet18")


def test_options_are_literals_or_texts() -> None:
    assert read_options("a=1&b=(2, 3)&c=eager&d=False") == {
        "a": 1,
        "b": (2, 3),
        "c": "eager",
        "d": False,
    }


@pytest.mark.parametrize(
    ("text", "name", "shape", "dtype"),
    [
        ("2,3,4", None, (2, 3, 4), torch.float32),
        ("ids=1,5:int64", "ids", (1, 5), torch.int64),
        ("2:bfloat16", None, (2,), torch.bfloat16),
        ("mask=1,5:bool", "mask", (1, 5), torch.bool),
    ],
)
def test_inputs(text: str, name: str | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    state = torch.get_rng_state()
    got, value = read_input(text)
    assert (got, value.shape, value.dtype) == (name, shape, dtype)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("text", ["2,x", "2,-1", "2:float12", "a=b", ""])
def test_bad_inputs(text: str) -> None:
    with pytest.raises(TargetError, match="expected sizes such as 2,3,224,224"):
        read_input(text)


def test_all_inputs_by_name_or_none() -> None:
    with pytest.raises(TargetError, match="all inputs by name or none"):
        load(f"{__name__}:factory", ["x=1,4", "1,4"])


def test_an_encoder_with_a_decoder() -> None:
    text = "transformers:t5?num_layers=1&d_model=8&d_ff=8&num_heads=2&d_kv=4&vocab_size=9"
    made = load(f"{text}&decoder_start_token_id=0")
    assert isinstance(made.inputs, dict)
    assert set(made.inputs) == {"input_ids", "decoder_input_ids", "use_cache"}
    assert made.model(**made.inputs).logits.shape == (1, 128, 9)


def test_named_inputs_keep_the_switches_of_the_library() -> None:
    text = "transformers:gpt2?n_layer=1&n_embd=8&n_head=2&vocab_size=9"
    made = load(text, ["input_ids=2,5:int64"])
    assert isinstance(made.inputs, dict)
    assert made.inputs["use_cache"] is False
    assert made.inputs["input_ids"].shape == (2, 5)


def test_a_class_of_transformers() -> None:
    options = "hidden_size=16&num_hidden_layers=1&num_attention_heads=2&intermediate_size=16"
    made = load(f"transformers:BertForMaskedLM?{options}&vocab_size=9&attn_implementation=eager")
    assert type(made.model).__name__ == "BertForMaskedLM"
    assert getattr(made.model.config, "_attn_implementation", None) == "eager"
    assert isinstance(made.inputs, dict)
    assert "input_ids" in made.inputs
    audio = "transformers:ASTModel?hidden_size=16&num_hidden_layers=1&num_attention_heads=2"
    assert load(audio).inputs is None


def test_a_builder_of_pytorchvideo_takes_a_list_of_clips() -> None:
    options = "model_depth=50&model_num_class=5&head_pool_kernel_sizes=((2,1,1),(8,1,1))"
    made = load(f"pytorchvideo:slowfast?{options}", ["1,3,2,32,32+1,3,8,32,32"])
    assert isinstance(made.inputs, tuple)
    (clips,) = made.inputs
    assert [tuple(clip.shape) for clip in clips] == [(1, 3, 2, 32, 32), (1, 3, 8, 32, 32)]
    assert made.model.eval()(clips).shape == (1, 5)
