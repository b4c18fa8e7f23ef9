"""Tokens of one continuation as text that may be shown at once, up to the first stop string."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MOST_HELD = 8
"""Tokens that are waited for: a character has up to four bytes, each of which may be a token, and bytes that belong to
none may stand before it."""


class TextStream:
    """Turns tokens into pieces of text: `"".join(pieces)` is the continuation without the stop string.

    Held back are bytes until they make a character, and text as long as it may be the beginning of a stop string.

    Args:
        decode: the tokenizer's.
        stops: strings that end the continuation.

    Attributes:
        stopped: whether a stop string has come; later tokens are nothing.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = [stop for stop in stops if stop]
        self._tokens: list[int] = []
        self._text = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that has become certain with `token`."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        if text.endswith(REPLACEMENT) and len(self._tokens) < MOST_HELD:
            return ""
        self._tokens.clear()
        self._text += text
        found = [place for place in map(self._text.find, self._stops) if place >= 0]
        if found:
            self.stopped = True
            return self._take(min(found))
        return self._take(len(self._text) - self._possible_stop())

    def close(self) -> str:
        """What is still held back, once no more tokens come."""
        if self.stopped:
            return ""
        self._text += self._decode(self._tokens)
        self._tokens.clear()
        found = [place for place in map(self._text.find, self._stops) if place >= 0]
        return self._take(min(found, default=len(self._text)))

    def _take(self, length: int) -> str:
        taken, self._text = self._text[:length], self._text[length:]
        return taken

    def _possible_stop(self) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        lengths = (
            length
            for stop in self._stops
            for length in range(min(len(stop), len(self._text)), 0, -1)
            if self._text.endswith(stop[:length])
        )
        return max(lengths, default=0)
