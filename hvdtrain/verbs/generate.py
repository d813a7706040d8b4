"""The verb `generate`: continues prompts with a trained language model."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TextIO

import torch

from hvdtrain.data.text.tokenizer import Tokenizer, load_bpe
from hvdtrain.errors import DataError
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.interchange import Shape, read_shape
from hvdtrain.models.sampling import Sampling, sample
from hvdtrain.rundir.trained import Trained, open_trained
from hvdtrain.verbs.options import GenerateOptions

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def generate(options: GenerateOptions) -> int:
    """Answer `generate DIR`: text to standard output, how fast to standard error; returns the exit code."""
    how = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)
    trained = open_trained(options.run_dir, options.checkpoint)
    if trained.about:
        sys.stderr.write(f"{trained.about}\n")
    shape = read_shape(trained.folder)
    if not (trained.folder / "tokenizer.json").is_file():
        raise DataError(f"{trained.source} has no tokenizer.json: it was trained on tokens whose text nobody knows")
    tokenizer = load_bpe(trained.folder / "tokenizer.json", shape.end)
    model = load_model(trained, shape)
    prompts = options.prompt or (_standard_input(),)
    begin = [] if shape.begin is None else [shape.begin]
    rows = [begin + tokenizer.encode(prompt).tolist() for prompt in prompts]
    texts = [Continuation(tokenizer, options.stop) for _ in rows]
    out = sys.stdout if len(rows) == 1 else None
    if out:
        _write(out, prompts[0])
    started, count = time.perf_counter(), 0
    for drawn in sample(
        model,
        rows,
        options.max_tokens,
        context_length=shape.max_length,
        sampling=how,
        is_done=lambda row, token: texts[row].add(token),
        use_cache=options.cache,
    ):
        count += sum(token is not None for token in drawn)
        if out:
            _write(out, texts[0].take())
    seconds = time.perf_counter() - started
    if out:
        _write(out, texts[0].finish() + "\n")
    else:
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            _write(sys.stdout, f"--- {i + 1}\n{prompt}{text.finish()}\n")
    sys.stderr.write(f"{count} tokens in {seconds:.2f} s: {count / max(seconds, 1e-9):,.0f} tokens/s\n")
    return 0


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

    Args:
        tokenizer: turns tokens into text.
        stop: texts that end it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._tokens: list[int] = []
        self._text = ""
        self._taken = 0
        self._is_done = False

    def add(self, token: int) -> bool:
        """Take in a token; returns whether it is the last: the end of the text, or of a stop text."""
        if token == self._tokenizer.eot:
            self._is_done = True
            return True
        self._tokens.append(token)
        self._text = self._tokenizer.decode(self._tokens)
        found = [place for text in self._stop if (place := self._text.find(text)) >= 0]
        if found:
            self._text, self._is_done = self._text[: min(found)], True
        return bool(found)

    def take(self) -> str:
        """Return what is new, but for the beginning of a character or of a stop text."""
        whole = self._text
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


def _standard_input() -> str:
    return "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read().removesuffix("\n")


def _write(file: TextIO, text: str) -> None:
    file.write(text)
    file.flush()
