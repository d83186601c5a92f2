"""Formulas of docstrings as MathML: the ones of the tree, and prose that must stay prose."""

import ast
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

import workingpapers
from workingpapers.desk.reference.formula import parse, split
from workingpapers.desk.reference.mathml import broken, written

CORE = {"math", "mrow", "mi", "mn", "mo", "msub", "msup", "msubsup", "munder", "munderover", "msqrt", "mspace"}
ATTRIBUTES = {"alttext", "mathvariant", "form", "stretchy", "class", "rspace", "width"}
FORMULAS = [
    "v(y) = sum_k alpha_k N(y | r_k, epsilon S_k)",
    "c(x) = int exp(<x, y> / epsilon) v(y) dy = sum_k alpha_k exp((x' S_k x + 2 r_k' x) / (2 epsilon))",
    "g(x, t) = sum_k w_k(x, t) M_k^{-1} (r_k + (S_k - I) x)",
    "w_k(x, t) ~ alpha_k |M_k|^{-1/2} exp(b_k / (2 epsilon))",
    "L = E log c(x0) - E log v(x1) = KL(bridge || model)",
    "h_s(W) = d log s - log det(sI - W o W)",
    "tr(diag(sigma)^-1 (I - W)' C (I - W)) / 2 + sum_i sigma_i / 2 + lam |W|_1",
    "-log sigma(beta h) - eta * log pi_theta(a_cho | x) / |a_cho|",
    "F(r) = eta * E_x [beta log Z_r(x) - E_{a0 ~ base} r(x, a0)] + L_D(r)",
    "H(k) = -(1-k) log2(1-k) - k log2(k/2)",
    "E||F_q(u) - F_q(v)||^2 <= L <F(u) - F(v), u - v>",
    "u_{k+1} = u_0 / (k+2) + (1 - 1/(k+2)) J_{G/L_F}(u_k - F(u_k)/L_F)",
    "|J(x̂) - J(x*)| <= C |x̂ - x*|",
    "T(x, θ_f, θ_C) = proj^φ_C(∇φ(x) - η ∇_1 f(x, θ_f), θ_C)",
    "Q = [[0, Aᵀ, c], [-A, 0, b], [-cᵀ, -bᵀ, 0]]",
    "F((z, ν, λ), θ_f, θ_G, θ_H) = (∇f + Gᵀν + Hᵀλ, G, λ∘H)",
    "O(batch K d^2 + K d^3)",
]
PROSE = [
    "A tensor is returned unless a mask in the data says otherwise.",
    "Take a score on data that is neither trained nor tested on: an estimate, I think.",
    "NOTEARS' acyclicity and the model's own head; the authors' code, as in the paper's appendix.",
    "two half-steps, a k-th term - or none - of log-ratios and min-max problems",
    "see (arXiv 2310.02987), 7(3) 1986, ICLR 2024, or int32 in float64",
    "a value in the range; max of all; sum of the parts; the log is kept",
    'the shape is "lora" or "full" (all weights)',
    "python -m tool --density 0.1 and key=value or call(argument=0.1)",
]


def found(text, names=()):
    return [piece.get("alttext") for piece in split(text, names) if not isinstance(piece, str)]


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_of_the_tree_are_understood_whole(text):
    assert parse(text) is not None
    assert found(f"we have {text}, which is well known")[:1] == [text] or "a0 ~ base" in text


