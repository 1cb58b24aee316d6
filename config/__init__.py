"""Config files. Each is Python that sets keys of `python train.py --help`; one may import another's."""
