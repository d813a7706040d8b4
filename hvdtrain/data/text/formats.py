"""What a record of a data set holds, recognised by its fields: a conversation, a prompt and completion, or a text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvdtrain.data.text.chat import Conversation, read_message
from hvdtrain.errors import DataError

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


@dataclass(frozen=True)
class Completion:
    """A text of which only the second part is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Recognised:
    """A record's content, and what its format is called."""

    format: str
    content: Conversation | Completion | str


def recognise(record: Any, text_field: str) -> Recognised:
    """Return what a record holds.

    Args:
        record: a mapping, as from JSON.
        text_field: the field of a text, "text" if the user has named no other.

    Raises:
        DataError: its fields are those of no format, or it misses something.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"a record is an object with fields, not {type(record).__name__}")
    if text_field != "text" and isinstance(record.get(text_field), str):
        return Recognised("text", record[text_field])
    if isinstance(record.get("messages"), list):
        return Recognised("messages", _conversation(record, record["messages"]))
    if isinstance(record.get("conversations"), list):
        return Recognised("ShareGPT", _conversation(record, [_from_sharegpt(turn) for turn in record["conversations"]]))
    if "prompt" in record and "completion" in record:
        return Recognised("prompt/completion", _prompt_completion(record))
    if isinstance(record.get("instruction"), str) and isinstance(record.get("output"), str):
        return Recognised("Alpaca", _alpaca(record))
    if isinstance(record.get(text_field), str):
        return Recognised("text", record[text_field])
    raise DataError(
        f"the fields {', '.join(map(str, record)) or '(none)'} are those of no format that is known: messages;"
        f" conversations (ShareGPT); prompt and completion; instruction and output (Alpaca); {text_field}, another name"
        " of which --data.text-field gives"
    )


def _conversation(record: Mapping[str, Any], values: Sequence[Any]) -> Conversation:
    messages, is_learned = zip(*map(read_message, values), strict=True) if values else ((), ())
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("no message has the role 'assistant', whose words are what is learned")
    variables = dict(record.get("chat_template_kwargs") or {})
    tools = _from_json(record.get("tools"))
    if tools:
        variables["tools"] = tools
    return Conversation(tuple(messages), tuple(is_learned), variables)


def _from_sharegpt(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise DataError("a turn of 'conversations' needs 'from' and 'value'")
    if "role" in turn:
        return turn
    role = _ROLES.get(str(turn.get("from")))
    if role is None:
        raise DataError(f"a turn of 'conversations' is from {turn.get('from')!r}, not one of {', '.join(_ROLES)}")
    kept = {key: value for key, value in turn.items() if key in ("weight", "train")}
    return {"role": role, "content": turn.get("value"), **kept}


def _prompt_completion(record: Mapping[str, Any]) -> Conversation | Completion:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Completion(prompt, completion)
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise DataError("'prompt' and 'completion' are two texts, or two lists of messages")
    unlearned = [{**message, "weight": 0} if isinstance(message, dict) else message for message in prompt]
    return _conversation(record, [*unlearned, *completion])


def _alpaca(record: Mapping[str, Any]) -> Conversation:
    more = record.get("input") or ""
    if not isinstance(more, str):
        raise DataError("'input' is no text")
    asked = f"{record['instruction']}\n\n{more}" if more else record["instruction"]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": record["output"]}]
    if isinstance(record.get("system"), str) and record["system"]:
        messages.insert(0, {"role": "system", "content": record["system"]})
    return _conversation(record, messages)


def _from_json(value: Any) -> Any:
    """Return what a text of JSON says; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f"'tools' is no JSON ({error})") from error
