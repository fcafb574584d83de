"""Control calls to instances at run time, from operators and the cluster manager.

An instance answers `POST /role /drain /resume /shutdown`; a gateway translates
`POST /cluster/instances/{id}` into these. Each answers with the instance's state afterwards.
"""

from __future__ import annotations

import signal
from enum import StrEnum
from http import HTTPStatus

import msgspec

from memserve.api.errors import ApiError
from memserve.api.status import PeerUrl, check_peer_url
from memserve.types import Epoch, Role

ROLE_PATH = "/role"
DRAIN_PATH = "/drain"
RESUME_PATH = "/resume"
SHUTDOWN_PATH = "/shutdown"
MAX_CONTROL_BYTES = 4096

# Exit code of an instance that was asked to restart (EX_TEMPFAIL: try again). One that was asked
# to leave exits with 0, and its supervisor does not restart it.
RESTART_EXIT_CODE = 75


def how_ended(code: int) -> str:
    """Return an exit code of `subprocess` in words: a negative one is a signal."""
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


class RoleCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /role`."""

    role: Role


class ShutdownCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /shutdown`: finish running requests, then end; with `restart`, to be restarted."""

    restart: bool = False


class WantedState(StrEnum):
    """The states that an operator can set."""

    READY = "ready"  # take requests again
    DRAINING = "draining"  # finish running requests, take no others, do not end
    STOPPED = "stopped"  # drain and end
    RESTARTING = "restarting"  # drain and end, to be restarted by its supervisor


class InstanceChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /cluster/instances/{id}`. Given both, the role is changed first."""

    role: Role | None = None
    state: WantedState | None = None


class LeaveRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`DELETE /cluster/members` on a gateway; with `epoch`, only that life of the instance."""

    address: PeerUrl
    epoch: Epoch | None = None

    def __post_init__(self) -> None:
        check_peer_url(self.address)


def instance_not_found(instance: str) -> ApiError:
    return ApiError(
        HTTPStatus.NOT_FOUND, f"There is no instance '{instance}'.", code="instance_not_found"
    )


def conflict(message: str, code: str) -> ApiError:
    """409: the instance's present state does not allow the change."""
    return ApiError(HTTPStatus.CONFLICT, message, code=code)
