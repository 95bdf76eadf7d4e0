"""Where logical matrices lie: index algebra, name tables, and the walk over a Megatron model."""
