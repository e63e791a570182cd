"""Looking after checkpoints that exist: `minillm checkpoint ...`. Reading here is cheap where it can be."""
