"""Steps 1 to 5: prunes are proposed, none is executed. The vertical slice, arrived at step by step."""

from config.steps.step4_bridge import *

out_dir = "out/step5_lifecycle"
chrono_lifecycle = True
