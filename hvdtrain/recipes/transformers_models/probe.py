"""Finds out, by trying, how packed documents can pass through a model so that its loss is right.

The judge is transformers' own forward pass of each document alone. A way through the model holds if its logits are
those, and if changing one document leaves those of others as they were. No class or setting is known by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.errors import ConfigError, UsageError
from hvdtrain.models.loss import IGNORE_INDEX, next_token_loss
from hvdtrain.recipes.transformers_models.balance import Balance
from hvdtrain.recipes.transformers_models.forward import DocumentLoss, Head, draws, run
from hvdtrain.recipes.transformers_models.heads import OwnHead, ProductHead, find_own_head
from hvdtrain.recipes.transformers_models.layouts import (
    BY_MASKS,
    BY_POSITIONS,
    IN_EQUAL_ROWS,
    IN_ROWS,
    Layout,
    pack,
)
from hvdtrain.recipes.transformers_models.probing import probing

TOLERANCE = 1e-3
"""Of a token's logits: the norm of their error by their norm, both without the mean. Rounding in fp32 makes about 1e-6
in small models, a window that is lost 3e-3 and more, as the positions of another document."""
LEAK_TOLERANCE = 3e-5
"""Of a token's logits where another document changes, which mostly leaves them bitwise as they are."""
_FAILS = "the forward pass fails"
_QUANTILE = 0.99
"""Of the tokens: in a mixture of experts rounding can send single tokens to another expert."""


@dataclass(frozen=True)
class Finding:
    """What trying one layout has shown."""

    layout: Layout
    error: float
    """The largest error of a token's logits, relative to them."""
    problem: str = ""
    """Why it does not hold; empty if it does."""


@dataclass(frozen=True)
class Way:
    """How documents pass through a model, and what was tried."""

    loss: DocumentLoss
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        """Return what a person should know."""
        if not self.findings:
            return f"{self.loss.layout.name}, if that holds: it is tried where there are weights"
        *failed, found = self.findings
        text = f"{found.layout.name}; each comes out as it does alone (tried: to {found.error:.0e})"
        if found.layout not in (IN_ROWS, IN_EQUAL_ROWS):
            slow = next((finding for finding in failed if finding.layout.tries_training), None)
            return f"{text}; {slow.layout.name} would be faster, but there {slow.problem}" if slow else text
        reason = min((finding.problem for finding in failed), key=_is_failure)
        return f"{text}; packed would be faster, but there {reason}"


def _is_failure(problem: str) -> bool:
    return problem.startswith(_FAILS)


NOT_TRIED = Way(DocumentLoss(BY_POSITIONS, ProductHead()), ())
"""For a model without weights."""


def find_way(model: nn.Module, pool: Tensor, length: int, packed: Sequence[Layout] = (BY_POSITIONS, BY_MASKS)) -> Way:
    """Return the fastest way that holds for this model.

    Costs about ten forward passes of a sample. The model is left as it was.

    Args:
        model: of transformers, on the device where it shall be tried.
        pool: int64 `(tokens,)`, what documents are made of.
        length: T, tokens of a sample.
        packed: what is tried before rows.

    Raises:
        ConfigError: none holds, or transformers itself cannot run the model on T tokens.
    """
    with probing(model) as draws_random_numbers:
        trial = _Trial(model, pool, length, draws_random_numbers)
        trial.check_causal()
        rows = trial.judge(IN_EQUAL_ROWS if draws_random_numbers else IN_ROWS)
        findings: list[Finding] = []
        for layout in packed:
            # Rows differ from documents alone by rounding: others may by ten times as much.
            findings.append(trial.judge(layout, 0.0 if rows.problem else 10 * rows.error))
            if not findings[-1].problem:
                break
        else:
            findings.append(rows)
        if findings[-1].problem:
            reasons = "; ".join(f"{finding.layout.name}: {finding.problem}" for finding in findings)
            raise ConfigError(f"this model cannot be trained on documents: there is no way for them ({reasons})")
        layout = findings[-1].layout
        return Way(DocumentLoss(layout, trial.head(layout), trial.balance()), tuple(findings))


