"""CoLiDE, the estimators it is compared with under one interface, and what experiments on them need."""

from workingpapers.causality.colide.baselines import DAGMALinear as DAGMALinear
from workingpapers.causality.colide.baselines import GolemEV as GolemEV
from workingpapers.causality.colide.baselines import GolemNV as GolemNV
from workingpapers.causality.colide.baselines import SortNRegress as SortNRegress
from workingpapers.causality.colide.estimator import CoLiDE as CoLiDE
from workingpapers.causality.graphs import dag_metrics as dag_metrics
from workingpapers.causality.graphs import simulate_linear_sem as simulate_linear_sem
from workingpapers.causality.graphs import to_dag as to_dag
