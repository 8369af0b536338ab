"""Small things that every part uses: files, processes, signals, the compilation cache."""
