"""Reading a stranger's page in a process of its own: it may be killed when it takes too long or too much memory.

`python -m workingpapers.desk.apart NAME` reads a page from its standard input and writes what it holds as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys

from workingpapers.desk.listing import Entry, Listing, ListingError, parse

SECONDS = 20.0
MEMORY = 2_000_000_000  # bytes of address space


def parse_apart(page: bytes, name: str, *, seconds: float = SECONDS) -> Listing:
    """Read a page as `desk.listing.parse` does, within bounds of time and memory.

    Raises
    ------
    ListingError : it is not a Daily Papers page, only a part of one, or it takes too long.
    """
    command = [sys.executable, "-m", "workingpapers.desk.apart", name]
    try:
        done = subprocess.run(command, input=page, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise ListingError(f"{name}: the page could not be read within {seconds:.0f} seconds") from None
    if done.returncode != 0:
        raise ListingError(f"{name}: the page could not be read; it takes too much memory or time")
    read = json.loads(done.stdout)
    if "refused" in read:
        raise ListingError(read["refused"])
    return Listing(read["date"], tuple(Entry(*entry) for entry in read["entries"]), name)


def main() -> None:
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    name = sys.argv[1]
    try:
        listing = parse(sys.stdin.buffer.read(), name)
    except ListingError as refused:
        print(json.dumps({"refused": str(refused)}))
        return
    entries = [(entry.title, entry.abstract, entry.arxiv) for entry in listing.entries]
    print(json.dumps({"date": listing.date, "entries": entries}))


if __name__ == "__main__":
    main()
