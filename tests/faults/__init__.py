"""What may happen to a file from outside: kill -9, a full disk, another process, a damaged disk."""
