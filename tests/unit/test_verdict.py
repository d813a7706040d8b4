"""Who is dead or stuck: a pure function of what was reported."""

from hvdtrain.process.progress import Place
from hvdtrain.world.verdict import Report, judge

LIMIT = 60.0


def report(rank, phase="forward", age_s=1.0, silent_s=0.5, step=7):
    return Report(f"rank {rank} on host", Place(step, phase, age_s), silent_s)


def test_healthy_ranks():
    assert judge([report(1), report(2)], report(0), LIMIT) is None
    assert judge([], report(0), LIMIT) is None


def test_silence_is_said_by_any_rank():
    for here in (report(0), None):
        said = judge([report(1), report(2, "backward", 100.0, 61.0)], here, LIMIT)
        assert said.startswith("rank 2 on host has given no sign of life for 61 s")
        assert "last seen at step 7, backward" in said


def test_no_progress_names_those_that_do_not_wait():
    waiting = [report(rank, "communication", 70.0) for rank in (1, 2)]
    said = judge([*waiting, report(3, "data", 80.0)], report(0, "communication", 70.0), LIMIT)
    assert "no rank has made progress for 60 s" in said
    assert "rank 3 on host has been at step 7, data for 80 s; the others wait." in said
    assert "rank 1" not in said


def test_all_wait():
    said = judge([report(1, "communication", 70.0)], report(0, "communication", 71.0), LIMIT)
    assert "rank 0 on host has been" in said
    assert "rank 1 on host has been" in said
    assert "the others" not in said


def test_one_rank_that_makes_progress_is_enough():
    stuck = report(1, "data", 500.0)
    assert judge([stuck], report(0, "communication", 59.0), LIMIT) is None


def test_a_rank_that_is_not_told_of_all_does_not_judge_progress():
    assert judge([report(0, "data", 500.0)], None, LIMIT) is None


def test_before_and_after_training_and_while_saving_there_is_time():
    waiting = report(0, "communication", 500.0, step=None)
    assert judge([report(1, "start", 170.0, step=None)], waiting, LIMIT) is None
    assert "start for 200 s; the others wait" in judge([report(1, "start", 200.0, step=None)], waiting, LIMIT)
    assert "end for 200 s; the others wait" in judge([report(1, "end", 200.0, step=None)], waiting, LIMIT)
    assert "resume for 400 s" in judge([report(1, "resume", 400.0, step=None)], waiting, LIMIT)
    assert judge([report(1, "resume", 300.0, step=None)], waiting, LIMIT) is None
    assert "evaluation for 70 s" in judge([report(1, "evaluation", 70.0, step=None)], waiting, LIMIT)
    assert judge([report(1, "saving", 300.0)], report(0, "communication", 300.0), LIMIT) is None
    assert "saving for 400 s" in judge([report(1, "saving", 400.0)], report(0, "communication", 400.0), LIMIT)


def test_many_stuck_ranks_are_counted():
    said = judge([report(rank, "data", 70.0) for rank in range(1, 20)], report(0, "data", 70.0), LIMIT)
    assert "and 12 more" in said
