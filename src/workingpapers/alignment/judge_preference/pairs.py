"""From inputs with one reference each to preference pairs: sample, judge, and pair the best with the worst."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from jaxtyping import Float, Int

from workingpapers.alignment.judge_preference.cache import ScoreCache, name_of_judge
from workingpapers.alignment.judge_preference.clinical import ClinicalJudge
from workingpapers.alignment.judge_preference.judges import Judge, judge_scores
from workingpapers.common.validation import check_integer, check_number

Row = dict[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class JudgedPairs(Sequence[Row]):
    """Preference pairs with the scores they come from; a sequence of rows, which trainers take as they are.

    A row has prompt, chosen, rejected, reference, reward_chosen and reward_rejected; chosen and rejected are texts
    where the prompt is one, and lists with one message of the assistant where it is a conversation.

    Attributes
    ----------
    rows : one per pair, in the order of the items.
    kept : the item of each pair.
    scores : of all candidates of all items, the dropped ones too.
    identical : items whose candidates all read the same to the judge; they are among the dropped ones.
    mean_length_gap : words of the chosen minus words of the rejected response, mean over pairs: above 0 the pairs teach
        length. 0 without pairs.
    """

    rows: tuple[Row, ...]
    kept: Int[np.ndarray, " pairs"]
    scores: Float[np.ndarray, "items candidates"]
    identical: int
    mean_length_gap: float

    @property
    def spreads(self) -> Float[np.ndarray, " items"]:
        """Best minus worst score of each item; pairing amplifies the judge's noise where they are small."""
        spreads: np.ndarray = np.ptp(self.scores, axis=1)
        return spreads

    @property
    def dropped(self) -> int:
        """Items without a pair, because their scores are too close."""
        return len(self.scores) - len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        return self.rows[index]

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __repr__(self) -> str:
        return f"JudgedPairs({len(self)} pairs, {self.dropped} dropped, mean_length_gap={self.mean_length_gap:.2f})"


def build_preferences(
    items: Iterable[tuple[Any, str] | Mapping[str, Any]],
    sample: Callable[..., Sequence[Sequence[str]]],
    judge: Judge | None = None,
    n: int = 4,
    min_spread: float = 1e-8,
    normalizer: Callable[[str], str] | None = None,
    cache: str | Path | None = None,
    random_state: int | None = None,
    *,
    chunk_size: int = 64,
    policy_name: str = "",
) -> JudgedPairs:
    """Sample n candidates per item, score them against the reference, and pair the best with the worst.

    The first of several candidates with the best score is chosen, the first with the worst score rejected. The
    reference itself is never chosen. There is at most one pair per item.

    Parameters
    ----------
    items : (prompt, reference), or mappings with these two keys. A prompt is a text or a list of messages. A mapping
        may have a key input: what `sample` is given in place of the prompt, with a handle of an image for example.
    sample : ``sample(inputs, n)`` returns n texts for each of some inputs, drawn from the fine-tuned model by plain
        sampling.
    judge : ``judge(candidate, reference)``, higher is better; `ClinicalJudge` when None.
    n : candidates per item, at least 2.
    min_spread : items whose best and worst score differ by no more than this are dropped; at least 0. Raise it where
        the judge is noisy.
    normalizer : applied to candidate and reference before they are judged, `normalize_report` for example; the texts
        of the pairs stay as they are.
    cache : a file (SQLite) in which candidates and scores are kept; a run that was interrupted goes on after its last
        finished chunk, and another judge finds the candidates already drawn. Candidates are recognised by place and
        input of the item, n, `random_state` and `policy_name`; scores by the texts and the name of the judge: its
        ``cache_name`` where it has one, else what a dataclass is made of, the module and name of a function, or its
        repr. Change the name, or the file, when what it stands for has changed.
    random_state : when given, `sample` is called with ``random_state=`` an integer that follows from this and the first
        item to be sampled alone, so that a resumed run draws what an uninterrupted one draws.
    chunk_size : items that are sampled and judged at a time.
    policy_name : of the model that `sample` draws from, for the cache.

    Raises
    ------
    ValueError : an argument is out of range, a reference is empty, `sample` or `judge` returns something else than
        asked for, or with `cache` the judge has no name or an input cannot be written as JSON.
    """
    judge = ClinicalJudge() if judge is None else judge
    n = check_integer("n", n, at_least=2)
    min_spread = check_number("min_spread", min_spread, at_least=0)
    chunk_size = check_integer("chunk_size", chunk_size, at_least=1)
    if random_state is not None:
        check_integer("random_state", random_state, at_least=0)
    prompts, inputs, references = _checked_items(items, normalizer)
    judged_references = references if normalizer is None else [normalizer(reference) for reference in references]

    rows: list[Row] = []
    kept, gaps, identical = [], [], 0
    scores = np.empty((len(references), n))
    with nullcontext() if cache is None else closing(ScoreCache(cache, name_of_judge(judge))) as store:
        for start in range(0, len(references), chunk_size):
            chunk = range(start, min(start + chunk_size, len(references)))
            asked, right = ([column[item] for item in chunk] for column in (inputs, judged_references))
            candidates = _candidates(sample, asked, n, random_state, start, store, policy_name)
            judged = [texts if normalizer is None else [normalizer(text) for text in texts] for texts in candidates]
            scores[chunk] = _scores(judge, judged, right, store)
            for item, texts, judged_texts in zip(chunk, candidates, judged, strict=True):
                identical += len(set(judged_texts)) == 1
                best, worst = int(scores[item].argmax()), int(scores[item].argmin())  # the first of equals
                if scores[item, best] - scores[item, worst] <= min_spread:
                    continue
                rows.append(
                    {
                        "prompt": prompts[item],
                        "chosen": _response(texts[best], prompts[item]),
                        "rejected": _response(texts[worst], prompts[item]),
                        "reference": references[item],
                        "reward_chosen": float(scores[item, best]),
                        "reward_rejected": float(scores[item, worst]),
                    }
                )
                kept.append(item)
                gaps.append(len(texts[best].split()) - len(texts[worst].split()))
    return JudgedPairs(tuple(rows), np.array(kept, dtype=int), scores, identical, float(np.mean(gaps)) if gaps else 0.0)


