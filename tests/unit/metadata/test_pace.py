"""How much commits are slowed, and when a failed fold is tried again."""

import pytest

from metadata.pace import BEHIND, EASY, RETRY, Pace

FOLD = 16 << 20


def test_nothing_waits_before_a_fold_was_timed():
    pace = Pace()
    assert pace.easy(int(EASY * FOLD), FOLD)
    assert not pace.easy(int(EASY * FOLD) + 1, FOLD)
    assert pace.delay(5000, int(BEHIND * FOLD), FOLD) == 0
    assert not pace.behind(int(BEHIND * FOLD), FOLD)
    assert pace.behind(int(BEHIND * FOLD) + 1, FOLD)


def test_half_way_commits_come_as_fast_as_they_are_folded():
    pace = Pace()
    pace.folded(FOLD, 4.0)
    assert pace.delay(5000, int(EASY * FOLD), FOLD) == 0
    half = int((EASY + BEHIND) / 2 * FOLD)
    assert pace.delay(FOLD, half, FOLD) == pytest.approx(4.0)
    assert pace.delay(FOLD // 2, half, FOLD) == pytest.approx(2.0)
    assert pace.delay(FOLD, int(BEHIND * FOLD), FOLD) == pytest.approx(8.0)


def test_the_rate_follows_the_last_folds():
    pace = Pace()
    pace.folded(100, 1.0)
    assert pace.rate == 100
    pace.folded(300, 1.0)
    assert pace.rate == 200
    pace.folded(0, 1.0)  # no entries of data: it says nothing
    pace.folded(100, 0.0)
    assert pace.rate == 200


def test_a_fold_that_failed_waits_longer_each_time_until_one_succeeds():
    pace = Pace()
    assert pace.retry_at == 0
    assert [pace.failed(100.0) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert pace.retry_at == 100 + RETRY[1]
    for _ in range(2000):
        assert pace.failed(100.0) == RETRY[1]
    pace.folded(100, 1.0)
    assert pace.failed(200.0) == RETRY[0]
