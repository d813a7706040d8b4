"""Parquet files and tar shards: every sample once, whatever the shards; what cannot be read is one sentence."""

import io
import pickle
import tarfile

import pytest
import torch

import hvdtrain
from hvdtrain.data.shards import ParquetSamples, TarSamples
from hvdtrain.data.users import as_dataset
from hvdtrain.errors import DataError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def write_parquet(file, numbers, group=4, **more):
    table = pyarrow.table({"x": [[n, n / 2] for n in numbers], "label": list(numbers), **more})
    parquet.write_table(table, file, row_group_size=group)


def write_tar(file, members, mode="w"):
    with tarfile.open(file, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_rows_of_parquet_files(tmp_path):
    write_parquet(tmp_path / "b.parquet", range(10, 23))
    write_parquet(tmp_path / "a.parquet", range(10))
    (tmp_path / "notes.txt").write_text("no data")
    rows = ParquetSamples(tmp_path)
    assert [row["label"] for row in (rows[i] for i in range(len(rows)))] == [*range(23)]
    assert rows[17] == {"x": [17, 8.5], "label": 17}
    assert [ParquetSamples(tmp_path / "*.parquet", columns=["label"])[i] for i in (22, 0)] == [
        {"label": 22},
        {"label": 0},
    ]
    again = pickle.loads(pickle.dumps(rows))  # as it goes to a process that reads
    assert again[20] == rows[20]
    with pytest.raises(IndexError):
        rows[23]


def test_rows_are_batches(tmp_path):
    write_parquet(tmp_path / "a.parquet", range(10))

    def collate(rows):
        return torch.tensor([row["x"] for row in rows]), torch.tensor([row["label"] for row in rows])

    x, label = as_dataset(ParquetSamples(tmp_path), collate).batch(torch.tensor([7, 2]))
    assert x.tolist() == [[7, 3.5], [2, 1]]
    assert label.tolist() == [7, 2]


def test_samples_of_tar_shards(tmp_path):
    write_tar(tmp_path / "1.tar", [("c/3.txt", b"three"), ("c/3.seg.txt", b""), ("README", b"no sample")])
    write_tar(tmp_path / "0.tar", [("a.1.cls", b"0"), ("b.cls", b"1"), ("a.txt", b"one")])
    samples = TarSamples(tmp_path)
    assert [samples[i]["__key__"] for i in range(len(samples))] == ["a", "b", "c/3"]
    assert samples[0] == {"__key__": "a", "1.cls": b"0", "txt": b"one"}
    assert samples[2] == {"__key__": "c/3", "txt": b"three", "seg.txt": b""}
    decoded = TarSamples(tmp_path / "0.tar", decode=lambda parts: (parts["__key__"], len(parts)))
    assert [decoded[0], decoded[1]] == [("a", 3), ("b", 2)]
    with pytest.raises(IndexError):
        samples[3]


def test_a_run_over_shards_is_one_over_memory(tmp_path, monkeypatch):
    """The same weights whether the samples lie in one shard, in three, in parquet or in memory."""
    numbers = [*range(12)]
    for name, cuts in (("one", [0, 12]), ("three", [0, 5, 6, 12])):
        (tmp_path / name).mkdir()
        for i in range(len(cuts) - 1):
            members = [(f"{n:03}.txt", str(n).encode()) for n in numbers[cuts[i] : cuts[i + 1]]]
            write_tar(tmp_path / name / f"{i}.tar", members)
    write_parquet(tmp_path / "a.parquet", numbers, group=5)

    def number(parts):
        return torch.tensor([float(parts["txt"])])

    def rows(batch):
        return torch.tensor([[float(row["label"])] for row in batch])

    class Halve(hvdtrain.Recipe):
        def build(self, say):
            data, collate = sources[0]
            model = torch.nn.Linear(1, 1)
            torch.nn.init.ones_(model.weight)
            torch.nn.init.zeros_(model.bias)
            return hvdtrain.Task(model=model, train_data=data, val_data=data, collate=collate, loss_sums=loss)

    def loss(model, batch):
        return {"loss": (model(batch) - batch / 2).square().sum() / 100}

    memory = [torch.tensor([float(n)]) for n in numbers]
    sources = [
        (memory, None),
        (TarSamples(tmp_path / "one", number), None),
        (TarSamples(tmp_path / "three", number), None),
        (ParquetSamples(tmp_path / "a.parquet", ["label"]), rows),
    ]
    losses = []
    monkeypatch.setenv("HOROVOD_FUSION_THRESHOLD", "0")  # which a run sets
    for i, source in enumerate(sources):
        sources[0] = source
        recipe = Halve(train=hvdtrain.TrainConfig(steps=5, global_batch_size=4))
        losses.append(hvdtrain.train(recipe, run_dir=tmp_path / f"run{i}").metrics["val/loss"])
    assert len(set(losses)) == 1


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"names no .parquet files"):
        ParquetSamples(tmp_path)
    with pytest.raises(DataError, match=r"names no .tar files"):
        TarSamples(tmp_path / "none*.tar")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        ParquetSamples(tmp_path / "cut.parquet")
    write_parquet(tmp_path / "a.parquet", range(3))
    write_parquet(tmp_path / "b.parquet", range(3), more=[1, 2, 3])
    with pytest.raises(DataError, match=r"b.parquet has other columns \(label, more, x\)"):
        ParquetSamples(tmp_path / "[ab].parquet")
    with pytest.raises(DataError, match="has no column y; it has label, x"):
        ParquetSamples(tmp_path / "a.parquet", ["y"])
    write_tar(tmp_path / "z.tar", [("a.txt", b"a")], mode="w:gz")
    with pytest.raises(DataError, match="cannot be read as an uncompressed tar file"):
        TarSamples(tmp_path / "z.tar")
    write_tar(tmp_path / "empty.tar", [("README", b"a")])
    with pytest.raises(DataError, match="hold no samples"):
        TarSamples(tmp_path / "empty.tar")
    write_tar(tmp_path / "twice.tar", [("a.txt", b"a"), ("a.txt", b"b")])
    with pytest.raises(DataError, match=r"holds a.txt twice"):
        TarSamples(tmp_path / "twice.tar")


def test_shards_that_change_while_they_are_read(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.txt", b"a" * 5000)])
    samples = TarSamples(tmp_path)
    with (tmp_path / "a.tar").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(DataError, match="is shorter than it was"):
        samples[0]
    (tmp_path / "a.tar").unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        samples[0]
