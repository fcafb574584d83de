"""The source's side of one transfer, message by message."""

from __future__ import annotations

import pytest

from memserve.transfer.messages import Drained, Failure, Prepare, Prepared
from memserve.transfer.session import Finish, Forget, Lease, Release, Round, Write
from memserve.transfer.source_session import SourceSession, SourceState
from memserve.types import Medium, Namespace

_WIRE_REFS = bytes(16)  # of two blocks


@pytest.mark.parametrize("drained", Drained)
@pytest.mark.parametrize("before", ["gone first", "failed first"])
def test_nothing_is_kept_for_a_peer_that_died_during_a_write(drained: Drained, before: str) -> None:
    """A peer that is gone answers no Abort, however its writes ended."""
    prepare = Prepare(1, 2, Medium.HBM, Namespace(""), None, None)
    session = SourceSession(prepare, Lease(0.0))
    session.start(0.0)
    first, second = Round(0, 1, None), Round(1, 2, None)
    actions = session.on_message(Prepared(1, 7, 0, _WIRE_REFS), 0.0)
    actions += session.write(first, 0.0) + session.write(second, 0.0)
    one, other = [action.serial for action in actions if isinstance(action, Write)]
    said = []
    if before == "failed first":
        said += session.on_write_done(one, Failure("TransferError", "broken"), drained, 0.0)
        said += session.on_gone(0.0)
    else:
        said += session.on_gone(0.0)
        said += session.on_write_done(one, None, drained, 0.0)
    assert not any(isinstance(action, Release | Forget) for action in said)
    said += session.on_write_done(other, None, drained, 0.0)
    assert session.state is SourceState.ENDED
    assert isinstance(said[-1], Forget)
    assert sum(isinstance(action, Release) for action in said) == 1
    assert sum(isinstance(action, Finish) for action in said) == 1
