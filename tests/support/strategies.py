"""What hypothesis draws in more than one file, and how patient it is."""

import itertools
from collections.abc import Iterable, Iterator

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
LINE_ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def in_pieces(stream: bytes, places: Iterable[int]) -> Iterator[bytes]:
    """The stream in reads that end at these places."""
    edges = [0, *sorted(place % (len(stream) + 1) for place in places), len(stream)]
    for start, end in itertools.pairwise(edges):
        yield stream[start:end]
