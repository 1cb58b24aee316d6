"""Steps 1 to 3 (beta): also update beta from coherence, which closes the loop."""

from config.steps.step2_coherence import *

out_dir = "out/step3_beta"
chrono_beta = True
