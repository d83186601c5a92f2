"""Preferences from a judge: pairs for alignment wherever every input has one reference text, but nobody has voted.

Radiology reports, summaries and patch notes come with one expert text per input. Several answers of the fine-tuned
model are scored against it by a judge, the best is paired with the worst, and a direct alignment loss learns from the
pairs. A judge that counts what a text contains rewards longer texts, so the judge can be divided by relative length,
and reports say how long the texts became and whether metrics other than the judge agree that they are better. Where
the reference is the only good answer, more supervised fine-tuning does the same job with less; where votes of people
exist, learn from those.

- `pairs` : `build_preferences`, candidates to scores to pairs, resumable; `to_binary`.
- `judges` : token F1, ROUGE-L, character n-gram F, label F1, `LengthControlled`, language models as judges.
- `clinical` : `ClinicalJudge`, the default judge, on findings that rules read from a report; and reports written from
  structured findings, with omissions and hallucinations scored, to try the method on.
- `losses` : `DPO`, `LengthRegularizedDPO`, `IPO`, `KTO`, `ORPO` on log-probabilities.
- `training` : `align`, and the trainer under it, for transformers causal LMs.
- `report` : `verbosity_report`, `overoptimization_report`, `alignment_tax`.

This is a recipe for data. That a judge's score rises is no evidence that a report is safe to act on: nothing here may
decide about a patient without a clinician who reads the report.

Reference: Hein, Chen, Ostmeier, Xu, Varma, Reis, Md, Bluethgen, Shin, Langlotz and Chaudhari, "CheXalign: Preference
fine-tuning in chest X-ray interpretation models without human feedback", ACL 2025, arXiv 2410.07025; first as
"Preference Fine-Tuning for Factuality in Chest X-Ray Interpretation Models Without Human Feedback".
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
