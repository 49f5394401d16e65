"""What happens while a model runs: the step protocol, the one owner of a block's forward, statistics of a call."""
