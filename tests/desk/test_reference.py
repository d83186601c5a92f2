"""The reference says what the code says: names, signatures and docstrings against the imported objects."""

import importlib
import inspect
from functools import reduce

import pytest

from workingpapers.desk import reference
from workingpapers.desk.catalogue import papers, status
from workingpapers.desk.reference import docstring
from workingpapers.desk.reference.definitions import shape_of

WORKING = [row for row in papers().values() if status(row) == "working"]
DOCUMENTED = ("class", "base class", "function", "method")


def entry(module, name):
    return next(found for top in reference.page(module).entries for found in top.walk() if found.name == name)


def imported(found):
    """The object that an entry is about."""
    home = importlib.import_module(found.home)
    parts = found.name.split(".")
    if not hasattr(home, parts[0]):
        parts = parts[1:]  # of a module that is itself a public name
    return home, reduce(getattr, parts, home)


def test_every_name_of_a_working_paper_has_an_entry():
    assert len(WORKING) >= 6
    for row in WORKING:
        assert set(row.names) <= reference.known(row.module), row.slug
        for name in row.names:
            assert entry(row.module, name).summary


@pytest.mark.parametrize("row", WORKING, ids=lambda row: row.slug)
def test_signatures_are_those_of_the_imported_objects(row):
    checked = 0
    for top in reference.page(row.module).entries:
        for found in top.walk():
            if found.kind not in DOCUMENTED or found.arguments is None:
                continue
            home, thing = imported(found)
            given = dict(inspect.signature(thing).parameters)
            if found.kind == "method":
                given.pop("self", None)
            shown = {each.name.lstrip("*"): each for each in found.arguments}
            assert list(shown) == list(given), found.name
            for name, parameter in given.items():
                if parameter.default is inspect.Parameter.empty:
                    assert shown[name].default == "", (found.name, name)
                elif not shown[name].default.endswith("()"):
                    default = eval(shown[name].default, vars(home))
                    assert default is parameter.default or repr(default) == repr(parameter.default), (found.name, name)
                assert shown[name].keyword_only == (parameter.kind == inspect.Parameter.KEYWORD_ONLY)
            checked += 1
    assert checked > 3


@pytest.mark.parametrize("row", WORKING, ids=lambda row: row.slug)
def test_docstrings_and_members_are_those_of_the_imported_objects(row):
    for top in reference.page(row.module).entries:
        for found in top.walk():
            if found.kind in ("class", "base class", "method", "function"):
                _, thing = imported(found)
                own = inspect.cleandoc(thing.__doc__ or "")
                assert inspect.cleandoc(found.text) == own or (not found.text and found.kind == "class"), found.name
            if found.kind == "class":
                inherited = {name for names in found.inherited.values() for name in names}
                members = {each.name.rpartition(".")[2] for each in found.members} | inherited
                mine = {
                    name
                    for base in thing.__mro__
                    if base.__module__.startswith("workingpapers")
                    for name, value in vars(base).items()
                    if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))
                    if name not in getattr(base, "__dataclass_fields__", ())  # a function may be a field's default
                }
                assert mine <= members, found.name


def test_every_parameter_is_described_or_listed_and_every_described_one_exists():
    for page in reference.pages():
        for top in page.entries:
            for found in top.walk():
                if found.arguments is None:
                    continue
                real = [each.name.lstrip("*") for each in found.arguments]
                if found.parameters:
                    listed = [each.name.lstrip("*") for group, _ in found.parameters for each in group]
                    assert sorted(listed) == sorted(set(listed)), found.name
                    assert set(real) <= set(listed), found.name
                    assert set(listed) <= set(real), (found.name, set(listed) - set(real))


def test_entries_stand_once_and_carry_what_a_search_needs():
    found = reference.entries()
    assert len(found) > 150
    assert len({(each.home, each.name) for each in found}) == len(found)
    fit = next(each for each in found if each.name == "LightSB.fit")
    assert (fit.module, fit.kind) == ("generative.light_sb", "method")
    assert fit.signature == "LightSB.fit(X0: Samples, X1: Samples) -> LightSB"
    assert fit.summary == "Minimise L = E log c(x0) - E log v(x1) by Adam on unpaired mini-batches."


def test_types_are_for_readers():
    def shown(module, name, argument):
        return next(each.type for each in entry(module, name).arguments if each.name == argument)

    assert shown("generative.light_sb", "LightSB.fit", "X0") == [("float array or Tensor", "n × d")]
    assert shown("causality.colide", "LinearDAGEstimator.fit", "X") == [("float array", "n × d")]
    assert shown("causality.colide", "CoLiDE", "variances") == [('"equal" or "unequal"', "")]
    assert shown("generative.light_sb", "LightSB", "device")[-1] == ("None", "")
    assert shape_of("*batch d") == "batch… × d"
    assert shape_of("") == "scalar"
    assert shape_of(" n") == "n"


def test_keyword_only_arguments_stand_after_a_star():
    signature = entry("causality.colide", "CoLiDE").signature
    assert signature.startswith('CoLiDE(variances: Literal["equal", "unequal"] = "unequal", lam: float = 0.05, ')
    assert signature.count("*, ") == 1


def test_names_in_backquotes_lead_to_their_entries():
    overview = entry("generative.light_sb", "LightSB").documentation
    links = [piece for names, blocks in overview.described("Attributes") if names == ["potential_"]
             for piece in blocks[0].lines[0] if piece.kind == "name"]  # fmt: skip
    assert [link.target for link in links] == [("generative.light_sb", "LightSBPotential")]
    for page in reference.pages():
        for top in page.entries:
            for found in top.walk():
                for piece in pieces_of(found.documentation):
                    if piece.kind == "name" and piece.target[1]:
                        assert piece.target[1] in reference.known(piece.target[0]), (found.name, piece)


def test_only_what_exists_has_a_page(toy):
    assert "optimization.toy" not in reference.modules()  # its method is not there
    assert reference.page("optimization.toy") is None
    assert reference.known("../../etc/passwd") == frozenset()
    assert "optimization.halpern" in reference.modules()  # what the field's stub names


def test_sections_lists_and_code():
    found = docstring.parse(
        """One line.

        Prose with ``literal`` and *stress* and `fit`, see https://example.org/x.

        - first
          goes on
        - second

        Then formulas:

            x = theta_0

        Then code::

            import os

        Parameters
        ----------
        a, b : the two,
            which go on.

            Another paragraph.
        *args : more.

        Returns
        -------
        Plain prose
        of two lines.

        Examples
        --------
        >>> 1 + 1
        2
        """
    )
    assert [block.kind for block in found.blocks] == ["paragraph", "list", "paragraph", "formulas", "paragraph", "code"]
    assert [len(item) for item in found.blocks[1].items] == [1, 1]
    kinds = [piece.kind for piece in found.blocks[0].lines[0]]
    assert kinds == ["text", "code", "text", "stress", "text", "code", "text", "link", "text"]
    described = found.described("Parameters")
    assert [names for names, _ in described] == [["a", "b"], ["*args"]]
    assert [block.kind for block in described[0][1]] == ["paragraph", "paragraph"]
    assert found.sections[1].blocks[0].kind == "paragraph"
    assert found.sections[2].blocks[0] == docstring.Block("code", text=">>> 1 + 1\n2")
    assert found.blocks[4].lines[0][0].text == "Then code:"


def pieces_of(found):
    def of(blocks):
        for block in blocks:
            for line in block.lines:
                yield from line
            for item in block.items:
                yield from of(item)

    yield from found.summary
    yield from of(found.blocks)
    for section in found.sections:
        yield from of(section.blocks)
