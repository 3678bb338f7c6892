"""Facts that plain text states, found by rules: fields, definitions, attributes, versions, dates, names and so on.

Every rule is one regular expression on one sentence. A statement has a cue - a few words of the same sentence that
name the fact without telling it - and a value, quoted. Standard library only.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

KINDS = ("field", "attribute", "definition", "version", "date", "quantity", "name", "identifier")
"""Kinds of statements; where two overlap, the earlier kind wins."""

_STOP_WORDS_TEXT = """
a about above after all also an and any are as at be because been before being below between both but by can could did
do does each either etc few for from further had has have having he her here hers him his how however i if in into is
it its itself just least less let like many may me might more most must my no nor not now of off on once only or other
our out over own per please same see shall she should since so some such than that the their them then there these they
this those through thus to too under until up upon us use used using very via was we were what when where which while
who whom whose why will with within without would yet you your
"""
STOP_WORDS = frozenset(_STOP_WORDS_TEXT.split())
_NOT_JOINING = ("a", "an", "and", "but", "not", "or", "such", "than", "that", "the", "this", "your")

_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|vs|cf|al|Dr|Mr|Mrs|Ms|Prof|St|No|Fig|Eq|Inc|Ltd|Jr|approx)|\b[A-Z])\.$"
)
_SENTENCE_END = re.compile(r"[.!?][\"')\]”]*\s+(?=[\"'(\[“]?[A-Z0-9])|\n+")
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
_WHOLE_WORD = re.compile(r"(?<!\S)[\"'(\[“]?([A-Za-z][A-Za-z'-]*)(?=[\"')\],;:”]*(?:\s|$))")

_MONTH = r"(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_PROPER = r"[A-Z][\w&'-]*[\w]"
_NAME = rf"{_PROPER}(?: (?:(?:of|the|van|von|de|der|du|la) ){{0,2}}{_PROPER}){{1,4}}|[A-Z]+[a-z]+[A-Z]\w*"
_NUMBER = r"(?<![\w.#/-])(?:\d{1,3}(?:,\d{3})+|\d+)"
_UNIT = (
    r"(?:%|percent|bits?|bytes?|[KMGT]i?B|Hz|[kMG]Hz|[nµm]?s|seconds?|minutes?|hours?|days?|weeks?|months?|years?|"
    r"[nµmck]?m|km²|meters?|metres?|kilometers?|kilometres?|miles?|feet|inches|[mk]?g|tons?|tonnes?|litres?|liters?|"
    r"degrees?|°C|°F|[kMG]?W|volts?|USD|EUR|times|percentage points)"
)

_FIELD = re.compile(r"^:?([A-Za-z][\w -]{1,30}\w):\s+(?!/)([^\n]{2,60}?)\.?$")
_ATTRIBUTE = re.compile(
    r"\b[Tt]he ((?:[a-z]+ ){1,3}of [\w' -]{2,30}?|[a-z]+(?: [a-z]+)?) (?:is|was|are|were) "
    rf"(?!(?:a|an|the|not|also|only) )((?:{_NAME}|{_PROPER})(?=[.,;) ]|$)|\d+(?:[.,]\d+)*(?=[.,;)]|$))"
)
_DEFINITION = re.compile(
    rf"^(?:The |An? )?({_NAME}|{_PROPER}) (?:is|are|was|were) (?:an?|the) ([a-z][^.,;:()]{{6,70}}?)"
    r"(?=[.,;:(]| that\b| which\b| who\b| for\b| to\b| and\b|$)"
)
_VERSION = re.compile(r"\b((?:[A-Z][\w+#]*|[Vv]ersion))(?: version)? v?(\d+(?:\.\d+)+\+?)(?![\w-])")
_YEAR = r"(?:1[0-9]|20)\d\d\b"
_DATE = re.compile(
    rf"\b(?:(?:\d{{1,2}} )?{_MONTH}(?: \d{{1,2}},?)? [12]\d{{3}}|[12]\d{{3}}-\d\d-\d\d)\b"
    rf"|(?<=\b[Ii]n ){_YEAR}|(?<=\b[Ss]ince ){_YEAR}|(?<=\b[Uu]ntil ){_YEAR}"
)
_MEASURE = re.compile(rf"{_NUMBER}(?:\.\d+)?(?: (?:million|billion|thousand))?\s?({_UNIT})(?!\w)")
_COUNT = re.compile(rf"{_NUMBER}(?: (?:million|billion|thousand))? ([a-z]{{3,}}s|people)\b")
_NAMES = re.compile(rf"\b(?:{_NAME})\b")
_IDENTIFIER = re.compile(
    r"(?<![\w/.:@-])(?:[A-Za-z]\w*(?:\.\w+)*\(\)|[A-Za-z]+_\w+|(?<=\")[A-Za-z_][\w.-]+(?=\")|(?<=“)[^”\n]{2,30}(?=”))"
    r"(?![\w/(=])"
)


@dataclass(frozen=True)
class Statement:
    """A fact as a text states it.

    Args:
        kind (`str`): One of [`KINDS`].
        cue (`str`): What the fact is about, for example ``"founded in"``; without the value and without slashes.
        value (`str`): As written.
        start (`int`), end (`int`): Character range of the value in the text, end exclusive.
        sentence (`str`): The sentence that states it.
        subject (`str`): What a definition defines, otherwise empty.
    """

    kind: str
    cue: str
    value: str
    start: int
    end: int
    sentence: str
    subject: str = ""


def split_sentences(text: str) -> Iterator[tuple[int, str]]:
    """(first character, sentence) of every sentence; a line break ends one, an abbreviation does not."""
    start = 0
    for found in _SENTENCE_END.finditer(text):
        is_line = "\n" in found.group()
        if not is_line and _ABBREVIATION.search(text[max(start, found.start() - 10) : found.start() + 1]):
            continue
        sentence = text[start : found.end()].rstrip()
        if sentence:
            yield start, sentence
        start = found.end()
    if text[start:].strip():
        yield start, text[start:].rstrip()


def cut_at_sentence(text: str, words: int) -> int:
    """Length of the text's first `words` words, shortened to the last sentence that ends in them."""
    ends = [found.end() for found in re.finditer(r"\S+", text)]
    if len(ends) <= words:
        return ends[-1] if ends else 0
    limit = ends[words - 1]
    return max((start + len(one) for start, one in split_sentences(text) if start + len(one) <= limit), default=limit)


