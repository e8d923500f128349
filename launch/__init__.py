"""Starting a command as several processes."""
