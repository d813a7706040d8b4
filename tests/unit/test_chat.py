"""Conversations: the tokens are those of `apply_chat_template`, and what is learned are the answers and their ends."""

import pytest
from hugging import import_transformers
from templates import KINDS, TEMPLATES, make_chat_tokenizer

from hvdtrain.data.text.chat import ChatTemplate, Conversation, read_message
from hvdtrain.data.text.documents import DocumentReader
from hvdtrain.errors import ConfigError, DataError

import_transformers()
pytestmark = pytest.mark.filterwarnings("default")  # transformers' own are none of ours
TALK = [
    {"role": "user", "content": "hello world"},
    {"role": "assistant", "content": "how are you"},
    {"role": "user", "content": "where is it?"},
    {"role": "assistant", "content": "there: 1 2 3"},
]


def tokenized(tokenizer, messages, **variables):
    """Return the documents of a conversation."""
    reader = DocumentReader(tokenizer, "text", "stop")
    record = {"messages": messages, **variables}
    passages = reader.passages_of(record)
    return list(reader.tokenize(passages)) if passages else []


def learned(tokenizer, document):
    """Return what is learned, a text for each run of tokens."""
    runs, before = [], False
    for token, is_target in zip(document.tokens.tolist(), document.is_target.tolist(), strict=True):
        if is_target:
            runs = [*runs[:-1], [*runs[-1], token]] if before else [*runs, [token]]
        before = is_target
    return [tokenizer.decode(run).strip() for run in runs]


def reference(tokenizer, messages, **variables):
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **variables))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_tokens_are_those_of_the_template(template, kind):
    tokenizer = make_chat_tokenizer(kind, template)
    end = TEMPLATES[template][1]
    documents = tokenized(tokenizer, TALK)
    whole = documents[-1].tokens.tolist()
    expected = reference(tokenizer, TALK)
    assert whole[: len(expected)] == expected
    extra = [tokenizer.convert_tokens_to_ids(end)] if template in ("next_ends", "plain") else []
    assert whole[len(expected) :] == extra
    answers = ["how are you", "there: 1 2 3"]
    found = [run for document in documents for run in learned(tokenizer, document)]
    ends = {"plain": ["", end]}.get(template, [end, end])
    expected_runs = [answer + end for answer, end in zip(answers, ends, strict=True)]
    if template == "thoughts_dropped":
        assert len(documents) == 2
        expected_runs = [f"<think>\n\n</think>\n\n{run}" for run in expected_runs]
    squeezed = [run.replace(" ", "").replace("\n", "") for run in found]
    assert squeezed == [run.replace(" ", "").replace("\n", "") for run in expected_runs]
    assert all(document.is_whole for document in documents)


@pytest.mark.parametrize("template", ["chatml", "headers", "next_ends", "lines", "first_message"])
def test_a_system_message_and_an_answer_in_the_middle(template):
    tokenizer = make_chat_tokenizer("bytes", template)
    messages = [{"role": "system", "content": "be brief"}, *TALK, {"role": "user", "content": "hello"}]
    (document,) = tokenized(tokenizer, messages)
    assert document.tokens.tolist() == reference(tokenizer, messages)
    end = TEMPLATES[template][1]
    assert learned(tokenizer, document) == [f"how are you{end}", f"there: 1 2 3{end}"]


@pytest.mark.parametrize("off", [{"weight": 0}, {"train": False}])
def test_answers_can_be_left_out(off):
    tokenizer = make_chat_tokenizer("bytes", "chatml")
    messages = [TALK[0], {**TALK[1], **off}, *TALK[2:]]
    (document,) = tokenized(tokenizer, messages)
    assert document.tokens.tolist() == reference(tokenizer, TALK)
    assert learned(tokenizer, document) == ["there: 1 2 3<|im_end|>"]
    assert tokenized(tokenizer, [TALK[0], {**TALK[1], **off}]) == []


def test_tools_reach_the_template():
    tokenizer = make_chat_tokenizer("bytes", "tools")
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    tools = [{"type": "function", "function": {"name": "weather"}}]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": " world"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1 2"},
        {"role": "assistant", "content": "there"},
    ]
    (document,) = tokenized(tokenizer, messages, tools=tools)
    text = tokenizer.decode(document.tokens)
    assert '"name": "weather"' in text
    assert "hello world" in text
    assert learned(tokenizer, document) == ["<call>weather(Bern)</call><|im_end|>", "there<|im_end|>"]
    (same,) = tokenized(tokenizer, messages, tools='[{"type": "function", "function": {"name": "weather"}}]')
    assert same.tokens.tolist() == document.tokens.tolist()


@pytest.mark.parametrize("template", ["chatml", "first_message", "next_ends"])
def test_the_assistant_may_begin(template):
    tokenizer = make_chat_tokenizer("bytes", template)
    (document,) = tokenized(tokenizer, TALK[1:])
    assert document.tokens.tolist()[: len(reference(tokenizer, TALK[1:]))] == reference(tokenizer, TALK[1:])
    end = TEMPLATES[template][1]
    assert [run.removeprefix("<|im_start|>assistant\n") for run in learned(tokenizer, document)] == [
        f"how are you{end}",
        f"there: 1 2 3{end}",
    ]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (
            "turns",
            [{"role": "system", "content": "x"}, *TALK],
            r"refuses this conversation \(System role not supported\)",
        ),
        ("instructions", [TALK[0], *TALK], r"refuses this conversation \(roles must alternate\)"),
        ("instructions", TALK[1:], r"refuses this conversation \(roles must alternate\)"),
        ("chatml", [TALK[0]], "no message has the role 'assistant'"),
        ("chatml", [{"role": "user"}, TALK[1]], "needs a 'role' and a 'content'"),
        ("chatml", [{"role": "user", "content": [{"type": "image"}]}, TALK[1]], "neither a text nor a list of texts"),
        ("chatml", [{"role": "user", "content": "\ud83d"}, TALK[1]], "half of a surrogate pair"),
    ],
)
def test_what_cannot_be_used_says_why(template, messages, message):
    tokenizer = make_chat_tokenizer("bytes", template)
    with pytest.raises(DataError, match=message):
        tokenized(tokenizer, messages)


def test_without_a_template():
    tokenizer = make_chat_tokenizer("bytes", "chatml")
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"give --data\.chat-template FILE"):
        tokenized(tokenizer, TALK)


def test_bytes_that_are_learned():
    tokenizer = make_chat_tokenizer("bytes", "chatml")
    messages, flags = zip(*map(read_message, TALK), strict=True)
    (passage,) = ChatTemplate(tokenizer).passages(Conversation(messages, flags))
    assert passage.num_bytes == len(b"how are you<|im_end|>there: 1 2 3<|im_end|>")
