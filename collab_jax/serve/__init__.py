"""Serving: the device model behind an OpenAI-compatible API; it decides when to ask the cloud.

slots           the device programs: prefill, insert, step, over a ring of keys and values
engine          the thread that owns the devices, and its bounded queue
reader          a response's tokens as thinking and content, without tags
budget          the controller that holds the share of calls
upstream        the cloud from asyncio: streams, stored answers, retries, one purchase for each key
body            what a client may ask for
answer          one request from its prompt to its last event
telemetry       counters, and the last requests
api             the HTTP application
playground      its page for a browser, playground.html
__main__        the command `python -m collab_jax.serve`
"""
