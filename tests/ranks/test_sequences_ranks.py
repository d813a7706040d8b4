"""Marian on pairs and HuBERT on clips, on two ranks: the model of one process, stopped and gone on with, exported."""

import dataclasses

import numpy as np
import pytest
import torch
from hugging import import_transformers
from test_optimizer import largest_difference
from test_training import StopAt, StoppedError, both, digest, quiet, trained

from hvdtrain.recipes.ctc import ClipsConfig, HearingConfig, HearingEvalConfig, SpeechRecognition
from hvdtrain.recipes.seq2seq import EncoderDecoder, EncoderDecoderConfig, PairsConfig, TranslationEvalConfig
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.settings import CheckpointConfig, TrainConfig
from hvdtrain.trainer import fit, settle
from hvdtrain.verbs.export import export
from hvdtrain.verbs.options import ExportOptions

pytestmark = [pytest.mark.ranks(2), pytest.mark.same_on_gloo, pytest.mark.filterwarnings("default")]
TRAIN = TrainConfig(steps=9, global_batch_size=6, max_grad_norm=0.5)  # an epoch ends in the sixth step or before
CLASSES = {"seq2seq": ("AutoModelForSeq2SeqLM", "MarianMTModel"), "ctc": ("AutoModelForCTC", "HubertForCTC")}


def seq2seq(folder):
    pytest.importorskip("sacrebleu")
    return EncoderDecoder(
        train=TRAIN,
        model=EncoderDecoderConfig(config=folder / "marian" / "config.json"),
        data=PairsConfig(
            path=str(folder / "pairs.tsv"), cache_dir=str(folder / "cache"), vocab_size=300, max_target_length=12
        ),
        eval=TranslationEvalConfig(batch_size=4, beams=2, samples=3),
    )


def ctc(folder):
    pytest.importorskip("jiwer")
    return SpeechRecognition(
        train=TRAIN,
        model=HearingConfig(config=folder / "hubert" / "config.json"),
        data=ClipsConfig(path=str(folder / "clips"), cache_dir=str(folder / "cache")),
        eval=HearingEvalConfig(batch_size=2),
    )


def write_files(folder):
    """Write pairs and clips of many lengths, and the configurations of two small models that drop out."""
    soundfile, transformers = pytest.importorskip("soundfile"), import_transformers()
    (folder / "pairs.tsv").write_text("".join(f"{n} {n + 1}\t{' '.join(str(n) * (1 + n % 3))}\n" for n in range(32)))
    draw = np.random.default_rng(0)
    (folder / "clips").mkdir()
    for number in range(32):
        wave = draw.normal(size=8000 + 400 * (number % 9)).astype(np.float32) * 0.1
        soundfile.write(folder / "clips" / f"{number}.wav", wave, 16_000)
        (folder / "clips" / f"{number}.txt").write_text(f"ab {'c' * (number % 4)}d\n")
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 256}
    tokens = {"vocab_size": 320, "pad_token_id": 0, "decoder_start_token_id": 0}
    transformers.MarianConfig(dropout=0.1, **shape, **tokens, **heads).save_pretrained(folder / "marian")
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (40, 8), "conv_stride": (40, 8), "num_feat_extract_layers": 2}
    places = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    transformers.HubertConfig(layerdrop=0.0, **shape, **convolutions, **places).save_pretrained(folder / "hubert")


@pytest.fixture
def folder(world, shared_dir):
    if world.rank == 0:
        write_files(shared_dir)
    world.barrier("files")
    return shared_dir


@pytest.mark.parametrize("make", [seq2seq, ctc])
def test_equals_one_process(world, folder, tmp_path, make):
    recipe = make(folder)
    exact = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, precision="fp64"))
    model, metrics, reference, expected = both(exact, world, folder, tmp_path)
    assert largest_difference(model, reference) < 1e-10
    assert metrics == pytest.approx(expected, abs=1e-8)
    assert {"val/bleu", "val/wer"} & metrics.keys()


@pytest.mark.parametrize("make", [seq2seq, ctc])
def test_going_on_is_bitwise_the_same(world, folder, make, capsys):
    """Stopped after 4 of 9 steps, in mid-epoch, and gone on with."""
    whole, metrics = trained(make(folder), world, folder / "whole")
    halfway = dataclasses.replace(make(folder), checkpoint=CheckpointConfig(every=4))
    job = settle(halfway.build(quiet), halfway, world, RunDirectory(folder / "halves"), MetricLog(None, []))
    with pytest.raises(StoppedError):
        fit(dataclasses.replace(job, log=StopAt(5)))
    torch.manual_seed(world.rank)  # whatever the random state was, it must not matter
    resumed, again = trained(halfway, world, folder / "halves")
    assert digest(resumed.state_dict().values()) == digest(whole.state_dict().values())
    assert again == metrics
    if world.rank == 0:
        capsys.readouterr()
        output, run = folder / "out", RunDirectory(folder / "halves")
        run.model.mkdir()
        job.task.write_model_files(run.model)
        assert export(ExportOptions(run_dir=run.path, output=output)) == 0
        auto, kind = CLASSES[make.__name__]
        assert f"transformers.{auto}.from_pretrained" in capsys.readouterr().out
        loaded = getattr(import_transformers(), auto).from_pretrained(output)
        assert type(loaded).__name__ == kind
        assert digest(loaded.state_dict().values()) == digest(whole.state_dict().values())
