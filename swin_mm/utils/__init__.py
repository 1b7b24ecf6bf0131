"""What all other packages may import: errors, files, the environment. Imports no other package of swin_mm."""
