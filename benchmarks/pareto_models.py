"""The networks that memory is traded for time on, at sizes for a CPU, a GPU and a test.

What a rival can put a checkpoint around is written down once per network: the containers whose
children are blocks that run one after another, and a block's forward with each of its residual
branches in a function of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from re2fx.zoo.steps import awaken

from .torchvision_shim import ensure_torchvision

# Positional arguments as a tuple or arguments by name, as `re2fx.transform` takes them.
Inputs = tuple[Any, ...] | dict[str, Any]

# Calls a function of tensors; a checkpoint does so too.
Run = Callable[..., Any]

# A block's forward, whose branches are run by the first argument.
BlockForward = Callable[..., Any]


@dataclass(frozen=True)
class Subject:
    """A network with its inputs.

    Attributes:
        name: what its library calls it.
        words: its size, and that of its inputs.
        build: makes it.
        inputs: makes those of a batch.
        batch: how many samples.
        containers: the modules whose children are its blocks, each called with the result of the
            one before.
        branches: a block's forward: ``(run, block, *inputs)``.
        output: the tensor among the results that the loss is of.
    """

    name: str
    words: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    batch: int
    containers: Callable[[Any], list[nn.Module]]
    branches: BlockForward
    output: Callable[[Any], Tensor] = lambda result: result

    def model(self) -> nn.Module:
        """With the same parameters every time, none of which is without a gradient."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            model = self.build()
        awaken(model)
        return model.train()

    def loss(self, result: Any) -> Tensor:
        """Of what a network returned."""
        return self.output(result).float().square().mean()


def call(network: Callable[..., Any], inputs: Inputs) -> Any:
    """Of a network with its inputs; SlowFast writes into the list that it is given."""
    if isinstance(inputs, dict):
        return network(**inputs)
    return network(*(list(given) if isinstance(given, list) else given for given in inputs))


def randn(*size: int) -> Tensor:
    """The same numbers every time."""
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


# torchvision's ViT


