"""Does the model recite its training answers? Reciting is not a voice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from .fluency import units

# Words in a row that nobody writes twice by chance.
RUN = 8

Run = tuple[str, ...]


def runs(text: str) -> Iterator[Run]:
    """Every RUN neighbouring words of a text, whatever their case."""
    words = units(text.casefold())
    return (tuple(words[start : start + RUN]) for start in range(len(words) - RUN + 1))


def copied_share(answers: Sequence[str], training_answers: Iterable[str]) -> float:
    """The share of the answers' runs that some training answer has too. 0 without any run."""
    known_runs = {run for text in training_answers for run in runs(text)}
    matches = [run in known_runs for text in answers for run in runs(text)]
    return sum(matches) / len(matches) if matches else 0.0
