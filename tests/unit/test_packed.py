"""Documents in windows: what is predicted, who sees whom, and conversations."""

import json

import numpy as np
import pytest
import torch
from hugging import import_transformers
from tiny_models import FORGETFUL_TEMPLATE, make_config, make_tokenizer

from hvdtrain.data.text.chat import DocumentReader
from hvdtrain.data.text.corpus import Document
from hvdtrain.data.text.packed import PackedDocuments, TokenizedDocument, same_document, write_packed
from hvdtrain.data.text.windows import IGNORED
from hvdtrain.errors import ConfigError, DataError
from hvdtrain.models.config import DecoderConfig


def packed(folder, documents, length, digest="x"):
    written = write_packed(folder, digest, {"train": lambda: documents})
    return PackedDocuments(written, "train", length)


def plain(*tokens, predicted=True):
    return TokenizedDocument(np.array(tokens), np.full(len(tokens), predicted))


def test_every_token_but_the_first_of_a_document_is_predicted_once(tmp_path):
    documents = [plain(*range(10, 17)), plain(20), plain(*range(30, 35)), plain(*range(40, 60))]
    data = packed(tmp_path, documents, 4)
    tokens, targets, document, position = data.batch(torch.arange(len(data)))
    predicted = sorted(targets[targets != IGNORED].tolist())
    assert predicted == [*range(11, 17), *range(31, 35), *range(41, 60)]
    assert data.num_tokens == len(predicted) == data.num_targets(torch.arange(len(data)))
    shown = tokens[targets != IGNORED]
    assert torch.equal(shown + 1, targets[targets != IGNORED])  # from the token before, of the same document
    assert tokens[0].tolist() == [10, 11, 12, 13]
    assert document[1].tolist() == [0, 0, 0, 1]
    assert position[1].tolist() == [0, 1, 2, 0]
    assert [data.num_targets(torch.tensor([i])) for i in range(len(data))] == (targets != IGNORED).sum(1).tolist()


def test_windows_without_anything_to_predict_are_left_out(tmp_path):
    documents = [plain(*range(1, 9), predicted=False), plain(*range(10, 14))]
    data = packed(tmp_path, documents, 4)
    assert len(data) == 1
    assert data.batch(torch.tensor([0]))[1].tolist() == [[11, 12, 13, IGNORED]]
    assert len(packed(tmp_path, [plain(1, 2, predicted=False)], 4, "none")) == 0
    assert len(packed(tmp_path, [], 4, "empty")) == 0


def test_parts_of_a_document_are_one(tmp_path):
    parts = [plain(1, 2), TokenizedDocument(np.array([3, 4]), np.array([True, False]), is_start=False), plain(5, 6)]
    data = packed(tmp_path, parts, 8)
    _, targets, document, position = data.batch(torch.tensor([0]))
    assert targets[0, :5].tolist() == [2, 3, IGNORED, IGNORED, 6]
    assert document[0].tolist() == [0, 0, 0, 0, 1, 1, -1, -1]
    assert position[0, :6].tolist() == [0, 1, 2, 3, 0, 1]


def test_who_sees_whom():
    seen = same_document(torch.tensor([[0, 0, 1, -1]]))[0, 0]
    assert seen.tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [False, False, True, False],
        [False, False, False, True],
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3"])
def test_no_document_sees_another(family, attention):
    """Changing one document leaves the losses of the others bitwise as they are."""
    transformers = import_transformers()
    from hvdtrain.recipes.transformers_models.forward import DocumentLoss
    from hvdtrain.recipes.transformers_models.layouts import BY_POSITIONS

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make_config(family), attn_implementation=attention).eval()
    document = torch.tensor([[0] * 9 + [1] * 12 + [2] * 11])
    position = torch.tensor([[*range(9), *range(12), *range(11)]])
    first = torch.randint(300, (1, 32))
    second = torch.where(document == 1, (first + 7) % 300, first)
    loss = DocumentLoss(BY_POSITIONS, is_chunked=True)

    def losses(tokens, only):
        targets = torch.where(document == only, tokens, IGNORED)
        return loss(model, (tokens, targets, document, position))["loss"]

    with torch.no_grad():
        assert torch.equal(losses(first, 0), losses(second, 0))
        assert torch.equal(losses(first, 2), losses(second, 2))
        assert not torch.equal(losses(first, 1), losses(second, 1))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_large_vocabularies_go_in_chunks(family):
    transformers = import_transformers()
    from hvdtrain.recipes.transformers_models.forward import DocumentLoss
    from hvdtrain.recipes.transformers_models.layouts import BY_POSITIONS

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make_config(family)).eval()
    tokens = torch.randint(300, (2, 16))
    batch = (tokens, tokens, torch.zeros_like(tokens), torch.arange(16).repeat(2, 1))
    loss = DocumentLoss(BY_POSITIONS, is_chunked=True)
    whole = loss(model, batch)["loss"]
    torch.testing.assert_close(loss(model, batch, 5 * 4 * 300)["loss"], whole, rtol=1e-6, atol=0)


CONVERSATION = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "world"},
    {"role": "user", "content": "how"},
    {"role": "assistant", "content": "are you"},
    {"role": "user", "content": "bye"},
]