class _Trial:
    """Two samples of documents, and what transformers makes of each document alone.

    The first sample holds a short document and a long one, the second one that fills it: in both, windows of attention
    that are shorter than a sample show.
    """

    def __init__(self, model: nn.Module, pool: Tensor, length: int, draws_random_numbers: bool) -> None:
        self._model, self._draws = model, draws_random_numbers
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        cut = length // 3
        drawn = [pool[torch.randint(len(pool), (n,), generator=generator)] for n in (cut, length - cut, length, cut)]
        *self.documents, self._other = [tokens.to(device) for tokens in drawn]
        self._alone = [self._logits(document) for document in self.documents if len(document)]

    def _logits(self, document: Tensor) -> Tensor:
        try:
            logits: Tensor = run(self._model, {"input_ids": document[None]}).logits[0]
        except UsageError:
            raise
        except Exception as error:  # whatever a model's code does
            raise ConfigError(
                f"transformers' own forward pass of this model fails on {len(document)} tokens ({describe(error)})"
            ) from error
        if logits.shape[0] != len(document) or not bool(logits.isfinite().all()):
            raise ConfigError("transformers' own forward pass of this model gives no finite logits, one for each token")
        return logits

    def check_causal(self) -> None:
        """Raise ConfigError where the model sees the tokens that it is to predict."""
        document = self.documents[-1]
        keep = len(document) - len(self._other)
        changed = torch.cat((document[:keep], self._other))
        if keep and _distance(self._logits(changed)[:keep], self._alone[-1][:keep]) > LEAK_TOLERANCE:
            raise ConfigError(
                "this model is no causal one: what it predicts depends on the tokens that follow (models made from"
                " encoders need is_decoder: true in their config.json)"
            )

    def judge(self, layout: Layout, noise: float = 0.0) -> Finding:
        """Return whether documents pass through the model as if each were alone.

        Args:
            layout: how they pass.
            noise: what rounding alone can do.
        """
        try:
            undo = layout.prepare(self._model)
        except Exception as problem:  # whatever a model's code does where it cannot compute so
            return Finding(layout, float("inf"), f"{_FAILS} ({describe(problem)})")
        finding = self._judged(layout, noise)
        if finding.problem:
            undo()
        return finding

    def _judged(self, layout: Layout, noise: float) -> Finding:
        try:
            ours = self._packed(layout, self.documents)
            changed = self._packed(layout, [self._other, *self.documents[1:]])
            if layout.tries_training and self._draws:
                self._train_once(layout)
        except Exception as problem:  # whatever a model's code does with arguments that it does not know
            return Finding(layout, float("inf"), f"{_FAILS} ({describe(problem)})")
        error = _distance(ours, torch.cat(self._alone))
        after = len(self._other)
        leak = _distance(changed[after:], ours[after:])
        if not leak <= max(LEAK_TOLERANCE, noise):
            return Finding(layout, error, f"they see each other (logits move by {leak:.0e})")
        if not error <= max(TOLERANCE, noise):
            return Finding(layout, error, f"they come out otherwise than alone (logits differ by {error:.0e})")
        return Finding(layout, error, layout.problem())

    def _train_once(self, layout: Layout) -> None:
        """Have the documents pass through the model as in training; the generators are put back."""
        self._model.train()
        try:
            draws(self.documents[0].device, lambda: self._packed(layout, self.documents))
        finally:
            self._model.eval()

    def _packed(self, layout: Layout, documents: Sequence[Tensor]) -> Tensor:
        """Return the logits of the documents, packed, `(tokens, V)`."""
        batch = pack(documents)
        logits: Tensor | None = None
        for call in layout.calls(self._model, batch):
            found = run(self._model, call.inputs).logits
            is_text = call.origins >= 0
            if logits is None:
                logits = found.new_full((batch[0].numel(), found.shape[-1]), float("nan"))
            logits[call.origins[is_text]] = found[is_text]
        assert logits is not None
        return logits

    def head(self, layout: Layout) -> Head | None:
        """Return the model's head where the loss in chunks, from the last hidden states, is that of its logits."""
        head = ProductHead() if self._is_product() else self._own_head()
        if head is None:
            return None
        batch = pack(self.documents)
        few = 4 * head.num_logits(self._model) * max(1, len(self.documents[-1]) // 3)
        try:
            at_once = DocumentLoss(layout, None)(self._model, batch)["loss"]
            in_chunks = DocumentLoss(layout, head)(self._model, batch, few)["loss"]
        except Exception:  # whatever a model's code does: its logits are right, and taken as they are
            return None
        return head if bool((in_chunks - at_once).abs() <= 1e-4 * at_once.abs()) else None

    def _own_head(self) -> OwnHead | None:
        inputs = {"input_ids": self.documents[-1][None]}
        return find_own_head(self._model, inputs, self._alone[-1][None], TOLERANCE / 10)

    def _is_product(self) -> bool:
        """Return whether logits are what the head makes of the last hidden states, neither scaled nor capped.

        A cap shows in large logits only, and those of new weights are small: here the head's are made large.
        """
        whole: Any = self._model
        inputs = {"input_ids": self.documents[-1][None]}
        try:
            head = whole.get_output_embeddings()
            if not isinstance(head, nn.Linear) or head.bias is not None:
                return False
            product = head(run(whole.base_model, inputs)[0])
            large = 1e3 / product.abs().max()
            hook = head.register_forward_hook(lambda module, args, output: output * large)
            try:
                logits = run(whole, inputs).logits
            finally:
                hook.remove()
        except Exception:  # whatever a model's code does: then its head is another one
            return False
        return _distance(logits[0], large * product[0]) <= TOLERANCE

    def balance(self) -> Balance | None:
        """Return the balancing loss that transformers adds to this model's loss; None if it adds none.

        Raises:
            ConfigError: it is another one than `Balance`.
        """
        document = self.documents[-1]
        inputs = {"input_ids": document[None]}
        output = run(self._model, inputs)
        logits = getattr(output, "router_logits", None)
        if not logits:
            return None
        labelled = run(self._model, {**inputs, "labels": document[None]})
        theirs = getattr(labelled, "aux_loss", None)
        if theirs is None or not isinstance(theirs, Tensor):
            return None
        targets = torch.cat((document[1:], document.new_tensor([IGNORE_INDEX])))[None]
        total, count = next_token_loss(labelled.logits, targets)
        term = float(labelled.loss - total / count)
        samples = torch.zeros_like(document)
        whole: Any = self._model
        coefficient = getattr(whole, "router_aux_loss_coef", None)
        if coefficient is not None and abs(coefficient * theirs - term) <= 1e-5 * float(labelled.loss):
            for top_k in range(1, logits[0].shape[-1] + 1):
                balance = Balance(float(coefficient), top_k)
                if (balance.of_samples([logits], [samples], 1) - theirs).abs() <= 1e-4 * theirs.abs():
                    return balance
        raise ConfigError(
            "transformers adds a balancing loss to this model's loss that is not known here: set output_router_logits"
            " to false in its config.json"
        )


def describe(error: Exception) -> str:
    """Return the kind of an error and the first line of its message, cut."""
    lines = str(error).strip().splitlines() or [""]
    text = lines[0] if len(lines[0]) <= 100 else f"{lines[0][:97]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _distance(a: Tensor, b: Tensor) -> float:
    """Return how far two tokens' logits, `(tokens, V)`, are apart, relative to those of `b`; nearly the largest."""
    if len(b) == 0:
        return 0.0
    a, b = (logits.float() - logits.float().mean(-1, keepdim=True) for logits in (a, b))
    distances = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-30)
    return float(distances.sort().values[math.ceil(_QUANTILE * len(distances)) - 1])
