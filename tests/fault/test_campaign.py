"""Faults drawn from a seed, into clusters under load; see `campaign`.

pytest tests/fault -k campaign --faults 1000 --fault-minutes 240 --fault-report faults.md
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.fakes import save_tiny_tokenizer
from tests.fault.campaign import Campaign, Draw, FaultRecord, Report, World, draws
from tests.fault.conftest import CampaignOptions, Expected
from tests.fault.load import What, kind_of
from tests.fault.members_world import MembersWorld
from tests.fault.processes import Processes
from tests.fault.up_world import UpWorld

# Of all faults: those among instances with a model, where KV is lost; the others are of processes.
MEMBERS_SHARE = 0.6
pytestmark = pytest.mark.timeout(0)  # the campaign has bounds of its own


def run(world: World, share: float, options: CampaignOptions, report: Report) -> None:
    faults = max(1, round(options.faults * share))
    seconds = options.seconds * share
    Campaign(world, report, options.seed).run(options.first, faults, seconds)
    failed = [each for each in report.faults if each.world == world.name and each.problems]
    said = [f"{'; '.join(each.problems)}\n    {each.replay}" for each in failed]
    assert not failed, f"{len(failed)} faults left something behind:\n" + "\n".join(said)


def test_members_campaign(
    model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    expected: Expected,
    campaign_options: CampaignOptions,
    campaign_report: Report,
) -> None:
    def make() -> Processes:
        return Processes(model, tmp_path_factory.mktemp("members"))

    run(MembersWorld(make, expected), MEMBERS_SHARE, campaign_options, campaign_report)


def test_up_campaign(
    tmp_path_factory: pytest.TempPathFactory,
    campaign_options: CampaignOptions,
    campaign_report: Report,
) -> None:
    model = tmp_path_factory.mktemp("model")
    save_tiny_tokenizer(model)
    (model / "config.json").write_text("{}")
    world = UpWorld(model, tmp_path_factory.mktemp("up"))
    run(world, 1 - MEMBERS_SHARE, campaign_options, campaign_report)


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ("cut off", What.CUT),
        ("ConnectionRefusedError(111, 'Connection refused')", What.CUT),
        ("RemoteDisconnected('Remote end closed connection')", What.CUT),
        ("TimeoutError('timed out')", What.UNANSWERED),
        ("instance_lost", What.ERROR),
        ('503 {"error": {"message": "no instance"}}', What.ERROR),
        ("500 Internal Server Error", What.UNANSWERED),
        ('500 {"detail": "no"}', What.UNANSWERED),
    ],
)
def test_errors_are_told_from_no_answer(said: str, what: What) -> None:
    assert kind_of(said) is what


def drawn(seed: int, first: int, count: int) -> list[Draw]:
    return list(itertools.islice(draws(seed, first, ["a", "b", "c", "d"]), count))


def test_draws_are_a_function_of_seed_and_number() -> None:
    everything = drawn(7, 0, 40)
    assert drawn(7, 13, 5) == everything[13:18]
    assert {draw.kind for draw in everything[:4]} == {"a", "b", "c", "d"}
    assert [d.kind for d in drawn(8, 0, 40)] != [d.kind for d in everything]
    assert everything[3].source.random() == drawn(7, 3, 1)[0].source.random()


def test_reports_tell_kinds_lives_and_failures(tmp_path: Path) -> None:
    report = Report()
    sound = FaultRecord("up", 1, 4, "full disk", "no room", 2.0, 0.5, right=20)
    broken = FaultRecord("up", 1, 5, "full disk", "no room", 4.0, wrong=1, problems=["wrong: [1]"])
    report.faults += [sound, broken]
    report.write(tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "| up | full disk | 2 | 20 | 0 | 0 | 1 | 0 | 0 | 0 | 3.00 | 4.00 | 0.25 | 0.50 |" in text
    assert "--fault-seed 1 --fault-first 5 --faults 1" in text
    report.write(tmp_path / "report.json")
    assert '"full disk"' in (tmp_path / "report.json").read_text()
