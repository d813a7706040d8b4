"""The order of samples: exact, repeatable, the same at any number of ranks."""

import numpy as np
import pytest
import torch

from hvdtrain.data.dataset import TensorSamples, contiguous_share, in_batches
from hvdtrain.data.order import SampleOrder
from hvdtrain.data.samplers import InOrder, Shuffled, Weighted, permute
from hvdtrain.errors import ConfigError
from hvdtrain.settings import BatchPlan

FIRST_ORDER = [4, 0, 7, 1, 6, 2, 8, 5, 9, 3]


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_an_epoch_is_a_permutation(num_samples):
    order = permute(np.arange(num_samples), num_samples, seed=1, epoch=0)
    assert sorted(order) == list(range(num_samples))


def test_epochs_and_seeds_differ_and_repeat():
    def order(seed, epoch):
        return permute(np.arange(1000), 1000, seed, epoch).tolist()

    assert permute(np.arange(10), 10, seed=0, epoch=0).tolist() == FIRST_ORDER  # a run may go on in another version
    assert order(0, 0) != order(0, 1) != order(1, 0)


def test_any_part_can_be_computed_alone():
    whole = permute(np.arange(1000), 1000, 3, 2)
    assert (permute(np.arange(700, 710), 1000, 3, 2) == whole[700:710]).all()


def test_the_permutation_looks_random():
    """Neighbours are not neighbours any more, and each position is as likely as another (chi-squared, 99.9 %)."""
    order = permute(np.arange(4096), 4096, 0, 0)
    assert abs(np.corrcoef(np.arange(4096), order)[0, 1]) < 0.06
    assert (np.abs(np.diff(order)) == 1).sum() < 12
    firsts = [int(permute(np.array([0]), 16, seed, 0)[0]) for seed in range(1600)]
    expected = 100
    assert sum((firsts.count(i) - expected) ** 2 / expected for i in range(16)) < 37.7


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("accum_steps", [1, 2])
def test_ranks_share_each_global_batch_exactly(size, accum_steps):
    micro = 16 // size // accum_steps
    order = SampleOrder(100, BatchPlan(16, micro, accum_steps, size), seed=5)
    alone = SampleOrder(100, BatchPlan(16, 16, 1, 1), seed=5)
    assert order.steps_per_epoch == 7
    seen = []
    for step in range(7):
        batches = [batch for rank in range(size) for batch in order.micro_batches(step, rank)]
        whole = order.global_batch(step)
        assert whole.tolist() == alone.global_batch(step).tolist()
        assert torch.cat(batches).tolist() == list(range(len(whole)))
        assert all(0 < len(batch) <= micro for batch in batches)
        seen += whole.tolist()
    assert sorted(seen) == list(range(100))


def test_a_short_last_batch_may_leave_a_rank_without_samples():
    order = SampleOrder(9, BatchPlan(8, 2, 1, 4), seed=0)
    assert [len(order.micro_batches(1, rank)) for rank in range(4)] == [0, 0, 0, 1]
    assert order.samples_before(2) == 9
    assert order.samples_before(3) == 17


def test_fewer_samples_than_a_batch_are_refused():
    with pytest.raises(ConfigError, match="at least as many"):
        SampleOrder(7, BatchPlan(8, 2, 1, 4), seed=0)


def test_evaluation_shares_cover_everything_once():
    shares = [contiguous_share(10, rank, 4).tolist() for rank in range(4)]
    assert [i for share in shares for i in share] == list(range(10))
    assert {len(share) for share in shares} == {2, 3}
    assert [len(batch) for batch in in_batches(contiguous_share(10, 0, 1), 4)] == [4, 4, 2]
    assert in_batches(contiguous_share(2, 0, 4), 4) == []


def test_tensor_samples():
    data = TensorSamples(torch.arange(4.0), torch.arange(4) * 10)
    assert data.batch(torch.tensor([3, 1]))[1].tolist() == [30, 10]
    assert data.num_targets(torch.tensor([3, 1])) == 2
    with pytest.raises(ValueError, match="one length"):
        TensorSamples(torch.zeros(3), torch.zeros(4))


