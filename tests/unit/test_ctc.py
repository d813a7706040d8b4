"""The recipe ctc: Wav2Vec2 and HuBERT on clips, their loss held against transformers', and what is wrong with clips."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hugging import import_transformers

from hvdtrain.data.clips import read_wave
from hvdtrain.errors import ConfigError, DataError
from hvdtrain.recipes.ctc import ClipsConfig, HearingConfig, HearingEvalConfig, ctc
from hvdtrain.recipes.transformers_models.as_program import program_of
from hvdtrain.recipes.transformers_models.hearing_files import make_tokenizer
from hvdtrain.recipes.transformers_models.listening import Listener
from hvdtrain.rundir.trained import open_trained

transformers = import_transformers()
soundfile = pytest.importorskip("soundfile")
pytestmark = pytest.mark.filterwarnings("default")
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8),
    "conv_kernel": (40, 8),
    "conv_stride": (40, 8),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "num_feat_extract_layers": 2,
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Put back the variables that a start sets for its process."""
    for name in ("HOROVOD_FUSION_THRESHOLD", "MKL_NUM_THREADS", "OMPI_MCA_mpi_yield_when_idle"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))


@pytest.fixture
def place(tmp_path):
    draw = np.random.default_rng(0)
    (tmp_path / "clips").mkdir()
    for number in range(30):
        wave = draw.normal(size=8000 + 400 * (number % 9)).astype(np.float32) * 0.1
        soundfile.write(tmp_path / "clips" / f"{number}.{'flac' if number % 2 else 'wav'}", wave, 16_000)
        (tmp_path / "clips" / f"{number}.txt").write_text(f"AB {'c' * (number % 4)}d\n")
    return tmp_path


def build(place, model=None, evaluation=None, said=None, **data):
    given = {"path": str(place / "clips"), "cache_dir": str(place / "cache"), **data}
    asked = HearingEvalConfig(**({"samples": 0} if evaluation is None else evaluation))
    recipe = dataclasses.replace(ctc(), model=model or make(place), data=ClipsConfig(**given), eval=asked)
    return recipe.build((said if said is not None else []).append)


def make(place, kind="Wav2Vec2Config", **changes):
    values = {**SMALL, **changes}
    getattr(transformers, kind)(**values).save_pretrained(place / "shape")
    return HearingConfig(config=place / "shape" / "config.json")


@pytest.mark.parametrize("kind", ["Wav2Vec2Config", "HubertConfig"])
def test_the_loss_is_transformers_own_and_its_files_load(place, kind):
    task = build(place, make(place, kind, ctc_loss_reduction="sum"))
    task.model.eval()
    indices = torch.arange(6)
    waves, lengths, labels = task.train_data.batch(indices)
    ours = float(task.loss_sums(task.model, (waves, lengths, labels))["loss"].detach())
    theirs = sum(
        float(task.model(waves[i : i + 1, : lengths[i]], labels=labels[i : i + 1]).loss.detach()) for i in range(6)
    )
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert tuple(task.loss_sums(task.model, (waves, lengths, labels))) == task.metrics == ("loss",)
    assert task.train_data.num_targets(indices) == int((labels >= 0).sum())
    task.write_model_files(place)
    task.model.save_pretrained(place)
    model = transformers.AutoModelForCTC.from_pretrained(place).eval()
    processor = transformers.AutoProcessor.from_pretrained(place)
    wave, rate = soundfile.read(task.train_data.clips[0].path, dtype="float32")
    given = processor(wave, sampling_rate=rate, return_tensors="pt")
    assert torch.allclose(given.input_values[0], waves[0, : lengths[0]], atol=1e-5)
    one, other = model(given.input_values).logits, task.model(waves[:1, : lengths[0]]).logits
    assert torch.allclose(one, other, atol=1e-4)
    assert model.config.architectures == [type(task.model).__name__]
    trained = open_trained(place, "latest")
    heard = processor.batch_decode(one.argmax(-1))[0]  # as transformers decodes its greedy output
    assert heard.strip()
    assert Listener(trained).write_down(task.train_data.clips[0].path) == " ".join(heard.split())
    if kind == "HubertConfig":
        program = program_of(trained, trained.weights, "AutoModelForCTC").module()
        longer = torch.randn(3, 12_345)
        assert torch.allclose(program(longer), model(longer).logits, atol=1e-4)


