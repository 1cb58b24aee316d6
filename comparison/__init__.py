"""Compare training with beta and without: train the arms with several seeds, pair the runs, test the differences."""
