"""The device model: decoder.py (the network), hf.py (Hugging Face folders), text.py (tokens <-> text)."""
