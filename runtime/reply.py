# SPDX-License-Identifier: Apache-2.0
"""The text of one reply, token by token."""

from starkv.manifest import Manifest
from starkv.runtime.generation import Sampler, SamplingParameters, StopScanner
from starkv.runtime.preprocess.tokenizer import ChatTokenizer


class Reply:
    """Takes tokens as they are picked; gives out text and says when it is over.

    Args:
        manifest: knows the tokens that end a reply.
        tokenizer: the engine's.
        parameters: sampling and stopping.
    """

    def __init__(self, manifest: Manifest, tokenizer: ChatTokenizer, parameters: SamplingParameters) -> None:
        self.sampler = Sampler(parameters)
        self.tokens: list[int] = []
        """As picked, the one that ends the reply included."""
        self.finish_reason: str | None = None
        """``stop`` (end token or stop string) or ``length``, once the reply is over."""
        self._ends = frozenset(manifest.tokens.end_of_text)
        self._most = parameters.max_new_tokens
        self._tokenizer = tokenizer
        self._scanner, self._stream = StopScanner(parameters.stop), tokenizer.stream()

    @property
    def ended_by_token(self) -> bool:
        """Whether the last token ends the reply, so that it is not part of its text."""
        return bool(self.tokens) and self.tokens[-1] in self._ends

    @property
    def text(self) -> str:
        """All that the tokens say, what a stop string cut off included."""
        said = self.tokens[:-1] if self.ended_by_token else self.tokens
        return self._tokenizer.decode(said)

    def push(self, token: int) -> str:
        """Add a token; returns the text that became certain, and the rest of it once the reply is over."""
        self.tokens.append(token)
        if token in self._ends:
            self.finish_reason = "stop"
            return self._rest()
        piece = self._scanner.push(self._stream.push(token))
        if self._scanner.stopped:
            self.finish_reason = "stop"
            return piece
        if len(self.tokens) == self._most:
            self.finish_reason = "length"
            return piece + self._rest()
        return piece

    def _rest(self) -> str:
        return self._scanner.push(self._stream.finish()) + self._scanner.finish()

    def abandon(self, reason: str) -> str:
        """End the reply where it is, for ``reason``; returns what was held back."""
        self.finish_reason = reason
        return "" if self._scanner.stopped else self._rest()
