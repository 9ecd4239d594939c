"""`async-rl launch kubernetes`: manifests that the API's schemas accept, and whose commands train."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from support_command import run_command, write_config
from support_ports import HeldPorts
from support_slurm import program

from async_rl.cluster.kubernetes import BUFFER_PORT, CONFIG, KEYS, RUNS, SECRET, WEIGHTS_PORT
from async_rl.run_folder import RunFolder, read_rows

MATH = Path(__file__).resolve().parents[2] / "configs" / "eight_gpu_math.yaml"
SCHEMA = "1.31"
"""the oldest version of the API that has everything the manifests use"""
KINDS = ["PersistentVolumeClaim", "ConfigMap", "Service", "Job", "Deployment"]


def launch(folder: Path, *words: object) -> str:
    """The text of the manifests; the words name a config first."""
    path = folder / "run.yaml"
    done = run_command("launch", "kubernetes", *words, "--image", "registry/async-rl:1", "--output", path)
    assert done.returncode == 0, done.stderr
    return path.read_text()


def by_kind(text: str) -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def pod(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["spec"]["template"]["spec"]
    return found


def test_the_manifests_are_what_the_api_takes_and_say_what_was_asked(tmp_path: Path) -> None:
    words = ("--generators", 16, "--gpus-per-generator", 2, "--cpus", 12, "--memory", 96, "--time", "2:00:00")
    more = ("--namespace", "rl", "--claim", "models=/app/models", "--storage", "2Ti", "checkpoint.grace_s=99.5")
    text = launch(tmp_path, MATH, *words, *more)
    documents = by_kind(text)
    assert list(documents) == KINDS
    for document in documents.values():
        assert document["metadata"]["namespace"] == "rl"
        kubernetes_validate.validate(document, SCHEMA, strict=True)
    run, generators = documents["Job"], documents["Deployment"]
    assert generators["spec"]["replicas"] == 16
    [container] = pod(generators)["containers"]
    assert container["resources"] == {
        "requests": {"cpu": "12", "memory": "96Gi"}, "limits": {"memory": "96Gi", "nvidia.com/gpu": "2"},
    }  # fmt: skip
    [trainer] = pod(run)["containers"]
    assert trainer["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert pod(run)["terminationGracePeriodSeconds"] == 115
    assert run["spec"]["activeDeadlineSeconds"] == 7200
    assert documents["PersistentVolumeClaim"]["spec"]["resources"]["requests"]["storage"] == "2Ti"
    assert documents["ConfigMap"]["data"]["config.yaml"] == MATH.read_text()
    for part in (run, generators):
        selector = documents["Service"]["spec"]["selector"]
        labels = part["spec"]["template"]["metadata"]["labels"]
        assert (selector.items() <= labels.items()) == (part is run)
        [claim] = [volume for volume in pod(part)["volumes"] if volume["name"] == "claim-0"]
        assert claim["persistentVolumeClaim"]["claimName"] == "models"
        names = {volume["name"] for volume in pod(part)["volumes"]}
        assert {mount["name"] for mount in pod(part)["containers"][0]["volumeMounts"]} == names
    [secret] = [volume["secret"] for volume in pod(generators)["volumes"] if "secret" in volume]
    assert "server.key_secret" not in {item["key"] for item in secret["items"]}
    assert f"kubectl -n rl create secret generic {secret['secretName']} --from-file=keys" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--image is missing"),
        (("--image", "x", "--partition", "gpu"), "--partition is for slurm; leave it out"),
        (("--image", "x", "--claim", "models"), "--claim is 'models'; write CLAIM=PATH"),
        (("--image", "x", "--storage", "much"), "--storage is 'much'; write a size"),
        (("--image", "x", "--namespace", "My"), "--namespace is 'My'"),
        (("--image", "x", "name=_"), "name is '_', of which no name of an object can be made"),
        (("--image", "x", "checkpoint.signals=[SIGUSR1]"), "checkpoint.signals must hold SIGTERM"),
    ],
)
def test_what_does_not_fit_is_refused(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from async_rl.cli.main import main

    path = tmp_path / "run.yaml"
    with pytest.raises(SystemExit) as end:
        main(["launch", "kubernetes", str(MATH), "--output", str(path), *words])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not path.exists()


class Pods:
    """The kubelet of one machine: it starts the containers of manifests as processes, and those of the Deployment again
    when they end. What is mounted lies in folders of `root`, the Service's name is the loopback, and its ports are held
    for this test."""

    def __init__(self, root: Path, documents: dict[str, Any]) -> None:
        self.root = root
        self.started: dict[str, subprocess.Popen[bytes]] = {}
        self.always: dict[str, dict[str, Any]] = {}
        self.ports = HeldPorts(2)
        buffer, weights = self.ports.numbers
        name = documents["Service"]["metadata"]["name"]
        self.places = {
            f"tcp://{name}:": "tcp://127.0.0.1:",
            f":{BUFFER_PORT}": f":{buffer}",
            f":{WEIGHTS_PORT}": f":{weights}",
        }
        self.folders = {SECRET: root / "secret", CONFIG: root / "config", RUNS: root / "runs"}
        (root / "bin").mkdir()
        program(root / "bin" / "async-rl", f'exec "{sys.executable}" -m async_rl "$@"')
        for folder in self.folders.values():
            folder.mkdir(exist_ok=True)
        for file, text in documents["ConfigMap"]["data"].items():
            (self.folders[CONFIG] / file).write_text(text)

    def here(self, text: str, pod: str) -> str:
        """The text with places of a pod replaced by those of this machine."""
        for there, place in (*self.places.items(), (KEYS, self.root / pod / "keys"), *self.folders.items()):
            text = re.sub(
                re.escape(there) + r"(?![\w.])" if there in (RUNS, CONFIG) else re.escape(there), str(place), text
            )
        return text

    def start(self, document: dict[str, Any], name: str) -> subprocess.Popen[bytes]:
        """Start the container of a pod; the one of a Deployment is started again when it ends, until `evict`."""
        if document["kind"] == "Deployment":
            self.always[name] = document
        [container] = pod(document)["containers"]
        words = [self.here(word, name) for word in container["command"]]
        path = f"{self.root / 'bin'}:{os.environ['PATH']}"
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                words, env={**os.environ, "PATH": path}, cwd=self.root, stdout=log, stderr=subprocess.STDOUT
            )
        self.started[name] = process
        return process

    def log(self, name: str) -> Path:
        return self.root / f"{name}.log"

    def wait_for(self, condition: Callable[[], object], what: str, longest_s: float) -> None:
        """Wait while the run's pod lives; what ended of the Deployment is started again. Says at once what every pod
        has printed where the run ends before, and when it was in vain."""
        job, deadline = self.started["run"], time.monotonic() + longest_s
        while not condition():
            ended = job.poll() is not None and not condition()
            assert not ended, f"the run ended with {job.returncode} before {what}:\n{self.account()}"
            assert time.monotonic() < deadline, f"waited {longest_s:g} s for {what}:\n{self.account()}"
            for name, document in self.always.items():
                if self.started[name].poll() is not None:
                    self.start(document, name)
            time.sleep(0.05)

    def evict(self, name: str) -> int:
        """End a pod as the kubelet does, by SIGTERM to its container's first process; its exit code."""
        self.always.pop(name, None)
        self.started[name].terminate()
        return self.ended(name)

    def ended(self, name: str) -> int:
        """The exit code of a pod that ends now."""
        try:
            return self.started[name].wait(240)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"waited 240 s for the end of {name}:\n{self.account()}") from None

    def account(self) -> str:
        """What every pod has printed, and the record of the run."""
        shown = {name: self.log(name).read_text() for name in self.started}
        files = [*self.folders[RUNS].glob("*/events.jsonl"), *self.folders[RUNS].glob("*/logs/*")]
        shown |= {str(path): path.read_text()[-5000:] for path in files}
        codes = {name: process.poll() for name, process in self.started.items()}
        return f"exit codes: {codes}\n" + "".join(f"--- {name}\n{text}\n" for name, text in shown.items())

    def stop(self) -> None:
        """End what a test that failed has left."""
        self.always.clear()
        for process in self.started.values():
            if process.poll() is None:
                process.terminate()
        for process in self.started.values():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.ports.close()

    def probe(self, document: dict[str, Any], kind: str) -> bool:
        [container] = pod(document)["containers"]
        words = [self.here(word, "run") for word in container[kind]["exec"]["command"]]
        return subprocess.run(words, capture_output=True, check=False).returncode == 0


