"""A writer of reports that is quick to train: findings seen through noise, reports in words, and nothing downloaded.

A study has K = 6 findings, each present with probability 0.4, at least one of them. The model sees x = 2 t - 1 + noise,
t being the truth, and writes a report word by word: an embedding of 32 and x go into a GRU of 64 at every step, whose
first state is tanh(W x). A study is one prompt token, behind which the model looks up x, as it would an image.

Two kinds of report:

- words : one word per finding, in order, one of two synonyms. The word count is the number of mentions.
- sentences : what `write_report` writes, in any order and wording, with one absent finding denied.

A third task has nothing to do with reports: to write a string of three letters backwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from workingpapers.alignment import TokenPair, TokenSequence, collate_sequences, sequence_logprobs
from workingpapers.alignment.judge_preference import (
    CHEST,
    ClinicalJudge,
    Concept,
    Finding,
    LengthControlled,
    alignment_tax,
    build_preferences,
    clinical_errors,
    sample_findings,
    verbosity_report,
    write_report,
)
from workingpapers.desk.claim import Row, artifact

FINDINGS = 6
SFT_STUDIES, TEST_STUDIES, MOST_STUDIES = 300, 1_000, 4_000
LETTERS = "abcdef"
LIMIT = {"words": 14, "sentences": 60}

SYNONYMS = (
    ("cardiomegaly", "megalocardia"),
    ("effusion", "hydrothorax"),
    ("pneumothorax", "aerothorax"),
    ("consolidation", "hepatization"),
    ("edema", "congestion"),
    ("atelectasis", "collapse"),
)
LEXICONS: dict[str, tuple[Concept, ...]] = {
    "words": tuple(Concept(pair[0], pair) for pair in SYNONYMS),
    "sentences": tuple(Concept(concept.name, concept.phrases) for concept in CHEST[:FINDINGS]),
}


class Studies(NamedTuple):
    """Numbered studies: what is there, what the model sees, and the reference report."""

    findings: list[tuple[Finding, ...]]
    views: Tensor
    references: list[str]


class Vocabulary:
    """Words to token ids; behind them letters, the end, and one prompt token per task and per study."""

    def __init__(self, references: Sequence[str]) -> None:
        self.words = sorted({word for text in references for word in _split(text)})
        self.ids = {word: place for place, word in enumerate(self.words)}
        self.first_letter = len(self.words)
        self.end = self.first_letter + len(LETTERS)
        self.backwards = self.end + 1
        self.first_study = self.end + 2

    def encode(self, text: str) -> list[int]:
        return [*(self.ids[word] for word in _split(text)), self.end]

    def decode(self, tokens: Sequence[int]) -> str:
        text = " ".join(self.words[token] for token in tokens if token < len(self.words))
        return text.replace(" .", ".")


class ReportWriter(nn.Module):
    """The model; like a transformers causal LM it maps ids and their mask to something with logits."""

    def __init__(self, vocabulary: Vocabulary, views: Tensor) -> None:
        super().__init__()
        self.first_study, self.end = vocabulary.first_study, vocabulary.end
        self.embedding = nn.Embedding(self.first_study + 1, 32)
        self.start = nn.Linear(FINDINGS, 64)
        self.cell = nn.GRU(32 + FINDINGS, 64, batch_first=True)
        self.head = nn.Linear(64, self.end + 1)
        self.register_buffer("views", views, persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        from transformers.modeling_outputs import CausalLMOutput

        views, state = self._seen(input_ids[:, 0])
        return CausalLMOutput(logits=self.head(self._run(input_ids, views, state)[0]))

    def _seen(self, prompts: Tensor) -> tuple[Tensor, Tensor]:
        studies = prompts - self.first_study
        views = torch.where(studies[:, None] >= 0, self.views[studies.clamp(min=0)], 0.0)  # type: ignore[index]
        return views, self.start(views).tanh()[None]

    def _run(self, input_ids: Tensor, views: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.embedding(input_ids.clamp(max=self.first_study))
        seen = views[:, None].expand(-1, input_ids.shape[1], -1)
        states, last = self.cell(torch.cat([embedded, seen], -1), state)
        return states, last

    @torch.no_grad()
    def sample(self, prompts: Sequence[Sequence[int]], limit: int, seed: int) -> list[list[int]]:
        """One answer to each prompt (all of one length), drawn at temperature 1, without its end."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.tensor(prompts)
        views, state = self._seen(tokens[:, 0])
        drawn, alive = [], torch.ones(len(tokens), dtype=torch.bool)
        for _ in range(limit):
            states, state = self._run(tokens, views, state)
            probabilities = self.head(states[:, -1]).softmax(-1)
            tokens = torch.multinomial(probabilities, 1, generator=generator)
            alive &= tokens[:, 0] != self.end
            drawn.append(torch.where(alive, tokens[:, 0], self.end))
            if not alive.any():
                break
        answers: list[list[int]] = torch.stack(drawn, 1).tolist()
        return [[token for token in answer if token != self.end] for answer in answers]


