"""Text from a trained model of transformers, by transformers' own way to generate."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.errors import ConfigError, DataError
from hvdtrain.models.sampling import Sampling
from hvdtrain.recipes.transformers_models.auto_classes import load_trained
from hvdtrain.recipes.transformers_models.loading import (
    check_files,
    import_transformers,
    load_model,
    load_tokenizer,
)
from hvdtrain.recipes.transformers_models.lora import load_adapted
from hvdtrain.rundir.trained import Trained


def open_transformers_writer(trained: Trained, is_chat: bool) -> TransformersWriter:
    """Load a model and its tokenizer.

    Args:
        trained: the weights, and the files that say what they are.
        is_chat: each prompt is a user's message, to be answered.

    Raises:
        DataError: model or tokenizer cannot be loaded.
        ConfigError: the tokenizer has no chat template to answer by.
    """
    tokenizer = load_tokenizer(str(trained.folder))
    if is_chat and not tokenizer.chat_template:
        raise ConfigError(f"--chat needs a chat template, and {trained.source} has none")
    return TransformersWriter(_load(trained), tokenizer, is_chat)


class TransformersWriter:
    """Continues prompts, or answers them as a conversation; made by `open_transformers_writer`."""

    end = -1
    """No token: the model's ends of text are looked for before `add` is called."""

    def __init__(self, model: nn.Module, tokenizer: Any, is_chat: bool) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._is_chat = is_chat

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def write(
        self, prompts: Sequence[str], num_tokens: int, how: Sampling, add: Callable[[int, int], bool], use_cache: bool
    ) -> int:
        """Continue each prompt after the other, and return how many tokens were drawn.

        Args:
            prompts: texts.
            num_tokens: the most for each.
            how: the next token is chosen.
            add: is called with row and token, and returns whether the row is done.
            use_cache: keep what the model knows of the tokens before.

        Raises:
            ConfigError: a prompt has more tokens than the model has positions; nothing was written.
        """
        rows, most = [self._encode(prompt) for prompt in prompts], most_tokens(self._model)
        for row, tokens in enumerate(rows):
            if most is not None and len(tokens) > most:
                raise ConfigError(
                    f"prompt {row + 1} has {len(tokens):,} tokens, and the model has positions for {most:,}: shorten it"
                )
        return sum(self._write(row, tokens, num_tokens, how, add, use_cache) for row, tokens in enumerate(rows))

    def _write(
        self,
        row: int,
        tokens: Sequence[int],
        num_tokens: int,
        how: Sampling,
        add: Callable[[int, int], bool],
        use_cache: bool,
    ) -> int:
        library = import_transformers()
        ends, most = self._ends(), most_tokens(self._model)
        listener = _Listener(len(tokens), lambda token: token in ends or add(row, token))
        asked, num_tokens = num_tokens, num_tokens if most is None else min(num_tokens, most + 1 - len(tokens))
        is_random = how.temperature > 0
        settings = library.GenerationConfig(
            max_new_tokens=num_tokens,
            do_sample=is_random,
            use_cache=use_cache,
            eos_token_id=sorted(ends) or None,
            pad_token_id=min(ends, default=0),
            **(
                {"temperature": how.temperature, "top_k": how.top_k or 0, "top_p": how.top_p or 1.0}
                if is_random
                else {}
            ),
        )
        device = next(self._model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(how.seed + row)
            model: Any = self._model
            inputs = torch.tensor([[*tokens]], device=device)
            model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=settings,
                stopping_criteria=[listener],
            )
        if listener.count == num_tokens < asked and not listener.is_done:
            sys.stderr.write(
                f"WARNING: text {row + 1} ends where the model has no more positions, of which it has {most:,}\n"
            )
        return listener.count

    def _encode(self, prompt: str) -> list[int]:
        tokenizer = self._tokenizer
        if self._is_chat:
            messages = [{"role": "user", "content": prompt}]
            return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        tokens = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        begin = tokenizer.bos_token_id
        if begin is not None and tokens[:1] != [begin]:  # as documents begin in training
            tokens.insert(0, begin)
        return tokens or [tokenizer.eos_token_id]

    def _ends(self) -> set[int]:
        """Return the tokens that end a text: those of the model's own settings, and of its tokenizer."""
        model: Any = self._model
        named = getattr(model.generation_config, "eos_token_id", None)
        ends = {self._tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
        if self._is_chat:
            ends |= _ends_of_answers(self._tokenizer)
        return {end for end in ends if end is not None}


def most_tokens(model: nn.Module) -> int | None:
    """Return how many tokens a model can be shown at most, None where it has no table of positions that ends.

    Most rotary and relative positions go on; one beyond a table, learned or not (GPT-J), is an error, on a GPU the end
    of the process.
    """
    own: Any = model
    words, limit = own.get_input_embeddings(), getattr(own.config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    modules = [item for item in model.modules() if item is not words]
    tables = [item.num_embeddings for item in modules if isinstance(item, nn.Embedding)]
    tables += [len(table) for item in modules if isinstance(table := getattr(item, "embed_positions", None), Tensor)]
    # OPT's table has two more: its positions begin at 2.
    return limit if any(limit <= length <= limit + 2 for length in tables) else None


class _Listener:
    """Hears of each token that is drawn, and says when to stop: a criterion of transformers."""

    is_done = False
    """What was heard last ends the text."""

    def __init__(self, num_shown: int, add: Callable[[int], bool]) -> None:
        self.count = 0
        self._num_shown = num_shown
        self._add = add

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return whether each row, `(1,)`, is done; `input_ids` is int64 `(1, tokens)`."""
        is_done = False
        for token in input_ids[0, self._num_shown + self.count :].tolist():
            self.count += 1
            is_done = self._add(token) or is_done
        self.is_done = is_done
        return torch.tensor([is_done], device=input_ids.device)


def _ends_of_answers(tokenizer: Any) -> set[int]:
    """Return the tokens that training has learned to end an answer with."""
    from hvdtrain.data.text.chat import ChatTemplate, Conversation

    talk = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "!"})
    try:
        (passage,) = ChatTemplate(tokenizer).passages(Conversation(talk, (False, True)))
    except DataError:
        return set()
    if passage.ending is not None:
        return {tokenizer.convert_tokens_to_ids(passage.ending)}
    start, end = passage.spans[-1]
    tokens = tokenizer(passage.text[start:end], add_special_tokens=False)["input_ids"]
    return {int(tokens[-1])}


def load_with_adapters(trained: Trained) -> nn.Module:
    """Return the base model of trained adapters with these, in fp32.

    Raises:
        DataError: either cannot be loaded, or they do not belong together.
    """
    return load_adapted(
        trained.folder, trained.weights, trained.source, lambda path: load_model(path, None, "auto", seed=0)
    )


def _load(trained: Trained) -> nn.Module:
    if not trained.is_adapter:
        return load_trained(trained, "AutoModelForCausalLM")
    check_files(str(trained.folder))
    adapted = load_with_adapters(trained)
    return adapted.to("cuda" if torch.cuda.is_available() else "cpu").eval()
