"""Documents for the tokenizers of transformers: texts and records of many formats, as tokens and what is learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hvdtrain.data.text.chat import ChatTemplate, Conversation, Passage
from hvdtrain.data.text.corpus import Document
from hvdtrain.data.text.formats import Completion, recognise
from hvdtrain.data.text.packed import TokenizedDocument
from hvdtrain.data.text.records import read_records
from hvdtrain.data.text.sources import Source
from hvdtrain.errors import DataError
from hvdtrain.settings.untrusted import parse_json

_BATCH = 64


class DocumentReader:
    """Reads documents and has them tokenised.

    Args:
        tokenizer: of transformers.
        text_field: the field of a record that holds a text.
        on_error: stop at a record that cannot be used, or skip it.
    """

    def __init__(self, tokenizer: Any, text_field: str, on_error: Literal["stop", "skip"]) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-text token (eos_token), which stands between documents")
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        self._text_field = text_field
        self._on_error = on_error
        self.formats: Counter[str] = Counter()
        """How many records there were of each format, and files of text."""
        self.skipped: list[str] = []
        """The first reasons why records were skipped."""
        self.num_skipped = 0
        self.without: Counter[str] = Counter()
        """How many records there were of which nothing is learned, by what they are."""

    def describe(self) -> dict[str, Any]:
        """Return what was read, as JSON can hold it."""
        return {
            "formats": dict(self.formats),
            "num_skipped": self.num_skipped,
            "skipped": self.skipped,
            "without": dict(self.without),
        }

    def read(self, sources: Iterable[Source]) -> Iterator[TokenizedDocument]:
        """Yield the documents' tokens, tokenised a few at a time by all cores.

        Raises:
            DataError: a record cannot be used; names file and line.
        """
        batch: list[Passage] = []
        for source in sources:
            passages = self._text(source.document) if source.kind is None else self._records(source)
            for passage in passages:
                batch.append(passage)
                if len(batch) == _BATCH:
                    yield from self.tokenize(batch)
                    batch = []
        if batch:
            yield from self.tokenize(batch)

    def _text(self, document: Document) -> Iterator[Passage]:
        """Yield a text file as one document, its end known one piece late."""
        if document.start == 0:  # of one that is cut, the second part is no other file
            self.formats["text files"] += 1
        before: str | None = None
        is_start = True
        for text in document.pieces():
            if before is not None:
                yield self._plain(before, is_start=is_start, is_end=False)
                is_start = False
            before = text.removeprefix("\ufeff") if before is None else text
        if before is not None:
            yield self._plain(before, is_start=is_start)

    def _plain(self, text: str, is_start: bool = True, is_end: bool = True, learned_from: int = 0) -> Passage:
        tokenizer = self._tokenizer
        return Passage(
            text,
            ((learned_from, len(text)),),
            is_start=is_start,
            begins=tokenizer.bos_token if is_start else None,
            ending=tokenizer.eos_token if is_end else None,
            is_whole=learned_from > 0,
        )

    def _records(self, source: Source) -> Iterator[Passage]:
        assert source.kind is not None
        for place, raw in read_records(source.document.path, source.kind):
            if not source.holds(raw):
                continue
            try:
                yield from self.passages_of(raw)
            except DataError as error:
                if self._on_error == "stop":
                    raise DataError(f"{place}: {error}; --data.on-error skip leaves such records out") from error
                self.num_skipped += 1
                self.skipped = [*self.skipped, f"{place}: {error}"][:3]

    def passages_of(self, raw: Any) -> list[Passage]:
        """Return the passages of a record, JSON text or what it holds.

        Raises:
            DataError: it cannot be used; says why.
        """
        try:
            value = parse_json(raw) if isinstance(raw, str) else raw
        except ValueError as error:
            raise DataError(f"not JSON ({error})") from error
        name, passages = self._recognise(value)
        for passage in passages:
            try:
                passage.text.encode()
            except UnicodeEncodeError as error:
                raise DataError("half of a surrogate pair, which is no character") from error
        if passages:
            self.formats[name] += 1
        else:
            self.without["empty text" if name == "text" else "conversation without an answer to learn"] += 1
        return passages

    def _recognise(self, value: Any) -> tuple[str, list[Passage]]:
        """Return what a record's format is called, and its passages."""
        found = recognise(value, self._text_field)
        return found.format, self._written(found.content)

    def _written(self, content: Conversation | Completion | str) -> list[Passage]:
        if isinstance(content, Conversation):
            return self._template.passages(content)
        if isinstance(content, Completion):
            return [self._plain(content.prompt + content.completion, learned_from=len(content.prompt))]
        return [self._plain(content)] if content else []

    def tokenize(self, passages: Sequence[Passage]) -> Iterator[TokenizedDocument]:
        """Yield the tokens of passages, at least one, and which of them are learned."""
        tokenizer = self._tokenizer
        encoded = tokenizer(
            [passage.text for passage in passages],
            add_special_tokens=False,
            return_offsets_mapping=bool(tokenizer.is_fast),
        )
        for i, passage in enumerate(passages):
            tokens = list(encoded["input_ids"][i])
            if tokenizer.is_fast:
                is_target = _overlap(np.array(encoded["offset_mapping"][i], np.int64).reshape(-1, 2), passage.spans)
            else:
                is_target = self._by_beginnings(tokens, passage)
            before, after = self._around(passage, tokens)
            is_target = np.concatenate((np.zeros(len(before), bool), is_target, np.ones(len(after), bool)))
            yield TokenizedDocument(
                np.array([*before, *tokens, *after], np.int64),
                is_target,
                passage.is_start,
                passage.is_whole,
                passage.num_bytes,
            )

    def _around(self, passage: Passage, tokens: list[int]) -> tuple[list[int], list[int]]:
        """Return the tokens before and after a passage that its text does not hold itself."""
        begin, end = (
            [] if token is None else [self._tokenizer.convert_tokens_to_ids(token)]
            for token in (passage.begins, passage.ending)
        )
        return [] if tokens[:1] == begin else begin, [] if end and end[0] in tokens[-2:] else end

    def _by_beginnings(self, tokens: list[int], passage: Passage) -> NDArray[np.bool_]:
        """Return which tokens lie in a span, for tokenizers that do not tell where a token stands.

        The text up to a place has as many tokens as are those of the whole text.
        """
        is_target = np.zeros(len(tokens), bool)
        for start, end in passage.spans:
            begin, stop = (
                len(tokens) if place == len(passage.text) else self._count(passage.text[:place], tokens)
                for place in (start, end)
            )
            is_target[begin:stop] = True
        return is_target

    def _count(self, text: str, tokens: list[int]) -> int:
        """Return how many of the tokens are those of the text that they begin with."""
        part = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        pairs = enumerate(zip(part, tokens, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(part), len(tokens)))


def _overlap(offsets: NDArray[np.int64], spans: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Return which tokens have a character in a span.

    Args:
        offsets: int64 `(n, 2)`, from which character to which one each token reaches.
        spans: the same for what is learned.
    """
    is_target = np.zeros(len(offsets), bool)
    for start, end in spans:
        is_target |= (offsets[:, 1] > start) & (offsets[:, 0] < end) & (offsets[:, 1] > offsets[:, 0])
    return is_target
