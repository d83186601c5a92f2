"""Findings in a report: read from its text by rules, scored for omissions and hallucinations, and written as text.

`ClinicalJudge` is the judge that needs nothing but this file. Its rules are small ones (a lexicon, negation by cue
words within a clause, sides and degrees next to the finding): good enough to rank candidates and to test the method
on, blind to what the lexicon does not name. Where a trained labeller of findings can be run, it is the better judge;
wrap it in `LabelF1`. No score here is evidence of clinical safety.

The score follows GREEN (Ostmeier et al. 2024, arXiv 2405.03595): matched findings over matched findings plus errors;
GREEN itself asks a language model of seven billion parameters for the counts.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from workingpapers.common.validation import check_choice, check_integer, check_number

Side = Literal["left", "right", "bilateral"]
Degree = Literal["mild", "moderate", "severe"]
Measure = Literal["green", "f1", "precision", "recall"]

_SIDES: dict[str, Side] = {"left": "left", "right": "right", "bilateral": "bilateral", "both": "bilateral"}
_SIDES |= {"bibasilar": "bilateral", "biapical": "bilateral"}
_DEGREE_WORDS: dict[Degree, tuple[str, ...]] = {
    "mild": ("mild", "small", "minimal", "trace", "slight", "tiny"),
    "moderate": ("moderate",),
    "severe": ("severe", "large", "marked", "extensive", "massive"),
}
_SIDE_VALUES, _DEGREE_VALUES = (None, *get_args(Side)), (None, *get_args(Degree))
_DEGREES = {word: degree for degree, words in _DEGREE_WORDS.items() for word in words}

_CLAUSE_END = re.compile(r"[.;:!?\n]+|\b(?:but|however|although|though|except)\b")
_NO_NEGATION = re.compile(r"\bno (?:change|increase|decrease|improvement|significant change) in\b|\bnot only\b")
_NEGATION = re.compile(r"\b(?:no|not|without|negative for|free of|clear of|absence of|absent|denies)\b")
_NEGATION_AFTER = re.compile(
    r"\b(?:not (?:seen|identified|present|visualized|demonstrated)|absent|resolved|ruled out|excluded)\b"
)
_AFFIRMATION = re.compile(
    r"\b(?:there (?:is|are)|(?:is|are) (?:seen|noted|present|again)|" + "|".join(_DEGREES) + r")\b"
)


@dataclass(frozen=True)
class Concept:
    """A finding of a lexicon.

    Attributes
    ----------
    name : what it is called in structured findings.
    phrases : how reports name it, in lower case, singular; at least one.
    sided : whether reports say on which side it is.
    graded : whether reports say how severe it is.
    """

    name: str
    phrases: tuple[str, ...]
    sided: bool = False
    graded: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.phrases, str) or not self.phrases or not all(self.phrases):
            raise ValueError(f"phrases must be at least one non-empty phrase, got {self.phrases!r}")


CHEST: tuple[Concept, ...] = (
    Concept("cardiomegaly", ("cardiomegaly", "enlarged heart", "enlarged cardiac silhouette"), graded=True),
    Concept("pleural effusion", ("pleural effusion", "effusion", "pleural fluid"), sided=True, graded=True),
    Concept("pneumothorax", ("pneumothorax", "pleural air"), sided=True, graded=True),
    Concept("consolidation", ("consolidation", "airspace opacity", "airspace disease"), sided=True),
    Concept("edema", ("pulmonary edema", "edema", "interstitial edema"), graded=True),
    Concept("atelectasis", ("atelectasis", "volume loss", "atelectatic change"), sided=True, graded=True),
    Concept("nodule", ("pulmonary nodule", "nodule", "nodular opacity"), sided=True),
    Concept("rib fracture", ("rib fracture", "fractured rib", "costal fracture"), sided=True),
)


@dataclass(frozen=True)
class Finding:
    """A finding that is there.

    Attributes
    ----------
    name : of its `Concept`.
    side, degree : where and how much; None where nothing is said.
    """

    name: str
    side: Side | None = None
    degree: Degree | None = None

    def __post_init__(self) -> None:
        check_choice("side", self.side, _SIDE_VALUES)
        check_choice("degree", self.degree, _DEGREE_VALUES)


def extract_findings(text: str, lexicon: Sequence[Concept] = CHEST) -> dict[str, Finding | None]:
    """Read the findings that a report names: present ones as `Finding`, those it denies as None.

    A finding is denied by a cue in front of it ("no", "without", "free of", ...), which reaches over commas up to the
    end of the clause or a new statement, or by one behind it ("not seen", "resolved"). A finding that is both asserted
    and denied counts as asserted, with what was first said of its side and degree.

    Parameters
    ----------
    text : the report, in any case.
    lexicon : the findings to look for.

    Returns
    -------
    Name to finding, in the order of the text; findings that are not mentioned are missing.
    """
    pattern, concepts = _compiled(tuple(lexicon))
    found: dict[str, Finding | None] = {}
    for clause in _CLAUSE_END.split(_NO_NEGATION.sub(" ", text.lower())):
        denied = False
        for part in clause.split(","):
            denied = denied and not _AFFIRMATION.search(part)
            mentions = list(pattern.finditer(part))
            for place, mention in enumerate(mentions):
                before = part[mentions[place - 1].end() if place else 0 : mention.start()]
                behind = part[mention.end() : mentions[place + 1].start() if place + 1 < len(mentions) else None]
                denied = denied or _NEGATION.search(before) is not None
                concept = concepts[mention.lastgroup or ""]
                if denied or _NEGATION_AFTER.search(part[mention.end() :]):
                    found.setdefault(concept.name, None)
                elif found.get(concept.name) is None:
                    last = place + 1 == len(mentions)
                    found[concept.name] = _described(concept, before, behind if last else "")
    return found


def _described(concept: Concept, before: str, behind: str) -> Finding:
    """The finding with the nearest side and degree in front of it, or the first side behind it."""
    if not (concept.sided or concept.graded):
        return Finding(concept.name)
    said = re.findall(r"[a-z]+", before)[::-1]
    sides = [_SIDES[word] for word in [*said, *re.findall(r"[a-z]+", behind)] if word in _SIDES]
    degrees = [_DEGREES[word] for word in said if word in _DEGREES]
    return Finding(
        concept.name,
        sides[0] if sides and concept.sided else None,
        degrees[0] if degrees and concept.graded else None,
    )


@dataclass(frozen=True)
class ReportScore:
    """What a candidate report gets right and wrong against a reference; names of findings, sorted.

    Attributes
    ----------
    matched : present in both.
    omissions : present in the reference alone.
    hallucinations : present in the candidate alone.
    wrong_side, wrong_degree : matched, but said to be elsewhere, or of another degree.
    """

    matched: tuple[str, ...]
    omissions: tuple[str, ...]
    hallucinations: tuple[str, ...]
    wrong_side: tuple[str, ...]
    wrong_degree: tuple[str, ...]

    @property
    def precision(self) -> float:
        """Share of the candidate's findings that are right; 1 where it has none."""
        return _ratio(len(self.matched), len(self.hallucinations))

    @property
    def recall(self) -> float:
        """Share of the reference's findings that are found; 1 where it has none."""
        return _ratio(len(self.matched), len(self.omissions))

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 1 where there is nothing to find and nothing was found."""
        return _ratio(2 * len(self.matched), len(self.omissions) + len(self.hallucinations))

    @property
    def green(self) -> float:
        """Matched findings over matched findings and errors, which include wrong sides and degrees; 1 without both."""
        wrong = (self.omissions, self.hallucinations, self.wrong_side, self.wrong_degree)
        return _ratio(len(self.matched), sum(map(len, wrong)))


def score_report(
    candidate: str | Iterable[Finding], reference: str | Iterable[Finding], lexicon: Sequence[Concept] = CHEST
) -> ReportScore:
    """Compare the findings of two reports.

    Parameters
    ----------
    candidate, reference : a text, or structured findings.
    lexicon : the findings to look for in texts.
    """
    ours, theirs = _present(candidate, lexicon), _present(reference, lexicon)
    matched = sorted(ours.keys() & theirs.keys())

    def differs(one: str | None, other: str | None) -> bool:
        return one is not None and other is not None and one != other

    return ReportScore(
        tuple(matched),
        tuple(sorted(theirs.keys() - ours.keys())),
        tuple(sorted(ours.keys() - theirs.keys())),
        tuple(name for name in matched if differs(ours[name].side, theirs[name].side)),
        tuple(name for name in matched if differs(ours[name].degree, theirs[name].degree)),
    )


@dataclass(frozen=True)
class ClinicalJudge:
    """Score a report by its findings, read from the text by rules; in [0, 1].

    Parameters
    ----------
    measure : "green" counts every error, "f1" omissions and hallucinations, "precision" and "recall" one of them.
        Recall alone rewards a report that names everything.
    lexicon : the findings to look for.
    """

    measure: Measure = "green"
    lexicon: tuple[Concept, ...] = CHEST

    def __post_init__(self) -> None:
        check_choice("measure", self.measure, get_args(Measure))

    def __call__(self, candidate: str, reference: str) -> float:
        """Score one candidate."""
        score: float = getattr(score_report(candidate, reference, self.lexicon), self.measure)
        return score


@dataclass(frozen=True)
class ClinicalErrors:
    """Errors of many reports against their references.

    Attributes
    ----------
    omissions, hallucinations, wrong_side, wrong_degree : mean number per report.
    precision, recall, f1 : of all findings of all reports together (micro average).
    """

    omissions: float
    hallucinations: float
    wrong_side: float
    wrong_degree: float
    precision: float
    recall: float
    f1: float


def clinical_errors(
    candidates: Sequence[str | Iterable[Finding]],
    references: Sequence[str | Iterable[Finding]],
    lexicon: Sequence[Concept] = CHEST,
) -> ClinicalErrors:
    """Count omissions and hallucinations of reports, each against its reference; arguments as in `score_report`.

    Raises
    ------
    ValueError : there are no reports, or not one reference for each.
    """
    if not len(candidates) or len(candidates) != len(references):
        raise ValueError(f"references must be one per candidate, got {len(references)} for {len(candidates)}")
    scores = [score_report(*pair, lexicon) for pair in zip(candidates, references, strict=True)]
    matched = sum(len(score.matched) for score in scores)
    omissions = sum(len(score.omissions) for score in scores)
    hallucinations = sum(len(score.hallucinations) for score in scores)
    return ClinicalErrors(
        omissions=omissions / len(scores),
        hallucinations=hallucinations / len(scores),
        wrong_side=sum(len(score.wrong_side) for score in scores) / len(scores),
        wrong_degree=sum(len(score.wrong_degree) for score in scores) / len(scores),
        precision=_ratio(matched, hallucinations),
        recall=_ratio(matched, omissions),
        f1=_ratio(2 * matched, omissions + hallucinations),
    )


def sample_findings(
    n: int, *, rate: float = 0.4, lexicon: Sequence[Concept] = CHEST, random_state: int = 0
) -> list[tuple[Finding, ...]]:
    """Draw structured findings of n studies, at least one finding each.

    Parameters
    ----------
    n : studies, at least 1.
    rate : probability of each finding, in (0, 1]; the first of the lexicon is forced where there is none.
    lexicon : the findings; sides and degrees are drawn uniformly where a finding has them.
    random_state : seed.
    """
    n = check_integer("n", n, at_least=1)
    rate = check_number("rate", rate, above=0, at_most=1)
    rng = np.random.default_rng(random_state)
    present = rng.random((n, len(lexicon))) < rate
    present[~present.any(1), 0] = True
    sides, degrees = get_args(Side), get_args(Degree)
    return [
        tuple(
            Finding(
                concept.name,
                sides[rng.integers(len(sides))] if concept.sided else None,
                degrees[rng.integers(len(degrees))] if concept.graded else None,
            )
            for concept, there in zip(lexicon, row, strict=True)
            if there
        )
        for row in present
    ]


def write_report(
    findings: Iterable[Finding], *, denied: int = 1, lexicon: Sequence[Concept] = CHEST, random_state: int = 0
) -> str:
    """Write structured findings as a report, with one of their phrases each, in random order and wording.

    `extract_findings` reads the same findings back.

    Parameters
    ----------
    findings : what is there; names of the lexicon.
    denied : how many absent findings are said to be absent, as far as there are any; at least 0.
    lexicon : the findings and their phrases.
    random_state : seed.

    Raises
    ------
    ValueError : a finding is not in the lexicon.
    """
    denied = check_integer("denied", denied, at_least=0)
    rng = np.random.default_rng(random_state)
    concepts: Mapping[str, Concept] = {concept.name: concept for concept in lexicon}
    present = {finding.name: finding for finding in findings}
    if not present.keys() <= concepts.keys():
        raise ValueError(f"findings must be in the lexicon, got {sorted(present.keys() - concepts.keys())}")
    sentences = []
    for finding in present.values():
        phrase = rng.choice(concepts[finding.name].phrases)
        stated = " ".join(word for word in (finding.degree, finding.side, str(phrase)) if word)
        sentences.append(str(rng.choice(("There is {}.", "{} is seen.", "{} is present."))).format(stated))
    absent = [name for name in concepts if name not in present]
    for name in rng.permutation(absent)[:denied].tolist():
        phrase = rng.choice(concepts[name].phrases)
        sentences.append(str(rng.choice(("No {}.", "There is no {}.", "No evidence of {}."))).format(phrase))
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in rng.permutation(sentences).tolist())


def _present(report: str | Iterable[Finding], lexicon: Sequence[Concept]) -> dict[str, Finding]:
    if isinstance(report, str):
        return {name: finding for name, finding in extract_findings(report, lexicon).items() if finding is not None}
    return {finding.name: finding for finding in report}


@functools.lru_cache(maxsize=32)
def _compiled(lexicon: tuple[Concept, ...]) -> tuple[re.Pattern[str], dict[str, Concept]]:
    """One pattern for all phrases, the longest first, and the finding that each of its groups stands for."""
    if not lexicon:
        raise ValueError("lexicon must have at least one finding")
    phrases = [(phrase, concept) for concept in lexicon for phrase in concept.phrases]
    phrases.sort(key=lambda pair: -len(pair[0]))
    concepts = {f"p{place}": concept for place, (_, concept) in enumerate(phrases)}
    alternatives = "|".join(f"(?P<p{place}>{_with_plural(phrase)})" for place, (phrase, _) in enumerate(phrases))
    return re.compile(rf"\b(?:{alternatives})\b"), concepts


def _with_plural(phrase: str) -> str:
    ending = {"y": "(?:y|ies)", "x": "(?:x|ces)"}.get(phrase[-1])  # opacities, pneumothoraces
    return re.escape(phrase) + "(?:s|es)?" if ending is None else re.escape(phrase[:-1]) + ending


def _ratio(right: float, wrong: float) -> float:
    return right / (right + wrong) if right + wrong else 1.0