class Eviction:
    """A run by its manifests, and what is needed to begin it again in another pod."""

    def __init__(self, folder: Path, model: Path) -> None:
        fast = ("trainer.threads=1", "generator.threads=1", "evaluation.every=0", "checkpoint.every=100000")
        config = write_config(folder, model, *fast, "trainer.steps=100000", "name=run")
        documents = by_kind(launch(folder, config, "--generators", 1))
        self.job, self.deployment = documents["Job"], documents["Deployment"]
        assert run_command("keys", folder / "secret", timeout_s=240).returncode == 0
        (folder / "secret" / "client.key_secret").chmod(0o640)  # as a Secret's files are, with a group of the pod's
        self.pods, self.run = Pods(folder, documents), RunFolder(folder / "runs" / "run")

    @property
    def steps(self) -> list[int]:
        return [row["step"] for row in read_rows(self.run.metrics)]

    def train_and_evict(self) -> None:
        """Three steps with every pod of the manifests, then SIGTERM."""
        assert not self.pods.probe(self.job, "startupProbe")
        self.pods.start(self.job, "run")
        names = [f"generator-{i}" for i in range(self.deployment["spec"]["replicas"])]
        for name in names:
            self.pods.start(self.deployment, name)
        self.pods.wait_for(lambda: len(self.steps) >= 3, "three steps", 400)
        assert self.pods.probe(self.job, "livenessProbe")
        assert self.pods.evict("run") == 143, self.pods.account()
        for name in names:
            self.pods.evict(name)
            assert " joins " in self.pods.log(name).read_text(), self.pods.account()
        assert "checkpoint" in {row["event"] for row in read_rows(self.run.events)}

    def go_on(self, until: int) -> None:
        """A second pod, which ends by itself."""
        text = self.run.config.read_text()
        self.run.config.write_text(text.replace("steps: 100000", f"steps: {until}"))
        self.pods.start(self.job, "run")
        self.pods.start(self.deployment, "generator-9")
        self.pods.wait_for(lambda: len(self.steps) >= until, "the last step", 400)
        self.pods.always.clear()
        assert self.pods.ended("run") == 0, self.pods.account()
        self.pods.ended("generator-9")
        assert "the run has ended: it is done" in self.pods.log("generator-9").read_text(), self.pods.account()


@pytest.fixture
def found(tmp_path: Path, tiny_model: Path) -> Iterator[Eviction]:
    made = Eviction(tmp_path, tiny_model)
    yield made
    made.pods.stop()


def test_the_commands_of_the_manifests_train(found: Eviction) -> None:
    found.train_and_evict()
    assert found.steps == list(range(len(found.steps)))
    # a probe of the ports would be one
    assert "peers_turned_away" not in {row["event"] for row in read_rows(found.run.events)}


@pytest.mark.nightly
def test_an_evicted_run_goes_on_in_another_pod(found: Eviction) -> None:
    found.train_and_evict()
    done = len(found.steps)
    found.go_on(done + 3)
    assert found.steps == list(range(done + 3))
    assert [row["version"] for row in read_rows(found.run.events) if row["event"] == "resumed"] == [done]
