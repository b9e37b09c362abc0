"""The whole method at small scale, from nothing but an installation."""
