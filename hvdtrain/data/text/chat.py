"""Conversations as the chat template of their tokenizer writes them, and which of their tokens are learned.

The tokens are those of `apply_chat_template(conversation, tokenize=True)`; only which of them are targets is decided
here: what the template writes for an answer, up to the token that ends it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hvdtrain.data.text.deadline import at_most
from hvdtrain.errors import ConfigError, DataError, one_line
from hvdtrain.settings.untrusted import parse_json

_MARK = "hvdtrain-answer"
_LONGEST_TEMPLATE = 1 << 20
_SECONDS_A_TEMPLATE = 10.0
_TOO_LONG = (
    f"the chat template takes more than {_SECONDS_A_TEMPLATE:g} s for this conversation: it is broken, or was written"
    " to do harm"
)


@dataclass(frozen=True)
class Conversation:
    """Messages, and what else their template may need."""

    messages: tuple[dict[str, Any], ...]
    """As `apply_chat_template` takes them."""
    is_learned: tuple[bool, ...]
    """Which of them."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Of the template: `tools` and others."""


@dataclass(frozen=True)
class Passage:
    """Text to be tokenised at once."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """From which character to which one it is learned, in order."""
    is_start: bool = True
    """A document begins here."""
    ending: str | None = None
    """A token to be learned after the text; None for none."""
    is_whole: bool = False
    """It is cut rather than continued in another sample, where it is too long for one."""
    begins: str | None = None
    """A token before the text; None for none."""

    @property
    def num_bytes(self) -> int:
        """Return the bytes that are learned, as UTF-8."""
        return sum(len(self.text[start:end].encode()) for start, end in self.spans)


def read_message(value: Any) -> tuple[dict[str, Any], bool]:
    """Return a message as templates take it, and whether it is learned if it is an answer.

    Content that is a list of texts becomes one text, arguments of tool calls that are JSON become what they say.
    `"weight": 0` and `"train": false` keep an answer from being learned.

    Raises:
        DataError: it has no role, or content that is no text.
    """
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise DataError("a message needs a 'role' and a 'content'")
    message = {key: item for key, item in value.items() if key not in ("weight", "train") and item is not None}
    message["content"] = _as_text(value.get("content"))
    if message["content"] is None:
        if not value.get("tool_calls"):
            raise DataError("a message needs a 'role' and a 'content'")
        message["content"] = ""
    if "tool_calls" in message:
        calls = message["tool_calls"]
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise DataError("'tool_calls' of a message is no list of objects")
        message["tool_calls"] = [_read_call(call) for call in calls]
    switches = [_switch(value, name) for name in ("weight", "train")]
    return message, message["role"] == "assistant" and all(switches)


def _switch(message: dict[str, Any], name: str) -> bool:
    """Return whether a message's "weight" or "train" lets it be learned, as it does where there is none."""
    found = message.get(name)
    if found is None:
        return True
    if found not in (0, 1) or isinstance(found, str):  # of numbers and truths
        raise DataError(f"{name!r} of a message is {found!r}: it can be 0 or 1, false or true")
    return bool(found)