@pytest.mark.parametrize("text", PROSE)
def test_prose_stays_prose(text):
    assert found(text) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sigma_0^2", "<msubsup><mi>σ</mi><mn>0</mn><mn>2</mn></msubsup>"),
        ("n >= 2", "<mrow><mi>n</mi><mo>≥</mo><mn>2</mn></mrow>"),
        ("A⁻¹ b", "<mrow><msup><mi>A</mi><mrow><mo>−</mo><mn>1</mn></mrow></msup><mo>\u2062</mo><mi>b</mi></mrow>"),
        ("x*", '<msup><mi>x</mi><mo>*</mo></msup>'),
        ("r_k'", '<mrow><msub><mi>r</mi><mi>k</mi></msub><mo form="postfix">′</mo></mrow>'),
        ("sqrt(k)", "<msqrt><mi>k</mi></msqrt>"),
        ("sum_i p_i", "<mrow><munder><mo>∑</mo><mi>i</mi></munder><msub><mi>p</mi><mi>i</mi></msub></mrow>"),
        (
            "log pi_ref",
            '<mrow><mi>log</mi><mo>\u2061</mo><mspace width="0.17em" />'
            "<msub><mi>π</mi><mi>ref</mi></msub></mrow>",
        ),
        ("d x d", "<mrow><mi>d</mi><mo>×</mo><mi>d</mi></mrow>"),
        ("(d,)", '<mrow><mo>(</mo><mi>d</mi><mo rspace="0">,</mo><mo>)</mo></mrow>'),
    ],
)  # fmt: skip
def test_what_is_made(text, expected):
    made = [piece for piece in split(f"it is {text} here") if not isinstance(piece, str)]
    assert [written(element[0]) for element in made] == [expected]


def test_names_of_the_program_are_not_symbols():
    assert found("the first n_samples of max_iter, noise_std_ and a k_0 here", {"n_samples"}) == ["k_0"]
    made = split("mu_k = mu * mu_factor^(k - 1)", {"mu", "mu_factor"})[0]
    assert '<mi class="name">mu_factor</mi>' in written(made)
    assert "<msub><mi>μ</mi><mi>k</mi></msub>" in written(made)


def test_a_formula_that_is_not_understood_is_left_alone():
    assert parse("x @ W.T") is None
    assert parse("f(x") is None
    assert parse("|a| <= |b") is None
    assert parse("theta = the angle of it") is None


def test_letters_alone_are_symbols_where_formulas_use_them():
    text = "Over W and all s; h_s(W) = d log s. A word, I say, and a letter."
    assert found(text) == ["W", "s", "h_s(W) = d log s"]


def test_two_formulas_of_a_line_stay_two():
    text = "mu_k S(W) + h(W),      h(W) = d log s"
    assert [piece.get("alttext") for piece in split(text, display=True) if not isinstance(piece, str)] == [
        "mu_k S(W) + h(W)",
        "h(W) = d log s",
    ]
    assert "r in R" in [piece.get("alttext") for piece in split("max over r in R  eta * x", display=True)
                        if not isinstance(piece, str)]  # fmt: skip


def test_parts_between_which_a_line_may_end_hold_the_whole_formula():
    for text in FORMULAS:
        element = parse(text)
        assert "".join("".join(part.itertext()) for part in broken(element)) == "".join(element.itertext())
    assert len(broken(parse("a = b + c <= d"))) == 4
    assert len(broken(parse("(a + b)"))) == 1


def test_every_docstring_of_the_tree_keeps_its_text():
    root = Path(workingpapers.__file__).parent
    formulas = 0
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) or not ast.get_docstring(node):
                continue
            for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node)):
                pieces = split(paragraph)
                assert "".join(p if isinstance(p, str) else p.get("alttext") for p in pieces) == paragraph
                elements = [piece for piece in pieces if not isinstance(piece, str)]
                formulas += len(elements)
                for element in elements:
                    check_core(written(element))
    assert formulas > 500


@given(st.text(alphabet="abxyAIW_^'*|<>=()[]{},;:+-/ 012.θ²ᵀ~o\"&\\", max_size=60))
def test_any_text_is_kept_and_well_formed(text):
    pieces = split(text)
    assert "".join(piece if isinstance(piece, str) else piece.get("alttext") for piece in pieces) == text
    for piece in pieces:
        if not isinstance(piece, str):
            check_core(written(piece))


def check_core(markup):
    """Well-formed, of MathML Core alone, with the attributes that we set."""
    for element in ElementTree.fromstring(markup).iter():
        assert element.tag in CORE
        assert set(element.attrib) <= ATTRIBUTES
