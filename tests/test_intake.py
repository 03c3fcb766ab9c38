from __future__ import annotations

import pytest

from tests import test_dispatcher
from tests.test_dispatcher import Front
from upq.errors import TooLong
from upq.job import RESULT_LIMIT_BYTES, NewJob

front = test_dispatcher.front


def test_a_child_has_no_more_params_than_a_result_may_have(front: Front) -> None:
    rest = len('{"fid":""}')
    fits = {"fid": "x" * (RESULT_LIMIT_BYTES - rest)}
    assert front.intake.submit_child(NewJob("hash", fits)).id
    before = front.rows()
    with pytest.raises(TooLong, match=f"more than {RESULT_LIMIT_BYTES}"):
        front.intake.submit_child(NewJob("hash", {"fid": fits["fid"] + "x"}))
    assert front.rows() == before
