"""The recipe seq2seq: T5, BART and Marian on pairs, their loss and translations held against transformers' own."""

import dataclasses
import os

import pytest
import torch
from hugging import import_transformers

from hvdtrain.errors import ConfigError, DataError
from hvdtrain.recipes.seq2seq import EncoderDecoderConfig, PairsConfig, TargetsConfig, TranslationEvalConfig, seq2seq
from hvdtrain.recipes.transformers_models.encoder_decoders import PairLoss, try_out
from hvdtrain.recipes.transformers_models.translating import Translator
from hvdtrain.rundir.trained import open_trained

transformers = import_transformers()
pytestmark = pytest.mark.filterwarnings("default")
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
SMALL = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 320, "max_position_embeddings": 64}
CONFIGS = {
    "t5": lambda: transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=320),
    "bart": lambda: transformers.BartConfig(**SMALL, **HEADS),
    "marian": lambda: transformers.MarianConfig(**SMALL, **HEADS),
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Put back the variables that a start sets for its process."""
    for name in ("HOROVOD_FUSION_THRESHOLD", "MKL_NUM_THREADS", "OMPI_MCA_mpi_yield_when_idle"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))


@pytest.fixture
def place(tmp_path):
    pairs = [(f"{n} {n + 1}", " ".join(reversed(f"{n}" * (1 + n % 3)))) for n in range(100, 160)]
    (tmp_path / "pairs.tsv").write_text("".join(f"{source}\t{target}\n" for source, target in pairs))
    return tmp_path


def recipe_of(place, family=None, evaluation=None, smoothing=0.0, **data):
    model = EncoderDecoderConfig()
    if family is not None:
        CONFIGS[family]().save_pretrained(place / family)
        model = EncoderDecoderConfig(config=place / family / "config.json")
    given = {"path": str(place / "pairs.tsv"), "cache_dir": str(place / "cache"), "vocab_size": 300, **data}
    asked = TranslationEvalConfig(**({"samples": 0} if evaluation is None else evaluation))
    return dataclasses.replace(
        seq2seq(), model=model, data=PairsConfig(**given), eval=asked, labels=TargetsConfig(smoothing=smoothing)
    )


def build(*args, **kwargs):
    return recipe_of(*args, **kwargs).build(lambda text: None)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_loss_is_transformers_own_and_its_files_load(place, family):
    task = build(place, family)
    task.model.eval()
    indices = torch.arange(5)
    ours = float(task.loss_sums(task.model, task.train_data.batch(indices))["loss"].detach())
    theirs = 0.0
    for number in range(5):
        sources, is_text, targets = task.train_data.batch(indices[number : number + 1])
        output = task.model(input_ids=sources, attention_mask=is_text, labels=targets)
        theirs += float(output.loss.detach()) * targets.numel()
    assert ours == pytest.approx(theirs, rel=1e-5)
    task.write_model_files(place)
    task.model.save_pretrained(place)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(place).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    given = tokenizer(["100 101"], return_tensors="pt")
    one = model.generate(**given, max_new_tokens=8, num_beams=1)
    other = task.model.generate(**given, max_new_tokens=8, num_beams=1, use_cache=True)
    assert torch.equal(one, other)
    said = Translator(open_trained(place, "latest")).translate(["100 101", "7"], beams=3, longest=8)
    given = tokenizer(["100 101", "7"], padding=True, return_tensors="pt")
    made = model.generate(**given, max_new_tokens=8, num_beams=3, do_sample=False)
    assert said == [text.strip() for text in tokenizer.batch_decode(made, skip_special_tokens=True)]
    assert model.config.architectures == [type(task.model).__name__]


def test_scores_are_sacrebleus(place):
    sacrebleu = pytest.importorskip("sacrebleu")
    task = build(place, "bart", {"samples": 3, "beams": 2, "bleu_tokenizer": "char"}, val_fraction=0.2)
    (part,) = task.evaluations
    assert len(part.data) == 3
    answers = part.answers(task.model.eval(), part.data.batch(torch.arange(3)))
    assert len(answers) == 3
    answers = ["0 0 1", "1 0 1 1 0 1", "2"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        next(path for path in (place / "cache").glob("pairs-bpe-*") if path.is_dir())
    )
    targets = [row[row >= 0] for row in part.data.batch(torch.arange(3))[2]]
    references = [[tokenizer.decode(target, skip_special_tokens=True) for target in targets]]
    found = part.score(answers)
    assert found["bleu"] == sacrebleu.corpus_bleu(answers, references, tokenize="char").score
    assert found["chrf"] == sacrebleu.corpus_chrf(answers, references).score


class Mean(torch.nn.Module):
    """Lets padding change what a model says, as one that ignores the mask does."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.prepare_decoder_input_ids_from_labels = model.prepare_decoder_input_ids_from_labels

    def forward(self, input_ids, attention_mask, **kwargs):
        return self.model(input_ids=input_ids, attention_mask=torch.ones_like(attention_mask), **kwargs)


