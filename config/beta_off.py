"""The vertical slice with step 3 off: everything is measured, beta stays 0. The other half of the comparison."""

from config.vertical_slice import *

out_dir = "out/beta_off"
chrono_beta = False