def vit(image: int, layers: int, batch: int, width: int = 768) -> Subject:
    """ViT-B/16 with another number of layers (24 of width 1024: ViT-L), for another image."""
    ensure_torchvision()
    from torchvision.models import VisionTransformer

    sizes = {"hidden_dim": width, "mlp_dim": 4 * width, "num_heads": width // 64}
    return Subject(
        "ViT-L" if width == 1024 else "ViT-B",
        f"torchvision ViT/16, {layers} layers of width {width}, {batch} images of {image} px",
        partial(VisionTransformer, image_size=image, patch_size=16, num_layers=layers, **sizes),
        lambda count: (randn(count, 3, image, image),),
        batch,
        lambda model: [model.encoder.layers],
        vit_block,
    )


def vit_block(run: Run, block: Any, x: Tensor) -> Tensor:
    """``torchvision.models.vision_transformer.EncoderBlock.forward``."""

    def attention(x: Tensor) -> Any:
        y = block.ln_1(x)
        return block.dropout(block.self_attention(y, y, y, need_weights=False)[0])

    x = x + run(attention, x)
    return x + run(lambda x: block.mlp(block.ln_2(x)), x)


# torchvision's Video Swin


def swin3d(
    frames: int, image: int, batch: int, width: int = 96, depths: tuple[int, ...] = (2, 2, 6, 2)
) -> Subject:
    """Video Swin-T, with its stochastic depth."""
    ensure_torchvision()
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    sizes = {
        "patch_size": [2, 4, 4], "embed_dim": width, "depths": list(depths),
        "num_heads": [width // 32 * 2**stage for stage in range(len(depths))],
        "window_size": [8, 7, 7], "stochastic_depth_prob": 0.1,
    }  # fmt: skip
    return Subject(
        "Swin3D-T",
        f"torchvision Video Swin, {sum(depths)} blocks, {batch} x {frames} frames of {image} px",
        partial(SwinTransformer3d, **sizes),
        lambda count: (randn(count, 3, frames, image, image),),
        batch,
        lambda model: [m for m in model.features if isinstance(m, nn.Sequential)],
        swin_block,
    )


def swin_block(run: Run, block: Any, x: Tensor) -> Tensor:
    """``torchvision.models.swin_transformer.SwinTransformerBlock.forward``."""
    x = x + run(lambda x: block.stochastic_depth(block.attn(block.norm1(x))), x)
    return x + run(lambda x: block.stochastic_depth(block.mlp(block.norm2(x))), x)


# pytorchvideo's SlowFast


def slowfast(frames: int, image: int, batch: int, depth: int = 50) -> Subject:
    """SlowFast 8x8 with another clip; the slow pathway reads every fourth frame."""
    ensure_torchvision()
    from pytorchvideo.models.slowfast import create_slowfast

    slow, side = frames // 4, image // 32
    pools = ((slow, side, side), (frames, side, side))

    def clips(count: int) -> Inputs:
        fast = randn(count, 3, frames, image, image)
        return ([fast[:, :, ::4].contiguous(), fast],)

    return Subject(
        f"SlowFast-R{depth}",
        f"pytorchvideo SlowFast-R{depth}, {batch} x {frames} frames of {image} px",
        partial(create_slowfast, model_depth=depth, head_pool_kernel_sizes=pools),
        clips,
        batch,
        lambda model: [m.res_blocks for m in model.modules() if hasattr(m, "res_blocks")],
        res_block,
    )


def res_block(run: Run, block: Any, x: Tensor) -> Tensor:
    """``pytorchvideo.models.resnet.ResBlock.forward``."""
    shortcut = x
    if block.branch1_conv is not None:
        shortcut = block.branch1_conv(x)
        if block.branch1_norm is not None:
            shortcut = block.branch1_norm(shortcut)
    x = block.branch_fusion(shortcut, run(block.branch2, x))
    return x if block.activation is None else block.activation(x)


# transformers' GPT-2

NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}  # which smaller vocabularies lack


def gpt2(
    tokens: int, layers: int, batch: int, width: int = 768, vocabulary: int = 50257
) -> Subject:
    """GPT-2 without its language head, with its dropout."""
    ensure_torchvision()  # which transformers imports
    from transformers import GPT2Config, GPT2Model

    sizes = {"n_layer": layers, "n_embd": width, "n_head": width // 64}
    config = GPT2Config(**sizes, vocab_size=vocabulary, n_positions=max(tokens, 1024), **NO_TOKENS)

    def ids(count: int) -> Inputs:
        generator = torch.Generator().manual_seed(1)
        drawn = torch.randint(vocabulary, (count, tokens), generator=generator)
        return {"input_ids": drawn, "use_cache": False}

    return Subject(
        "GPT-2",
        f"transformers GPT-2, {layers} layers of width {width}, {vocabulary} words, loss on the "
        f"last hidden state, {batch} x {tokens} tokens",
        lambda: GPT2Model(config),
        ids,
        batch,
        lambda model: [model.h],
        gpt2_block,
        lambda result: result.last_hidden_state,
    )


def gpt2_block(
    run: Run,
    block: Any,
    x: Tensor,
    past: Any = None,
    mask: Any = None,
    *others: Any,
    **options: Any,
) -> Tensor:
    """``transformers.models.gpt2.modeling_gpt2.GPT2Block.forward`` without cross-attention."""
    options.pop("encoder_attention_mask", None)

    def attention(x: Tensor) -> Any:
        y = block.ln_1(x)
        return block.attn(y, past_key_values=past, attention_mask=mask, **options)[0]

    x = run(attention, x) + x
    return x + run(lambda x: block.mlp(block.ln_2(x)), x)


Make = Callable[[], Subject]

# A step of each takes about two seconds on two cores.
CPU: Mapping[str, Make] = {
    "vit": partial(vit, 224, 12, 2),
    "swin3d": partial(swin3d, 16, 112, 2),
    "slowfast": partial(slowfast, 16, 128, 2),
    # The gradient of 50,257 word vectors would be larger than all that can be saved here.
    "gpt2": partial(gpt2, 256, 12, 2, vocabulary=4096),
}

QUICK: Mapping[str, Make] = {
    "vit": partial(vit, 64, 4, 8, width=128),
    "swin3d": partial(swin3d, 4, 32, 4, width=32, depths=(2, 4)),
    "slowfast": partial(slowfast, 8, 32, 2),
    "gpt2": partial(gpt2, 64, 4, 4, width=128, vocabulary=512),
}

# Large enough for the device to be what takes the time, not the launches.
GPU: Mapping[str, Make] = {
    "vit": partial(vit, 224, 12, 256),
    "vit-l": partial(vit, 224, 24, 64, width=1024),
    "swin3d": partial(swin3d, 32, 224, 8),
    "slowfast": partial(slowfast, 32, 256, 8),
    "gpt2": partial(gpt2, 1024, 12, 32),
}
