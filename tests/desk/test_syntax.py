"""Syntax trees are made by one thread at a time, and again where code that is not ours disturbed it."""

import ast
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from workingpapers.desk import syntax


def test_one_thread_at_a_time(monkeypatch):
    parse, busy, together = ast.parse, threading.Lock(), []

    def watched(*given):
        together.append(not busy.acquire(blocking=False))
        time.sleep(0.002)
        if not together[-1]:
            busy.release()
        return parse(*given)

    monkeypatch.setattr(ast, "parse", watched)
    with ThreadPoolExecutor(4) as pool:
        trees = list(pool.map(syntax.parse, ["x = 1"] * 12))
    assert len(trees) == len(together) == 12
    assert not any(together)


def test_a_tree_that_was_disturbed_is_made_again(monkeypatch):
    parse, disturbed = ast.parse, [True, True]

    def failing(*given):
        if disturbed:
            disturbed.pop()
            raise SystemError("AST constructor recursion depth mismatch (before=78, after=41)")
        return parse(*given)

    monkeypatch.setattr(ast, "parse", failing)
    assert len(syntax.parse("x = 1\ny = 2").body) == 2


def test_what_is_no_python_is_refused():
    with pytest.raises(SyntaxError):
        syntax.parse("def", "claims.py")
