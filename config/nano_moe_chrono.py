"""nanoMoE's 8-expert run with all five steps on."""

from config.train_nano_moe import *

out_dir = "out/nano_moe_chrono"

chrono_router = True
chrono_coherence = True
chrono_beta = True
chrono_bridge = True
chrono_lifecycle = True
