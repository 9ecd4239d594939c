"""THE COMMAND LINE. In: words. Out: an exit code: 0 done, 1 a run failed, 2 a wrong setting or file,
128 and the number of the signal that stopped it (130: Ctrl-C).

Each file registers the commands of one group (train, look, check, experiment) and imports what a command needs when
that command runs, so `--help` is quick. Nothing else imports this room.
"""
