"""Completions for reinforcement learning: the engine that writes them and the rewards that judge them."""
