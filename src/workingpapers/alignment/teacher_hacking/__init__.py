"""Teacher hacking: distillation that approaches the teacher and leaves the truth, its detection and its cures.

A teacher is an imperfect copy of the truth. A student that is trained for long on a fixed set of its answers keeps
coming closer to it while the distance to the truth starts to rise. Validation loss against the teacher does not show
it. What helps is fresh data: answers drawn anew from the teacher or from the student, and failing that more prompts,
and several answers to each. Here are

- `distiller` : `Distiller`, distillation from offline answers, online ones of the teacher or of the student, or both;
- `divergence` : `token_divergence`, the losses, and `SequenceDivergence`, distances between whole models;
- `monitor` : `HackingMonitor`, proxy and golden metric during training, and when hacking sets in;
- `detector` : `PowerLawDetector`, departure from the polynomial learning curve, with its `false_alarm_rate`;
- `study` : `controlled_study`, the experiment with oracle, teacher and student;
- `models` : how transformers causal and encoder-decoder models, or any other, take part.

Where the teacher is close to the truth, the student as large as the teacher or the training short, nothing of this
happens, and plain offline distillation costs least. For on-policy distillation of large models with generation on
other machines, trl's `DistillationTrainer` has the machinery; it watches neither metric.

Reference: Tiapkin, Calandriello, Ferret, Perrin, Vieillard, Ramé and Blondel, "On Teacher Hacking in Language Model
Distillation", 2025, arXiv 2502.02671. The paper reports the departure from a power law and gives no test; the detector
and its constants are ours. Mixtures of sources and the generalized JS divergence follow Agarwal et al., "On-Policy
Distillation of Language Models", ICLR 2024, arXiv 2306.13649.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
