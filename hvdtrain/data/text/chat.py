"""Documents for the tokenizers of transformers: text files, JSON lines of text, and conversations.

A line of a `.jsonl` file is an object with a field of text, or with "messages": `[{"role": ..., "content": ...}, ...]`.
Of a conversation only what the assistant says is to be predicted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvdtrain.data.text.corpus import Document
from hvdtrain.data.text.deadline import at_most
from hvdtrain.data.text.packed import TokenizedDocument
from hvdtrain.errors import DataError

_BATCH = 64
_SECONDS_A_TEMPLATE = 10.0
_TOO_LONG = (
    f"the chat template takes more than {_SECONDS_A_TEMPLATE:g} s for this conversation: it is broken, or was written"
    " to do harm"
)
_LONGEST_TEMPLATE = 1 << 20


@dataclass(frozen=True)
class Piece:
    """Text that is tokenised at once."""

    text: str
    is_target: bool = True
    is_start: bool = True
    """A document begins here."""
    is_end: bool = True
    """A document ends here."""


class DocumentReader:
    """Reads documents and has them tokenised.

    Args:
        tokenizer: of transformers.
        text_field: of a JSON line.
    """

    def __init__(self, tokenizer: Any, text_field: str) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-text token (eos_token), which stands between documents")
        self._tokenizer = tokenizer
        self._field = text_field

    def read(self, documents: Iterable[Document]) -> Iterator[TokenizedDocument]:
        """Yield the documents' tokens, tokenised a few at a time by all cores.

        Raises:
            DataError: a JSON line is none, or lacks the field; names file and line.
        """
        batch: list[Piece] = []
        for document in documents:
            pieces = self._lines(document) if document.path.suffix == ".jsonl" else self._text(document)
            for piece in pieces:
                batch.append(piece)
                if len(batch) == _BATCH:
                    yield from self._tokenize(batch)
                    batch = []
        if batch:
            yield from self._tokenize(batch)

    def _text(self, document: Document) -> Iterator[Piece]:
        """Yield a text file as one document, its end known one piece late."""
        before: Piece | None = None
        for text in document.pieces():
            if before is not None:
                yield before
            before = Piece(text, is_start=before is None, is_end=False)
        if before is not None:
            yield Piece(before.text, is_start=before.is_start)

    def _lines(self, document: Document) -> Iterator[Piece]:
        number = 0
        rest = ""
        for text in document.pieces():
            *lines, rest = (rest + text).split("\n")
            for line in lines:
                number += 1
                yield from self._line(line, f"{document.path}, line {number}")
        yield from self._line(rest, f"{document.path}, line {number + 1}")

    def _line(self, line: str, place: str) -> Iterator[Piece]:
        if not line.strip():
            return
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place}: not JSON ({error})") from error
        if isinstance(value, dict) and isinstance(value.get("messages"), list):
            yield from self._conversation(value["messages"], place)
        elif isinstance(value, dict) and isinstance(value.get(self._field), str):
            if value[self._field]:
                yield Piece(value[self._field])
        else:
            fields = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            raise DataError(
                f"{place}: there is neither a text '{self._field}' nor a list 'messages' (but {fields}):"
                " name the field with --data.text-field"
            )

    def _conversation(self, messages: Sequence[Any], place: str) -> Iterator[Piece]:
        for message in messages:
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise DataError(f"{place}: a message needs a 'role' and a 'content', both text")
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError(f"{place}: no message has the role 'assistant', whose words are what is learned")
        with at_most(_SECONDS_A_TEMPLATE, DataError(f"{place}: {_TOO_LONG}")):
            split = self._split(messages)
        for document in split:
            for i, (text, is_target) in enumerate(document):
                yield Piece(text, is_target, i == 0, i == len(document) - 1)

    def _split(self, messages: Sequence[dict[str, str]]) -> list[list[tuple[str, bool]]]:
        """Return a conversation as documents of parts, each with whether it is to be predicted.

        One document, if the template writes the beginning of a conversation as it writes the conversation. Some do not
        (they leave thoughts out of earlier answers): then every answer makes a document with what led to it.
        """
        if not self._tokenizer.chat_template:
            return [_plain(messages)]
        turns = [self._turn(messages, i) for i, message in enumerate(messages) if message["role"] == "assistant"]
        parts: list[tuple[str, bool]] = []
        before = ""
        for prompt, answer in turns:
            if not prompt.startswith(before):
                return [[(prompt, False), (answer[len(prompt) :], True)] for prompt, answer in turns]
            parts += [(prompt[len(before) :], False), (answer[len(prompt) :], True)]
            before = answer
        return [parts]

    def _turn(self, messages: Sequence[dict[str, str]], i: int) -> tuple[str, str]:
        """Return what the template writes before the answer that is message i, and up to its end."""
        answer = self._render(messages[: i + 1], False)
        for prompt in (self._render(messages[:i], True), self._render(messages[:i], False)):
            if answer.startswith(prompt):  # the second: a template that adds nothing to ask for an answer
                return prompt, answer
        raise DataError("the tokenizer's chat template changes what came before an answer: it cannot be learned")

    def _render(self, messages: Sequence[dict[str, str]], asks: bool) -> str:
        text: str = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asks)
        return text

    def _tokenize(self, pieces: Sequence[Piece]) -> Iterator[TokenizedDocument]:
        encoded = self._tokenizer([piece.text for piece in pieces], add_special_tokens=False)["input_ids"]
        for piece, ids in zip(pieces, encoded, strict=True):
            tokens = list(ids)
            bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
            starts = piece.is_start and bos is not None and tokens[:1] != [bos]
            # Templates end an answer themselves, some with a new line after it.
            ends = piece.is_end and eos not in tokens[-2:]
            tokens = [bos] * starts + tokens + [eos] * ends
            is_target = np.full(len(tokens), piece.is_target)
            yield TokenizedDocument(np.array(tokens, np.int64), is_target, piece.is_start)


def check_template(template: object, source: str) -> None:
    """Raise DataError where a tokenizer's chat template is longer than any that a person would write."""
    length = len(str(template or ""))
    if length > _LONGEST_TEMPLATE:
        raise DataError(f"the chat template of {source} has {length:,} characters: that is no template")


def _plain(messages: Sequence[dict[str, str]]) -> list[tuple[str, bool]]:
    """Return the parts of a conversation for a tokenizer without a template: "role: content", a line each."""
    parts = []
    for message in messages:
        is_target = message["role"] == "assistant"
        parts += [(f"{message['role']}:", False), (f" {message['content']}\n", is_target)]
    return parts
