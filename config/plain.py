"""The vertical slice with all five steps off: nanoMoE's routing, dropless."""

from config.vertical_slice import *

out_dir = "out/plain"
chrono_router = False
chrono_coherence = False
chrono_beta = False
chrono_bridge = False
chrono_lifecycle = False
