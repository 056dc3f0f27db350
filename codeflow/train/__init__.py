"""The LoopCoder reference trainer: from shards to a small trained model, readable end to end."""
