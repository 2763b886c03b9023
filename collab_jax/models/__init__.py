"""The device model: decoder.py (the network), hf.py (Hugging Face folders), lora.py (adapters),
text.py (tokens <-> text).
"""
