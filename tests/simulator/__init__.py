"""The simulator by itself: its faults, its lives, and what it does on a clock that jumps."""
