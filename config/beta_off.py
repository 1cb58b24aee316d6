"""The vertical slice with step 3 (beta) off: everything is measured, and beta stays 0. The baseline of a comparison."""

from config.vertical_slice import *

out_dir = "out/beta_off"
chrono_beta = False
