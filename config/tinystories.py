"""TinyStories with 8 experts, for one GPU.

First: python data/tinystories/prepare.py
"""

out_dir = "out/tinystories"
dataset = "tinystories"

n_layer = 8
n_head = 8
n_embd = 512
n_exp = 8
top_k = 2
stride = 2
use_aux_loss = True
aux_loss_weight = 0.01
use_router_z_loss = True
router_z_loss_weight = 0.001
use_switch_tfm_init = True
router_use_full_prec = True

block_size = 512
batch_size = 32
gradient_accumulation_steps = 4

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 500
max_iters = 20000
lr_decay_iters = 20000
eval_interval = 500
eval_iters = 100
log_interval = 10
