"""New words for a model that goes on to read other text: rows for them in its tokenizer and its embedding."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from danlu.exceptions import DataError
from danlu.models.embeddings import grow_embeddings
from danlu.text.coverage import coverage
from danlu.text.extend import extend_tokenizer
from danlu.text.new_words import find_words
from danlu.text.sample import MEGABYTE, sample
from danlu.text.word_pieces import WordPieces

SAMPLE = 32 * MEGABYTE  # of text, evenly from all of it
MEASURED = 400  # texts on which both tokenizers are compared


def learn_words(model: Any, tokenizer: Any, texts: Iterable[str], count: int) -> tuple[Any, dict[str, Any]]:
    """The tokenizer with the words of the texts that save most tokens; the model gets rows for them, in place.

    A row starts as the mean of the rows of the word's old pieces. The same texts give the same words.

    Args:
        count: words at most.

    Returns:
        The new tokenizer, and facts: how many words, and tokens per character by language, before and after.

    Raises:
        DataError: no word is frequent enough.
        ModelError: this kind of tokenizer, or a quantised model, cannot be extended.
    """
    taken = sample(texts, SAMPLE).texts
    found = find_words(WordPieces(tokenizer), taken, count)
    extension = extend_tokenizer(tokenizer, [word.text for word in found], config=model.config)
    if not extension.tokens:
        raise DataError("no word of the text is frequent enough to be added", field="new_words", hint="new_words: 0")
    grow_embeddings(model, {token.id: token.pieces for token in extension.tokens})
    measured = taken[:: max(1, len(taken) // MEASURED)]
    before, after = coverage([tokenizer, extension.tokenizer], measured)
    facts = {
        "new_words": len(extension.tokens),
        "tokens_per_character": {
            language: {
                "before": round(before.languages[language].tokens_per_character, 4),
                "after": round(after.languages[language].tokens_per_character, 4),
            }
            for language in before.languages
        },
    }
    return extension.tokenizer, facts
