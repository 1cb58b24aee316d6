"""Steps 1 to 4 (bridge): also weaken beta where it disagrees with the router."""

from config.steps.step3_beta import *

out_dir = "out/step4_bridge"
chrono_bridge = True
