"""Which downloads stay in the media store."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from storage_provider.cache_policy import bytes_to_leave
from storage_provider.known_media import KnownMedia
from storage_provider.media_store import MediaStore
from storage_provider.proofs import Fingerprint
from storage_provider.room import Room
from storage_provider.settings import ProviderSettings


class ReadThrough:
    """Lets files stay that Synapse's database knows, as far as the limits of the local cache allow; for any thread."""

    def __init__(
        self,
        settings: ProviderSettings,
        store: MediaStore,
        room: Room,
        known_media: KnownMedia,
        on_no_room: Callable[[], None],
    ) -> None:
        """`on_no_room` is called whenever a limit is reached: it is time to evict."""
        self._settings = settings
        self._store = store
        self._room = room
        self._known_media = known_media
        self._on_no_room = on_no_room

    def count(self, size: int) -> None:
        """A file of that many bytes has been added, whether there was room or not."""
        if not self._room.add(size):
            self._on_no_room()

    def choose(self, contents: Mapping[str, Fingerprint]) -> set[str]:
        """The paths of those whole downloads that may stay; their room is taken then."""
        free, total = self._store.free_space()
        if free < bytes_to_leave(self._settings, total):
            self._on_no_room()
            return set()
        known = self._known_media.known_of(contents)
        chosen = {path for path in known if self._room.take(contents[path].length)}
        if chosen != known:
            self._on_no_room()
        return chosen
