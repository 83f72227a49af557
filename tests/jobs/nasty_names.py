"""Media and thumbnails with names that are allowed and that nobody thinks of, for property-based tests."""

from __future__ import annotations

from hypothesis import strategies as st

from storage_provider.media_paths import Media

# Around "/" in the order of bytes, of one to four bytes in UTF-8, and some that mean something to somebody.
NASTY = "-./0aAé€😀 \\*~%[]:"

nasty_segments = st.text(NASTY.replace("/", ""), min_size=1, max_size=6).filter(lambda text: text not in (".", ".."))
nasty_ids = st.builds(
    "".join,
    st.tuples(
        *[st.text(NASTY.replace("/", ""), min_size=2, max_size=2).filter(lambda text: text != "..")] * 2, nasty_segments
    ),
)
nasty_media = st.builds(Media, st.just("") | nasty_segments, nasty_ids)
thumbnail_names = st.builds(
    "{}-{}-image-{}-{}".format,
    st.integers(0, 9999),
    st.integers(0, 9999),
    st.sampled_from(["jpeg", "png", "webp"]),
    st.sampled_from(["crop", "scale"]),
)
