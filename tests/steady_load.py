"""Clients that ask one thing over and over, and count what they get."""

from __future__ import annotations

import threading

import openai

from tests.fakes import MODEL, until


class Load:
    """Clients that stream without a pause; every answer must be whole."""

    def __init__(self, url: str, clients: int = 4, tokens: int = 40) -> None:
        self.whole = 0
        self.failures: list[str] = []
        self._url = url
        self._tokens = tokens
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._client) for _ in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def more(self, answers: int) -> None:
        """Wait for so many more, or a failure."""
        wanted = self.whole + answers
        until(lambda: self.whole >= wanted or bool(self.failures))

    def _client(self) -> None:
        with openai.OpenAI(base_url=f"{self._url}/v1", api_key="none", max_retries=0) as client:
            while not self._over.is_set():
                try:
                    stream = client.completions.create(
                        model=MODEL,
                        prompt=[5, 6, 7],
                        max_tokens=self._tokens,
                        stream=True,
                        extra_body={"ignore_eos": True},
                    )
                    chunks = [chunk.choices[0] for chunk in stream]
                except openai.APIError as error:
                    self.failures.append(repr(error))
                    return
                if chunks[-1].finish_reason != "length":
                    self.failures.append(f"cut off after {len(chunks)} chunks")
                self.whole += 1