def _as_text(content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    texts = [_part(part) for part in (content if isinstance(content, list) else [content])]
    return "".join(texts)


def _part(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        kind = f" (a part of it is of type {part['type']})" if isinstance(part, dict) and "type" in part else ""
        raise DataError(f"the content of a message is neither a text nor a list of texts{kind}")
    return text


def _read_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": parse_json(function["arguments"])}}
    except ValueError:
        return call


def check_template(template: object, source: str) -> None:
    """Raise DataError where a tokenizer's chat template is longer than any that a person would write."""
    length = len(str(template or ""))
    if length > _LONGEST_TEMPLATE:
        raise DataError(f"the chat template of {source} has {length:,} characters: that is no template")


class ChatTemplate:
    """Writes conversations, and finds the answers in them.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        special = {str(token) for token in added if getattr(token, "special", False)}
        ours = set(inspect.signature(tokenizer.apply_chat_template).parameters)
        # What is none of a template's variables, but says what is done with it.
        self._reserved = ours - {"tools", "documents", "kwargs"}
        self._special = tuple(sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True))
        self._is_tried = False

    def passages(self, conversation: Conversation) -> list[Passage]:
        """Return the conversation as documents: one, if the template writes its beginning as it writes the whole.

        Some do not (they leave thoughts out of earlier answers): then every answer makes a document with what led to
        it, as it was when it was given.

        Raises:
            ConfigError: there is no template.
            DataError: it does not write this conversation.
        """
        if not self._tokenizer.chat_template:
            raise ConfigError(
                "there are conversations, and the tokenizer has no chat template: give --data.chat-template FILE"
            )
        learned = [i for i, is_learned in enumerate(conversation.is_learned) if is_learned]
        if not learned:
            return []
        reserved = sorted(self._reserved & set(conversation.variables))
        if reserved:
            raise DataError(f"'chat_template_kwargs' sets {reserved[0]}, which is no variable of a template")
        with at_most(_SECONDS_A_TEMPLATE, DataError(_TOO_LONG)):
            self._try(conversation, learned[-1])
            return self._write(conversation, learned)

    def _try(self, conversation: Conversation, i: int) -> None:
        """Raise ConfigError where the template writes nothing of an answer, message i: nothing but its end was learned.

        The first conversation that has a plain one shows it.
        """
        message = conversation.messages[i]
        if self._is_tried or not message["content"] or message.get("tool_calls"):
            return
        marked = Conversation((*conversation.messages[:i], {**message, "content": _MARK}), (), conversation.variables)
        text = self._try_render(marked, i + 1, False)
        if text is not None and _MARK not in text:
            raise ConfigError(
                "the chat template does not write what the assistant says: it is no template, or none for such messages"
            )
        self._is_tried = True

    def question(self, asked: Any) -> str:
        """Return what the template writes up to an answer.

        Args:
            asked: a user's words, or messages.

        Raises:
            ConfigError: there is no template.
            DataError: it does not write this.
        """
        if not self._tokenizer.chat_template:
            raise ConfigError(
                "--eval.chat needs a chat template, and the tokenizer has none: give --data.chat-template"
            )
        values = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
        messages = tuple(read_message(value)[0] for value in values)
        with at_most(_SECONDS_A_TEMPLATE, DataError(_TOO_LONG)):
            return self._render(Conversation(messages, ()), len(messages), asks=True)

    def _write(self, conversation: Conversation, learned: list[int]) -> list[Passage]:
        whole = self._render(conversation, len(conversation.messages))
        answers = [self._render(conversation, i + 1) for i in learned]
        if all(map(whole.startswith, answers)):
            spans = [self._span(conversation, i, text, whole) for i, text in zip(learned, answers, strict=True)]
            is_last = learned[-1] == len(conversation.messages) - 1
            ending = self._ending(conversation, learned[-1], whole[slice(*spans[-1])]) if is_last else None
            return [Passage(whole, tuple(spans), ending=ending, is_whole=True)]
        passages = []
        for i, text in zip(learned, answers, strict=True):
            span = self._span(conversation, i, text, text)
            ending = self._ending(conversation, i, text[slice(*span)])
            passages.append(Passage(text, (span,), ending=ending, is_whole=True))
        return passages

    def _span(self, conversation: Conversation, i: int, text: str, whole: str) -> tuple[int, int]:
        """Return where the answer that is message i begins and where what ends it does; `text` ends with it."""
        start, end = self._start(conversation, i, text), len(text)
        trimmed = len(text.rstrip())
        if self._ends(text[start:trimmed]):
            return start, trimmed
        if self._ends(text[start:end]):
            return start, end
        after = whole[end:]
        blank = len(after) - len(after.lstrip())
        follows = next((token for token in self._special if after.startswith(token, blank)), None)
        return start, end if follows is None else end + blank + len(follows)

    def _start(self, conversation: Conversation, i: int, text: str) -> int:
        """Return where the answer that is message i begins in `text`, which ends with it."""
        asked, before = (self._try_render(conversation, i, asks) for asks in (True, False))
        if asked is not None and text.startswith(asked):
            return len(asked)
        if before is not None and text.startswith(before):
            # What asks for an answer may go on otherwise than this one does, as with thoughts that were left out.
            return max(len(before), _common(asked or "", text))
        message = conversation.messages[i]
        marked = {**message, "content": _MARK + message["content"]}
        other = Conversation((*conversation.messages[:i], marked), (), conversation.variables)
        start = self._render(other, i + 1).find(_MARK)
        if start < 0 or not message["content"] or not text.startswith(message["content"], start):
            raise DataError("the chat template does not say where an answer begins: it cannot be learned")
        return start

    def _ending(self, conversation: Conversation, i: int, answer: str) -> str | None:
        """Return the token that ends an answer after which nothing is written; None if the template wrote one."""
        if self._ends(answer):
            return None
        question = {"role": "user", "content": "?"}
        more = Conversation((*conversation.messages[: i + 1], question), (), conversation.variables)
        text, longer = self._render(conversation, i + 1), self._try_render(more, i + 2, False)
        if longer is not None and longer.startswith(text):
            after = longer[len(text) :].lstrip()
            follows = next((token for token in self._special if after.startswith(token)), None)
            if follows is not None:
                return follows
        end: str | None = self._tokenizer.eos_token
        return end

    def _ends(self, text: str) -> bool:
        return text.endswith(self._special)

    def _try_render(self, conversation: Conversation, count: int, asks: bool) -> str | None:
        try:
            return self._render(conversation, count, asks)
        except DataError:
            return None  # a beginning that the template refuses, such as none at all

    def _render(self, conversation: Conversation, count: int, asks: bool = False) -> str:
        """Return what the template writes for the first messages, and to ask for an answer."""
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(conversation.messages[:count]),
                tokenize=False,
                add_generation_prompt=asks,
                **conversation.variables,
            )
        except Exception as error:  # a template is a program of someone else's
            raise DataError(f"the chat template refuses this conversation ({one_line(error)})") from error
        return text


def _common(a: str, b: str) -> int:
    """Return the length of what two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
