"""For each token of one vocabulary (source), the token of another (target) that stands for it.

One table serves every method: a method that wants exact matches reads the rows of kind exact and special, one that
wants the longest prefix reads `prefix_id`, and one that wants MinED reads the match itself.

- Distances are Levenshtein over bytes, those of tokenkit's `compute_mined_mapping`. Among the nearest tokens the
  longest common prefix wins, then the more frequent token, then the lower id. Tokenizers record how frequent a token
  was in their training text as the order of BPE merges or the score of a Unigram piece; without either the id decides.
- Ids with the same bytes have the same match. Of target ids with the same bytes the one that `ByteView.id_of_bytes`
  names is matched, the others never are; a runner-up always has other bytes.
- A byte fallback `<0xNN>` is the byte NN, and takes part like any token.
- Specials are matched as `stages.tokenization.specials` says, never by edit distance.
- An id without a token (a hole) has no match.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from stages.alignment.nearest import nearest
from stages.tokenization.specials import counterpart, own_roles
from stages.tokenization.view import ByteView


class Match(NamedTuple):
    """The target token for a source token; an id of -1 is no token, kind is exact, mined, special or none.

    `confidence` of a mined match is the share of bytes that it keeps, times how much nearer it is than the runner-up:
    (1 - distance / longer length) * runner-up's distance / (distance + runner-up's distance), at most half for a tie.
    `reliable`: exact, special, or of a normalised distance below the limit. `prefix` is the id of the longest target
    token that the source token begins with; of a special, its match.
    """

    identity: int
    content: bytes | None
    kind: str
    distance: int
    normalised_distance: float | None
    confidence: float
    reliable: bool
    runner_up: int
    runner_up_distance: int
    prefix: int


_NONE = Match(-1, None, "none", -1, None, 0.0, False, -1, -1, -1)


def mine(target: ByteView, source: ByteView, max_distance: float) -> Iterator[Match]:
    """Yield the Match of each source id, in order.

    `max_distance` is a distance divided by the two lengths together, as in CDM: mined matches below it are reliable.
    """
    known, roles = target.id_of_bytes, own_roles(source) if source.special_ids else {}
    missing = [token for token in dict.fromkeys(source.token_bytes) if token and token not in known]
    mined = dict(zip(missing, _mined(missing, target, max_distance), strict=True))
    for identity, token in enumerate(source.token_bytes):
        if token in known:
            yield Match(known[token], token, "exact", 0, 0.0, 1.0, True, -1, -1, known[token])
        elif token in mined:
            yield mined[token]
        elif identity in source.special_ids:
            text = source.string_of(identity)
            found = counterpart(identity, text, roles, target.roles, target.special_named)
            yield _NONE if found is None else Match(found, None, "special", 0, 0.0, 1.0, True, -1, -1, found)
        else:
            yield _NONE


def nearest_tokens(queries: Sequence[bytes], choices: dict[bytes, int]) -> Iterator[tuple[int, int]]:
    """Yield (id, Levenshtein distance in bytes) of the choice nearest to each query; see `nearest` for more."""
    tokens = sorted(choices, key=choices.__getitem__)
    found = nearest(queries, tokens)
    for index, distance in zip(found.index[:, 0].tolist(), found.distance[:, 0].tolist(), strict=True):
        yield choices[tokens[index]], distance


def frequency_ranks(view: ByteView) -> np.ndarray:
    """Return int64 [vocab]: lower for what was more frequent in the training text of the tokenizer, as far as it tells.

    Of BPE the place of the merge that makes a token; tokens that no merge makes come first, as all others are made of
    them. Of Unigram the place by score. Tokens added later come last. Of any other model all ranks are 0.
    """
    model, recorded = view.model, {}
    if model["type"] == "BPE":
        prefix = model.get("continuing_subword_prefix") or ""
        merged = [left + right.removeprefix(prefix) for left, right in model["merges"]]
        first = {token: place for place, token in reversed(list(enumerate(merged, 1)))}
        recorded = {identity: first.get(token, 0) for token, identity in model["vocab"].items()}
    elif model["type"] == "Unigram":
        scores = [score for _, score in model["vocab"]]
        place = {score: rank for rank, score in enumerate(sorted(set(scores), reverse=True))}
        recorded = {identity: place[score] for identity, score in enumerate(scores)}
    ranks = np.full(view.vocab_size, max(recorded.values(), default=-1) + 1)
    ranks[list(recorded)] = list(recorded.values())
    return ranks


def _mined(tokens: list[bytes], target: ByteView, max_distance: float) -> Iterator[Match]:
    known = target.id_of_bytes
    choices = sorted(known, key=known.__getitem__)
    ids = [known[token] for token in choices]
    found = nearest(tokens, choices, frequency_ranks(target)[ids])
    for token, (index, other), (distance, second) in zip(
        tokens, found.index.tolist(), found.distance.tolist(), strict=True
    ):
        if index < 0:
            yield _NONE
            continue
        normalised = distance / (len(token) + len(choices[index]))
        margin = second / (distance + second) if other >= 0 else 1.0
        confidence = (1 - distance / max(len(token), len(choices[index]))) * margin
        runner_up = ids[other] if other >= 0 else -1
        prefix = next((known[token[:end]] for end in range(len(token), 0, -1) if token[:end] in known), -1)
        yield Match(
            ids[index], choices[index], "mined", distance, normalised, confidence, normalised < max_distance,
            runner_up, second, prefix,
        )  # fmt: skip