class Bed:
    """The studies, words and base model of one seed."""

    def __init__(self, style: str, seed: int, sft_steps: int, letters: bool = False) -> None:
        self.style, self.seed, self.letters = style, seed, letters
        self.studies = make_studies(style, seed)
        self.vocabulary = Vocabulary(self.studies.references)
        self.base = sft_weights(style, seed, sft_steps, letters)

    def model(self) -> ReportWriter:
        model = ReportWriter(self.vocabulary, self.studies.views)
        model.load_state_dict(self.base)
        return model

    def prompt(self, study: int) -> list[int]:
        return [self.vocabulary.first_study + study]

    def write(self, model: ReportWriter, studies: Sequence[int], seed: int) -> list[str]:
        drawn = model.sample([self.prompt(study) for study in studies], LIMIT[self.style], seed)
        return [self.vocabulary.decode(tokens) for tokens in drawn]

    def pairs(self, judge: Any, studies: range, n: int = 4) -> list[TokenPair]:
        """Candidates of the base model, judged; as tokens."""
        model = self.model()

        def sample(inputs: list[int], n: int, random_state: int) -> list[list[str]]:
            texts = self.write(model, [study for study in inputs for _ in range(n)], random_state)
            return [texts[start : start + n] for start in range(0, len(texts), n)]

        items = [{"prompt": "", "input": study, "reference": self.studies.references[study]} for study in studies]
        judged = build_preferences(items, sample, judge, n, random_state=self.seed, chunk_size=len(items))
        return [
            TokenPair(
                self.prompt(studies[item]),
                self.vocabulary.encode(row["chosen"]),
                self.vocabulary.encode(row["rejected"]),
                scores=(row["reward_chosen"], row["reward_rejected"]),
            )
            for item, row in zip(judged.kept.tolist(), judged, strict=True)
        ]

    def references(self, studies: range) -> list[TokenSequence]:
        return [
            TokenSequence(self.prompt(study), self.vocabulary.encode(self.studies.references[study]))
            for study in studies
        ]

    def measure(self, model: ReportWriter) -> Row:
        """Scores of sampled reports on test studies, beside those of the base model."""
        test = range(MOST_STUDIES - TEST_STUDIES, MOST_STUDIES)
        lexicon, references = LEXICONS[self.style], self.studies.references[test.start :]
        before, after = (self.write(who, test, 10_000 + self.seed) for who in (self.model(), model))
        report = verbosity_report(before, after, references, judge=ClinicalJudge("recall", lexicon))
        errors = clinical_errors(after, [self.studies.findings[study] for study in test], lexicon)
        return {
            "recall": report.judge_after,
            "lc_score": report.controlled_after,
            "f1": errors.f1,
            "omissions": errors.omissions,
            "hallucinations": errors.hallucinations,
            "verbosity": report.verbosity_after,
            "growth": report.growth,
        }

    def backwards(self, model: ReportWriter, seed: int, count: int = 500) -> np.ndarray:
        """1 where a string is written backwards, 0 elsewhere."""
        asked = letter_sequences(self.vocabulary, count, [seed, 77])
        answers = model.sample([sequence.prompt for sequence in asked], len(asked[0].response) + 2, seed)
        return np.array([[*a, self.vocabulary.end] == s.response for a, s in zip(answers, asked, strict=True)], float)

    def tax(self, model: ReportWriter) -> Row:
        """What the model lost at writing backwards."""
        before, after = ({"backwards": self.backwards(who, self.seed)} for who in (self.model(), model))
        task = alignment_tax(before, after).tasks["backwards"]
        return {"backwards": task.after, "backwards_change": task.change}