def test_a_model_that_normalises_over_time_gets_clips_one_at_a_time(place):
    task = build(place, make(place, feat_extract_norm="group"))
    assert task.loss_sums.is_alone
    assert "one at a time" in task.description
    assert not build(place).loss_sums.is_alone


def test_scores_are_jiwers(place):
    jiwer = pytest.importorskip("jiwer")
    task = build(place, evaluation={"samples": 2}, val_fraction=0.3)
    (part,) = task.evaluations
    assert len(part.answers(task.model.eval(), part.data.batch(torch.arange(2)))) == 2
    texts = [clip.text for clip in task.val_data.clips[:2]]
    answers = ["ab d", "x"]
    assert part.score(answers) == {"wer": jiwer.wer(texts, answers), "cer": jiwer.cer(texts, answers)}


def test_settings_of_the_data(place):
    task = build(place)
    assert {clip.text[:2] for clip in task.train_data.clips} == {"ab"}
    assert {clip.text[:2] for clip in build(place, lowercase=False).train_data.clips} == {"AB"}
    assert "left out:" in build(place, max_seconds=0.6).description
    assert len(build(place, val_fraction=0.5).val_data) > len(task.val_data)
    rows = [f"{path.name}\t{path.stem} says so\n" for path in sorted((place / "clips").glob("1*.wav"))]
    (place / "clips" / "list.tsv").write_text("".join(rows))
    listed = build(place, path=str(place / "clips" / "list.tsv"), val_path=str(place / "clips"))
    assert (len(listed.train_data), len(listed.val_data)) == (len(rows), 30)
    (place / "clips" / "list.tsv").write_text("name\tword\n" + "".join(rows))
    by_name = {"audio_field": "name", "text_field": "word"}
    assert len(
        build(place, path=str(place / "clips" / "list.tsv"), val_path=str(place / "clips"), **by_name).train_data
    ) == len(rows)


def test_settings_of_the_model(place):
    task = build(place, dataclasses.replace(make(place), freeze_features="yes"))
    frozen = [name for name, parameter in task.model.named_parameters() if not parameter.requires_grad]
    assert frozen
    assert all("feature_extractor" in name for name in frozen)
    assert not task.model.config.apply_spec_augment
    assert build(place, dataclasses.replace(make(place), spec_augment=True)).model.config.apply_spec_augment
    task.write_model_files(place)
    task.model.save_pretrained(place)
    again = build(place, HearingConfig(path=str(place)))
    assert not all(parameter.requires_grad for parameter in again.model.parameters())
    assert torch.equal(again.model.lm_head.weight, task.model.lm_head.weight)
    other = build(place, tokenizer=str(place), val_fraction=0.2)
    assert other.model.config.vocab_size == task.model.config.vocab_size


