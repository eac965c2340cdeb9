"""The ways to train a localizer that are compared, and how each makes its backbone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import re2fx

from .actionformer import ActionFormer, ActionFormerConfig
from .backbones import Backbone
from .localizer import Localizer
from .vsgn import VSGN, VSGNConfig
from .vsgn_stitched import StitchedVSGN


@dataclass(frozen=True)
class Entry:
    """One way.

    Attributes:
        name: of rows and files.
        words: what it is, for tables.
        trained: whether the backbone is trained with the localizer, or gives fixed features.
        options: further arguments of `re2fx.transform`; None leaves the backbone as it is.
    """

    name: str
    words: str
    trained: bool = True
    options: Callable[[], dict[str, Any]] | None = None

    @property
    def rewired(self) -> bool:
        """Whether the backbone is another network than the pretrained one."""
        return self.options is not None

    def made_of(self, backbone: nn.Module, frames: Tensor) -> nn.Module:
        """The backbone to train, with the weights of a pretrained one.

        Args:
            backbone: as pretrained.
            frames: an example, ``(B, 3, T, H, W)``.
        """
        if self.options is None:
            return backbone
        return re2fx.transform(backbone, (frames,), **self.options())


def _exact() -> dict[str, Any]:
    coupling = re2fx.Coupling.consistent(0.25)
    return {"coupling": coupling, "exact": True}


ENTRIES = {
    entry.name: entry
    for entry in (
        Entry("fixed", "fixed features", trained=False),
        Entry("original", "end to end"),
        Entry("re2tal", "end to end, rewired (Re2TAL)", options=dict),
        Entry("consistent", "end to end, rewired (consistent(1/4), exact)", options=_exact),
    )
}


@dataclass(frozen=True)
class Kind:
    """A localizer.

    Attributes:
        words: its name.
        make: makes it for so many channels and classes.
    """

    words: str
    make: Callable[[int, int], Localizer[Any]]


def _actionformer(channels: int, classes: int) -> Localizer[Any]:
    return ActionFormer(ActionFormerConfig(channels, classes))


def _vsgn(channels: int, classes: int) -> Localizer[Any]:
    return VSGN(VSGNConfig(channels, classes))


def _stitched(channels: int, classes: int) -> Localizer[Any]:
    return StitchedVSGN(VSGNConfig(channels, classes))


LOCALIZERS = {
    "actionformer": Kind("ActionFormer", _actionformer),
    "vsgn": Kind("VSGN", _vsgn),
    "vsgn_stitched": Kind("VSGN, stitched", _stitched),
}


class Classifier(nn.Module):
    """A backbone that names a clip: the mean of its features over time, and a linear layer.

    Attributes:
        fixed: whether the backbone stays in eval mode and is not trained.
    """

    def __init__(self, backbone: nn.Module, channels: int, classes: int) -> None:
        super().__init__()
        self.backbone, self.fixed = backbone, False
        self.head = nn.Linear(channels, classes)

    @classmethod
    def of(cls, kind: Backbone, classes: int) -> Classifier:
        """With random weights, or those that the backbone's package has."""
        return cls(kind.build(), kind.channels, classes)

    def forward(self, frames: Tensor) -> Tensor:
        """Logits ``(B, classes)`` of frames ``(B, 3, T, H, W)``."""
        logits: Tensor = self.head(self.backbone(frames).mean(-1))
        return logits

    def fix(self) -> Classifier:
        """Train the linear layer alone from now on."""
        self.fixed = True
        self.backbone.requires_grad_(False).eval()
        return self

    def train(self, mode: bool = True) -> Classifier:
        """As `torch.nn.Module.train`, but for a fixed backbone."""
        super().train(mode)
        if self.fixed:
            self.backbone.eval()
        return self
