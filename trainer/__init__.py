"""What a training run needs besides the model: settings, setup, step, checkpoints, logs, ranks. One job per file."""
