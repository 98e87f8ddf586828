"""One tuning job in a child process; the only package that imports torch, transformers and peft."""