def judges(style: str) -> dict[str, Any]:
    """Recall of findings, which longer reports win, GREEN's score, and both divided by relative length."""
    plain, green = (ClinicalJudge(measure, LEXICONS[style]) for measure in ("recall", "green"))
    return {"plain": plain, "LC": LengthControlled(plain), "green": green, "LC-green": LengthControlled(green)}


def make_studies(style: str, seed: int) -> Studies:
    lexicon = LEXICONS[style]
    findings = sample_findings(MOST_STUDIES, lexicon=lexicon, random_state=seed)
    rng = np.random.default_rng([seed, 1])
    names = [concept.name for concept in lexicon]
    truth = np.array([[name in {finding.name for finding in study} for name in names] for study in findings])
    views = 2.0 * truth - 1.0 + rng.standard_normal(truth.shape)
    synonym = rng.integers(2, size=truth.shape)
    references = [
        " ".join(SYNONYMS[k][synonym[study, k]] for k in np.flatnonzero(truth[study]))
        if style == "words"
        else write_report(findings[study], lexicon=lexicon, random_state=seed * MOST_STUDIES + study).lower()
        for study in range(MOST_STUDIES)
    ]
    return Studies(findings, torch.from_numpy(views).float(), references)


@artifact
def sft_weights(style: str, seed: int, steps: int, letters: bool) -> dict[str, torch.Tensor]:
    """The base model: Adam 3e-3 on batches of 64 of the first 300 references, with strings written backwards or not."""
    studies = make_studies(style, seed)
    vocabulary = Vocabulary(studies.references)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ReportWriter(vocabulary, studies.views)
    sequences = [
        TokenSequence([vocabulary.first_study + study], vocabulary.encode(studies.references[study]))
        for study in range(SFT_STUDIES)
    ]
    others = letter_sequences(vocabulary, 20_000, [seed, 2]) if letters else []
    fine_tune(model, sequences, steps, 3e-3, seed, others)
    return dict(model.state_dict())


def fine_tune(
    model: ReportWriter,
    sequences: Sequence[TokenSequence],
    steps: int,
    rate: float,
    seed: int,
    others: Sequence[TokenSequence] = (),
) -> None:
    """Adam on batches of 64 sequences, and as many others."""
    rng, optimizer = np.random.default_rng([seed, 3]), torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(steps):
        chosen = [sequences[k] for k in rng.integers(len(sequences), size=64)]
        chosen += [others[k] for k in rng.integers(len(others), size=64)] if others else []
        batch = collate_sequences(chosen)
        optimizer.zero_grad()
        logps = sequence_logprobs(model, batch.input_ids, batch.attention_mask, batch.response_mask)
        torch.autograd.backward(-logps.sum() / batch.response_mask.sum())
        optimizer.step()


def letter_sequences(vocabulary: Vocabulary, count: int, seed: list[int]) -> list[TokenSequence]:
    strings = vocabulary.first_letter + np.random.default_rng(seed).integers(len(LETTERS), size=(count, 3))
    return [
        TokenSequence([vocabulary.backwards, *letters], [*letters[::-1], vocabulary.end])
        for letters in strings.tolist()
    ]


def _split(text: str) -> list[str]:
    return text.replace(".", " .").split()
