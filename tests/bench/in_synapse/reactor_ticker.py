"""A module that Synapse loads, in either environment, to tell how long its reactor was busy with one thing.

`GET /_bench/longest_block` answers with the longest time, in seconds, by which a call that was due every
10 ms came late since the last such request. It stands alone in its folder, which is put on Synapse's import path.
"""

from __future__ import annotations

import json
import time
from typing import Any

from synapse.module_api import ModuleApi
from twisted.web.resource import Resource
from twisted.web.server import Request

_INTERVAL = 0.01


class ReactorTicker:
    def __init__(self, _config: Any, api: ModuleApi) -> None:
        self._reactor: Any = api._hs.get_reactor()
        self._longest = 0.0
        self._due = time.monotonic()
        self._reactor.callWhenRunning(self._start)
        api.register_web_resource("/_bench/longest_block", _LongestBlock(self))

    @staticmethod
    def parse_config(config: Any) -> Any:
        return config

    def take_longest(self) -> float:
        """The longest delay since the last call."""
        self._note()
        longest, self._longest = self._longest, 0.0
        return longest

    def _start(self) -> None:
        self._longest = 0.0
        self._wait()

    def _wait(self) -> None:
        self._due = time.monotonic() + _INTERVAL
        self._reactor.callLater(_INTERVAL, self._tick)

    def _tick(self) -> None:
        self._note()
        self._wait()

    def _note(self) -> None:
        self._longest = max(self._longest, time.monotonic() - self._due)


class _LongestBlock(Resource):
    isLeaf = True

    def __init__(self, ticker: ReactorTicker) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ticker = ticker

    def render_GET(self, request: Request) -> bytes:
        request.setHeader(b"Content-Type", b"application/json")  # type: ignore[no-untyped-call]
        return json.dumps({"seconds": self._ticker.take_longest()}).encode()
