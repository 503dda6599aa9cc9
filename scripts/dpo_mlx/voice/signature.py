"""How much of an author's voice a text has, which another writer's voice does not fool.

A classifier of the author's answers against the base model's takes whatever the base model does not
write as a sign of the author: it gave two other writers 36% and 63% of the author's score. A
signature counts only what the author does and the base model does not; what a text lacks says
nothing. It gave the same writers -2% and 3%, the base model's answers with a bold first sentence,
as the author writes it, 29%, and the author's with half of their sentences replaced by the base
model's 48% (48 questions of the sample).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .habits import MIN_Z

# Bytes in UTF-8 of an n-gram: 3 to 6 letters of the Latin alphabet, 2 or 3 Cyrillic ones, 1 or 2
# Chinese characters.
SHORTEST, LONGEST = 3, 6
# Stands before a text, so that an n-gram can mean "at the start".
START = b"\x02"


@dataclass(frozen=True)
class Signature:
    """The n-grams in clearly more of an author's answers than of the base model's.

    `ngrams` are sorted codes, [N] uint64, and `weights` are [N] float64. `typical_count` is how
    many different n-grams an answer of the author has.
    """

    ngrams: np.ndarray
    weights: np.ndarray
    typical_count: float

    def evidence(self, texts: Iterable[str]) -> np.ndarray:
        """How much of the signature each text has, [len(texts)]: the sum of the weights of its
        n-grams.

        A long text has more n-grams of any kind by chance, so the sum is divided by the root of
        their number; a text shorter than the author's gains nothing by that. The scale has no
        meaning of its own: use `share_of_way` with the base model's and the author's answers to
        the same questions.
        """
        return np.array([self._evidence(_ngrams(text)) for text in texts])

    def _evidence(self, ngrams: np.ndarray) -> float:
        total = self.weights[np.isin(self.ngrams, ngrams, assume_unique=True)].sum()
        return float(total / np.sqrt(max(len(ngrams), self.typical_count, 1)))


def find_signature(author: Sequence[str], base: Sequence[str]) -> Signature:
    """The signature of an author's answers beside the base model's to the same questions.

    An n-gram belongs to it when the shares of the answers that contain it differ by more than
    chance, and counts with the square of their difference: what the author does in every answer
    tells more than what the author does a little more often, as any other writer might. Without
    such n-grams all evidence is 0, and there is no way from floor to ceiling. Raises ValueError
    when a side is empty.
    """
    if not author or not base:
        raise ValueError("a signature needs answers of the author and of the base model")
    by_answer = [_ngrams(text) for text in author]
    ngrams, counts = np.unique(np.concatenate(by_answer), return_counts=True)
    base_ngrams, base_counts = np.unique(
        np.concatenate([_ngrams(text) for text in base]), return_counts=True
    )
    author_shares, base_shares = counts / len(author), np.zeros(len(ngrams))
    _, in_author, in_base = np.intersect1d(
        ngrams, base_ngrams, assume_unique=True, return_indices=True
    )
    base_shares[in_author] = base_counts[in_base] / len(base)
    differences = author_shares - base_shares
    variances = _variance(author_shares, author) + _variance(base_shares, base)
    is_clear = differences > MIN_Z * np.sqrt(variances)
    return Signature(
        ngrams[is_clear],
        differences[is_clear] ** 2,
        float(np.median([len(answer_ngrams) for answer_ngrams in by_answer])),
    )


def _variance(share: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """The variance of an estimated share of texts. Where all agree, count one as different."""
    return np.maximum(share * (1 - share), 1 / len(texts) ** 2) / len(texts)


def _ngrams(text: str) -> np.ndarray:
    """The different n-grams of a text as sorted numbers: a 1 and then their bytes.

    N-grams are of whole characters: with parts of them a dash, which has 3 bytes, would count
    several times.
    """
    data = np.frombuffer(START + text.encode("utf-8", "surrogatepass"), dtype=np.uint8)
    between_characters = np.append(data & 0xC0 != 0x80, True)
    codes, by_length = np.ones(len(data) + 1, dtype=np.uint64), []
    for length in range(1, LONGEST + 1):
        codes = codes[:-1] << np.uint64(8) | data[length - 1 :]
        if length >= SHORTEST:
            whole = between_characters[: len(codes)] & between_characters[length:]
            by_length.append(codes[whole])
    return np.unique(np.concatenate(by_length))
