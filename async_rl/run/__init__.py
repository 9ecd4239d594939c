"""THE PROCESSES OF A RUN. In: settings, or a run folder to go on with. Out: processes started, watched, ended.

launcher.py is the story; crew.py the processes it has now; child.py one of them and how it ended; restart.py when a
dead one starts again; vitals.py and live.py signs of life; placement.py who sees which GPUs and uses which cores
(machine.py: what there is); preflight.py what can be found wrong before; resume.py where a resumed run begins;
tracking.py the process that feeds trackers. Invariant: a run ends with a cause or a success, never with a hang, and
leaves no process behind. The launcher waits for its children by deadlines and for nobody's messages.
"""
