"""Student and adapter to bundle (torch): merge, convert, quantize, verify."""
