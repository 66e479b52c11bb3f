"""What a model writes, told apart while it streams: reasoning, content and tool calls."""
