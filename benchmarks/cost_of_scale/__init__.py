"""What a training step costs as one thing grows: batch, context, experts, vocabulary, ranks that share them, layers."""
