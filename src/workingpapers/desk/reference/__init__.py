"""The reference: what every public name is called with, returns and says of itself, read from the sources."""

from workingpapers.desk.reference.entries import SHARED, Argument, Entry, Page, entries, known, modules, page, pages

__all__ = ["SHARED", "Argument", "Entry", "Page", "entries", "known", "modules", "page", "pages"]
