"""Linear attention, causal or not: time and memory grow with the length, not with its square."""
