"""Sizes as people read them."""

import pytest

from lowprec.core.sizes import bytes_text, digits_apart


@pytest.mark.parametrize(
    ("sizes", "texts"),
    [
        ([1_822_000, 1_950_000], ["1.82 MB", "1.95 MB"]),
        ([1_822_000, 1_824_000, 1_822_000], ["1.822 MB", "1.824 MB", "1.822 MB"]),
        ([1_822_346, 1_822_347], ["1.822346 MB", "1.822347 MB"]),
        ([5], ["5 B"]),
        ([], []),
    ],
)
def test_different_sizes_are_written_differently(sizes, texts):
    digits = digits_apart(sizes)
    assert [bytes_text(size, digits=digits) for size in sizes] == texts
