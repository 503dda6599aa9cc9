"""Rules that check whether an answer follows an instruction, such as "answer in one word".

That a rule can check such instructions is the idea of IFEval (Zhou et al. 2023, arXiv:2311.07911).
The instructions and the rules here are our own.
"""

from __future__ import annotations

import json
import re
import typing
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from ..data.pairs import STOP
from ..files import schema
from ..files.schema import Count, OneOf
from ..model.sampling import Answer
from .habits import BOLD, HEADING, paragraphs

WORD = re.compile(r"[^\W_]+(?:['’.\-][^\W_]+)*")
SENTENCE_END = re.compile(r"[!?。]|\.(?!\w)|\n")
BULLET = re.compile(r"^([ \t]*)(?:[-*+–]\s+|•\s*)\S", re.MULTILINE)
NUMBER_OF_ITEM = re.compile(r"^[ \t*_]*(\d+)[.)][*_]*\s+\S", re.MULTILINE)
NUMBER = re.compile(r"[-+−]?\d+(?:[.,]\d+)*")
QUOTED = re.compile(r'["“„«][^"“”„«»]+["“”»]')
# A code fence around a text, and marks around it that do not stand within it.
FENCE = re.compile(r"```\w*\n(.*?)\n?```", re.DOTALL)
WRAPPED = re.compile(r"(\*\*|__|[*_`\"])((?:(?!\1).)+)\1|[“„«]([^“”„«»]+)[“”»]", re.DOTALL)
# What may stand around the first and the last word of a text.
OUTER_MARKS = "*_`#\"'“”„«»‘’.,:;!?…() \n"
# The most words in an item of a list on one line. Clauses between commas have more.
MAX_ITEM_WORDS = 4

# Very common words of each language. A word of several languages counts for each of them.
FUNCTION_WORDS = {
    "English": "the and of to is in that it with for are this you i on as be we was at have not or "
    "from can a",
    "French": "le la les un une des du de et est en que qui dans pour pas je il elle nous vous ce "
    "cette sur avec plus sont au ne se mon ma mes à j l d c qu",
    "German": "der die das und ist in zu den dem des ein eine einen nicht mit von für auf sie er "
    "ich es wir auch sich im dass wie als",
    "Italian": "il lo la i gli le un una di del della e è in che per con non si su al sono come "
    "più io mi da l",
    "Portuguese": "o a os as um uma de do da e é em que para com não se no na por mais eu são como",
    "Spanish": "el la los las un una de del y en es que por para con no se su al lo como más yo me "
    "mi son muy a",
}
Language = Annotated[str, OneOf(tuple(FUNCTION_WORDS))]


def words(text: str) -> list[str]:
    """The words of a text in a script with blanks. "twenty-one", "it's" and "3.5" are one each."""
    return WORD.findall(text)


def unwrap(text: str) -> str:
    """The text without a code fence, bold, code or quotation marks around the whole of it."""
    if fence := FENCE.fullmatch(text):
        text = fence[1].strip()
    while wrapped := WRAPPED.fullmatch(text):
        text = (wrapped[2] or wrapped[3]).strip()
    return text


# Each rule takes an answer, stripped and in Unicode's form NFKC, and the parameters of its
# instruction.


def has_words(text: str, least: Count, most: Count) -> bool:
    return least <= len(words(text)) <= most


def has_sentences(text: str, count: Count) -> bool:
    """Abbreviations with a point end a sentence too, so an instruction must not invite them."""
    return sum(bool(words(part)) for part in SENTENCE_END.split(text)) == count


def has_bullets(text: str, count: Count) -> bool:
    """Items as deep as the first one. Text before and after the list is allowed."""
    depths = [item[1] for item in BULLET.finditer(text)]
    return depths.count(depths[0]) == count if depths else False


def has_numbered_items(text: str, count: Count) -> bool:
    """Items 1 to `count`, in order. Text before and after the list is allowed."""
    numbers = NUMBER_OF_ITEM.findall(text)
    return numbers == [str(number) for number in range(1, count + 1)]


def has_paragraphs(text: str, count: Count) -> bool:
    return len(paragraphs(text)) == count


def has_lines(text: str, count: Count) -> bool:
    return sum(bool(line.strip()) for line in text.splitlines()) == count


def is_lower_case(text: str) -> bool:
    return any(map(str.islower, text)) and not any(map(str.isupper, text))


def is_upper_case(text: str) -> bool:
    return any(map(str.isupper, text)) and not any(map(str.islower, text))


def is_in_language(text: str, language: Language) -> bool:
    """Whether the text has more of the language's common words than of any other's, and two or
    more.

    This tells a sentence in one of these languages from the others. It cannot judge single words,
    takes a mixed text for the language with the larger part, and may take a related language that
    is not in the table (Catalan, Dutch) for one that is.
    """
    tokens = re.findall(r"[^\W\d_]+", text.casefold())
    hits = {name: sum(map(common.split().count, tokens)) for name, common in FUNCTION_WORDS.items()}
    own = hits.pop(language)
    return own >= 2 and own > max(hits.values())


