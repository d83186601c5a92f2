"""How long a search takes: over the papers of the catalogue, and with 100,000 imported ones beside them.

    python benchmarks/search.py [--titles 100000] [--abstract 150] [--seed 0]

The imported papers are made of the words of the catalogue, drawn with the frequencies they have there. The queries are
what readers type: titles of the catalogue and questions, letter by letter from the first to the thirtieth, misspelt
words, words that nothing has. It prints the median, the 99th percentile and the longest time of a query, each query
timed once, by the clock and in processor time (on a busy machine the clock tells of the others too).
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import string
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from workingpapers.desk.catalogue import papers
from workingpapers.desk.search import Index, search_claims
from workingpapers.desk.titles import Titles

TYPED = [
    "diffusion models for inverse problems",
    "how do I compress a lora adapter",
    "the variance of the gradient of a",
    "training large language models with",
    "a new method for learning in networks",
    "reinforcement learning from human",
    "causal graph with unequal noise",
    "regularization of transformers for s",
    "sparse autoencoders find features",
    "representation of probability",
    "https://arxiv.org/abs/2310.02895",
    "i in a of the on to is by we",
]
MISSPELT = ["difusion modles", "reinforcment lerning", "shrodinger brige", "autoencdoers", "gradiant desent methds"]
NOTHING = ["zebra crossing", "qqqq zzzz", "tokamak learning", "learning xylophone model of network training"]


def queries() -> list[str]:
    """Every query once."""
    prefixes = [query[:end] for query in TYPED for end in range(1, 31)]
    titles = [paper.title[:end] for paper in list(papers().values())[::8] for end in range(1, 31)]
    letters = [*string.ascii_lowercase, *(a + b for a in string.ascii_lowercase for b in "aeiorst")]
    return list(dict.fromkeys([*prefixes, *titles, *letters, *MISSPELT, *NOTHING]))


def imported(count: int, words_of_abstract: int, seed: int) -> Iterator[tuple[str, str]]:
    """Titles and abstracts of made-up papers."""
    claims = search_claims(papers().values())
    text = " ".join(
        f"{paper.title} {paper.summary} {' '.join(claims.get(slug, ()))}" for slug, paper in papers().items()
    )
    words = re.findall(r"[A-Za-z][A-Za-z-]+", text)
    rng = random.Random(seed)
    for _ in range(count):
        yield " ".join(rng.choices(words, k=rng.randint(5, 14))), " ".join(rng.choices(words, k=words_of_abstract))


def timed(search: Callable[[str], object]) -> list[tuple[float, float, str]]:
    """Milliseconds, milliseconds of processor time and query, the slowest last."""
    for query in TYPED:
        search(query)  # warm
    times = []
    for query in queries():
        start, busy = time.perf_counter(), time.process_time()
        search(query)
        times.append(((time.perf_counter() - start) * 1e3, (time.process_time() - busy) * 1e3, query))
    return sorted(times)


def report(name: str, times: list[tuple[float, float, str]]) -> None:
    print(f"{name}: {len(times)} queries")
    for kind, spent in (("by the clock", [wall for wall, _, _ in times]), ("processor", [cpu for _, cpu, _ in times])):
        median, p99 = statistics.median(spent), statistics.quantiles(spent, n=100)[98]
        print(f"    {kind:12}  median {median:5.1f} ms, 99 % {p99:5.1f} ms, longest {max(spent):5.1f} ms")
    print("    slowest:", ", ".join(f"{query!r} {wall:.1f}" for wall, _, query in times[:-4:-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description="How long a search takes.")
    parser.add_argument("--titles", type=int, default=100_000)
    parser.add_argument("--abstract", type=int, default=150, help="words of an abstract")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    claims = search_claims(papers().values())

    start = time.perf_counter()
    index = Index(papers(), claims=claims)
    print(f"the index of {len(papers())} papers was made in {(time.perf_counter() - start) * 1e3:.0f} ms")
    report(f"{len(papers())} papers", timed(lambda query: index.search(query, limit=200)))

    with tempfile.TemporaryDirectory() as folder, Titles(Path(folder, "titles.sqlite")) as titles:
        start = time.perf_counter()
        titles.add(imported(options.titles, options.abstract, options.seed))
        print(f"{options.titles:,} imported papers were indexed in {time.perf_counter() - start:.1f} s")
        index = Index(papers(), claims=claims, titles=titles)
        report(f"with {options.titles:,} imported", timed(lambda query: index.search(query, limit=200)))


if __name__ == "__main__":
    main()
