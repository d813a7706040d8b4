"""Documents in samples: what is predicted, and who sees whom."""

import numpy as np
import pytest
import torch
from hugging import import_transformers
from tiny_models import make_config

from hvdtrain.data.text.best_fit import pack_best_fit
from hvdtrain.data.text.packed import PackedDocuments, TokenizedDocument, same_document, write_packed
from hvdtrain.data.text.windows import IGNORED
from hvdtrain.errors import ConfigError
from hvdtrain.models.config import DecoderConfig


def packed(folder, documents, length, digest="x"):
    written = write_packed(folder, digest, {"train": lambda: documents})
    return PackedDocuments(written, "train", length)


def plain(*tokens, predicted=True, **more):
    return TokenizedDocument(np.array(tokens), np.full(len(tokens), predicted), **more)


def everything(data):
    return data.batch(torch.arange(len(data)))


def test_every_token_but_the_first_of_a_document_is_predicted_once(tmp_path):
    documents = [plain(*range(10, 17)), plain(20), plain(*range(30, 35)), plain(*range(40, 60)), plain(8, 9)]
    data = packed(tmp_path, documents, 4)
    tokens, targets, document, position = everything(data)
    predicted = sorted(targets[targets != IGNORED].tolist())
    assert predicted == [9, *range(11, 17), *range(31, 35), *range(41, 60)]
    assert data.num_tokens == len(predicted) == data.num_targets(torch.arange(len(data)))
    is_target = targets != IGNORED
    assert torch.equal(tokens[is_target] + 1, targets[is_target])  # from the token before, of the same document
    assert [data.num_targets(torch.tensor([i])) for i in range(len(data))] == is_target.sum(1).tolist()
    for row in range(len(data)):
        for number in set(document[row].tolist()) - {-1}:
            inside = document[row] == number
            assert position[row][inside].tolist() == list(range(int(inside.sum())))
            assert (tokens[row][inside].diff() == 1).all()  # a part of one document, in order
    assert data.num_cut == 0


def test_short_documents_stay_whole_and_share_samples(tmp_path):
    documents = [plain(*range(10 * n, 10 * n + n)) for n in (4, 6, 3, 7, 2, 5)]
    data = packed(tmp_path, documents, 8)
    _, _, document, _ = everything(data)
    assert len(data) == 3  # 21 tokens that are shown in samples of 8
    seen = [i for row in document for i in set(row.tolist()) - {-1}]
    assert len(seen) == len(set(seen)) == 6  # none is in two samples


def test_what_is_too_long_goes_on_or_is_cut(tmp_path):
    goes_on = packed(tmp_path, [plain(*range(10, 21), num_bytes=20)], 4, "goes on")
    assert len(goes_on) == 3
    assert (goes_on.num_cut, goes_on.num_tokens, goes_on.num_bytes) == (0, 10, 20)
    cut = packed(tmp_path, [plain(*range(10, 21), is_whole=True, num_bytes=20)], 4, "cut")
    tokens, targets, _, _ = everything(cut)
    assert tokens.tolist() == [[10, 11, 12, 13]]
    assert targets.tolist() == [[11, 12, 13, 14]]
    assert (cut.num_cut, cut.num_tokens, cut.num_bytes) == (1, 4, 8)
    fits = packed(tmp_path, [plain(*range(5), is_whole=True)], 4, "fits")
    assert (fits.num_cut, fits.num_tokens) == (0, 4)


def test_parts_without_anything_to_predict_are_left_out(tmp_path):
    asked = np.arange(12) >= 10
    documents = [plain(*range(1, 9), predicted=False), TokenizedDocument(np.arange(20, 32), asked)]
    data = packed(tmp_path, documents, 4)
    tokens, targets, _, _ = everything(data)
    assert tokens.tolist() == [[28, 29, 30, 0]]
    assert targets.tolist() == [[IGNORED, 30, 31, IGNORED]]
    assert len(packed(tmp_path, [plain(1, 2, predicted=False)], 4, "none")) == 0
    assert len(packed(tmp_path, [], 4, "empty")) == 0


def test_parts_of_a_document_are_one(tmp_path):
    parts = [plain(1, 2), TokenizedDocument(np.array([3, 4]), np.array([True, False]), is_start=False), plain(5, 6)]
    data = packed(tmp_path, parts, 8)
    tokens, targets, document, position = everything(data)
    assert tokens[0].tolist() == [1, 2, 3, 5, 0, 0, 0, 0]
    assert targets[0, :4].tolist() == [2, 3, IGNORED, 6]
    assert document[0].tolist() == [0, 0, 0, 1, -1, -1, -1, -1]
    assert position[0].tolist() == [0, 1, 2, 0, 0, 1, 2, 3]


def test_best_fit_against_every_way_to_put_pieces():
    generator = np.random.default_rng(0)
    for _ in range(50):
        capacity = int(generator.integers(1, 40))
        lengths = generator.integers(1, capacity + 1, int(generator.integers(1, 60)))
        samples = pack_best_fit(lengths, capacity)
        assert sorted(piece for sample in samples for piece in sample) == list(range(len(lengths)))
        assert all(lengths[sample].sum() <= capacity for sample in samples)
        # The rule, piece by piece, as slowly as it can be written.
        rooms = []
        for length in sorted(lengths.tolist(), reverse=True):
            fits = [room for room in rooms if room >= length]
            rooms.remove(min(fits)) if fits else None
            rooms.append((min(fits) if fits else capacity) - length)
        assert len(samples) == len(rooms)


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
    from hvdtrain.recipes.transformers_models.heads import ProductHead
    from hvdtrain.recipes.transformers_models.layouts import BY_POSITIONS

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make_config(family), attn_implementation=attention).eval()
    document = torch.tensor([[0] * 9 + [1] * 12 + [2] * 11])
    position = torch.tensor([[*range(9), *range(12), *range(11)]])
    first = torch.randint(300, (1, 32))
    second = torch.where(document == 1, (first + 7) % 300, first)
    loss = DocumentLoss(BY_POSITIONS, ProductHead())

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
    from hvdtrain.recipes.transformers_models.heads import ProductHead
    from hvdtrain.recipes.transformers_models.layouts import BY_POSITIONS

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make_config(family)).eval()
    tokens = torch.randint(300, (2, 16))
    batch = (tokens, tokens, torch.zeros_like(tokens), torch.arange(16).repeat(2, 1))
    loss = DocumentLoss(BY_POSITIONS, ProductHead())
    whole = loss(model, batch)["loss"]
    torch.testing.assert_close(loss(model, batch, 5 * 4 * 300)["loss"], whole, rtol=1e-6, atol=0)


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
