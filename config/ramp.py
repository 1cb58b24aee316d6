"""The strength of beta rises from 0 and falls back to 0 within one run: does routing at the same strength differ
between the two branches (hysteresis)? Eight seeds of three arms train in less than an hour on two cores.

    python compare.py config/ramp.py --arms=off,on,shuffled --seeds=8
"""

from config.study import *

out_dir = "out/ramp"

max_iters = 1200
lr_decay_iters = 1200
# constant after the warm-up, so that both branches have the same rate
learning_rate = 2e-3
min_lr = 2e-3

margin = None  # that of the study is of a loss
chrono_ramp = "0@0 1@600 0@1200"
chrono_center = True
chrono_eta = 1e-1
chrono_k_max = 10.0
# the bridge would lower the strength where beta disagrees with the router
chrono_bridge = False
