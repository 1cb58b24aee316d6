"""A smaller vertical slice: eight seeds of four arms train in less than an hour on two cores."""

from config.vertical_slice import *

out_dir = "out/study"
wandb_log = False

n_embd = 64
block_size = 64
batch_size = 16
max_iters = 600
lr_decay_iters = 600
learning_rate = 3e-3
min_lr = 3e-4

# Declared before the runs: differences in validation loss up to this value, about 1% of the loss, do not matter.
margin = 0.02
protocol = "docs/protocol.md"

eval_interval = 25
eval_iters = 20
log_interval = 25
