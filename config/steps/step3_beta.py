"""Steps 1 to 3: coherence moves beta, and the loop is closed."""

from config.steps.step2_coherence import *

out_dir = "out/step3_beta"
chrono_beta = True
