"""Which language a short text is probably in: by its letters or, in Latin ones, by its most common words."""

import re
import unicodedata
from collections import Counter

_COMMON = {
  "English": "the and of to for with in on is you your this that by from a an are it at be as or",
  "German": "der die das und mit für von zu im in den ist ein eine auf aus bei nicht auch oder des dem",
  "French": "le la les et de du des pour avec une un dans sur en est au aux par plus votre vous",
  "Spanish": "el los las y de del para con una un en es por su al que se más lo",
  "Italian": "il lo gli e di del della per con una un in è da al che su più dei delle",
  "Portuguese": "o os as e de do da dos das para com uma um em é por ao que não mais seu",
  "Dutch": "de het een en van voor met op in is te zijn dat aan uit bij ook niet naar door",
  "Polish": "i w na z do dla się jest nie to ze od po oraz przez jak który",
  "Swedish": "och i att en ett för med på av är som till den det från inte har om",
  "Turkish": "ve bir için ile bu da de çok olarak en her gibi kadar daha",
}
_WORDS = {language: frozenset(words.split()) for language, words in _COMMON.items()}
_SCRIPTS = {
  "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "CJK": "Chinese", "HANGUL": "Korean", "CYRILLIC": "Cyrillic script",
  "ARABIC": "Arabic script", "HEBREW": "Hebrew", "GREEK": "Greek", "THAI": "Thai", "DEVANAGARI": "Devanagari script",
}  # fmt: skip


def language_of(text: str) -> str:
  """The language of a text in words; "unknown" where nothing tells.

  Args:
    text: a title, or a sentence or two.
  """
  letters = [sign for sign in text[:500] if sign.isalpha()]
  scripts = Counter(unicodedata.name(sign, "").split(" ")[0] for sign in letters if not sign.isascii())
  for script, language in _SCRIPTS.items():
    if 3 * scripts[script] > len(letters):
      return language
  words = set(re.findall(r"[^\W\d_]+", text[:500].lower()))
  best = max(_WORDS, key=lambda language: len(words & _WORDS[language]))
  return best if words & _WORDS[best] else "unknown"
