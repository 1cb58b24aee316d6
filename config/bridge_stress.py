"""The vertical slice with a beta large enough for the bridge to act, at the default threshold of JS 0.2.

With k_max=0.3 no beta reaches that threshold. With k_max=6 and 1000 times the default drift, the disagreement exceeds
it within a few hundred steps, and relevance falls until beta and the router are in balance.
"""

from config.vertical_slice import *

out_dir = "out/bridge_stress"
chrono_k_max = 6.0
chrono_eta = 1e-1
chrono_center = True
chrono_bridge_threshold = 0.2