def whole_value(value: str) -> re.Pattern[str]:
    """Finds a value where it is not a part of another word; to know the first place, [`find_whole`] costs a tenth."""
    return re.compile(rf"(?<!\w){re.escape(value)}(?!\w)")


def find_whole(value: str, text: str) -> int:
    """The first place where a text holds a value that is not a part of another word; -1 if there is none."""
    place = text.find(value)
    while place >= 0:
        end = place + len(value)
        if not (_joins(text[max(place - 1, 0) : place]) or _joins(text[end : end + 1])):
            break
        place = text.find(value, place + 1)
    return place


def _joins(character: str) -> bool:
    return character.isalnum() or character == "_"


def content_words(text: str) -> list[str]:
    """Words that carry meaning, in lower case."""
    return [word for word in (found.lower() for found in _WORD.findall(text)) if word not in STOP_WORDS]


def find_statements(text: str) -> list[Statement]:
    """All statements of a text, in order and without overlaps."""
    chosen: list[Statement] = []
    for start, sentence in split_sentences(text):
        found: list[Statement] = []
        for rule in _RULES:
            for one in rule(sentence):
                if one.cue and all(one.end <= other.start or one.start >= other.end for other in found):
                    found.append(one)
        found.sort(key=lambda statement: statement.start)
        chosen += [replace(one, start=start + one.start, end=start + one.end) for one in found]
    return chosen


def _context(sentence: str, start: int, end: int, join: bool = True) -> str:
    """A cue from the words next to a value: the content word before it (and what joins them), else the one after."""
    before = _WHOLE_WORD.findall(sentence[:start])[-5:]
    for place in range(len(before) - 1, -1, -1):
        if _is_content(before[place]):
            joined = [word for word in before[place + 1 :] if word.lower() not in _NOT_JOINING]
            return " ".join([before[place], *(joined[-1:] if join else ())]).lower().removesuffix("'s")
    after = [word for word in _WHOLE_WORD.findall(sentence[end:])[:3] if _is_content(word)]
    return after[0].lower() if after else ""


def _is_content(word: str) -> bool:
    return len(word) > 2 and word.lower() not in STOP_WORDS


def _statement(kind: str, cue: str, found: re.Match, group: int, subject: str = "") -> Statement:
    cue, value = " ".join(cue.split()), found.group(group)
    cue = "" if value.lower() in cue.lower() else cue
    return Statement(kind, cue, value, found.start(group), found.end(group), found.string, subject)


def _fields(sentence: str) -> Iterator[Statement]:
    found = _FIELD.match(sentence)
    if found and len(found.group(1).split()) <= 4 and len(found.group(2).split()) <= 8 and "://" not in found.group(2):
        yield _statement("field", found.group(1).lower(), found, 2)


def _attributes(sentence: str) -> Iterator[Statement]:
    for found in _ATTRIBUTE.finditer(sentence):
        yield _statement("attribute", found.group(1), found, 2)


def _definitions(sentence: str) -> Iterator[Statement]:
    found = _DEFINITION.match(sentence)
    if found and found.group(1).lower() not in STOP_WORDS:
        yield _statement("definition", f"meaning of {found.group(1)}", found, 2, found.group(1))


def _versions(sentence: str) -> Iterator[Statement]:
    for found in _VERSION.finditer(sentence):
        product = found.group(1)
        is_plain = product.lower() in STOP_WORDS or product.lower() == "version"
        yield _statement("version", "version" if is_plain else f"{product} version", found, 2)


def _dates(sentence: str) -> Iterator[Statement]:
    for found in _DATE.finditer(sentence):
        yield _statement("date", _context(sentence, found.start(), found.end()), found, 0)


def _quantities(sentence: str) -> Iterator[Statement]:
    for found in _MEASURE.finditer(sentence):
        context = _context(sentence, found.start(), found.end(), join=False)
        yield _statement("quantity", f"{context} in {found.group(1)}" if context else "", found, 0)
    for found in _COUNT.finditer(sentence):
        # "1 is", "2 uses": a number before a verb counts nothing.
        if found.group(1) not in STOP_WORDS:
            yield _statement("quantity", f"number of {found.group(1)}", found, 0)


def _names(sentence: str) -> Iterator[Statement]:
    for found in _NAMES.finditer(sentence):
        # At the start of a sentence a capital says nothing, unless one stands inside the word too.
        is_opening = not sentence[: found.start()].strip("\"'([“ ") and " " in found.group()
        if not is_opening and found.group().split()[0].lower() not in STOP_WORDS:
            yield _statement("name", _context(sentence, found.start(), found.end()), found, 0)


def _identifiers(sentence: str) -> Iterator[Statement]:
    for found in _IDENTIFIER.finditer(sentence):
        yield _statement("identifier", _context(sentence, found.start(), found.end()), found, 0)


_RULES: tuple[Callable[[str], Iterator[Statement]], ...] = (
    *(_fields, _attributes, _definitions, _versions, _dates, _quantities, _names, _identifiers),
)
