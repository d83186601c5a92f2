"""What counts as a change of a claim's source, on a small package written for each test."""

import subprocess
import sys

import pytest

import workingpapers.claims
from workingpapers.desk.source import (
    claims_of,
    fingerprint,
    function_fingerprint,
    has_claims,
    load_claims,
    module_fingerprint,
)

FILES = {
    "__init__.py": "__version__ = '1'\n",
    "claims/__init__.py": "",
    "claims/dynamics/__init__.py": "",
    "claims/dynamics/pendulum.py": '''"""Claims."""
from __future__ import annotations
from typing import TYPE_CHECKING
import numpy as np
from workingpapers.common.numbers import golden
from workingpapers.desk.claim import Cell, Row, artifact, claim, lower
from workingpapers.dynamics import Pendulum
from workingpapers.dynamics.spring import spring
if TYPE_CHECKING:
    from workingpapers.common.types import Anything

PAPER = "pendulum"
STEPS = 10
METHODS = {"ours": Pendulum}
METHODS["theirs"] = spring
UNUSED = 1

@claim(paper=PAPER, says="It swings.", published="", grid={"seed": [0]}, expect=[lower("loss", "ours", than=1.0)])
def swings(cell: Cell) -> Row:
    """A measurement."""
    return {"loss": helper(cell.seed) + table(3)["x"].sum()}

@claim(paper=PAPER, says="It stops.", published="", grid={"seed": [0]}, expect=[])
def stops(cell: Cell) -> Row:
    from workingpapers.data.winds import wind
    return {"loss": wind()}

def helper(seed):
    return METHODS["ours"](golden() * STEPS * seed)

def other_helper():
    return 2

@artifact
def table(width: int) -> dict[str, np.ndarray]:
    return {"x": np.zeros(width)}
''',
    "common/__init__.py": "",
    "common/numbers.py": '''"""Numbers."""
def golden():
    """Of the rectangle."""
    return 1 + _half()

def _half():
    return 0.618  # rounded

def silver():
    return 2.414

REGISTRY = {}

def register(function):
    REGISTRY[function.__name__] = function
    return function

@register
def bronze():
    return 3.303
''',
    "common/types.py": "Anything = object\n",
    "data/__init__.py": "import lazy_loader\n",
    "data/__init__.pyi": "from .winds import wind as wind\n",
    "data/winds.py": "def wind():\n    return 1\n",
    "dynamics/__init__.py": "import lazy_loader\n",
    "dynamics/__init__.pyi": "from .pendulum import Pendulum as Pendulum\nfrom .spring import spring as spring\n",
    "dynamics/pendulum.py": """class Pendulum:
    def __init__(self, length):
        from ..dynamics.friction import friction
        self.length = friction(length)

def unused():
    return 0
""",
    "dynamics/spring.py": "def spring():\n    return 5\n",
    "dynamics/friction.py": "def friction(x):\n    return x\n",
    "dynamics/nobody.py": "x = 1\n",
}


