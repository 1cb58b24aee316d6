"""Steps 1 and 2 (coherence): also measure each expert's coherence with its layer."""

from config.steps.step1_router import *

out_dir = "out/step2_coherence"
chrono_coherence = True
