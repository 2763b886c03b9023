"""What any command needs and no method knows: errors, the command line, settings of the process,
devices, checkpoints, metrics, files, Markdown. Imports nothing else of this package; all may import it.
"""
