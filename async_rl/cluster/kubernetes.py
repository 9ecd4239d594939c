"""The manifests of a run for Kubernetes: a Job for the run, a Deployment of generators, a Service by which they find
it, a volume for its folder and its config; the keys are a Secret that a command of the head makes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from async_rl.cluster.demand import Demand, Share
from async_rl.errors import UserError

MARGIN_S = 15
"""between the end of checkpoint.grace_s and Kubernetes' own end of the pod"""
BUFFER_PORT, WEIGHTS_PORT = 5555, 5556
SECRET, CONFIG, RUNS, KEYS = "/etc/async-rl/keys", "/etc/async-rl/config", "/runs", "/dev/shm/keys"
"""where pods have them"""
STORAGE = "50Gi"
FRESH_S = 60
"""age of live.json, which a living launcher writes about once a second"""
CLIENT_KEYS = ("server.key", "client.key", "client.key_secret")
"""what a generator has of the keys"""
STOPPED = (129, 138, 143)
"""exit codes of a run that a signal ended behind its checkpoint"""
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,51}[a-z0-9])?")
_SIZE = re.compile(r"[1-9]\d*(Mi|Gi|Ti|M|G|T)")

Comments = Mapping[str, str]
"""key of a manifest -> the line of comment above it"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the pods run, and on what."""

    image: str
    """with async-rl, and whatever the task needs"""
    namespace: str = ""
    """empty: that of the user's context"""
    claims: tuple[str, ...] = ()
    """`CLAIM=PATH`: volumes that all pods have, for models and data"""
    storage: str = STORAGE
    """of the volume for the run's folder"""


def kubernetes_manifests(run: Demand, place: Place, config: str, *, file: str) -> str:
    """The text of the manifests `file`. `config`: the text of the config. Raises UserError for what Kubernetes cannot
    do for the run."""
    name = object_name(run.name)
    _check(run, place)
    documents = [
        _claim(name, place),
        _config(name, config),
        _service(name),
        _run_job(name, run, place),
        _generators(name, run, place),
    ]
    if place.namespace:
        for document, _ in documents:
            document["metadata"]["namespace"] = place.namespace
    return "---\n".join([_head(name, run, place, file), *(_written(document, said) for document, said in documents)])


def object_name(name: str) -> str:
    """The run's name as objects of Kubernetes may have it. Raises UserError."""
    label = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")
    if _LABEL.fullmatch(label) is None:
        raise UserError(f"name is '{name}', of which no name of an object can be made; set name= to letters and digits")
    return label


def _check(run: Demand, place: Place) -> None:
    if not place.image or any(c.isspace() for c in place.image):
        raise UserError("--image is missing: name the container image that has async-rl, e.g. registry/async-rl:1")
    if place.namespace and _LABEL.fullmatch(place.namespace) is None:
        raise UserError(f"--namespace is '{place.namespace}'; write lower-case letters, digits and dashes")
    if _SIZE.fullmatch(place.storage) is None:
        raise UserError(f"--storage is '{place.storage}'; write a size, e.g. 50Gi")
    if "SIGTERM" not in run.settings.checkpoint.signals:
        raise UserError("checkpoint.signals must hold SIGTERM, by which Kubernetes ends a pod")
    if run.asked.trainer_nodes > 1:
        raise UserError("--trainer-nodes is for slurm: on Kubernetes the trainer's ranks are in one pod")
    for claim in place.claims:
        found, equals, path = claim.partition("=")
        if not equals or _LABEL.fullmatch(found) is None or not path.startswith("/"):
            raise UserError(f"--claim is '{claim}'; write CLAIM=PATH, e.g. models=/models")


