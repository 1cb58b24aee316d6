"""Your own text, one token per byte, with the model of the vertical slice.

First: python data/text/prepare.py FILE_OR_FOLDER...
"""

from config.vertical_slice import *

out_dir = "out/text"
dataset = "text"
wandb_log = False
