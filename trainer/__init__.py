"""What a trainer needs besides a model: settings, data, checkpoints, the run's log. One job a file."""