def all_samples(order, steps):
    return [order.global_batch(step).tolist() for step in range(steps)]


def test_orders_without_shuffling_and_without_the_rest():
    plan = BatchPlan(8, 2, 1, 4)
    assert all_samples(SampleOrder(20, plan, 0, InOrder()), 4)[2:] == [[16, 17, 18, 19], list(range(8))]
    order = SampleOrder(20, plan, 0, InOrder(), drop_last=True)
    assert order.steps_per_epoch == 2
    assert order.samples_before(5) == 40
    assert all_samples(order, 3) == [list(range(8)), list(range(8, 16)), list(range(8))]
    shuffled = SampleOrder(20, plan, 0, Shuffled(), drop_last=True)
    assert all_samples(shuffled, 2) == all_samples(SampleOrder(20, plan, 0), 2)


def test_weights_say_how_often_a_sample_comes():
    weights = np.array([0.0, 1.0, 2.0, 5.0])
    drawn = Weighted(weights).samples(np.arange(80_000), 4, seed=0, epoch=0)
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    assert shares[0] == 0
    assert shares == pytest.approx(weights / 8, abs=0.005)
    again = Weighted(weights).samples(np.arange(500, 600), 4, 0, 0)
    assert (again == drawn[500:600]).all()
    assert (Weighted(weights).samples(np.arange(600), 4, 0, 1) != drawn[:600]).any()
    assert (Weighted(weights).samples(np.arange(600), 4, 1, 0) != drawn[:600]).any()
    lagged = (drawn[1:] == drawn[:-1]).mean()
    assert lagged == pytest.approx((shares**2).sum(), abs=0.01)  # neighbours know nothing of each other


def test_a_sample_that_comes_twice_draws_twice():
    order = SampleOrder(8, BatchPlan(8, 8, 1, 1), 0, Weighted([1.0] + [0.0] * 7))
    (request,) = order.requests(0, 0)
    assert request.samples.tolist() == [0] * 8
    assert len({request.draws.seed_of(i) for i in range(8)}) == 8


class Counted:
    """A sampler that notes for how many positions it was asked at a time."""

    def __init__(self):
        self.asked = []

    def samples(self, positions, num_samples, seed, epoch):
        self.asked.append(len(positions))
        return (positions + 1000 * epoch) % num_samples


def test_samples_of_many_steps_are_computed_at_once_and_are_those_of_each_alone():
    sampler = Counted()
    order = SampleOrder(num_samples=30_001, plan=BatchPlan(7, 7, 1, 1), seed=3, sampler=sampler)
    per_epoch = order.steps_per_epoch
    for step in range(2 * per_epoch):
        order.requests(step + 1, 0)  # whoever reads ahead is there first
        first = step % per_epoch * 7
        places = range(first, min(first + 7, 30_001))
        assert order.global_batch(step).tolist() == [(i + 1000 * (step // per_epoch)) % 30_001 for i in places]
    assert len(sampler.asked) < 12
    assert max(sampler.asked) <= 1 << 13


@pytest.mark.parametrize("batch", [1, 100, 5000, 20_000])
def test_a_step_sees_the_same_whichever_was_asked_for_before(batch):
    plan = BatchPlan(batch, batch, 1, 1)
    forward, backward = (SampleOrder(num_samples=20_011, plan=plan, seed=1) for _ in range(2))
    steps = range(0, 3 * forward.steps_per_epoch, max(1, forward.steps_per_epoch // 40))
    seen = {step: forward.global_batch(step).tolist() for step in steps}
    assert {step: backward.global_batch(step).tolist() for step in reversed(steps)} == seen
    samples = [sample for step in range(forward.steps_per_epoch) for sample in forward.global_batch(step).tolist()]
    assert sorted(samples) == list(range(20_011))


def test_too_few_samples_are_counted_as_a_person_would():
    with pytest.raises(
        ConfigError, match=r"a global batch of 16 samples on 1 rank needs .* has 13: use more data or a s"
    ):
        SampleOrder(13, BatchPlan(16, 16, 1, 1), seed=0)
