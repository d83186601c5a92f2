from .light_sb import LightSB as LightSB
from .light_sb import LightSBPotential as LightSBPotential
from .light_sb import energy_distance as energy_distance
