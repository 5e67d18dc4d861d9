"""The cache that is bounded by bytes."""

from lowprec.core.byte_lru import ByteLru


def keys_of(cache, keys):
    """The keys that are there; those that are not are made again, so each is asked for in a copy of its own order."""
    made = []
    for key in keys:
        cache.get(key, lambda key=key: made.append(key), lambda _: 0)
    return [key for key in keys if key not in made]


def test_what_was_used_last_stays():
    cache = ByteLru(50)
    for key in range(10):
        cache.get(key, lambda: "value", lambda _: 16)
        cache.get(0, lambda: "value", lambda _: 16)  # in use, so it stays
    assert keys_of(cache, range(10)) == [0, 8, 9]


def test_a_value_that_is_too_large_is_made_and_not_kept():
    cache = ByteLru(50)
    assert [cache.get("large", lambda k=k: k, lambda _: 51) for k in range(2)] == [0, 1]
    assert [cache.get("small", lambda k=k: k, lambda _: 50) for k in range(2)] == [0, 0]


def test_as_many_values_as_wanted_stay_whatever_their_size():
    cache = ByteLru(50, keep=1)
    assert [cache.get("large", lambda k=k: k, lambda _: 51) for k in range(2)] == [0, 0]
    cache.get("next", lambda: 2, lambda _: 1)
    assert keys_of(cache, ["next", "large"]) == ["next"]
