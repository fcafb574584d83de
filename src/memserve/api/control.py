"""What instances are told at run time, by people and by the cluster manager.

An instance answers `POST /role /drain /resume /shutdown`; a gateway passes on what it gets as
`POST /cluster/instances/{id}`. Each answers with how the instance is afterwards.
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

# An instance that was asked to restart ends with this (EX_TEMPFAIL: try again); one that was
# asked to leave ends with 0, and whoever started it lets it be.
RESTART_EXIT_CODE = 75


def how_ended(code: int) -> str:
    """An exit code of `subprocess` in words: a negative one is a signal."""
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


class RoleCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /role`."""

    role: Role


class ShutdownCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /shutdown`: finish what runs, then end; with `restart`, to be started again."""

    restart: bool = False


class WantedState(StrEnum):
    """What a person can ask an instance to be."""

    READY = "ready"  # take requests again
    DRAINING = "draining"  # finish what runs, take nothing new, stay
    STOPPED = "stopped"  # drain and end
    RESTARTING = "restarting"  # drain, end, and be started again by whoever supervises it


class InstanceChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /cluster/instances/{id}`. Given both, the role is changed first."""

    role: Role | None = None
    state: WantedState | None = None


class LeaveRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`DELETE /cluster/members` on a gateway; with `epoch`, for that life of the instance."""

    address: PeerUrl
    epoch: Epoch | None = None

    def __post_init__(self) -> None:
        check_peer_url(self.address)


def instance_not_found(instance: str) -> ApiError:
    return ApiError(
        HTTPStatus.NOT_FOUND, f"There is no instance '{instance}'.", code="instance_not_found"
    )


def conflict(message: str, code: str) -> ApiError:
    """The instance is in a state in which this cannot be done."""
    return ApiError(HTTPStatus.CONFLICT, message, code=code)
