"""THE PROCESSES OF A RUN. In: settings, or a run folder to go on with. Out: processes started, watched, ended.

launcher.py is the story of one launch; crew.py the processes it has now, and when a dead one is started again; child.py
one of them and how it ended; agent.py and external.py what stands for a trainer of several ranks, or of others;
liveness.py pulses and live.json; placement.py who sees which GPUs; memory.py what a run takes; preflight.py what can be
found wrong before; resume.py where a resumed run goes on; join.py and join_trainer.py processes that users start.
Invariant: a run ends with a cause or a success, never with a hang, and leaves no process behind. The launcher waits for
its children by deadlines and for nobody's messages.
"""
