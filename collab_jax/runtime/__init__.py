"""What any command needs, whatever the method is.

Errors, the command line, settings of the process, devices, hosts, checkpoints, metrics, files,
tables, Markdown, functions of the user. It imports no other package of collab_jax; every other one
may import it.
"""