def starts_with(text: str, phrase: str) -> bool:
    start = text.lstrip(OUTER_MARKS).casefold()
    return bool(re.match(rf"{re.escape(phrase.casefold())}(?!\w)", start))


def ends_with(text: str, phrase: str) -> bool:
    end = text.rstrip(OUTER_MARKS).casefold()
    return bool(re.search(rf"(?<!\w){re.escape(phrase.casefold())}\Z", end))


def ends_with_mark(text: str, mark: str) -> bool:
    """Whether the answer itself ends with the mark, and not a quotation at its end."""
    return unwrap(text).rstrip("*_) \n").endswith(mark)


def has_word(text: str, word: str, count: Count) -> bool:
    pattern = rf"(?<!\w){re.escape(word.casefold())}(?!\w)"
    return len(re.findall(pattern, text.casefold())) == count


def contains(text: str, phrases: list[str]) -> bool:
    return not any(has_word(text, phrase, 0) for phrase in phrases)


def is_without(text: str, characters: str) -> bool:
    return not set(characters) & set(text)


def is_number(text: str) -> bool:
    return bool(NUMBER.fullmatch(unwrap(text).rstrip(".")))


def is_one_of(text: str, phrases: list[str]) -> bool:
    return " ".join(words(text)).casefold() in phrases


def is_separated(text: str, separator: str, count: Count) -> bool:
    """Items of a few words on one line."""
    line = unwrap(text).rstrip(".")
    lengths = [len(words(item)) for item in line.split(separator)]
    short = all(1 <= length <= MAX_ITEM_WORDS for length in lengths)
    return "\n" not in line and len(lengths) == count and short


def is_json_object(text: str, keys: list[str]) -> bool:
    """A fence that is only closed does no harm: small models often write one."""
    try:
        value = json.loads(unwrap(text).strip("`\n"))
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and value.keys() == set(keys)


def equals(text: str, phrase: str) -> bool:
    return unwrap(text) == phrase


def is_quoted(text: str) -> bool:
    return bool(QUOTED.fullmatch(text))


def opens_with_heading(text: str) -> bool:
    """A Markdown heading, and text below it."""
    return bool(HEADING.match(text) and words(text.partition("\n")[2]))


def has_bold_words(text: str, count: Count) -> bool:
    return sum(len(words(span[2])) for span in BOLD.finditer(text)) == count


@dataclass(frozen=True)
class Kind:
    """A kind of rule. `needs_end` marks one that only a whole answer can follow: an answer that was
    cut off does not.
    """

    holds: Callable[..., bool]
    needs_end: bool = True


KINDS = {
    "words": Kind(has_words),
    "sentences": Kind(has_sentences),
    "bullets": Kind(has_bullets),
    "numbered": Kind(has_numbered_items),
    "paragraphs": Kind(has_paragraphs),
    "lines": Kind(has_lines),
    "lower_case": Kind(is_lower_case, needs_end=False),
    "upper_case": Kind(is_upper_case, needs_end=False),
    "language": Kind(is_in_language, needs_end=False),
    "starts_with": Kind(starts_with, needs_end=False),
    "ends_with": Kind(ends_with),
    "ends_with_mark": Kind(ends_with_mark),
    "word_count": Kind(has_word),
    "contains": Kind(contains, needs_end=False),
    "without": Kind(is_without, needs_end=False),
    "number": Kind(is_number),
    "one_of": Kind(is_one_of),
    "separated": Kind(is_separated),
    "json_object": Kind(is_json_object),
    "equals": Kind(equals),
    "quoted": Kind(is_quoted),
    "heading": Kind(opens_with_heading, needs_end=False),
    "bold_words": Kind(has_bold_words),
}


@dataclass(frozen=True)
class Rule:
    """A kind of rule with its parameters."""

    kind: Kind
    parameters: dict[str, Any]

    def is_followed(self, answer: Answer) -> bool:
        """Whether an answer follows the rule. An empty answer follows none."""
        text = unicodedata.normalize("NFKC", answer.text).strip()
        if not text or (self.kind.needs_end and answer.finish != STOP):
            return False
        return self.kind.holds(text, **self.parameters)


def parse_rule(value: dict[str, Any]) -> Rule:
    """The rule of a JSON object such as `{"kind": "bullets", "count": 3}`.

    Raises ValueError for an unknown kind, and for parameters that the kind does not take.
    """
    values = dict(value)
    name = schema.parse(values.pop("kind", None), Annotated[str, OneOf(tuple(KINDS))], "rule.kind")
    types = typing.get_type_hints(KINDS[name].holds, include_extras=True)
    del types["text"], types["return"]
    if values.keys() != types.keys():
        raise ValueError(f'the rule "{name}" takes the keys {", ".join(["kind", *types])}')
    parameters = {key: schema.parse(values[key], types[key], f"rule.{key}") for key in types}
    for key, parameter in parameters.items():
        if parameter == [] or "" in (parameter if isinstance(parameter, list) else [parameter]):
            raise ValueError(f'"rule.{key}" is empty')
    return Rule(KINDS[name], parameters)
