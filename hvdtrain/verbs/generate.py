"""The verb `generate`: continues prompts, translates (`translate.py`), or writes a clip down (`transcribe.py`)."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TextIO

import torch

from hvdtrain.data.text.tokenizer import Tokenizer, load_bpe
from hvdtrain.errors import DataError
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.interchange import Shape, read_shape
from hvdtrain.models.sampling import Sampling, sample
from hvdtrain.recipes.image_models import MODEL_TYPE
from hvdtrain.rundir.trained import Trained, open_trained
from hvdtrain.verbs.kit import standard_input
from hvdtrain.verbs.loading import CTC, SEQ2SEQ, auto_class_of
from hvdtrain.verbs.options import GenerateOptions
from hvdtrain.verbs.transcribe import transcribe_file
from hvdtrain.verbs.translate import refuse_for_language_models, translate

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# Tokens that are decoded at once, and how many of them are decoded again beside the ones that follow.
_MOST_DECODED = 32
_DECODED_AGAIN = 8


class TokensAsText(Protocol):
    """Knows what tokens mean."""

    @property
    def end(self) -> int:
        """Return the token that ends a text."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        ...


class Writer(TokensAsText, Protocol):
    """Continues prompts with a model."""

    def write(
        self, prompts: Sequence[str], num_tokens: int, how: Sampling, add: Callable[[int, int], bool], use_cache: bool
    ) -> int:
        """Continue the prompts, calling `add` with row and token, until it says that a row is done.

        Returns:
            How many tokens were drawn.
        """
        ...


def generate(options: GenerateOptions) -> int:
    """Answer `generate DIR`: text to standard output, how fast to standard error; returns the exit code."""
    trained = open_trained(options.run_dir, options.checkpoint)
    if trained.about:
        sys.stderr.write(f"{trained.about}\n")
    kind = auto_class_of(trained)
    if kind == SEQ2SEQ:
        return translate(options, trained)
    if kind == CTC:
        return transcribe_file(options, trained)
    refuse_for_language_models(options)
    temperature = 0.8 if options.temperature is None else options.temperature
    how = Sampling(temperature=temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)
    writer = open_writer(trained, options.chat)
    prompts = options.prompt or (_standard_input(),)
    texts = [Continuation(writer, options.stop) for _ in prompts]
    out = sys.stdout if len(prompts) == 1 else None
    unsaid = [] if options.chat else [*prompts]  # with the first token: the prompt may yet be refused

    def add(row: int, token: int) -> bool:
        is_done = texts[row].add(token)
        if out:
            _write(out, (unsaid.pop() if unsaid else "") + texts[0].take())
        return is_done

    started = time.perf_counter()
    count = writer.write(prompts, options.max_tokens, how, add, options.cache)
    seconds = time.perf_counter() - started
    if out:
        _write(out, (unsaid.pop() if unsaid else "") + texts[0].finish() + "\n")
    else:
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            shown = f"{prompt}\n" if options.chat else prompt
            _write(sys.stdout, f"--- {i + 1}\n{shown}{text.finish()}\n")
    sys.stderr.write(f"{count} tokens in {seconds:.2f} s: {count / max(seconds, 1e-9):,.0f} tokens/s\n")
    return 0


def open_writer(trained: Trained, is_chat: bool) -> Writer:
    """Return what writes with a trained model: the native decoder, or transformers for what transformers has made.

    Raises:
        DataError: the model cannot be loaded.
        ConfigError: it cannot answer in a conversation.
    """
    if trained.is_adapter:
        from hvdtrain.recipes.transformers_models.writing import open_transformers_writer

        return open_transformers_writer(trained, is_chat)
    if not (trained.folder / "config.json").is_file():
        raise DataError(
            f"{trained.source} does not say what its weights are (no config.json): it is no run of a language model"
        )
    if trained.model_type == MODEL_TYPE:
        raise DataError(f"{trained.source} is a classifier of images: python -m hvdtrain predict says what they show")
    is_theirs = is_chat or (trained.folder / "generation_config.json").exists() or not _is_native(trained)
    if is_theirs and importlib.util.find_spec("transformers") is not None:
        from hvdtrain.recipes.transformers_models.writing import open_transformers_writer

        return open_transformers_writer(trained, is_chat)
    if is_chat:
        raise DataError("--chat needs transformers: pip install 'hvdtrain[hf]'")
    shape = read_shape(trained.folder)
    if not (trained.folder / "tokenizer.json").is_file():
        raise DataError(
            f"{trained.source} has no tokenizer.json: it was trained on tokens whose text nobody knows;"
            " train with --data.tokenizer to give it the one of its .bin files"
        )
    tokenizer = load_bpe(trained.folder / "tokenizer.json", shape.end)
    return NativeWriter(load_model(trained, shape), tokenizer, shape)


