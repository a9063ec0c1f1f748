"""Named random streams: one seed in the config, a generator of its own for everything that draws."""

import hashlib


def seed_of(seed: int, *names: object) -> int:
    """Return the seed (64 bits) of the generator of this name, which depends on `seed` and `names` alone."""
    text = " ".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
