"""Which language a text is in, from its script and its most frequent words. Standard library only."""

import re
import unicodedata
from collections import Counter

FREQUENT_WORDS = {
    "de": "der die das und nicht ein eine mit von zu den dem auf für werden sich auch einer wird",
    "en": "the of and to in is that it for was with as on be by are this which from at",
    "es": "el la los las de y que en un una es se por con para del no como su más",
    "fr": "le la les des et est que dans un une pour pas qui sur au avec par du ce plus",
    "it": "il la di che è e un una per non con sono del della si da gli nel le anche",
    "nl": "de het een van en is dat op te in niet voor met zijn aan er ook door bij naar",
    "pl": "i w na się nie to z że jest do od przez jak dla po oraz być który są o",
    "pt": "o a os as de e que em um uma é do da não para com por se mais no",
}
"""Frequent words of languages in the Latin script, by ISO 639-1 code."""

_WORD = re.compile(r"[^\W\d_]+")
_MIN_HITS, _MIN_LEAD = 4, 1.3


def language_of(text: str, characters: int = 4000) -> str | None:
    """
    Language or script of a text.

    Args:
        text (`str`): The text.
        characters (`int`, *optional*, defaults to 4000): How much of it is read.

    Returns:
        `str`: A code of [`FREQUENT_WORDS`], or the name of another script (`"cyrillic"`, `"cjk"`); `None` where the
        text is too short or its language is none of these.
    """
    text = text[:characters]
    # Most texts are ASCII as a whole, and no letter of theirs has to be looked at.
    if not text.isascii():
        letters = [character for character in text if character.isalpha()]
        scripts = Counter("latin" if letter.isascii() else _script(letter) for letter in letters)
        script, count = scripts.most_common(1)[0] if scripts else ("latin", 0)
        if script != "latin":
            return script if count > len(letters) / 2 else None
    hits = Counter(code for word in _WORD.findall(text) for code in _CODES.get(word.lower(), ()))
    (best, code), (second, _) = sorted(((hits[code], code) for code in FREQUENT_WORDS), reverse=True)[:2]
    return code if best >= _MIN_HITS and best >= _MIN_LEAD * second else None


def _script(letter: str) -> str:
    return unicodedata.name(letter, "unknown").split()[0].lower().split("-")[0]


def _codes_by_word() -> dict[str, tuple[str, ...]]:
    codes: dict[str, set[str]] = {}
    for code, words in FREQUENT_WORDS.items():
        for word in words.split():
            codes.setdefault(word, set()).add(code)
    return {word: tuple(found) for word, found in codes.items()}


_CODES = _codes_by_word()
