"""Numbers in digits and in words, in two languages: pairs to translate that are always at hand."""

from __future__ import annotations

from collections.abc import Iterator

# fmt: off
_ENGLISH = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]
_ENGLISH_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_GERMAN = [
    "null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn", "elf", "zwölf",
    "dreizehn", "vierzehn", "fünfzehn", "sechzehn", "siebzehn", "achtzehn", "neunzehn",
]
_GERMAN_TENS = ["zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig"]
# fmt: on


def in_english(number: int) -> str:
    """Return a number from 0 to 999,999 in English words."""
    if number < 20:
        return _ENGLISH[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return "-".join((_ENGLISH_TENS[tens - 2], *((_ENGLISH[ones],) if ones else ())))
    unit, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    count, rest = divmod(number, unit)
    joint = " and " if rest and rest < 100 else " "
    return f"{in_english(count)} {name}" + (f"{joint}{in_english(rest)}" if rest else "")


def in_german(number: int) -> str:
    """Return a number from 0 to 999,999 in German words, which are one word."""
    if number < 20:
        return _GERMAN[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        before = f"{_before(ones)}und" if ones else ""
        return f"{before}{_GERMAN_TENS[tens - 2]}"
    unit, name = (1000, "tausend") if number >= 1000 else (100, "hundert")
    count, rest = divmod(number, unit)
    head = in_german(count)
    if count % 100 == 1:  # einhundert, hunderteintausend
        head = head.removesuffix("s")
    return f"{head}{name}" + (in_german(rest) if rest else "")


def _before(number: int) -> str:
    """Return the word of a digit as it stands before another word."""
    return "ein" if number == 1 else _GERMAN[number]


def number_pairs() -> Iterator[tuple[str, str]]:
    """Yield all pairs of a language with a number below 10,000, such as `de 21`, and its words, `einundzwanzig`."""
    for number in range(10**4):
        yield f"en {number}", in_english(number)
        yield f"de {number}", in_german(number)
