"""Stage 1, the behaviour-bind tokenizer: encoders, codebooks, losses, training, evaluation."""
