"""Samples put together to batches, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

# An index, or an epoch and an index.
Key = int | tuple[int, int]
# Batches that each worker reads ahead.
AHEAD = 2


@dataclass(frozen=True)
class Sample:
    """Frames and what happens in them.

    Attributes:
        video: its name.
        frames: (3, T, H, W), float32, normalised.
        offset: when the first frame starts, in seconds.
        step: seconds per frame.
        segments: (n, 2), float32, starts and ends in frames, from 0 to ``length``.
        labels: (n,), int64.
        length: how many frames are of the video; those after them are padding.
    """

    video: str
    frames: Tensor
    offset: float
    step: float
    segments: Tensor
    labels: Tensor
    length: int


@dataclass(frozen=True)
class Broken:
    """In place of a sample: a video that cannot be read, and why."""

    video: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """Samples that could be read, and the videos that could not.

    Attributes:
        videos: B names.
        frames: (B, 3, T, H, W), float32; (0, 3, 0, 0, 0) if all videos are broken.
        offsets: when each first frame starts, in seconds.
        steps: seconds per frame of each.
        segments: per sample (n, 2), in frames.
        labels: per sample (n,), int64.
        lengths: (B,), int64, how many frames are not padding.
        broken: what is missing.
    """

    videos: tuple[str, ...]
    frames: Tensor
    offsets: tuple[float, ...]
    steps: tuple[float, ...]
    segments: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    lengths: Tensor
    broken: tuple[Broken, ...]

    def __len__(self) -> int:
        """How many samples there are; a batch of none is to be skipped."""
        return len(self.videos)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in memory that is copied to a GPU in the background."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            frames=change(self.frames),
            segments=tuple(map(change, self.segments)),
            labels=tuple(map(change, self.labels)),
            lengths=change(self.lengths),
        )


def collate(samples: Sequence[Sample | Broken]) -> Batch:
    """Stack the samples; set aside what is broken."""
    good = [sample for sample in samples if isinstance(sample, Sample)]
    frames = [sample.frames for sample in good]
    return Batch(
        videos=tuple(sample.video for sample in good),
        frames=torch.stack(frames) if frames else torch.empty(0, 3, 0, 0, 0),
        offsets=tuple(sample.offset for sample in good),
        steps=tuple(sample.step for sample in good),
        segments=tuple(sample.segments for sample in good),
        labels=tuple(sample.labels for sample in good),
        lengths=torch.tensor([sample.length for sample in good], dtype=torch.int64),
        broken=tuple(sample for sample in samples if isinstance(sample, Broken)),
    )


def generator(*numbers: int) -> torch.Generator:
    """A source of random numbers of its own for every tuple of whole numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class Order(Sampler[tuple[int, int]]):
    """The keys of a rank's samples in an epoch.

    Shuffled, every rank gets equally many, for which the first few may come twice: ranks that
    train together have to take equally many steps. In order, every sample comes exactly once.
    """

    def __init__(self, count: int, seed: int, shuffle: bool, rank: int, world: int) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not one of {world}")
        self.count, self.seed, self.shuffle = count, seed, shuffle
        self.rank, self.world, self.epoch = rank, world, 0

    def set_epoch(self, epoch: int) -> None:
        """Take another order, and other random numbers for the samples, from now on."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Pairs of epoch and index."""
        order = list(range(self.count))
        if self.shuffle:
            order = torch.randperm(self.count, generator=generator(self.seed, self.epoch)).tolist()
        for number in range(len(self)):
            yield self.epoch, order[(self.rank + number * self.world) % self.count]

    def __len__(self) -> int:
        """The number of this rank's samples."""
        if self.shuffle:
            return math.ceil(self.count / self.world)
        return len(range(self.rank, self.count, self.world))


class Loader(DataLoader[Batch]):
    """A loader of batches whose order and random numbers follow the epoch."""

    order: Order

    def set_epoch(self, epoch: int) -> None:
        """Call it before each epoch; its number may be any, so that a run can be resumed."""
        self.order.set_epoch(epoch)


def loader(
    dataset: Dataset[Sample | Broken],
    batch: int,
    workers: int,
    seed: int,
    shuffle: bool,
    rank: int = 0,
    world: int = 1,
) -> Loader:
    """Batches of a dataset of `benchmarks.tal.clips`.

    Args:
        dataset: takes keys of epoch and index.
        batch: samples per batch; fewer in the last, and where videos are broken.
        workers: processes that read ahead; 0 reads in this one.
        seed: of the order.
        shuffle: take another order in each epoch.
        rank: which of the processes that train together this is.
        world: how many they are; each reads its own samples.
    """
    order = Order(len(dataset), seed, shuffle, rank, world)  # type: ignore[arg-type]
    result = Loader(
        dataset,  # type: ignore[arg-type]
        batch_size=batch,
        sampler=order,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
        prefetch_factor=AHEAD if workers else None,
        pin_memory=torch.cuda.is_available(),
        # Otherwise each epoch draws from torch's own generator.
        generator=generator(seed),
    )
    result.order = order
    return result
