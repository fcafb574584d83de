"""ReAct: an agent that thinks, acts and reads the observation. Long prompts that grow.

Every session begins with the same few-shot prompt. The answer of a turn is one thought and
action; the prompt of the next turn is the action's observation.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import msgspec

from memserve.errors import ConfigError
from memserve.workloads.lines import read_lines, shown
from memserve.workloads.session import (
    CountTokens,
    Exchange,
    Session,
    SessionLimits,
    data_files,
    fitting_turns,
    open_data,
)

_PROMPT_FILE = "fever_prompt.json"
_PROMPT = "webthink_simple3"


class _Step(msgspec.Struct):
    thought: str
    action: str
    observation: str


class _Trajectory(msgspec.Struct):
    id: int
    question: str
    steps: list[_Step]


def read_react(path: Path) -> Iterator[tuple[str, tuple[Exchange, ...]]]:
    """Yield the name and the exchanges of each run in a folder with `fever_prompt.json` and
    `*trajectories.jsonl`. Raises ConfigError.
    """
    examples = _examples(path / _PROMPT_FILE)
    for file in data_files(path, "*trajectories.jsonl"):
        for _, run in read_lines(file, _Trajectory):
            yield f"fever-{run.id}", _exchanges(examples, run)


def react_sessions(
    runs: Iterator[tuple[str, tuple[Exchange, ...]]],
    count: int,
    seed: int,
    limits: SessionLimits,
    count_tokens: CountTokens,
) -> tuple[Session, ...]:
    """Return `count` runs of the agent as sessions, in an order that the seed decides; runs are
    repeated if the data has fewer. Raises ConfigError if none of the first `count` runs fits the
    limits.
    """
    choice = random.Random(seed)
    pool = [run for run in runs if len(run[1]) >= limits.min_turns]
    fitting: dict[str, Session] = {}
    sessions: list[Session] = []
    while len(sessions) < count:
        choice.shuffle(pool)
        for name, exchanges in pool[: count - len(sessions)]:
            if name not in fitting:
                turns = fitting_turns(exchanges, limits, count_tokens, min_answer_tokens=1)
                fitting[name] = Session(name, turns, chat=False)
            if len(fitting[name].turns) >= limits.min_turns:
                sessions.append(fitting[name])
        if not sessions:
            raise ConfigError(f"no run of the agent fits {limits.max_context_tokens} tokens")
    return tuple(sessions)


def _examples(path: Path) -> str:
    with open_data(path) as file:
        try:
            return msgspec.json.decode(file.read(), type=dict[str, str])[_PROMPT]
        except KeyError:
            raise ConfigError(f"{path}: no {_PROMPT} in it") from None
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{path}: {shown(error)}") from error


def _exchanges(examples: str, run: _Trajectory) -> tuple[Exchange, ...]:
    exchanges = []
    lead = f"{examples}\n{run.question}\nThought 1:"
    for number, step in enumerate(run.steps, 1):
        exchanges.append(Exchange(lead, f" {step.thought}\nAction {number}: {step.action}"))
        lead = f"\nObservation {number}: {step.observation}\nThought {number + 1}:"
    return tuple(exchanges)