def to_binary(pairs: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Two labelled records per pair for trl's KTO: the chosen response (True), then the rejected one (False).

    Records of a pair stand side by side: shuffle them for a trainer that takes the response of a neighbour as one that
    belongs to another prompt. `align` takes the pairs themselves.
    """
    return [
        {"prompt": pair["prompt"], "completion": pair[column], "label": column == "chosen"}
        for pair in pairs
        for column in ("chosen", "rejected")
    ]


def _checked_items(
    items: Iterable[tuple[Any, str] | Mapping[str, Any]], normalizer: Callable[[str], str] | None
) -> tuple[list[Any], list[Any], list[str]]:
    prompts, inputs, references = [], [], []
    for number, item in enumerate(items):
        if isinstance(item, Mapping):
            if not {"prompt", "reference"} <= item.keys():
                raise ValueError(f"item {number} must have prompt and reference, got {', '.join(map(str, item))}")
            prompt, reference = item["prompt"], item["reference"]
        elif isinstance(item, Sequence) and not isinstance(item, str) and len(item) == 2:
            prompt, reference = item
        else:
            raise ValueError(f"item {number} must be (prompt, reference) or a mapping, got {item!r}")
        if not isinstance(reference, str):
            raise ValueError(f"item {number}: reference must be a string, got {reference!r}")
        if not (reference if normalizer is None else normalizer(reference)).strip():
            raise ValueError(f"item {number}: reference must not be empty, got {reference!r}")
        prompts.append(prompt)
        inputs.append(item.get("input", prompt) if isinstance(item, Mapping) else prompt)
        references.append(reference)
    if not references:
        raise ValueError("items must hold at least one item")
    return prompts, inputs, references


def _candidates(
    sample: Callable[..., Sequence[Sequence[str]]],
    inputs: Sequence[Any],
    n: int,
    random_state: int | None,
    start: int,
    store: ScoreCache | None,
    policy_name: str,
) -> list[list[str]]:
    keys, known = list(map(str, range(len(inputs)))), {}
    if store is not None:
        try:
            keys = [
                json.dumps(["candidates", policy_name, n, random_state, start + place, text], sort_keys=True)
                for place, text in enumerate(inputs)
            ]
        except TypeError as error:
            raise ValueError(f"items must have inputs that can be written as JSON to be cached: {error}") from None
        known = store.read(keys)
    missing = [place for place, key in enumerate(keys) if key not in known]
    if missing:
        seed = {} if random_state is None else {"random_state": _seed(random_state, start + missing[0])}
        drawn = [list(texts) for texts in sample([inputs[place] for place in missing], n, **seed)]
        if len(drawn) != len(missing) or not all(len(texts) == n for texts in drawn):
            raise ValueError(
                f"sample must return {n} texts for each of {len(missing)} inputs, got {[len(texts) for texts in drawn]}"
            )
        for text in itertools.chain(*drawn):
            if not isinstance(text, str):
                raise ValueError(f"sample must return strings, got {text!r}")
        new = {keys[place]: texts for place, texts in zip(missing, drawn, strict=True)}
        if store is not None:
            store.write(new)
        known |= new
    return [known[key] for key in keys]


def _scores(
    judge: Judge, candidates: Sequence[Sequence[str]], references: Sequence[str], store: ScoreCache | None
) -> Float[np.ndarray, "items candidates"]:
    """Judge every distinct pair of texts once."""
    wanted = [(text, reference) for texts, reference in zip(candidates, references, strict=True) for text in texts]
    distinct = dict.fromkeys(wanted)
    known: dict[tuple[str, str], float] = {}
    if store is not None:
        keys = {pair: json.dumps(["score", store.judge, *pair]) for pair in distinct}
        found = store.read(keys.values())
        known = {pair: found[key] for pair, key in keys.items() if key in found}
    new = [pair for pair in distinct if pair not in known]
    known |= zip(new, judge_scores(judge, [text for text, _ in new], [reference for _, reference in new]), strict=True)
    if store is not None:
        store.write({keys[pair]: known[pair] for pair in new})
    return np.array([known[pair] for pair in wanted]).reshape(len(references), -1)


def _seed(random_state: int, start: int) -> int:
    return int(np.random.SeedSequence([random_state, start]).generate_state(1)[0])


def _response(text: str, prompt: Any) -> Any:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
