from .groups import frugal_param_groups as frugal_param_groups
from .memory import StateMemory as StateMemory
from .memory import Tally as Tally
from .memory import state_memory as state_memory
from .optimizer import Frugal as Frugal
from .trainer import trainer_optimizers as trainer_optimizers
