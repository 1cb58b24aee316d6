"""Your own text, a token a byte, in the vertical slice's shape. First: python data/text/prepare.py FILE_OR_FOLDER..."""

from config.vertical_slice import *

out_dir = "out/text"
dataset = "text"
wandb_log = False
