"""A run that is killed at any instant and resumed is the same run: SIGKILL during steps, evaluations and saves."""

import random

import pytest

from tests.storm import KILLS_OF_A_RUN, KINDS, Storm


def test_a_run_killed_several_times_is_the_run_that_was_not_killed(tmp_path):
    storm = Storm("single", tmp_path, random.Random(1))
    storm.kill(4)
    assert storm.tally.kills == 4 and storm.tally.compared >= 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_runs_killed_twenty_times_are_the_runs_that_were_not_killed(kind, tmp_path):
    storm = Storm(kind, tmp_path, random.Random(0))
    storm.kill(KILLS_OF_A_RUN)
    assert storm.tally.kills == KILLS_OF_A_RUN and storm.tally.in_writes >= 3
