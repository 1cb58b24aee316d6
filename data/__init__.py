"""Tools that prepare datasets. Each folder is a dataset, with its preparer prepare.py."""
