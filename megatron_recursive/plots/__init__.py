"""Pictures of a training run, drawn from its metrics.jsonl."""