@pytest.fixture
def tree(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / "workingpapers" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "workingpapers"


def of(tree, name="swings"):
    """The fingerprint of a function of the claims module, from its file alone."""
    path = tree / "claims" / "dynamics" / "pendulum.py"
    namespace = {}
    exec(compile(f"def {name}(): ...", str(path), "exec"), namespace)
    return function_fingerprint(namespace[name])


def change(tree, file, old, new):
    path = tree / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


CHANGES = [
    # (file, old, new, whether it changes what `swings` can measure)
    ("claims/dynamics/pendulum.py", "helper(cell.seed) +", "helper(cell.seed) -", True),
    ("claims/dynamics/pendulum.py", "STEPS = 10", "STEPS = 11", True),
    ("claims/dynamics/pendulum.py", "* STEPS * seed", "* STEPS + seed", True),
    ("claims/dynamics/pendulum.py", 'METHODS["theirs"] = spring', "pass", True),
    ("claims/dynamics/pendulum.py", "np.zeros(width)", "np.ones(width)", True),
    ("claims/dynamics/pendulum.py", "import numpy as np", "import cupy as np", True),
    ("common/numbers.py", "0.618", "0.619", True),
    ("common/numbers.py", "3.303", "3.304", True),  # what a decorator of ours registers may be found by any route
    ("dynamics/pendulum.py", "self.length", "self.size", True),
    ("dynamics/pendulum.py", "return 0", "return 1", True),  # a paper's own method counts as a whole
    ("dynamics/friction.py", "return x", "return 2 * x", True),
    ("dynamics/spring.py", "return 5", "return 6", True),
    ("claims/dynamics/pendulum.py", '"It swings."', '"It swings for ever."', False),
    ("claims/dynamics/pendulum.py", "than=1.0", "than=2.0", False),
    ("claims/dynamics/pendulum.py", '"""A measurement."""', '"""Another text."""', False),
    ("claims/dynamics/pendulum.py", '    """A measurement."""\n', "", False),
    ("claims/dynamics/pendulum.py", "STEPS = 10", "STEPS = (10)  # enough\n", False),
    ("claims/dynamics/pendulum.py", 'return {"loss": wind()}', 'return {"loss": 0.0}', False),
    ("claims/dynamics/pendulum.py", "UNUSED = 1", "UNUSED = 2", False),
    ("claims/dynamics/pendulum.py", "return 2", "return 3", False),
    ("common/numbers.py", "2.414", "2.415", False),
    ("common/numbers.py", "# rounded", "# to three digits", False),
    ("common/numbers.py", '"""Of the rectangle."""', "'''Of the \\n rectangle.'''", False),
    ("common/types.py", "object", "int", False),
    ("data/winds.py", "return 1", "return 2", False),
    ("dynamics/nobody.py", "x = 1", "x = 2", False),
    ("__init__.py", "'1'", "'2'", False),
]


@pytest.mark.parametrize(("file", "old", "new", "counts"), CHANGES)
def test_what_counts_as_a_change_of_a_measurement(tree, file, old, new, counts):
    before = of(tree)
    change(tree, file, old, new)
    assert (of(tree) != before) == counts


def test_the_method_may_move_inside_its_field_only_by_changing(tree):
    before = of(tree)
    change(tree, "dynamics/__init__.pyi", "from .spring import spring as spring\n", "")
    assert of(tree) == before, "the stub only says where names are"
    change(tree, "dynamics/__init__.pyi", ".pendulum import", ".nobody import")
    assert of(tree) != before


def test_other_claims_have_their_own_source(tree):
    swings, stops = of(tree), of(tree, "stops")
    change(tree, "data/winds.py", "return 1", "return 2")
    assert of(tree, "stops") != stops
    assert of(tree) == swings
    stops = of(tree, "stops")
    change(tree, "dynamics/friction.py", "return x", "return 2 * x")
    assert of(tree, "stops") == stops
    assert of(tree) != swings


IMPORTS = {
    "a package whose names are looked up": ("import workingpapers.dynamics as d", "d.Pendulum", "dynamics/friction.py"),
    "a package of the house": ("from workingpapers import dynamics", "dynamics.Pendulum", "dynamics/friction.py"),
    "the house": ("import workingpapers.dynamics", "workingpapers.dynamics.Pendulum", "dynamics/friction.py"),
    "a module": ("from workingpapers.common import numbers", "numbers.golden", "common/numbers.py"),
    "a module by its whole name": ("import workingpapers.common.numbers as n", "n.golden", "common/numbers.py"),
    "everything": ("from workingpapers.common.numbers import *", "golden", "common/numbers.py"),
    "a neighbour": ("from ...common.numbers import golden", "golden", "common/numbers.py"),
    "under another name": ("from workingpapers.common.numbers import golden as g", "g", "common/numbers.py"),
    "only when possible": (
        "try:\n    from workingpapers.common.numbers import golden\nexcept ImportError:\n    golden = None",
        "golden",
        "common/numbers.py",
    ),
}


@pytest.mark.parametrize(("statement", "name", "file"), IMPORTS.values(), ids=IMPORTS)
def test_imports_of_every_kind_are_followed(tree, statement, name, file):
    claims = tree / "claims" / "dynamics" / "pendulum.py"
    claims.write_text(f"{statement}\n\ndef swings(cell):\n    return {name}()\n")
    before = of(tree)
    path = tree / file
    path.write_text(path.read_text().replace("0.618", "0.6").replace("return x", "return -x"))
    assert of(tree) != before


def test_a_lookup_by_text_makes_the_whole_module_count(tree):
    claims = tree / "claims" / "dynamics" / "pendulum.py"
    claims.write_text(claims.read_text().replace('METHODS["ours"](golden()', 'globals()["golden"]((1)'))
    before = of(tree)
    change(tree, "claims/dynamics/pendulum.py", "return 2", "return 3")
    assert of(tree) != before


def test_only_this_library_is_looked_at_and_circles_end(tree):
    change(
        tree,
        "common/numbers.py",
        "def golden",
        "import workingpapers.common.numbers\nfrom . import numbers\ndef golden",
    )
    assert len(of(tree)) == 32
    assert int(of(tree), 16) >= 0


def test_evidence_is_of_everything_that_a_claims_module_says(tree, monkeypatch):
    monkeypatch.setattr(workingpapers.claims, "__path__", [*workingpapers.claims.__path__, str(tree / "claims")])
    seen = [module_fingerprint("dynamics.pendulum")]
    for file, old, new in [
        ("claims/dynamics/pendulum.py", "than=1.0", "than=2.0"),
        ("claims/dynamics/pendulum.py", '"It stops."', '"It never stops."'),
        ("data/winds.py", "return 1", "return 2"),
        ("dynamics/pendulum.py", "self.length", "self.size"),
    ]:
        change(tree, file, old, new)
        seen.append(module_fingerprint("dynamics.pendulum"))
    assert len(set(seen)) == len(seen)
    change(tree, "common/numbers.py", "# rounded", "")
    change(tree, "common/numbers.py", "2.414", "2.415")
    assert module_fingerprint("dynamics.pendulum") == seen[-1]


CLAIMS = """
from workingpapers.desk.claim import Cell, Row, benchmark, claim
COMMON = {"paper": "x", "published": "", "says": "", "expect": []}

@claim(**COMMON, grid={"n": [0]})
def second_by_name(cell: Cell) -> Row:
    return {"n": 1}

@benchmark(paper="x", grid={"contender": ["ours"]}, expect=[])
def first_by_name(cell: Cell) -> Row:
    return {"n": 1}

again = second_by_name
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Write claims modules where they are found by name."""
    monkeypatch.setattr(workingpapers.claims, "__path__", [*workingpapers.claims.__path__, str(tmp_path)])
    (tmp_path / "geometry").mkdir()
    (tmp_path / "geometry" / "__init__.py").write_text("")

    def write(name, text):
        (tmp_path / "geometry" / f"{name}.py").write_text(text)
        return f"geometry.{name}"

    yield write
    for name in [name for name in sys.modules if name.startswith("workingpapers.claims.geometry")]:
        del sys.modules[name]


def test_claims_are_loaded_by_name_in_their_order(written):
    module = written("circles", CLAIMS)
    assert has_claims(module)
    claims = load_claims(module)
    assert [claim.name for claim in claims] == ["second_by_name", "first_by_name"]
    assert claims_of(sys.modules["workingpapers.claims.geometry.circles"]) == claims
    assert fingerprint(claims[0]) != fingerprint(claims[1])


def test_a_paper_without_claims_is_told_apart_from_one_that_fails_to_import(written):
    for module in ("geometry.squares", "astrology.stars"):
        assert not has_claims(module)
        with pytest.raises(
            LookupError, match=f"{module} has no claims: there is no module workingpapers.claims.{module}"
        ):
            load_claims(module)
        with pytest.raises(LookupError, match="has no claims"):
            module_fingerprint(module)
    module = written("lines", "import a_peer_that_is_absent\n")
    assert has_claims(module)
    with pytest.raises(ModuleNotFoundError, match="a_peer_that_is_absent"):
        load_claims(module)


def test_two_claims_of_one_name_are_refused(written):
    module = written("twins", CLAIMS + "\nkept = first_by_name\n\n" + CLAIMS.partition("COMMON")[2].partition("\n")[2])
    with pytest.raises(ValueError, match="two claims named first_by_name"):
        load_claims(module)


def test_fingerprints_cost_little_and_need_no_torch():
    """On this library itself: every claims module that there is."""
    code = """
import sys, time
from pathlib import Path
from workingpapers.desk.source import module_fingerprint
import workingpapers.desk.source as source
root = Path(source.__file__).parents[1] / "claims"
names = [f"{path.parent.name}.{path.stem}" for path in root.glob("*/*.py") if path.stem != "__init__"]
first = [module_fingerprint(name) for name in names]
began = time.process_time()
assert [module_fingerprint(name) for name in names] == first
assert time.process_time() - began < 0.05 * max(1, len(names)), time.process_time() - began
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
