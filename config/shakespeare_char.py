"""Shakespeare by characters, with 4 experts.

First: python data/shakespeare_char/prepare.py
"""

out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
n_exp = 4
top_k = 2
stride = 2
use_aux_loss = True
aux_loss_weight = 0.01

block_size = 256
batch_size = 64
gradient_accumulation_steps = 1

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
max_iters = 5000
lr_decay_iters = 5000
beta2 = 0.99

# overfits: evaluate often, and use ckpt_best.pt
eval_interval = 250
eval_iters = 200
log_interval = 10
