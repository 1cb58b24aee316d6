"""Config files. Each is Python and sets keys of `python train.py --help`. A config file can import another one."""
