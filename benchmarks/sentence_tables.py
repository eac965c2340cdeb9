"""What `benchmarks.sentences` has measured, as a README table."""

from __future__ import annotations

from statistics import fmean

from .accuracy_tables import distance, percent
from .tables import Data, machine, table


def text_sentences(data: Data) -> str:
    """A row per coupling."""
    setup, rows = data["setup"], data["rows"]
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    own = {name: [row for row in rows if row["candidate"] == name] for name in names}
    epochs, (train, test) = setup["epochs"], setup["sentences"]
    pretrained = fmean(row["pretrained"] for row in rows)
    seeds = len({row["seed"] for row in rows})
    intro = (
        f"all-MiniLM-L6-v2, six post-norm layers, tells {len(setup['topics'])} topics of "
        f"scikit-learn's documentation apart in {pretrained:.1%} of {test} sentences by a linear "
        f"head fitted to {train} others. Finetuned with its head, exact streams; accuracy in per "
        f"cent, relative distance of the embeddings from the pretrained ones, mean ± standard "
        f"deviation over {seeds} splits:"
    )
    head = ("coupling, readout", "distance at the start", "accuracy at the start", "after 1 epoch")
    return "\n\n".join(
        [
            intro,
            table(
                (*head, f"after {epochs}"),
                (
                    (name, distance(found, 0), *(percent(found, n) for n in (0, 1, epochs)))
                    for name, found in own.items()
                ),
            ),
            machine(data),
        ]
    )