def _head(name: str, run: Demand, place: Place, file: str) -> str:
    spaced = f" -n {place.namespace}" if place.namespace else ""
    lines = [
        f"{run.name} on Kubernetes: one pod for the run and its trainer, {run.generators} for generators.",
        f"Written by: {run.asked.written_by}",
        "",
        "Start it, with keys of its own (what goes over the network is encrypted with them):",
        "  async-rl keys keys",
        f"  kubectl{spaced} create secret generic {name}-keys --from-file=keys",
        f"  kubectl{spaced} apply -f {file}",
        f"Watch it:    kubectl{spaced} logs -f job/{name}",
        f"             kubectl{spaced} exec -it job/{name} -- async-rl top {RUNS}/{run.name}",
        f"Generators:  kubectl{spaced} scale deployment/{name}-generators --replicas=N, at any time",
        "An evicted run goes on at its newest checkpoint in another pod; so does one that failed, three times.",
        "When it is done (the Deployment would start its generators for ever):",
        f"  kubectl{spaced} delete deployment/{name}-generators job/{name} service/{name} configmap/{name}",
        f"The volume {name}-runs holds the run's folder; it stays until you delete it.",
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


# ------------------------------------------------------------------------------------------------ what both pods have


def _metadata(name: str, run: str) -> dict[str, Any]:
    return {"name": name, "labels": {"app.kubernetes.io/name": "async-rl", "app.kubernetes.io/instance": run}}


def _labels(run: str, part: str) -> dict[str, str]:
    return {"app.kubernetes.io/instance": run, "app.kubernetes.io/component": part}


def _resources(share: Share) -> dict[str, Any]:
    """GPUs are limits by Kubernetes' rule; memory is one, so that a pod is never ended for another's."""
    asked: dict[str, Any] = {"cpu": str(share.cpus)}
    limits: dict[str, Any] = {}
    if share.memory_gb:
        asked["memory"] = limits["memory"] = f"{share.memory_gb}Gi"
    if share.gpus:
        limits["nvidia.com/gpu"] = str(share.gpus)
    return {"requests": asked, **({"limits": limits} if limits else {})}


def _volumes(name: str, place: Place, secret: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": "keys", "secret": {"secretName": f"{name}-keys", **secret}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        *(
            {"name": f"claim-{i}", "persistentVolumeClaim": {"claimName": claim.partition("=")[0]}}
            for i, claim in enumerate(place.claims)
        ),
    ]


def _mounts(place: Place) -> list[dict[str, Any]]:
    return [
        {"name": "keys", "mountPath": SECRET, "readOnly": True},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        *({"name": f"claim-{i}", "mountPath": c.partition("=")[2]} for i, c in enumerate(place.claims)),
    ]


TAKE_KEYS = (
    "# a Secret's files can be read by the pod's group, which async-rl refuses: a copy that is ours alone\n"
    f"umask 077; mkdir -p {KEYS}; cp -L {SECRET}/* {KEYS}/\n"
)
SHARED_MEMORY = "a container has 64 MB of shared memory by default; weights are published there. Counts as memory"


# ------------------------------------------------------------------------------------------------ the objects


def _claim(name: str, place: Place) -> tuple[dict[str, Any], Comments]:
    document = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": _metadata(f"{name}-runs", name),
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": place.storage}}},
    }
    return document, {"apiVersion": "The folder of the run: record, stored trajectories, checkpoints."}


def _config(name: str, config: str) -> tuple[dict[str, Any], Comments]:
    document = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(name, name),
        "data": {"config.yaml": config},
    }
    return document, {"apiVersion": "The config, as it is."}


def _service(name: str) -> tuple[dict[str, Any], Comments]:
    document = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(name, name),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": _labels(name, "run"),
            "ports": [{"name": "buffer", "port": BUFFER_PORT}, {"name": "weights", "port": WEIGHTS_PORT}],
        },
    }
    return document, {
        "apiVersion": "The name by which generators find the run, in whatever pod it is now.",
        "publishNotReadyAddresses": "a run that is busy for a moment must not lose its generators",
    }


def run_command(run: Demand) -> str:
    """What the run's pod does: begin the run, or go on with it."""
    folder = f"{RUNS}/{run.name}"
    words = " ".join(map(shlex.quote, run.words))
    here = f"wire.endpoint=tcp://0.0.0.0:{BUFFER_PORT} weights.endpoint=tcp://0.0.0.0:{WEIGHTS_PORT} wire.keys={KEYS}"
    return (
        TAKE_KEYS
        + "# exec: signals of Kubernetes go to the run itself, which then writes a checkpoint\n"
        + f"if [ -f {shlex.quote(folder + '/config.yaml')} ]; then\n"
        + f"  exec async-rl run --resume {shlex.quote(folder)} {here}\n"
        + "fi\n"
        + f"exec async-rl run {CONFIG}/config.yaml --run-dir {shlex.quote(folder)} {words} {here}\n"
    )


def _alive(run: Demand) -> dict[str, Any]:
    """A probe: the launcher has written live.json a moment ago, by this machine's clock."""
    live = shlex.quote(f"{RUNS}/{run.name}/live.json")
    written = f"sed 's/^{{\"time\": \\([0-9]*\\).*/\\1/' {live}"
    return {"exec": {"command": ["/bin/sh", "-c", f"test $(($(date +%s) - $({written}))) -lt {FRESH_S}"]}}


