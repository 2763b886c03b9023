"""Serving: the device model behind an OpenAI-compatible API; it decides when to ask the cloud.

slots           the device programs: prefill, insert, step, over a ring of keys and values
engine          the thread that owns the devices, and its bounded queue
reader          a response's tokens as thinking and content, without tags
response        what the device has written, and what of it is said
budget          the controller that holds the share of calls
upstream        the cloud from asyncio: streams, stored answers, retries, one purchase for each key
schema          JSON Schemas: one table that checks a request and describes it
body            what a client may ask for
answer          one request from its prompt to its last event
telemetry       counters, and the last requests
wire            responses as OpenAI's clients read them
openapi         the description of all this, at /openapi.json
api             the HTTP application
playground      its page for a browser, playground.html
__main__        the command `python -m collab_jax.serve`
"""
