"""Bundle to answers (numpy, pillow, tokenizers and one engine; never torch)."""