def _is_native(trained: Trained) -> bool:
    return trained.model_type == "llama"


class NativeWriter:
    """Continues prompts with the native decoder, all of them together.

    Args:
        model: the decoder.
        tokenizer: its tokenizer.
        shape: what its config.json says.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer, shape: Shape) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._shape = shape

    @property
    def end(self) -> int:
        """Return the token that ends a text."""
        return self._tokenizer.eot

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        return self._tokenizer.decode(tokens)

    def write(
        self, prompts: Sequence[str], num_tokens: int, how: Sampling, add: Callable[[int, int], bool], use_cache: bool
    ) -> int:
        """Continue the prompts, and return how many tokens were drawn; arguments as in `Writer`."""
        begin = [] if self._shape.begin is None else [self._shape.begin]
        rows = [begin + self._tokenizer.encode(prompt).tolist() for prompt in prompts]
        longest, most = max(map(len, rows)), self._shape.max_length
        if longest > most:
            sys.stderr.write(
                f"WARNING: a prompt has {longest:,} tokens, and the model, which was trained on {most:,} at a time,"
                " sees the last of them alone\n"
            )
        drawn = sample(
            self._model,
            rows,
            num_tokens,
            context_length=self._shape.max_length,
            sampling=how,
            is_done=add,
            use_cache=use_cache,
        )
        return sum(token is not None for tokens in drawn for token in tokens)


def load_model(trained: Trained, shape: Shape) -> Decoder:
    """Return the decoder with the trained weights, on the GPU if there is one.

    Raises:
        DataError: the weights do not fit their config.json.
    """
    with torch.device("meta"):
        model = Decoder(shape.config, shape.vocab_size)
    missing: list[str] = []
    try:
        missing, _ = model.load_state_dict(trained.weights, strict=False, assign=True)
    except RuntimeError as error:
        raise DataError(f"the weights of {trained.source} do not fit its config.json: {error}") from error
    if shape.config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    if any(parameter.is_meta for parameter in model.parameters()):
        raise DataError(f"the weights of {trained.source} do not fit its config.json: {missing[0]} is not there")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


class Continuation:
    """The text of one row as its tokens come: whole characters only, and nothing from a stop text on.

    A token costs the same however long the text is: the last tokens alone are decoded, beside a few before them, since
    what a token looks like may depend on its neighbours.

    Args:
        writer: turns tokens into text.
        stop: texts that end it.
    """

    def __init__(self, writer: TokensAsText, stop: Sequence[str]) -> None:
        self._writer = writer
        self._stop = [text for text in stop if text]
        self._longest = max(map(len, self._stop), default=0)
        self._tokens: list[int] = []
        self._before = 0  # so many characters of the tokens' text are in `_settled`
        self._settled = ""  # what no later token changes, from a place that was taken before
        self._new = ""
        self._taken = 0  # of `_settled + _new`
        self._is_done = False

    def add(self, token: int) -> bool:
        """Take in a token; returns whether it is the last: the end of the text, or of a stop text."""
        if token == self._writer.end:
            self._is_done = True
            return True
        self._tokens.append(token)
        self._new = self._writer.decode(self._tokens)[self._before :]
        if self._longest and self._ends_at_stop():
            self._is_done = True
        elif len(self._tokens) >= _MOST_DECODED and not self._new.endswith(_UNFINISHED):
            self._settle()
        return self._is_done

    def take(self) -> str:
        """Return what is new, but for the beginning of a character or of a stop text."""
        whole = self._settled + self._new
        if not self._is_done:
            whole = whole.rstrip(_UNFINISHED)
            held = [n for text in self._stop for n in range(1, len(text)) if whole.endswith(text[:n])]
            whole = whole[: len(whole) - max(held, default=0)]
        new = whole[self._taken :]
        self._taken = max(self._taken, len(whole))
        return new

    def finish(self) -> str:
        """Return all that was not taken yet."""
        self._is_done = True
        return self.take()

    def _ends_at_stop(self) -> bool:
        """Return whether there is a stop text now, and cut the text there: it ends in what is new."""
        start = max(0, len(self._settled) - self._longest)
        recent = self._settled[start:] + self._new
        found = [place for text in self._stop if (place := recent.find(text)) >= 0]
        if found:
            self._settled, self._new = (self._settled + self._new)[: start + min(found)], ""
        return bool(found)

    def _settle(self) -> None:
        """Forget the tokens but for a few, and the text that was taken."""
        whole = self._settled + self._new
        self._settled, self._new, self._taken = whole[self._taken :], "", 0
        del self._tokens[:-_DECODED_AGAIN]
        self._before = len(self._writer.decode(self._tokens))


def _standard_input() -> str:
    return "" if sys.stdin is None or sys.stdin.isatty() else standard_input().removesuffix("\n")


def _write(file: TextIO, text: str) -> None:
    file.write(text)
    file.flush()
