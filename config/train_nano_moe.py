"""nanoMoE's 8-expert run on OpenWebText, dropless. config/nano_moe_chrono.py adds the loop.

torchrun --standalone --nproc_per_node=8 train.py config/train_nano_moe.py
"""

out_dir = "out/nano_moe"
dataset = "openwebtext"
wandb_log = True
compile = True

n_layer = 6
n_head = 6
n_embd = 384
n_exp = 8
top_k = 2
stride = 2
use_aux_loss = True
aux_loss_weight = 0.01
use_router_z_loss = True
router_z_loss_weight = 0.001
use_switch_tfm_init = True
router_use_full_prec = True

# 12 sequences x 1024 tokens x 40 micro-batches over all ranks: 0.5 M tokens per step
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

max_iters = 50000
lr_decay_iters = 50000
eval_interval = 500
eval_iters = 200
log_interval = 10
