"""Does the model recite its training answers? Reciting is not a voice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .fluency import units

# So many words in a row are hardly ever the same by chance.
RUN = 8

Run = tuple[str, ...]


def runs(texts: Iterable[str]) -> Iterator[Run]:
    """Every RUN neighbouring words of each text, in lower case."""
    for text in texts:
        words = units(text.casefold())
        yield from (tuple(words[start : start + RUN]) for start in range(len(words) - RUN + 1))


def copied_share(answers: Iterable[str], training_runs: set[Run]) -> float:
    """The share of the answers' runs that are among the training answers' runs. 0 without any."""
    matches = [run in training_runs for run in runs(answers)]
    return sum(matches) / len(matches) if matches else 0.0
