"""Episodes: some labelled preferences of one user as the context, and one more of the same user to predict."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from workingpapers.common.validation import check_integer, check_number

Text = str | tuple[int, ...]  # text, or token ids for templates that take them


@dataclass(frozen=True)
class Comparison:
    """One labelled preference: two responses to a prompt, the preferred one first.

    Attributes
    ----------
    prompt, chosen, rejected : text, or tuples of token ids.
    persona : a description of the user, for templates that describe the user first.
    rejected_persona : a description of the user for whom the rejected response was written.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    persona: Text | None = None
    rejected_persona: Text | None = None


@dataclass(frozen=True)
class Episode:
    """What one user preferred so far, and a comparison of the same user that is not among it.

    Attributes
    ----------
    shots : the context, oldest first.
    query : the comparison to predict.
    user : whose they are.
    """

    shots: tuple[Comparison, ...]
    query: Comparison
    user: Hashable

    @property
    def prompt(self) -> Text:
        """The prompt of the query."""
        return self.query.prompt

    @property
    def chosen(self) -> Text:
        """The preferred response to the query."""
        return self.query.chosen

    @property
    def rejected(self) -> Text:
        """The other response to the query."""
        return self.query.rejected


def as_comparison(record: Mapping[str, Any] | Comparison, name: str = "record") -> Comparison:
    """Read one labelled preference.

    Parameters
    ----------
    record : a mapping with prompt and either chosen and rejected, or response_1, response_2 and label, which is 0
        where the first response is preferred and 1 where the second is. Optional: persona, rejected_persona. Each text
        is a string, a list of ``{"role": ..., "content": ...}`` messages, or token ids.
    name : what error messages call it.

    Raises
    ------
    ValueError : a part is missing or empty, the label is missing or a tie, or the two responses are the same.
    """
    if isinstance(record, Comparison):
        return record
    if record.get("chosen") is not None or "label" not in record:
        columns = "prompt", "chosen", "rejected"
    elif record["label"] in (0, 1):
        columns = "prompt", *(("response_2", "response_1") if record["label"] else ("response_1", "response_2"))
    else:
        raise ValueError(
            f"{name}: label must be 0 (response_1 preferred) or 1 (response_2 preferred), got {record['label']!r}: "
            "drop ties and pairs without a label"
        )
    prompt, chosen, rejected = (_text(record.get(column), f"{name}: {column}") for column in columns)
    if chosen == rejected:
        raise ValueError(f"{name}: {columns[1]} and {columns[2]} are the same response, a tie")
    described = {
        column: _text(record[column], f"{name}: {column}")
        for column in ("persona", "rejected_persona")
        if record.get(column) is not None
    }
    return Comparison(prompt, chosen, rejected, **described)


