"""What a program needs on a machine that need not be here: memory, time, collectives."""