def test_other_rates_are_resampled(place):
    pytest.importorskip("soxr")
    wave, _ = soundfile.read(place / "clips" / "0.wav", dtype="float32")
    soundfile.write(place / "clips" / "0.wav", np.stack((wave, wave), 1), 22_050)
    task = build(place, val_fraction=0.01)
    number = next(i for i, clip in enumerate(task.train_data.clips) if clip.name == "0.wav")
    _, lengths, _ = task.train_data.batch(torch.tensor([number]))
    assert int(lengths[0]) == -(-len(wave) * 16_000 // 22_050)


def test_clips_that_cannot_be_used(place):
    (place / "clips" / "3.flac").write_bytes(b"no sound at all")
    with pytest.raises(DataError, match=r"the clip .*3\.flac cannot be read"):
        build(place)
    assert "left out:   1 clip that cannot be used" in build(place, on_error="skip").description
    (place / "clips" / "3.flac").unlink()
    (place / "clips" / "5.txt").unlink()
    with pytest.raises(DataError, match=r"5\.flac has no text: 5\.txt beside it is missing or empty"):
        build(place)
    (place / "clips" / "5.txt").write_text("a" * 300)
    with pytest.raises(DataError, match="is too short for its text: the model hears"):
        build(place)


def test_a_clip_that_turns_out_to_be_damaged_counts_for_nothing(place, capfd):
    task = build(place, on_error="skip")
    path = task.train_data.clips[0].path
    path.write_bytes(path.read_bytes()[:200])
    batch = task.train_data.batch(torch.arange(3))
    assert batch[1][0] == 0
    assert "cannot be read" in capfd.readouterr().err
    task.model.eval()
    sums = {name: float(value.detach()) for name, value in task.loss_sums(task.model, batch).items()}
    rest = task.loss_sums(task.model, task.train_data.batch(torch.tensor([1, 2])))
    assert sums["loss"] == pytest.approx(float(rest["loss"].detach()), rel=1e-4)
    lost = task.train_data.num_targets(torch.tensor([0]))
    assert sums["unread"] == lost
    assert task.summarize({"loss": 1.0, "unread": 0.5})["loss"] == 2.0
    with pytest.raises(DataError, match=r"too short for its text|it was cut"):  # its header says how much is left
        build(place, on_error="stop")


def test_clips_of_every_form_are_heard_alike_and_odd_ones_are_told(place):
    path = place / "clips" / "0.wav"
    wave, _ = soundfile.read(path, dtype="float32")
    sound = read_wave(path, 16_000)
    for name, subtype in (("0.wav", "FLOAT"), ("0.wav", "DOUBLE"), ("0.wav", "PCM_24"), ("0.flac", "PCM_16")):
        file = place / name
        soundfile.write(file, np.stack((wave, wave), 1), 16_000, subtype=subtype)
        assert np.allclose(read_wave(file, 16_000), sound, atol=1e-4), subtype
    for odd in (np.nan, np.inf):
        soundfile.write(path, np.where(np.arange(len(wave)) == 7, odd, wave), 16_000, subtype="FLOAT")
        with pytest.raises(ValueError, match="not finite"):
            read_wave(path, 16_000)
    task = build(place, on_error="skip")
    number = next(i for i, clip in enumerate(task.train_data.clips) if clip.name == "0.wav")
    assert task.train_data.batch(torch.tensor([number]))[1].tolist() == [0]  # it counts for nothing
    soundfile.write(path, np.zeros(0, np.float32), 16_000)
    with pytest.raises(DataError, match=r"0\.wav is empty"):
        build(place)
    soundfile.write(path, wave, 16_000)
    (place / "clips" / "a.trans.txt").write_bytes("0 f\u00fcnf".encode("latin1"))
    with pytest.raises(DataError, match=r"a\.trans\.txt is not UTF-8 text: .*latin1"):
        build(place)


def test_letters_are_those_that_a_tokenizer_has(place):
    """As in wav2vec2-base-960h, which knows capitals alone: small letters would all be unknown to it."""
    tokenizer = make_tokenizer(["ABCD E"])
    tokenizer.save_pretrained(place / "capitals")
    task = build(place, tokenizer=str(place / "capitals"))
    assert {clip.text[:2] for clip in (*task.train_data.clips, *task.val_data.clips)} == {"AB"}
    assert "in capitals, as the tokenizer has no small letters" in task.description
    assert "that the tokenizer does not have" not in task.description
    make_tokenizer(["xyz"]).save_pretrained(place / "others")
    with pytest.raises(DataError, match=r"the tokenizer does not have [\d,]+ of the texts' [\d,]+ characters; it has"):
        build(place, tokenizer=str(place / "others"))


def test_a_tokenizer_that_keeps_repetitions_is_none_for_ctc(place):
    inner = make_tokenizer(["ABCD abcd"])
    plain = transformers.PreTrainedTokenizerFast(
        tokenizer_object=characters({**inner.get_vocab(), " ": len(inner)}), pad_token="<pad>", unk_token="<unk>"
    )
    plain.save_pretrained(place / "plain")
    with pytest.raises(DataError, match="does not read back what CTC says"):
        build(place, tokenizer=str(place / "plain"))


def characters(vocab):
    """Return a tokenizer of single characters, which knows nothing of CTC."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    one = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    one.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    one.decoder = decoders.Fuse()
    return one


def test_a_text_that_holds_the_blank_is_named(place):
    (place / "clips" / "5.txt").write_text("a<pad>b")
    with pytest.raises(DataError, match=r"5\.flac holds <pad>, which is CTC's blank"):
        build(place)
    assert "left out:   1 clip" in build(place, on_error="skip").description


@pytest.mark.parametrize("name", ["cut.wav", "cut.aiff", "cut.au", "cut.w64"])
def test_a_clip_that_was_cut_is_told(place, name):
    """Its text is of all of it: what is there was learned to be that, in silence."""
    path = place / "clips" / name
    soundfile.write(path, np.zeros(16_000, np.float32), 16_000)
    path.with_suffix(".txt").write_text("ab")
    build(place)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(DataError, match=rf"{name} cannot be read \(it was cut: of 32,... bytes of sound \d+,\d+ are"):
        build(place)


def test_a_clip_that_may_not_be_read_is_told_as_such(place, monkeypatch):
    """To root all files are open: the system's answer is changed instead."""
    opened = Path.open

    def closed(path, *how, **more):
        if path.name == "3.flac":
            raise PermissionError(13, "Permission denied")
        return opened(path, *how, **more)

    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(DataError, match=r"3\.flac cannot be read \(Permission denied\)"):
        build(place)


def test_what_was_written_to_a_pipe_was_not_cut(place):
    path = place / "clips" / "0.wav"
    raw = bytearray(path.read_bytes())
    for at in (4, raw.index(b"data") + 4):
        raw[at : at + 4] = b"\xff" * 4
    path.write_bytes(raw)
    build(place)


def test_a_listed_clip_that_is_not_there_is_told(place):
    (place / "clips" / "a.trans.txt").write_text("0 ab\n99 ab\n")
    with pytest.raises(DataError, match=r"the clip 99, which .*a\.trans\.txt lists, is not there"):
        build(place)
    assert "left out:   1 clip that cannot be used" in build(place, on_error="skip").description


def test_of_few_clips_one_is_held_out(place):
    for path in (place / "clips").iterdir():
        if path.stem not in ("10", "11", "12"):
            path.unlink()
    for fraction in (0.1, 1e-6):
        task = build(place, val_fraction=fraction)
        assert (len(task.train_data), len(task.val_data)) == (2, 1)
    with pytest.raises(DataError, match=r"no training clips that can be used \(left out: 3 clips of more than 0.1"):
        build(place, max_seconds=0.1)


def test_one_field_is_no_pair():
    with pytest.raises(ConfigError, match=r"--data\.audio-field and --data\.text-field are both 'path'"):
        ClipsConfig(audio_field="path", text_field="path")


def test_tables_of_any_ends_of_lines_and_names(place):
    rows = [f"clips/{n}.wav\tab c{n}\r" for n in range(0, 30, 2)]
    (place / "list.tsv").write_text("".join(rows), newline="")
    task = build(place, path=str(place / "list.tsv"), val_fraction=0.2)
    assert {clip.text for clip in task.train_data.clips} <= {f"ab c{n}" for n in range(0, 30, 2)}
    (place / "list.jsonl").write_text('{"where": "clips/0.wav", "said": "ab"}\n')
    with pytest.raises(DataError, match=r"the fields where, said: .* by --data\.audio-field and --data\.text-field"):
        build(place, path=str(place / "list.jsonl"))
    (place / "list.tsv").write_text("".join([*rows, "~nosuchuser/1.wav\tab"]), newline="")
    with pytest.raises(DataError, match=r"nosuchuser/1\.wav cannot be read \(there is no such file\)"):
        build(place, path=str(place / "list.tsv"))


def test_what_is_no_model_that_hears_is_told(place):
    with pytest.raises(ConfigError, match=r"give --data\.path"):
        ctc().build(print)
    transformers.BertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2).save_pretrained(place / "bert")
    with pytest.raises(DataError, match="no model for AutoModelForCTC comes from"):
        build(place, HearingConfig(config=place / "bert" / "config.json"))
