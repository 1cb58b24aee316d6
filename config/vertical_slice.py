"""All five steps with a small model: trains in a few minutes on two CPU cores."""

out_dir = "out/vertical_slice"
dataset = "stdlib"
wandb_log = True

# 4 blocks; blocks 0 and 2 have 8 experts each
n_layer = 4
n_head = 4
n_embd = 128
n_exp = 8
top_k = 2
stride = 2
use_aux_loss = True
aux_loss_weight = 0.01
use_router_z_loss = True
router_z_loss_weight = 0.001
use_switch_tfm_init = True
router_use_full_prec = True

block_size = 128
batch_size = 16
gradient_accumulation_steps = 1

learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 50
max_iters = 1000
lr_decay_iters = 1000
beta2 = 0.99

eval_interval = 100
eval_iters = 20
log_interval = 10

# step 1 (router): add beta to the routing logits
chrono_router = True
# step 2 (coherence): measure each expert's coherence
chrono_coherence = True
# step 3 (beta): update beta from coherence
chrono_beta = True
# step 4 (bridge): weaken beta where it disagrees with the router
chrono_bridge = True
# step 5 (lifecycle): propose prunes
chrono_lifecycle = True
chrono_unused_after = 500
chrono_window = 250
