"""A decoder with fewer heads and channels: how many, which, and what that costs."""
