"""Multiple choice, against likelihoods computed one by one."""

import json

import pytest
import torch

from hvdtrain.data.text.choices import Choices, count_right
from hvdtrain.errors import DataError
from hvdtrain.models.config import DecoderConfig
from hvdtrain.models.decoder import Decoder

QUESTIONS = [
    {"context": "two and two is ", "choices": ["four", "five", "a very long answer"], "answer": 0},
    {"context": "é", "choices": ["x", "yy"], "answer": 1},
    {"context": "a long context that does not fit as a whole: ", "choices": ["no", "yes", "no", "it is"], "answer": 3},
]


def encode(text):
    return list(text.encode())


def write(path, questions):
    path.write_text("\n".join(json.dumps(question) for question in questions) + "\n\n")
    return path


def model():
    torch.manual_seed(0)
    network = Decoder(DecoderConfig(num_layers=1, hidden_size=16, num_heads=2), 257, seed=0).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(8)  # far from uniform
    return network


def likelihood(network, context, choice, length):
    tokens = [256, *encode(context), *encode(choice)][-(length + 1) :]
    logits = network(torch.tensor([tokens[:-1]])).log_softmax(-1)[0]
    count = len(encode(choice))
    return sum(logits[i, tokens[i + 1]].item() for i in range(len(tokens) - 1 - count, len(tokens) - 1))


@pytest.mark.parametrize("length", [24, 100])
def test_answers_are_those_of_one_by_one(tmp_path, length):
    network = model()
    data = Choices(write(tmp_path / "q.jsonl", QUESTIONS), encode, [256], length)
    right, right_per_byte = [], []
    for question in QUESTIONS:
        scores = [likelihood(network, question["context"], choice, length) for choice in question["choices"]]
        sizes = [len(encode(choice)) for choice in question["choices"]]
        right.append(scores.index(max(scores)) == question["answer"])
        per_byte = [score / size for score, size in zip(scores, sizes, strict=True)]
        right_per_byte.append(per_byte.index(max(per_byte)) == question["answer"])
    with torch.no_grad():
        together = count_right(network, data.batch(torch.arange(3)), lambda m, tokens: m(tokens))
        alone = [count_right(network, data.batch(torch.tensor([i])), lambda m, tokens: m(tokens)) for i in range(3)]
    assert int(together["choice_accuracy"]) == sum(right)
    assert int(together["choice_accuracy_per_byte"]) == sum(right_per_byte)
    assert [bool(one["choice_accuracy"]) for one in alone] == right
    assert [bool(one["choice_accuracy_per_byte"]) for one in alone] == right_per_byte
    assert data.num_targets(torch.arange(3)) == len(data) == 3


def test_a_model_that_knows_answers_all(tmp_path):
    """A model that is told the next byte: the right choice is "b", whatever came before."""

    def only_b(network, tokens):
        logits = torch.zeros(*tokens.shape, 257)
        logits[..., ord("b")] = 9.0
        return logits

    questions = [
        {"context": "?", "choices": ["a", "b", "c"], "answer": 1},
        {"context": "??", "choices": ["b"], "answer": 0},
    ]
    data = Choices(write(tmp_path / "q.jsonl", questions), encode, [256], 9)
    assert int(count_right(None, data.batch(torch.arange(2)), only_b)["choice_accuracy"]) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2 is not"),
        ('{"context": "a"}', "line 2 is not .*: there is no 'choices'"),
        ('{"context": "a", "choices": "bc", "answer": 1}', "line 2: 'choices' is no list of texts"),
        ('{"context": "a", "choices": ["b", null], "answer": 1}', "line 2: 'choices' is no list of texts"),
        ('{"context": "a", "choices": ["b", "c"], "answer": true}', "line 2: the answer True is none of the 2"),
        ('{"context": "a", "choices": ["b"], "answer": 1}', "line 2: the answer 1 is none of the 1 choices"),
        ('{"context": "a", "choices": ["b"], "answer": "b"}', "line 2: the answer b is none"),
        ('{"context": "a", "choices": [""], "answer": 0}', "line 2: a context and choices of 1 to 9 tokens"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, message):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(QUESTIONS[1]) + "\n" + line)
    with pytest.raises(DataError, match=message):
        Choices(path, encode, [256], 9)


def test_lines_end_where_jsons_do(tmp_path):
    """A line separator may stand in a text of JSON; other languages write it as it is. Numbers are texts."""
    path = tmp_path / "q.jsonl"
    question = {"context": "a\u2028b", "choices": [4, "5"], "answer": 0}
    path.write_text("\ufeff" + json.dumps(question, ensure_ascii=False) + "\r\n")
    assert len(Choices(path, encode, [256], 9)) == 1
    path.write_bytes(json.dumps(question).encode("utf-16"))
    with pytest.raises(DataError, match=r"q\.jsonl is not UTF-8 text: convert it, as with iconv -f utf-16 "):
        Choices(path, encode, [256], 9)


def test_a_file_without_questions(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        Choices(tmp_path / "nowhere", encode, [256], 9)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(DataError, match="holds no question"):
        Choices(tmp_path / "empty", encode, [256], 9)


def test_context_and_choice_are_tokenised_together(tmp_path):
    """Tokens of two letters: the one across the border belongs to the choice."""

    def pairs(text):
        return [ord(text[i]) + 300 * ord(text[i + 1 : i + 2] or " ") for i in range(0, len(text), 2)]

    data = Choices(
        write(tmp_path / "q.jsonl", [{"context": "abc", "choices": ["d", "x"], "answer": 0}]), pairs, [256], 9
    )
    tokens, targets, _, _ = data.batch(torch.tensor([0]))
    for row, text in enumerate(("abcd", "abcx")):
        assert tokens[0, row].tolist() == [256, pairs(text)[0]]
        assert targets[0, row].tolist() == [-100, pairs(text)[1]]


def test_a_context_can_be_written_by_a_template(tmp_path):
    path = write(tmp_path / "q.jsonl", [{"context": ["?"], "choices": ["b"], "answer": 0}])
    data = Choices(path, encode, [], 9, write=lambda asked: f"<{asked[0]}>")
    assert data.batch(torch.tensor([0]))[0].flatten().tolist() == encode("<?>")

    def refuses(asked):
        raise DataError("no")

    with pytest.raises(DataError, match=r"q\.jsonl, line 1: no"):
        Choices(path, encode, [], 9, write=refuses)
