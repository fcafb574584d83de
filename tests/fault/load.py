"""Clients without a pause whose answers are known: what a campaign of faults is seen by."""

from __future__ import annotations

import http.client
import itertools
import json
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import urlsplit

from tests.fault.processes import PATIENCE, Client


@dataclass(frozen=True)
class Question:
    """A prompt, and the only right answer, greedily."""

    prompt: list[int]
    answer: list[int]


class What(StrEnum):
    RIGHT = "right"
    WRONG = "wrong"  # other tokens, or fewer
    ERROR = "error"  # in the API's form
    LEFT = "left"  # the client did
    CUT = "cut"  # refused, or a connection that ended: for want of a gateway
    UNANSWERED = "unanswered"  # nothing in time, or in no form that the API has


@dataclass(frozen=True)
class Seen:
    """What became of one request."""

    what: What
    detail: str = ""
    pause: float = 0.0  # the longest time without a token, from the first byte asked for


@dataclass(frozen=True)
class Place:
    """Where a `Client` asks."""

    url: str


class Load:
    """Streams, whole answers and hang-ups. Ended by `end`."""

    def __init__(
        self, place: Place, questions: Sequence[Question], clients: int = 4, seed: int = 0
    ) -> None:
        self.place = place
        self._questions = questions
        self._seen: list[Seen] = []
        self._lock = threading.Lock()
        self._go = threading.Event()
        self._over = False
        self._busy = 0
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._client, args=(random.Random(f"{seed} {n}"),), daemon=True)
            for n in range(clients)
        ]
        for thread in self._threads:
            thread.start()

    def resume(self) -> None:
        self._go.set()

    def pause(self, seconds: float) -> int:
        """No further request; how many of those that run were not answered in time."""
        self._go.clear()
        with self._changed:
            self._changed.wait_for(lambda: self._busy == 0, timeout=seconds)
            return self._busy

    def take(self) -> list[Seen]:
        """What was seen since the last time."""
        with self._lock:
            seen, self._seen = self._seen, []
            return seen

    def right(self, answers: int, seconds: float) -> bool:
        """Whether so many more right answers came in time."""
        end = time.monotonic() + seconds
        wanted = self._right() + answers
        while time.monotonic() < end:
            if self._right() >= wanted:
                return True
            time.sleep(0.01)
        return False

    def end(self) -> None:
        self._over = True
        self._go.set()
        for thread in self._threads:
            thread.join(2 * PATIENCE)

    def _right(self) -> int:
        with self._lock:
            return sum(each.what is What.RIGHT for each in self._seen)

    def _client(self, source: random.Random) -> None:
        while True:
            self._go.wait()
            if self._over:
                return
            with self._changed:
                self._busy += 1
            try:
                seen = _ask(self.place.url, source.choice(self._questions), source)
            except AssertionError as error:  # it has lasted too long
                seen = Seen(What.UNANSWERED, str(error))
            with self._lock:
                self._seen.append(seen)
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()
            if seen.what is What.CUT:
                time.sleep(0.05)  # nobody is there


def _ask(url: str, question: Question, source: random.Random) -> Seen:
    how = source.choices(("stream", "whole", "leave"), (5, 3, 1))[0]
    if how == "whole":
        return _whole(url, question)
    begin = time.monotonic()
    client = Client(Place(url), question.prompt, len(question.answer))
    if how == "leave":
        client.wait(source.randrange(1, 5))
        if client.error is None:
            client.leave()
            return Seen(What.LEFT)
    client.join()
    times = [begin, *client.times]
    pause = max((b - a for a, b in itertools.pairwise(times)), default=0.0)
    if client.error is None:
        return _judged(question, client.tokens, pause)
    return Seen(kind_of(client.error), client.error[:300], pause)


def _whole(url: str, question: Question) -> Seen:
    place = urlsplit(url)
    assert place.hostname is not None
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=PATIENCE)
    body = {
        "model": "tiny",
        "prompt": question.prompt,
        "max_tokens": len(question.answer),
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    begin = time.monotonic()
    try:
        connection.request("POST", "/v1/completions", json.dumps(body))
        answer = connection.getresponse()
        data = answer.read()
    except (OSError, http.client.HTTPException) as error:
        return Seen(kind_of(repr(error)), repr(error)[:300])
    finally:
        connection.close()
    pause = time.monotonic() - begin
    if answer.status != 200:
        said = f"{answer.status} {data.decode(errors='replace')}"
        return Seen(kind_of(said), said[:300], pause)
    return _judged(question, json.loads(data)["choices"][0]["token_ids"], pause)


def _judged(question: Question, tokens: list[int], pause: float) -> Seen:
    if tokens == question.answer:
        return Seen(What.RIGHT, pause=pause)
    return Seen(What.WRONG, f"{tokens} for {question.answer}", pause)


def kind_of(error: str) -> What:
    """By what `Client` says: a status and a body, a code, `cut off`, or an exception."""
    if error.startswith("TimeoutError"):
        return What.UNANSWERED
    if error == "cut off" or "(" in error.split(" ")[0]:
        return What.CUT
    status, _, body = error.partition(" ")
    if not status.isdecimal():
        return What.ERROR  # a code out of an error event
    try:
        json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return What.UNANSWERED
    return What.ERROR
