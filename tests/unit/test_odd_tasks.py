"""Tasks whose fields hold other things than they are for: refused in a sentence, never taken for something else."""

import os

import pytest
import torch
from torch.utils import data as utils

import hvdtrain
from hvdtrain.errors import ConfigError, DataError
from hvdtrain.trainer.task import CorpusEvaluation, Evaluation


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Put back the variables that a start sets for its process."""
    for name in ("HOROVOD_FUSION_THRESHOLD", "MKL_NUM_THREADS", "OMPI_MCA_mpi_yield_when_idle"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))


class Numbers:
    """Samples with something odd at one place."""

    def __init__(self, odd=None, size=16):
        self.odd, self.size = odd or {}, size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        if isinstance(self.odd.get(i), Exception):
            raise self.odd[i]
        return self.odd.get(i, torch.full((3,), float(i))) if i in self.odd else torch.full((3,), float(i))


class Stream:
    """The same as a stream."""

    def __init__(self, odd):
        self.numbers = Numbers(odd)

    def __len__(self):
        return len(self.numbers)

    def __iter__(self):
        return map(self.numbers.__getitem__, range(len(self)))


def squares(model, batch):
    return {"loss": model(batch).square().sum()}


def task(**fields):
    fields = {"train_data": Numbers(), "val_data": Numbers(), "loss_sums": squares, **fields}
    return hvdtrain.Task(**{"model": torch.nn.Linear(3, 1), **fields})


class Odd(hvdtrain.Recipe):
    """Trains what `fields` says."""

    def build(self, say):
        torch.manual_seed(0)
        return task(**Odd.fields)


def train(tmp_path, **fields):
    Odd.fields = fields
    recipe = Odd(train=hvdtrain.TrainConfig(steps=3, global_batch_size=8), log=hvdtrain.LogConfig(every=3))
    return hvdtrain.train(recipe, run_dir=tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"reduction": "none"}, "'sum' or 'mean'"),
        ({"reduction": None}, "'sum' or 'mean'"),
        ({"metrics": "loss"}, r"Task\(metrics=\[\.\.\.\]\)"),
        ({"callbacks": object()}, r"Task\(callbacks=\[\.\.\.\]\)"),
        ({"callbacks": None}, "takes a tuple or a list"),
        ({"sinks": {}}, "takes a tuple or a list"),
        ({"components": len}, "takes a tuple or a list"),
        ({"evaluations": 3}, "takes a tuple or a list"),
        ({"loss_sums": 3}, "takes a function"),
        ({"collate": "pad"}, "takes a function"),
        ({"unit": 3}, "must be a text"),
        ({"model": torch.nn.Linear}, r"model=\.\.\.\) holds a class: make an object, Linear\("),
        ({"model": squares}, r"takes a torch\.nn\.Module, not an object of type function"),
        ({"build_optimizer": torch.optim.Adam}, r"not a class: write build_optimizer=lambda optim, model: Adam\("),
    ],
)
def test_a_field_of_another_kind(fields, says):
    with pytest.raises(ConfigError, match=says):
        task(**fields)


@pytest.mark.parametrize(
    ("sampler", "says"),
    [
        (utils.WeightedRandomSampler([1.0] * 16, 16), r"hvdtrain\.Weighted\(weights\)"),
        (utils.SequentialSampler(range(16)), r"Give hvdtrain\.InOrder\(\)"),
        (utils.RandomSampler(range(16)), "Give nothing, since a task is shuffled anyhow"),
        (utils.SubsetRandomSampler(range(4)), "Subset"),
        (utils.DistributedSampler(range(16), num_replicas=2, rank=0), "ranks are dealt their samples anyhow"),
        (utils.BatchSampler(range(16), 4, drop_last=False), "global-batch-size"),
        (range(16), r"a range, which has no method samples.* Give a class with that method"),
        (hvdtrain.InOrder, r"holds a class: make an object, InOrder\("),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_sampler_is_told_what_is_instead(sampler, says):
    with pytest.raises(DataError, match=says):
        task(sampler=sampler)


def test_parts_of_a_task_are_looked_at_too():
    with pytest.raises(ConfigError, match=r"Evaluation\(reduction='none'\)"):
        Evaluation(data=Numbers(), loss_sums=squares, metrics=("loss",), reduction="none")
    with pytest.raises(ConfigError, match=r"CorpusEvaluation\(metrics=\[\.\.\.\]\)"):
        CorpusEvaluation(data=Numbers(), answers=squares, score=len, metrics="bleu")


class Arity:
    """A callback whose one method takes what `function` does."""

    def __init__(self, name, function):
        setattr(self, name, function)


CALLED = {name: kind for name, kind in hvdtrain.Task.__annotations__.items() if str(kind).startswith("Callable[")}


@pytest.mark.parametrize("name", CALLED)
def test_a_function_of_other_arguments_is_told_before_it_is_called(name):
    def other(a, b, c, d, e):
        """Take more than any is given."""

    with pytest.raises(
        ConfigError, match=rf"Task\({name}=\.\.\.\) is called with . arguments? \(.*other\(a, b, c, d, e\)"
    ):
        task(**{name: other})
    task(**{name: lambda *arguments: None})


@pytest.mark.parametrize("name", ["begin", "after_step", "after_evaluation", "state_dict", "load_state_dict"])
def test_a_method_of_a_callback_of_other_arguments(tmp_path, name):
    with pytest.raises(ConfigError, match=rf"the callback Arity has a method .* write def {name}\(self"):
        train(tmp_path, callbacks=[Arity(name, lambda a, b, c: None)])


def test_a_build_without_say():
    class NoSay(hvdtrain.Recipe):
        """Builds without a word."""

        def build(self):
            return task()

    with pytest.raises(ConfigError, match=r"NoSay has a method build\(\).*def build\(self, say\)"):
        hvdtrain.train(NoSay())


class Answers:
    """A sampler that gives a ready answer."""

    def __init__(self, answer):
        self.answer = answer

    def samples(self, positions, num_samples, seed, epoch):
        return self.answer(positions)


@pytest.mark.parametrize("answer", [list, torch.from_numpy, lambda p: p.astype("int32"), lambda p: p[::-1]])
def test_a_sampler_may_answer_in_any_form(tmp_path, answer):
    assert train(tmp_path, sampler=Answers(answer)).step == 3


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda p: p + 0.5, "type float64 for 16 positions"),
        (lambda p: p[1:], r"shape \(15,\)"),
        (lambda p: p[:, None], r"shape \(16, 1\)"),
        (lambda p: None, r"NoneType of shape \(\)"),
        (lambda p: p + 1, "the samples 1 to 16, and there are those from 0 to 15"),
        (lambda p: p - 1, "the samples -1 to 14"),
    ],
)
def test_a_sampler_that_answers_something_else(tmp_path, answer, says):
    with pytest.raises(DataError, match=rf"samples\(\) of the sampler Answers returned .*{says}"):
        train(tmp_path, sampler=Answers(answer))


def test_a_sampler_of_other_arguments():
    sampler = Arity("samples", lambda positions: positions)
    with pytest.raises(
        DataError, match=r"cannot be called: write def samples\(self, positions, num_samples, seed, epoch\)"
    ):
        task(sampler=sampler)


@pytest.mark.parametrize("name", ["train_data", "val_data"])
def test_data_that_is_none_is_told_by_its_field(name):
    with pytest.raises(DataError, match=rf"Task\({name}=None\): there is no data.*random_split"):
        task(**{name: None})
    with pytest.raises(DataError, match=rf"Task\({name}=\.\.\.\): int cannot be read as data"):
        task(**{name: 3})


def kept(samples):
    """Leave out what is not there, as many collate functions do."""
    return torch.stack([sample for sample in samples if sample is not None])


@pytest.mark.parametrize("kind", [Numbers, Stream])
@pytest.mark.parametrize("collate", [None, kept])
def test_a_sample_that_is_none_is_not_left_out_in_silence(tmp_path, kind, collate):
    with pytest.raises(DataError, match=r"sample 5 is None: .*none may be left out in collate"):
        train(tmp_path, train_data=kind({5: None}), collate=collate)


def test_samples_of_two_kinds(tmp_path):
    with pytest.raises(DataError, match=r"of type Tensor, sample 5 of type str|sample \d+ of type"):
        train(tmp_path, train_data=Numbers({5: "text"}))


def test_an_optimizer_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match=r"returned a NoneType: return a torch\.optim\.Optimizer"):
        train(tmp_path, build_optimizer=lambda optim, model: None)


def test_a_loss_that_is_differentiated_already(tmp_path):
    def differentiated(model, batch):
        loss = squares(model, batch)
        loss["loss"].backward()
        return loss

    with pytest.raises(ConfigError, match=r"has called backward\(\): return the loss"):
        train(tmp_path, loss_sums=differentiated)


def test_a_scheduler_of_torch_is_no_callback(tmp_path):
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1), 2)
    with pytest.raises(ConfigError, match=r"holds torch's StepLR, which would change nothing"):
        train(tmp_path, callbacks=[scheduler])


def test_a_model_in_which_nothing_learns(tmp_path):
    with pytest.raises(ConfigError, match="no parameter of the model learns: all have requires_grad=False"):
        train(tmp_path, model=torch.nn.Linear(3, 1).requires_grad_(False))


def test_a_complex_loss(tmp_path):
    with pytest.raises(ConfigError, match=r"a complex number as 'loss': return a real one"):
        train(tmp_path, loss_sums=lambda model, batch: {"loss": model(batch).sum() * 1j})


class Keeping:
    """A callback with something in its state that no checkpoint can hold."""

    def __init__(self, state):
        self.state, self.steps = state, 0

    def after_step(self, run):
        self.steps += 1

    def state_dict(self):
        return self.state


@pytest.mark.parametrize("state", [{"f": len}, {"a": [{1, 2}]}, object(), {"x": torch.nn.Linear(1, 1)}], ids=str)
def test_what_a_callback_cannot_save_is_told_in_the_first_step(tmp_path, state):
    callback = Keeping(state)
    with pytest.raises(ConfigError, match=r"state_dict\(\) of the callback Keeping.* which a checkpoint cannot hold"):
        train(tmp_path, callbacks=[callback])
    assert callback.steps == 1


def test_an_exception_says_which_sample_was_read(tmp_path):
    from hvdtrain.process.tracebacks import sentence_of

    with pytest.raises(ValueError, match="broken") as caught:
        train(tmp_path, train_data=Numbers({5: ValueError("broken")}))
    assert sentence_of(caught.value).endswith("in __getitem__, reading sample 5)")
