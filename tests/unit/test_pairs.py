"""Pairs of texts: read from tables and records, split, tokenised, and what is wrong with them."""

import json

import pytest
import torch

from hvdtrain.data.text.corpus import find_documents
from hvdtrain.data.text.number_words import in_english, in_german, number_pairs
from hvdtrain.data.text.pair_samples import NOTHING, PairWriter, TokenizedPairs, mixed_by_length, read_held_out
from hvdtrain.data.text.pairs import PairReader
from hvdtrain.errors import DataError


def read(path, source=None, target=None, on_error="stop"):
    reader = PairReader(source, target, on_error)
    return list(reader.read(find_documents(str(path)))), reader


def test_tables(tmp_path):
    file = tmp_path / "pairs.tsv"
    file.write_text("\ufeffein Haus\ta house\textra\r\n\n zwei \t two \n", encoding="utf-8")
    assert read(file)[0] == [("ein Haus", "a house"), ("zwei", "two")]
    file.write_text("a\tb\tc\nd\te\tf\n")
    assert read(file, "3", "1")[0] == [("c", "a"), ("f", "d")]
    file.write_text("id\tde\ten\n1\tHaus\thouse\n")
    assert read(file, "de", "en")[0] == [("Haus", "house")]
    with pytest.raises(DataError, match=r"has no column 'fr' in its first line, but id, de, en"):
        read(file, "de", "fr")
    for number in ("0", "7"):
        with pytest.raises(DataError, match=f"has 3 columns, counted from 1, and none of number {number}"):
            read(file, number, "1")
    file.write_bytes(b"a\tb\rc\td\r")  # as on old Macs
    assert read(file)[0] == [("a", "b"), ("c", "d")]
    file.write_text('id\tSource\ttarget \r\n1\tHaus\thouse\r\n2\t"zwei"\ttwo\r\n')  # its titles are no pair
    assert read(file)[0] == [("Haus", "house"), ('"zwei"', "two")]
    assert read(file, "2", "3")[0][0] == ("Source", "target")


def test_records(tmp_path):
    file = tmp_path / "pairs.jsonl"
    lines = [
        {"source": "a", "target": "b"},
        {"translation": {"source": "c", "target": "d"}},
        {"document": "e", "summary": "f"},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read(file)[0] == [("a", "b"), ("c", "d"), ("e", "f")]
    file.write_text('{"translation": {"de": "Haus", "en": "house"}}\n')
    assert read(file, "de", "en")[0] == [("Haus", "house")]
    with pytest.raises(DataError, match=r"line 1 has the fields de, en: say which .* --data\.source-field"):
        read(file)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"src": ["a", "b"], "tgt": ["c", "d"]}), tmp_path / "pairs.parquet")
    assert read(tmp_path / "pairs.parquet")[0] == [("a", "c"), ("b", "d")]


@pytest.mark.parametrize(
    ("name", "line", "problem"),
    [
        ("a.tsv", "only one column", r"a\.tsv, line 2 has one column: a source and a target are needed"),
        ("a.tsv", "\tb", "line 2 has an empty source"),
        ("a.tsv", "a\t ", "line 2 has an empty target"),
        ("a.jsonl", '{"source": "", "target": "b"}', "line 2 has an empty source"),
        ("a.jsonl", '{"source": 3, "target": "b"}', "line 2 has something else than texts in its fields"),
        ("a.jsonl", '{"source": ', "line 2 is no JSON"),
        ("a.jsonl", '["a", "b"]', "line 2 is no record with fields"),
        ("a.jsonl", '{"source": "\\ud83e", "target": "b"}', "line 2 has half a character"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_or_counted(tmp_path, name, line, problem):
    good = "a\tb" if name.endswith("tsv") else '{"source": "a", "target": "b"}'
    (tmp_path / name).write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(DataError, match=problem):
        read(tmp_path / name)
    pairs, reader = read(tmp_path / name, on_error="skip")
    assert pairs == [("a", "b")] * 2
    assert reader.num_skipped == len(reader.skipped) == 1


def test_tokenised_pairs_come_back(tmp_path):
    pairs = [("x" * (1 + n % 7), "y" * (1 + n % 5)) for n in range(70)] + [("z" * 9, "y")]
    writer = PairWriter(lambda a, b: ([[1] * len(t) for t in a], [[2] * len(t) for t in b]), (8, 8))
    for name in ("train", "val"):
        writer.write(tmp_path, name, pairs)
    assert writer.num_too_long == {"train": 1, "val": 1}
    data = TokenizedPairs(tmp_path, "train", 0)
    indices = torch.tensor([6, 0, 4])
    sources, is_text, targets = data.batch(indices)
    assert sources.tolist() == [[1] * 7, [1] + [0] * 6, [1] * 5 + [0] * 2]
    assert torch.equal(is_text, (sources != 0).long())
    assert targets.tolist() == [[2, 2, *[NOTHING] * 3], [2, *[NOTHING] * 4], [2] * 5]
    assert data.num_targets(indices) == 8
    held_out = TokenizedPairs(tmp_path, "val", 0)
    texts = read_held_out(tmp_path)
    assert sorted(texts) == sorted(pairs[:-1])
    assert [len(source) for source, _ in texts] == held_out.source_lengths.tolist()


def test_an_order_in_which_neighbours_are_alike_and_parts_too():
    lengths = [n % 40 for n in range(640)]
    order = mixed_by_length(lengths)
    assert sorted(order) == list(range(640))
    halves = [sum(lengths[number] for number in part) for part in (order[:320], order[320:])]
    assert min(halves) > 0.8 * max(halves)
    assert mixed_by_length([]) == []


def test_numbers_in_words():
    assert in_english(7142) == "seven thousand one hundred and forty-two"
    assert in_german(7121) == "siebentausendeinhunderteinundzwanzig"
    assert [in_german(number) for number in (1, 101, 21000)] == ["eins", "einhunderteins", "einundzwanzigtausend"]
    pairs = list(number_pairs())
    assert len(set(pairs)) == len({source for source, _ in pairs}) == 20_000
