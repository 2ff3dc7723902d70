"""Text from tokens while they are being generated."""
from collections.abc import Iterable, Iterator
from typing import Any


def decoded_pieces(tokenizer: Any, prompt: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """The new text after each token, "" while the bytes of a character are not all there; if they
    never come, a last piece shows what there is of it. EOS is silent. The prompt is decoded along,
    as SentencePiece takes the space off a text's beginning."""
    ids = list(prompt)
    text = tokenizer.decode(ids)
    shown = len(text)
    for token in tokens:
        if token != tokenizer.eos_id:
            ids.append(token)
        text = tokenizer.decode(ids)
        if text.endswith("\ufffd"):
            yield ""
        else:
            yield text[shown:]
            shown = len(text)
    if len(text) > shown:
        yield text[shown:]
