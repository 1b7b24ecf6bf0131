"""What every other room may use: errors, files, the environment. Imports nothing else of this package."""
