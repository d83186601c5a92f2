"""ComPEFT: a fine-tuning residual as sparse signs and one scale, without retraining or calibration data.

For whoever sends or holds many fine-tuned experts: LoRA or (IA)^3 adapters, or the differences of whole models from
one base. At density k a residual takes H(k) = -(1-k) log2(1-k) - k log2(k/2) bits per parameter (0.34 at 5 %, 0.92 at
20 %, 1.18 at 30 %) instead of 16, and the packed bytes come within 2 % of that, or below it where some tensors keep
more than others. What it costs in accuracy depends on the base and the task: little for small residuals of a wide
network, much where the task is far from the base.

    from workingpapers.federated.compeft import ComPEFTTuner, compress

    update = compress(adapter, density=0.1, alpha=1.0, kind="lora")
    blob = update.pack()                                    # the bytes to send
    best = ComPEFTTuner().fit(model, adapter, evaluate=validation_accuracy)
    model.load_state_dict(best.update_.to_state_dict(), strict=False)

and for files, in memory of about the packed result:

    python -m workingpapers.federated.compeft pack ADAPTER_FOLDER expert.compeft --density 0.1 --alpha 2
    python -m workingpapers.federated.compeft unpack expert.compeft NEW_FOLDER

Choose alpha on validation data: with alpha = 1 small models may end near no fine-tuning at all. Where nothing can be
validated, `alpha="stc"` minimises the error of the residual. At density one half and above keeping the true values
(`pruned`) or 4-bit rounding (`uniform_quant`) costs more bytes and less accuracy. Tensors of different scale share one
threshold and one sigma, so send new heads by themselves.

Reference: Yadav, Choshen, Raffel and Bansal, "ComPEFT: Compression for Communicating Parameter Efficient Updates via
Sparsification and Quantization", 2023 (arXiv 2311.13171). Against the authors' code: exactly floor(k d) entries are
kept where it keeps one more and all ties, and STC's scale is the mean of absolute values where it averages signed ones.
"""

from workingpapers.federated.compeft.adapters import from_peft as from_peft
from workingpapers.federated.compeft.adapters import into_peft as into_peft
from workingpapers.federated.compeft.baselines import original as original
from workingpapers.federated.compeft.baselines import pruned as pruned
from workingpapers.federated.compeft.baselines import sign_only as sign_only
from workingpapers.federated.compeft.baselines import stc as stc
from workingpapers.federated.compeft.baselines import uniform_quant as uniform_quant
from workingpapers.federated.compeft.files import compress_file as compress_file
from workingpapers.federated.compeft.files import inspect_file as inspect_file
from workingpapers.federated.compeft.files import pack_file as pack_file
from workingpapers.federated.compeft.files import read_packed as read_packed
from workingpapers.federated.compeft.files import unpack_file as unpack_file
from workingpapers.federated.compeft.merging import LearnedMerge as LearnedMerge
from workingpapers.federated.compeft.merging import learn_weights as learn_weights
from workingpapers.federated.compeft.merging import merge as merge
from workingpapers.federated.compeft.ternary import TernaryUpdate as TernaryUpdate
from workingpapers.federated.compeft.ternary import compress as compress
from workingpapers.federated.compeft.tuning import ComPEFTTuner as ComPEFTTuner