def _run_job(name: str, run: Demand, place: Place) -> tuple[dict[str, Any], Comments]:
    probe = _alive(run)
    container = {
        "name": "run",
        "image": place.image,
        "command": ["/bin/sh", "-c", run_command(run)],
        "ports": [{"containerPort": BUFFER_PORT}, {"containerPort": WEIGHTS_PORT}],
        "resources": _resources(run.trainer),
        "startupProbe": {**probe, "periodSeconds": 10, "failureThreshold": 360},
        "livenessProbe": {**probe, "periodSeconds": 30, "timeoutSeconds": 5, "failureThreshold": 3},
        "readinessProbe": {**probe, "periodSeconds": 10, "timeoutSeconds": 5},
        "volumeMounts": [
            {"name": "runs", "mountPath": RUNS},
            {"name": "config", "mountPath": CONFIG, "readOnly": True},
            *_mounts(place),
        ],
    }
    volumes = [
        {"name": "runs", "persistentVolumeClaim": {"claimName": f"{name}-runs"}},
        {"name": "config", "configMap": {"name": name}},
        *_volumes(name, place, {}),
    ]
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": run.grace_s + MARGIN_S,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "containers": [container],
        "volumes": volumes,
    }
    rules = [
        {"action": "FailJob", "onExitCodes": {"containerName": "run", "operator": "In", "values": [2]}},
        {"action": "Ignore", "onExitCodes": {"containerName": "run", "operator": "In", "values": list(STOPPED)}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    limit = {"activeDeadlineSeconds": run.asked.time_s} if run.asked.time_s else {}
    document = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(name, name),
        "spec": {
            "backoffLimit": 3,
            **limit,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": rules},
            "template": {"metadata": {"labels": _labels(name, "run")}, "spec": pod},
        },
    }
    return document, {
        "apiVersion": "The run: launcher, buffer, weight server and the trainer.",
        "backoffLimit": "a run that fails goes on at its newest checkpoint in a new pod, so many times",
        "activeDeadlineSeconds": "--time, over all pods of the run",
        "podReplacementPolicy": "the next pod comes when the one before is gone: two would write into one folder",
        "podFailurePolicy": "a wrong setting (exit code 2) is not tried again; evictions and signals do not count",
        "terminationGracePeriodSeconds": f"checkpoint.grace_s={run.grace_s} for the last step and its checkpoint, and "
        f"{MARGIN_S} s to end",
        "enableServiceLinks": "without it, vLLM would take the Service's variables for its own",
        "startupProbe": "the run lives when its launcher has just written live.json; a model may take long to load. No "
        "probe of\n# the ports: the buffer would count it as a peer without a key",
        "medium": SHARED_MEMORY,
    }


def generator_command(name: str) -> str:
    """What a generator's pod does; Kubernetes starts it again when it ends."""
    return TAKE_KEYS + f"exec async-rl generate --connect tcp://{name}:{BUFFER_PORT} --keys {KEYS}\n"


def _generators(name: str, run: Demand, place: Place) -> tuple[dict[str, Any], Comments]:
    container = {
        "name": "generator",
        "image": place.image,
        "command": ["/bin/sh", "-c", generator_command(name)],
        "resources": _resources(run.generator),
        "volumeMounts": _mounts(place),
    }
    items = [{"key": key, "path": key} for key in CLIENT_KEYS]
    document = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(f"{name}-generators", name),
        "spec": {
            "replicas": run.generators,
            "selector": {"matchLabels": _labels(name, "generator")},
            "template": {
                "metadata": {"labels": _labels(name, "generator")},
                "spec": {
                    "terminationGracePeriodSeconds": 30,
                    "automountServiceAccountToken": False,
                    "enableServiceLinks": False,
                    "containers": [container],
                    "volumes": _volumes(name, place, {"items": items}),
                },
            },
        },
    }
    return document, {
        "apiVersion": "Generators: they join the run and leave it at any time. What one held goes to others.",
        "terminationGracePeriodSeconds": "finished turns are handed over before it leaves",
        "containers": "no probe: the process beside each generator watches it and ends what is frozen, whereupon it "
        "is started\n# again; one that finds no run ends, too, and tries again with Kubernetes' growing delay",
        "items": "not the server's secret",
        "medium": SHARED_MEMORY,
    }


# ------------------------------------------------------------------------------------------------ as text


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as lines, and repeats what stands twice instead of referring to it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _as_lines(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _as_lines)


def _written(document: Mapping[str, Any], said: Comments) -> str:
    """The document with its comments, each above the first line of its key."""
    lines, left = [], dict(said)
    for line in yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True).splitlines():
        found = re.match(r"( *(?:- )*)(\w+):", line)
        if found is not None and found[2] in left:
            indent = " " * len(found[1])
            lines += [f"{indent}{row if row.startswith('#') else f'# {row}'}" for row in left.pop(found[2]).split("\n")]
        lines.append(line)
    return "\n".join(lines) + "\n"
