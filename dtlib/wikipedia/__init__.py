"""Paper B (Reid et al. 2022): its losses, and its Atari games (emulator, replay, games)."""
