"""Encoder-decoders that must be told their languages: NLLB's and mBART's tokenizers, of a few characters."""

import dataclasses

import pytest
import torch
from hugging import import_transformers

from hvdtrain.errors import ConfigError
from hvdtrain.recipes.seq2seq import EncoderDecoderConfig, PairsConfig, TranslationEvalConfig, seq2seq
from hvdtrain.recipes.transformers_models.encoder_decoders import before_targets

transformers = import_transformers()
pytestmark = pytest.mark.filterwarnings("default")
WORDS = ["<s>", "<pad>", "</s>", "<unk>", "▁", *"0123456789"]
SHAPE = {
    **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 40},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
}
CODES = {"nllb": ("eng_Latn", "deu_Latn"), "mbart": ("en_XX", "de_DE"), "mbart50": ("en_XX", "de_DE")}
STARTS = {"nllb": "</s>", "mbart": "de_DE", "mbart50": "</s>"}


def tokenizer_of(family):
    if family == "nllb":
        vocab = {word: number for number, word in enumerate(WORDS)}
        return transformers.NllbTokenizer(vocab=vocab, additional_special_tokens=[*CODES[family]])
    kind = transformers.MBartTokenizer if family == "mbart" else transformers.MBart50Tokenizer
    return kind(vocab=[(word, -1.0) for word in WORDS])


def recipe_of(place, family, source=None, target=None, **data):
    (place / "pairs.tsv").write_text("".join(f"{n} {n + 1}\t{n}\n" for n in range(100, 140)))
    tokenizer = tokenizer_of(family)
    tokenizer.save_pretrained(place / family)
    kind = transformers.M2M100Config if family == "nllb" else transformers.MBartConfig
    kind(vocab_size=len(tokenizer), **SHAPE).save_pretrained(place / family)
    given = {"path": str(place / "pairs.tsv"), "cache_dir": str(place / "cache"), "tokenizer": str(place / family)}
    languages = {"source_language": source, "target_language": target}
    return dataclasses.replace(
        seq2seq(),
        model=EncoderDecoderConfig(config=place / family / "config.json"),
        data=PairsConfig(**{**given, **languages, **data}),
        eval=TranslationEvalConfig(samples=0),
    )


def build(*args, **kwargs):
    return recipe_of(*args, **kwargs).build(lambda text: None)


@pytest.mark.parametrize("family", CODES)
def test_translations_begin_as_targets_do_in_training(tmp_path, family):
    task = build(tmp_path, family, *CODES[family])
    task.write_model_files(tmp_path / "out")
    task.model.save_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    sources, is_text, targets = task.train_data.batch(torch.arange(2))
    given = tokenizer("100 101", text_target="100")  # its languages are saved with it
    assert sources[0].tolist() == given["input_ids"]
    assert targets[0].tolist() == given["labels"]
    source, target = CODES[family]
    assert source in tokenizer.convert_ids_to_tokens(given["input_ids"])
    assert target in tokenizer.convert_ids_to_tokens(given["labels"])
    trained = before_targets(task.model, targets)[0].tolist()
    made = model.generate(input_ids=sources, attention_mask=is_text, max_new_tokens=4, num_beams=2)[0].tolist()
    assert tokenizer.convert_ids_to_tokens(trained[0]) == STARTS[family]
    begin = trained.index(tokenizer.convert_tokens_to_ids(target)) + 1  # what comes before the first word
    assert made[:begin] == trained[:begin]


def test_a_saved_tokenizer_knows_its_languages(tmp_path):
    told = build(tmp_path, "nllb", "deu_Latn", "eng_Latn")
    told.write_model_files(tmp_path / "out")
    again = build(tmp_path, "nllb", tokenizer=str(tmp_path / "out"))
    assert again.train_data.batch(torch.arange(1))[2].tolist() == told.train_data.batch(torch.arange(1))[2].tolist()
    other = build(tmp_path, "nllb", "eng_Latn", "deu_Latn")
    assert other.fingerprint not in (told.fingerprint, None)
    assert other.train_data.batch(torch.arange(1))[2].tolist() != told.train_data.batch(torch.arange(1))[2].tolist()


@pytest.mark.parametrize(
    ("family", "source", "target", "says"),
    [
        ("nllb", None, None, r"must be told its languages: give --data\.source-language and --data\.target-language"),
        ("mbart", "en_XX", None, r"--data\.source-language is given, and --data\.target-language is not: give both"),
        ("mbart50", None, "en_XX", r"--data\.target-language is given, and --data\.source-language is not"),
        ("nllb", "eng_Latn", "deu_Lat", r"--data\.target-language deu_Lat is no .* did you mean 'deu_Latn'"),
        ("mbart50", "en", "de_DE", r"--data\.source-language en is no language of this tokenizer"),
        ("mbart", "en_XX", "</s>", r"--data\.target-language </s> is no language of this tokenizer"),
    ],
)
def test_what_languages_are_missing_or_unknown_is_told(tmp_path, family, source, target, says):
    with pytest.raises(ConfigError, match=says):
        build(tmp_path, family, source, target)


def test_other_tokenizers_are_told_no_language(tmp_path):
    recipe = recipe_of(tmp_path, "nllb", "eng_Latn", None)
    plain = dataclasses.replace(recipe.data, tokenizer=None)
    with pytest.raises(ConfigError, match=r"--data\.source-language is for tokenizers that know languages"):
        dataclasses.replace(recipe, data=plain, model=EncoderDecoderConfig()).build(print)
