"""What the steps of a pass over the local cache share."""

from __future__ import annotations

import threading

import pytest

from storage_provider.cache_pass import UntilStopped
from storage_provider.failures import Stopped


@pytest.mark.parametrize("is_begun", [False, True])
def test_end_breaks_off_what_is_moved_as_fast_as_it_goes(is_begun: bool) -> None:
    stop = threading.Event()
    bandwidth = UntilStopped(stop)
    bandwidth.spend(1 << 40, is_begun=is_begun)
    stop.set()
    with pytest.raises(Stopped):
        bandwidth.spend(1, is_begun=is_begun)
