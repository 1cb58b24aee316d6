"""Step 1: the router takes beta (0 here) and measures clean against biased routing."""

from config.plain import *

out_dir = "out/step1_router"
chrono_router = True
