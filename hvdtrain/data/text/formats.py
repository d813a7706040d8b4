"""What a record of a data set holds, recognised by its fields: a conversation, a prompt and completion, or a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvdtrain.data.text.chat import Conversation, read_message
from hvdtrain.data.text.records import is_turn
from hvdtrain.errors import DataError
from hvdtrain.settings.untrusted import parse_json

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
# What a role is called that every template knows; other roles are the template's own business.
_SPEAKERS = {name: role for name, role in _ROLES.items() if role in ("user", "assistant", "system") and "_" not in name}
# Who speaks before an answer: what begins with them is the whole conversation.
_ASKING = tuple(name for name, role in _ROLES.items() if role in ("user", "system"))
_CONVERSATIONS = {"messages": "messages", "conversations": "ShareGPT"}


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
        record: a mapping, or a list of messages, as from JSON.
        text_field: the field of a text, "text" if the user has named no other.

    Raises:
        DataError: its fields are those of no format, or it misses something.
    """
    if isinstance(record, list) and record and is_turn(record[0]):
        return Recognised("messages", _conversation({}, record))
    if not isinstance(record, Mapping):
        raise DataError(f"a record is an object with fields, not {_kind(record)}")
    if text_field != "text" and isinstance(record.get(text_field), str):
        return Recognised("text", record[text_field])
    for field, format_name in _CONVERSATIONS.items():
        if isinstance(record.get(field), list):
            return Recognised(format_name, _conversation(record, record[field]))
    if "prompt" in record and "completion" in record:
        return Recognised("prompt/completion", _prompt_completion(record))
    if isinstance(record.get("instruction"), str) and isinstance(record.get("output"), str):
        return Recognised("Alpaca", _alpaca(record))
    if isinstance(record.get(text_field), str):
        return Recognised("text", record[text_field])
    talks = [name for name, value in record.items() if isinstance(value, list) and value and is_turn(value[0])]
    if len(talks) == 1:
        return Recognised(f"conversations in {talks[0]}", _conversation(record, record[talks[0]]))
    raise DataError(_of_no_format(record, text_field))


def recognise_pair(record: Any) -> tuple[str, Conversation | Completion, Conversation | Completion]:
    """Return what the format of a preference is called, and what is preferred to what.

    Args:
        record: a mapping with "chosen" and "rejected", texts or lists of messages, and mostly "prompt", likewise. What
            the two begin with alike belongs to the prompt.

    Raises:
        DataError: it is no such thing, or there is no difference.
    """
    if not isinstance(record, Mapping) or "chosen" not in record or "rejected" not in record:
        found = (", ".join(map(str, record)) or "none") if isinstance(record, Mapping) else _kind(record)
        raise DataError(f"a preference has the fields 'chosen', 'rejected' and mostly 'prompt', not {found}")
    prompt, chosen, rejected = (record.get(name) for name in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str) and (prompt is None or isinstance(prompt, str)):
        name = "pairs of texts"
        pair: list[Any] = _pair_of_texts(prompt, chosen, rejected)
    else:
        name = "pairs of conversations"
        talks = [_talk(prompt, record[field], field) for field in ("chosen", "rejected")]
        if talks[0] == talks[1]:
            raise DataError("'chosen' and 'rejected' are the same")
        pairs = zip(*talks, strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(map(len, talks)))
        pair = [_answer(record, talk, shared) for talk in talks]
        if any(answer.messages[shared]["role"] != "assistant" for answer in pair):
            raise DataError(
                f"'chosen' and 'rejected' differ in message {shared + 1}, which is no answer: a preference is between"
                " two answers to the same"
            )
    if pair[0] == pair[1]:
        raise DataError("'chosen' and 'rejected' are the same")
    return name, pair[0], pair[1]


def _pair_of_texts(prompt: str | None, chosen: str, rejected: str) -> list[Completion]:
    """Return the two as completions; without a prompt, of what they begin with alike, to the last space."""
    if prompt is None:
        alike = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        shared = chosen[: min(len(chosen), len(rejected)) if alike is None else alike]
        prompt = shared[: shared.rfind(" ") + 1]
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if not chosen or not rejected:
        raise DataError("'chosen' or 'rejected' is empty")
    return [Completion(prompt, chosen), Completion(prompt, rejected)]


def _talk(prompt: Any, answer: Any, field: str) -> list[Any]:
    """Return the messages of a prompt and an answer, which may hold those of the prompt already."""
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    after = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    if not isinstance(before, list) or not isinstance(after, list) or not after:
        raise DataError(f"'prompt' and {field!r} are texts, or lists of messages, and {field!r} is not empty")
    first = after[0].get("role", after[0].get("from")) if isinstance(after[0], dict) else None
    return after if first in _ASKING else [*before, *after]


def _answer(record: Mapping[str, Any], talk: Sequence[Any], shared: int) -> Conversation:
    """Return a conversation of which only what the assistant says after the first `shared` messages is learned."""
    found = _conversation(record, talk)
    is_learned = tuple(flag and i >= shared for i, flag in enumerate(found.is_learned))
    if not any(is_learned):
        raise DataError("where 'chosen' and 'rejected' differ, the assistant says nothing in one of them")
    return Conversation(found.messages, is_learned, found.variables)


def _of_no_format(record: Mapping[str, Any], text_field: str) -> str:
    """Return why a record is none that is known."""
    wanted = {**dict.fromkeys(_CONVERSATIONS, "a list of messages"), "instruction": "a text", text_field: "a text"}
    if "instruction" in record:
        wanted["output"] = "a text"
    for field, what in wanted.items():
        if field in record and not isinstance(record[field], str if what == "a text" else list):
            return f"{field!r} is {_kind(record[field])}, not {what}"
    return (
        f"the fields {', '.join(map(str, record)) or '(none)'} are those of no format that is known: messages;"
        f" conversations (ShareGPT); prompt and completion; instruction and output (Alpaca); {text_field}, another name"
        " of which --data.text-field gives"
    )


def _kind(value: Any) -> str:
    """Return what JSON calls a value."""
    kinds = {str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return "null" if value is None else kinds.get(type(value), "an object")


def _conversation(record: Mapping[str, Any], values: Sequence[Any]) -> Conversation:
    messages, is_learned = zip(*map(_message, values), strict=True) if values else ((), ())
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("no message has the role 'assistant', whose words are what is learned")
    variables = record.get("chat_template_kwargs") or {}
    if not isinstance(variables, Mapping):
        raise DataError(f"'chat_template_kwargs' is {_kind(variables)}, not an object")
    tools = _from_json(record.get("tools"))
    if tools:
        variables = {**variables, "tools": tools}
    return Conversation(tuple(messages), tuple(is_learned), dict(variables))


def _message(value: Any) -> tuple[dict[str, Any], bool]:
    """Return a message as `read_message` does, its role by the name that templates know it by."""
    if isinstance(value, dict) and "role" not in value and "from" in value:
        value = _from_sharegpt(value)
    if isinstance(value, dict) and isinstance(value.get("role"), str):
        role = value["role"]
        value = {**value, "role": _SPEAKERS.get(role.lower(), role)}
    return read_message(value)


def _from_sharegpt(turn: dict[str, Any]) -> dict[str, Any]:
    role = _ROLES.get(str(turn["from"]).lower())
    if role is None:
        raise DataError(f"a turn of 'conversations' is from {turn['from']!r}, not one of {', '.join(_ROLES)}")
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
        return parse_json(value)
    except ValueError as error:
        raise DataError(f"'tools' is no JSON ({error})") from error
