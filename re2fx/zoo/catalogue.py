"""Which models are in the zoo: lines of text, so that a reader can copy one into a shell.

A line of ``catalogue.txt`` holds a target as `re2fx.targets.load` takes it and its inputs as
``--input`` takes them; a line in brackets begins a group. Models are reduced in width, depth and
input, but keep every kind of block that they have, and several of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.resources import files


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        target: as `re2fx.targets.load` takes it.
        inputs: as ``--input`` takes them.
        group: what it is filed under.
    """

    target: str
    inputs: tuple[str, ...] = ()
    group: str = ""

    @property
    def name(self) -> str:
        """Library and model, without the options."""
        return self.target.partition("?")[0]

    @property
    def library(self) -> str:
        """Where it comes from; a model of ours stands for one of its group's library."""
        if self.target.startswith("re2fx."):
            return self.group.partition(":")[0]
        return self.target.partition(":")[0].partition(".")[0]


def catalogue(patterns: Iterable[str] = ()) -> tuple[Entry, ...]:
    """The models whose target, name or group fits any of some patterns; all without patterns."""
    text = files(__package__).joinpath("catalogue.txt").read_text()
    entries = tuple(read(text))
    patterns = list(patterns)
    return tuple(entry for entry in entries if not patterns or fits(entry, patterns))


def fits(entry: Entry, patterns: Iterable[str]) -> bool:
    """Whether a pattern as in `fnmatch`, or a part of the name, means a model."""
    names = (entry.target, entry.name, entry.group, entry.library)
    return any(
        pattern in entry.name or any(fnmatch(name, pattern) for name in names)
        for pattern in patterns
    )


def read(text: str) -> Iterator[Entry]:
    """The entries of a catalogue; ``#`` begins a comment."""
    group = ""
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if not words:
            continue
        if words[0].startswith("["):
            group = " ".join(words).strip("[]")
            continue
        target, *inputs = words
        yield Entry(target, tuple(inputs), group)
