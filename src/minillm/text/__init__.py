"""Text in and out: the tokenizer, how it is trained, and how a conversation becomes tokens."""
