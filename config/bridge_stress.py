"""The vertical slice with a beta strong enough that the bridge has work to do, at the plan's threshold of JS 0.2.

At k_max 0.3 no beta can reach that threshold; with k_max 6 and a drift a thousand times the default it is passed within
a few hundred steps, and relevance falls until beta and router hold each other.
"""

from config.vertical_slice import *

out_dir = "out/bridge_stress"
chrono_k_max = 6.0
chrono_eta = 1e-1
chrono_center = True
chrono_bridge_threshold = 0.2
