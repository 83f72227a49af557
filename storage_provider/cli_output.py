"""What the command line says: results to stdout, everything else to stderr, progress on a terminal only."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NoReturn

from backends.errors import in_one_line

if TYPE_CHECKING:
    from tqdm import tqdm


class Progress:
    """How far a run has come; shows nothing where there is no bar."""

    def __init__(self, bar: tqdm[NoReturn] | None) -> None:
        self._bar = bar
        self._started = time.monotonic()
        self._files = self._bytes = 0

    def advance(self, media: int) -> None:
        """So many more are done."""
        if self._bar is not None:
            self._bar.update(media)

    def expect_more(self, media: int) -> None:
        """There are more than was thought."""
        if self._bar is not None and self._bar.total is not None:
            self._bar.total += media

    def count_file(self, size: int) -> None:
        """A file of so many bytes has been moved."""
        if self._bar is None:
            return
        self._files += 1
        self._bytes += size
        rate = self._bytes / max(time.monotonic() - self._started, 0.001)
        text = f"{self._files} files, {readable_size(self._bytes)}, {readable_size(rate)}/s"
        self._bar.set_postfix_str(text, refresh=False)
        # Draws when it is time to.
        self._bar.update(0)


class Output:
    """Tells people or machines what is done."""

    def __init__(self, *, progress: bool, as_json: bool = False) -> None:
        self.progress = progress
        self._as_json = as_json
        self._bar: tqdm[NoReturn] | None = None

    def line(self, *words: object) -> None:
        """A result, for people."""
        if not self._as_json:
            print(*words, flush=True)

    def result(self, values: Mapping[str, object]) -> None:
        """The results, for machines."""
        if self._as_json:
            print(json.dumps(values), flush=True)

    def complain(self, text: str) -> None:
        """Tell what went wrong, without spoiling the progress bar."""
        # Names of files and ids are in it, as others have chosen them.
        text = in_one_line(text)
        if self._bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bar.write(text, file=sys.stderr)

    @contextlib.contextmanager
    def bar(self, total: int | None, unit: str = "media") -> Iterator[Progress]:
        """A progress bar on a terminal; nothing elsewhere."""
        if not self.progress or not sys.stderr.isatty():
            yield Progress(None)
            return
        from tqdm import tqdm  # takes long to load

        with tqdm(total=total, unit=f" {unit}", file=sys.stderr, dynamic_ncols=True, miniters=0) as self._bar:
            try:
                yield Progress(self._bar)
            finally:
                self._bar.refresh()
                self._bar = None


def readable_size(size: float) -> str:
    """A number of bytes, as the older tool writes them: 1.5K, 3.0M."""
    import humanize  # takes long to load

    return humanize.naturalsize(size, gnu=True)
