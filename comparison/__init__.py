"""Beta on against beta off: train the arms over seeds, pair the runs, test the differences. One job a file."""
