"""Step 1 (router): add beta (0 here) to the routing logits, and measure clean against biased routing."""

from config.plain import *

out_dir = "out/step1_router"
chrono_router = True