def test_a_model_that_sees_padding_gets_samples_one_at_a_time(place):
    task = build(place, "t5")
    batch = task.train_data.batch(torch.arange(6))
    assert (batch[1].sum(1) == batch[1].shape[1]).all()  # sources are equally long: nothing is filled up
    batch = (torch.nn.functional.pad(batch[0], (0, 3)), torch.nn.functional.pad(batch[1], (0, 3)), batch[2])
    loss, about = try_out(Mean(task.model), batch, PairLoss())
    assert loss.is_alone
    assert "one at a time" in about
    assert try_out(task.model, batch, PairLoss()) == (PairLoss(), "")


def test_smoothing_is_for_training(place):
    plain, smooth = build(place, "bart"), build(place, "bart", smoothing=0.3)
    batch = plain.train_data.batch(torch.arange(4))
    for task in (plain, smooth):
        task.model.eval()
    losses = [float(task.loss_sums(task.model, batch)["loss"].detach()) for task in (plain, smooth)]
    assert losses[0] == losses[1]
    for module in smooth.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    smooth.model.train()
    smooth.model.config.dropout = 0.0
    assert float(smooth.loss_sums(smooth.model, batch)["loss"].detach()) != losses[0]


def test_settings_of_the_data(place):
    (place / "more.tsv").write_text("a\tb\nonly one\n")
    plain = build(place)
    prefixed = build(place, source_prefix="say: ")
    assert prefixed.model.config.prefix == "say: "
    assert prefixed.train_data.source_lengths.mean() > plain.train_data.source_lengths.mean() + 1
    short = build(place, max_source_length=64, max_target_length=8)
    assert "left out" in short.description
    assert len(short.train_data) < len(plain.train_data)
    with pytest.raises(DataError, match="there are no training pairs that can be used"):
        build(place, max_source_length=7)
    assert len(build(place, val_fraction=0.4).val_data) > len(plain.val_data)
    with pytest.raises(DataError, match="line 2 has one column"):
        build(place, val_path=str(place / "more.tsv"))
    skipped = build(place, val_path=str(place / "more.tsv"), on_error="skip")
    assert (len(skipped.val_data), len(skipped.train_data)) == (1, 60)
    assert "left out:   1 line that cannot be used" in skipped.description
    turned = build(place, source_field="2", target_field="1")
    assert turned.train_data.target_lengths.mean() != plain.train_data.target_lengths.mean()
    tokenizer = next(path for path in (place / "cache").glob("pairs-bpe-*") if path.is_dir())
    assert len(build(place, tokenizer=str(tokenizer)).train_data) == len(plain.train_data)
    assert "vocabulary 300" not in build(place, vocab_size=400).description or plain.model.config.vocab_size < 300


def test_lines_that_are_left_out_are_counted_once_in_all_files(place):
    with (place / "pairs.tsv").open("a") as file:
        file.write("no target\nnor here\n")
    assert "left out:   2 lines that cannot be used" in build(place, on_error="skip").description
    (place / "more.tsv").write_text("a\tb\nonly one\n")
    apart = build(place, val_path=str(place / "more.tsv"), on_error="skip")
    assert "left out:   3 lines that cannot be used, such as" in apart.description
    assert "pairs.tsv, line 61 has one column" in apart.description


def test_of_few_pairs_one_is_held_out(place):
    lines = (place / "pairs.tsv").read_text().splitlines()
    (place / "pairs.tsv").write_text("\n".join([*lines[:3], "no pair"]))
    for fraction in (0.1, 1e-6):
        task = build(place, val_fraction=fraction, on_error="skip")
        assert (len(task.train_data), len(task.val_data)) == (2, 1)


def test_one_field_is_no_pair():
    with pytest.raises(ConfigError, match=r"--data\.source-field and --data\.target-field are both '2'"):
        PairsConfig(source_field="2", target_field="2")


def test_what_does_not_fit_is_told(place):
    both = EncoderDecoderConfig(path="somewhere", config=place / "pairs.tsv")
    with pytest.raises(ConfigError, match=r"give --model\.path, a model to begin with, or --model\.config"):
        dataclasses.replace(recipe_of(place), model=both).build(print)
    CONFIGS["bart"]().save_pretrained(place / "long")
    (place / "pairs.tsv").write_text("".join(f"{'1' * 90}{n}\t2\n" for n in range(40)))
    with pytest.raises(DataError, match=r"a source has 9\d tokens, and the model 64 positions"):
        build(place, "bart")
    unused = dict(PairsConfig(on_error="skip").unused())
    assert "on_error" in unused
    assert {"beams", "bleu_tokenizer"} <= dict(TranslationEvalConfig(samples=0).unused()).keys()