def read(tmp_path, lines, tokenizer, field="text"):
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps(line) if not isinstance(line, str) else line for line in lines) + "\n\n")
    return list(DocumentReader(tokenizer, field).read([Document("lines.jsonl", path)]))


def predicted(tokenizer, documents):
    """Return the text that is to be predicted, and all text, document by document."""
    texts = []
    for part in documents:
        if part.is_start:
            texts.append(["", ""])
        texts[-1][0] += tokenizer.decode(part.tokens[part.is_target])
        texts[-1][1] += tokenizer.decode(part.tokens)
    return [tuple(text) for text in texts]


def test_only_the_assistant_is_learned(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    (found,) = predicted(tokenizer, read(tmp_path, [{"messages": CONVERSATION}], tokenizer))
    assert found == (
        "world<|end|>are you<|end|>",
        "<|system|>be brief<|end|><|user|>hello<|end|><|assistant|>world<|end|>"
        "<|user|>how<|end|><|assistant|>are you<|end|>",
    )


def test_a_template_that_forgets_makes_a_document_of_each_answer(tmp_path):
    tokenizer = make_tokenizer(tmp_path, FORGETFUL_TEMPLATE)
    first, second = predicted(tokenizer, read(tmp_path, [{"messages": CONVERSATION}], tokenizer))
    assert first[0] == "(think)world<|end|>"
    assert second[0] == "(think)are you<|end|>"
    assert "(think)" not in second[1].replace("(think)are", "are")


def test_without_a_template(tmp_path):
    tokenizer = make_tokenizer(tmp_path, None)
    (found,) = predicted(tokenizer, read(tmp_path, [{"messages": CONVERSATION[1:3]}], tokenizer))
    assert found == (" world\n<|end|>", "user: hello\nassistant: world\n<|end|>")


@pytest.mark.slow
def test_texts_of_json_lines_and_files(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    found = predicted(tokenizer, read(tmp_path, [{"body": "one"}, {"body": ""}, {"body": "two"}], tokenizer, "body"))
    assert found == [("one<|end|>", "one<|end|>"), ("two<|end|>", "two<|end|>")]
    (tmp_path / "a.txt").write_text("line of a file\n" * 100_000)  # of more than one piece
    parts = list(DocumentReader(tokenizer, "text").read([Document("a.txt", tmp_path / "a.txt")]))
    assert len(parts) == 2
    ((_, text),) = predicted(tokenizer, parts)
    assert text == "line of a file\n" * 100_000 + "<|end|>"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"lines\.jsonl, line 2: not JSON"),
        ({"other": "x"}, r"line 2: there is neither a text 'text' nor a list 'messages' \(but other\)"),
        (["x"], r"line 2: there is neither .* \(but list\)"),
        ({"messages": [{"role": "user"}]}, "line 2: a message needs a 'role' and a 'content'"),
        ({"messages": CONVERSATION[:2]}, "line 2: no message has the role 'assistant'"),
    ],
)
def test_lines_that_cannot_be_used_are_named(tmp_path, line, message):
    tokenizer = make_tokenizer(tmp_path)
    with pytest.raises(DataError, match=message):
        read(tmp_path, [{"text": "good"}, line], tokenizer)


def test_no_document_of_the_native_model_sees_another(tmp_path):
    """The stream of `lm`, cut into samples, with --data.packing documents."""
    from hvdtrain.recipes.lm import LanguageModel, StreamConfig

    words = {"a.txt": "one two three", "b.txt": "four five six seven", "c.txt": "eight nine ten"}
    folder = tmp_path / "text"
    folder.mkdir()
    for name, text in words.items():
        (folder / name).write_text(text)
    (tmp_path / "held_out.txt").write_text("eleven twelve thirteen fourteen fifteen, and some more of them")
    length = sum(len(text) + 1 for text in words.values())
    config = StreamConfig(
        path=str(folder),
        val_path=str(tmp_path / "held_out.txt"),
        sequence_length=length,
        cache_dir=str(tmp_path / "cache"),
        packing="documents",
    )
    model = DecoderConfig(num_layers=2, hidden_size=32, num_heads=4)
    task = LanguageModel(data=config, model=model).build(lambda line: None)
    tokens, targets = task.train_data.batch(torch.tensor([0]))
    document = (tokens == 256).cumsum(1)
    assert document.max() == 3
    changed = torch.where((document == 2) & (tokens != 256), (tokens + 7) % 256, tokens)

    def losses(tokens, only):
        return task.loss_sums(task.model, (tokens, torch.where(document == only, targets, IGNORED)))["loss"]

    with torch.no_grad():
        for parameter in task.model.parameters():  # away from the first weights, where attention is all but uniform
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 5)
        for unchanged in (1, 3):
            assert torch.equal(losses(tokens, unchanged), losses(changed, unchanged))
        assert not torch.equal(losses(tokens, 2), losses(changed, 2))
        # And a document is what it would be alone.
        last = document[0] == 3
        alone = task.model(tokens[:, last], targets[:, last])
        torch.testing.assert_close(losses(tokens, 3), alone, rtol=1e-5, atol=1e-4)


def test_a_token_file_has_no_documents(tmp_path):
    from hvdtrain.recipes.lm import StreamConfig

    with pytest.raises(ConfigError, match="which token begins a document"):
        StreamConfig(path="train.bin", val_path="val.bin", packing="documents")
