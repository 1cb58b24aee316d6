"""Steps 1 to 5 (lifecycle): also propose prunes; none is executed. The same settings as config/vertical_slice.py."""

from config.steps.step4_bridge import *

out_dir = "out/step5_lifecycle"
chrono_lifecycle = True