class EpisodeSampler:
    """Cut the records of each user into episodes.

    Without replacement, a pass shuffles every user's records and cuts them into disjoint windows of `num_shots` shots
    and one query; what is left of a user is dropped for that pass. The episodes of a pass come in random order. With
    replacement, episodes come without end: a random user, then `num_shots` + 1 distinct records of that user.

    A comparison that a user made twice (the same prompt and responses, whatever the label) counts once, the first
    time: otherwise a query could stand among its own shots. N binary labels tell at most 2^N users apart.

    Parameters
    ----------
    records : mappings as for `as_comparison`, each with its user: a list, or a ``datasets.Dataset``.
    num_shots : N, at least 0; 0 gives episodes without context.
    user_key : the column that says whose preference a record is; its values must be hashable.
    random_state : decides all draws.
    replacement : see above.
    passes : how often an epoch goes over all records, each time in other windows.

    Attributes
    ----------
    users : the users that have enough records.
    skipped_users : those that have not.
    leftover_records : records that a pass drops because they fill no window.

    Raises
    ------
    ValueError : a record does not fit, or no user has `num_shots` + 1 records.

    Warns
    -----
    UserWarning : users were skipped, or repeated comparisons were dropped.
    """

    def __init__(
        self,
        records: Iterable[Mapping[str, Any]],
        num_shots: int = 8,
        user_key: str = "user",
        random_state: int = 0,
        replacement: bool = False,
        passes: int = 1,
    ) -> None:
        self.num_shots = check_integer("num_shots", num_shots, at_least=0)
        self.user_key = user_key
        self.random_state = check_integer("random_state", random_state, at_least=0)
        self.replacement = replacement
        self.passes = check_integer("passes", passes, at_least=1)

        by_user, repeated = _by_user(records, user_key)
        size = self.num_shots + 1
        self._comparisons = {user: kept for user, kept in by_user.items() if len(kept) >= size}
        self.users: list[Hashable] = list(self._comparisons)
        self.skipped_users: list[Hashable] = [user for user in by_user if user not in self._comparisons]
        self.leftover_records = sum(len(kept) % size for kept in self._comparisons.values())
        self._personas = {
            user: next((comparison.persona for comparison in kept if comparison.persona is not None), None)
            for user, kept in by_user.items()
        }
        if not self.users:
            raise ValueError(f"records must hold a user with at least num_shots + 1 = {size} comparisons, got none")
        if repeated:
            warnings.warn(f"{repeated} records repeat a comparison of their user and are left out", stacklevel=2)
        if self.skipped_users:
            warnings.warn(
                f"{len(self.skipped_users)} of {len(by_user)} users have fewer than num_shots + 1 = {size} "
                "comparisons and are left out",
                stacklevel=2,
            )

    def __len__(self) -> int:
        """Episodes in an epoch.

        Raises
        ------
        TypeError : with replacement there is no end.
        """
        if self.replacement:
            raise TypeError("an EpisodeSampler with replacement has no length: it goes on without end")
        size = self.num_shots + 1
        return self.passes * sum(len(kept) // size for kept in self._comparisons.values())

    def __iter__(self) -> Iterator[Episode]:
        """The episodes of epoch 0."""
        return self.epoch(0)

    def epoch(self, number: int) -> Iterator[Episode]:
        """The episodes of one epoch; the same number gives the same episodes.

        Parameters
        ----------
        number : at least 0; every epoch has windows of its own.
        """
        rng = np.random.default_rng([self.random_state, check_integer("number", number, at_least=0)])
        if self.replacement:
            return self._endless(rng)
        return (episode for _ in range(self.passes) for episode in self._one_pass(rng))

    def _endless(self, rng: np.random.Generator) -> Iterator[Episode]:
        while True:
            user = self.users[rng.integers(len(self.users))]
            rows = rng.choice(len(self._comparisons[user]), self.num_shots + 1, replace=False)
            yield self._episode(user, rows, rng)

    def _one_pass(self, rng: np.random.Generator) -> Iterator[Episode]:
        size = self.num_shots + 1
        windows: list[tuple[Hashable, np.ndarray]] = []
        for user, kept in self._comparisons.items():
            order = rng.permutation(len(kept))[: len(kept) // size * size]
            windows += [(user, rows) for rows in order.reshape(-1, size)]
        for place in rng.permutation(len(windows)):
            user, rows = windows[place]
            yield self._episode(user, rows, rng)

    def _episode(self, user: Hashable, rows: np.ndarray, rng: np.random.Generator) -> Episode:
        *shots, query = (self._comparisons[user][row] for row in rows)
        if query.persona is not None and query.rejected_persona is None:
            others = sorted({str(p): p for p in self._personas.values() if p not in (None, query.persona)}.items())
            if others:
                query = replace(query, rejected_persona=others[rng.integers(len(others))][1])
        return Episode(tuple(shots), query, user)


def split_users(
    records: Iterable[Mapping[str, Any]], test_size: float | int = 0.2, random_state: int = 0, *, user_key: str = "user"
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Divide records so that no user is on both sides.

    Parameters
    ----------
    records : mappings with a user.
    test_size : share of the users to hold out, in (0, 1), rounded up; or how many, an int of at least 1.
    random_state : decides which.
    user_key : the column of the user.

    Returns
    -------
    Training records and held-out records, each in the order given.

    Raises
    ------
    ValueError : a record has no user, or one side would have none.
    """
    rows = list(records)
    users = list(dict.fromkeys(_user(row, number, user_key) for number, row in enumerate(rows)))
    if isinstance(test_size, float):
        held_out = int(np.ceil(check_number("test_size", test_size, above=0, below=1) * len(users)))
    else:
        held_out = check_integer("test_size", test_size, at_least=1)
    if not 0 < held_out < len(users):
        raise ValueError(f"test_size={test_size!r} of {len(users)} users leaves no user on one side")
    rng = np.random.default_rng(check_integer("random_state", random_state, at_least=0))
    test = {users[place] for place in rng.permutation(len(users))[:held_out]}
    return [row for row in rows if row[user_key] not in test], [row for row in rows if row[user_key] in test]


def _by_user(records: Iterable[Mapping[str, Any]], user_key: str) -> tuple[dict[Hashable, list[Comparison]], int]:
    """The distinct comparisons of each user, and how many repetitions were left out."""
    found: dict[Hashable, dict[tuple[Text, frozenset[Text]], Comparison]] = {}
    count = 0
    for number, record in enumerate(records):
        user = _user(record, number, user_key)
        comparison = as_comparison(record, f"record {number}")
        key = comparison.prompt, frozenset((comparison.chosen, comparison.rejected))
        found.setdefault(user, {}).setdefault(key, comparison)
        count += 1
    by_user = {user: list(kept.values()) for user, kept in found.items()}
    return by_user, count - sum(map(len, by_user.values()))


def _user(record: Mapping[str, Any], number: int, user_key: str) -> Hashable:
    user: Hashable = record.get(user_key)
    if user is None or user != user:  # NaN, as pandas marks what is missing
        raise ValueError(f"record {number} has no user: {user_key} is {user!r}")
    return user


def _text(value: Any, name: str) -> Text:
    """A string without surrounding space, or token ids as a tuple."""
    if isinstance(value, str):
        text = value.strip()
        if not text:
            raise ValueError(f"{name} must not be empty")
        return text
    if not isinstance(value, Sequence) or not len(value):
        raise ValueError(f"{name} must be text, messages or token ids, and not empty, got {value!r}")
    if isinstance(value[0], Mapping):
        # one message is its content; a longer exchange says who speaks
        turns = [str(message["content"]).strip() for message in value]
        if len(turns) > 1:
            turns = [f"{message['role']}: {turn}" for message, turn in zip(value, turns, strict=True)]
        return _text("\n".join(turns), name)
    return tuple(check_integer(name, token, at_least=0) for token in value)
