"""GPT-2 with each dense MLP of every second block turned into 4 experts (sparse upcycling), trained on Shakespeare.

First: python data/shakespeare/prepare.py, pip install transformers
"""

out_dir = "out/shakespeare_upcycled"
dataset = "shakespeare"
init_from = "gpt2"

n_exp = 4
top_k = 2
stride = 2
use_aux_loss = True
aux_loss_weight = 0.01

block_size = 512
batch_size = 1
gradient_accumulation_steps = 32  # 16,384 tokens per step

learning_rate = 3e-5
decay_lr = False
max_iters = 200
eval_interval = 20
eval_iters = 40
log_interval = 1
