"""Other recipes on stored batches: the run's own recipe is found again, and others are what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support_run import quick_settings, train

from async_rl.cli.main import main
from async_rl.errors import UserError
from async_rl.instruments.rescore import OWN, cosine, parse_steps, rescore
from async_rl.run_folder import RunFolder, read_rows

STEPS = 6
OTHERS = {
    "vcpo": ["vcpo", "grpo", "tis select.sequence_high=1.0000001", "grpo kl.coefficient=0.1 kl.target=reference"],
    "st_ppo": ["st_ppo", "ppo", "gspo"],
}


@pytest.fixture(scope="module", params=sorted(OTHERS))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> RunFolder:
    settings = quick_settings(
        tiny_model,
        f"recipe={request.param}",
        f"trainer.steps={STEPS}",
        "trainer.micro_batch_tokens=60",
        "staleness.max_staleness=2",
        "checkpoint.every=2",
        "checkpoint.keep=9",
        "critic.warmup_steps=1",
        "optimizer.learning_rate=1e-2",
    )
    return train(settings, tmp_path_factory.mktemp("rescored") / request.param)


def recipes_of(run: RunFolder) -> list[str]:
    return OTHERS[str(run.settings().recipe["name"])]


def test_the_runs_own_recipe_scores_what_the_run_recorded(run: RunFolder) -> None:
    result = rescore(run, recipes_of(run))
    rows = list(read_rows(run.metrics))
    own, same, *_ = result.scores
    assert own.recipe == OWN
    assert [step.step for step in own.steps] == list(range(STEPS))
    for step, row in zip(own.steps, rows, strict=True):
        assert step.ess == row["ess/ratio"]
        assert step.clip_frac == row["clip/frac"]
        if "grad/norm" in row:
            assert step.grad_norm == pytest.approx(row["grad/norm"], rel=1e-5)
            assert step.cosine == pytest.approx(1.0)
        if row.get("lr/effective"):
            assert step.cosine_update is not None
            assert step.cosine_update > 0, "the weights moved downhill"
            assert step.learning_rate_factor == pytest.approx(row["lr/effective"] / row["lr/base"])
    # asked for by name it is another learner on the same model, which must see the same
    for mine, other in zip(own.steps, same.steps, strict=True):
        assert (other.ess, other.grad_norm) == (mine.ess, mine.grad_norm)
        assert other.coefficient_norm == mine.coefficient_norm


def test_rescoring_changes_neither_the_run_nor_its_training(run: RunFolder) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.suffix != ".sqlite-shm"}
    alone = rescore(run, [])
    together = rescore(run, recipes_of(run))
    assert alone.scores[0].steps == together.scores[0].steps
    after = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.suffix != ".sqlite-shm"}
    assert {p: t for p, t in after.items() if p in before and p.is_file()} == {
        p: t for p, t in before.items() if p.is_file()
    }


def test_from_a_checkpoint_or_from_the_start_the_numbers_are_the_same(run: RunFolder) -> None:
    whole, late = rescore(run, []), rescore(run, [], steps="5:6")
    assert "the initial model" in whole.begun
    assert "the checkpoint of version 4, trained again up to version 5" in late.begun
    assert late.scores[0].steps == whole.scores[0].steps[5:]


def test_other_recipes_differ_where_they_should(run: RunFolder) -> None:
    result = rescore(run, recipes_of(run))
    scores = {score.recipe: score for score in result.scores}
    if "vcpo" not in scores:
        assert scores["gspo"].steps != scores["st_ppo"].steps
        return
    strict = scores["tis select.sequence_high=1.0000001"]
    total = sum(strict.trajectories.values())
    rejected = sum(strict.rejected["sequence_ratio"].values())
    assert total == STEPS * 16
    assert 0 < rejected < total
    assert sum(scores[OWN].rejected["sequence_ratio"].values()) == 0
    shares = strict.rejected_share()["sequence_ratio"]
    assert shares == {
        bucket: strict.rejected["sequence_ratio"][bucket] / n for bucket, n in strict.trajectories.items()
    }
    for mine, other in zip(scores["grpo"].steps, scores[OWN].steps, strict=True):
        assert mine.ess == other.ess, "the ESS is a property of the data"
        assert mine.cosine is None or -1 <= mine.cosine < 1


def test_the_command_prints_a_table_and_writes_json(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.json"
    with pytest.raises(SystemExit) as end:
        main(["rescore", str(run.path), "--recipe", "gspo", "--steps", "3:", "--out", str(out)])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "cos update" in said
    assert "weights: the checkpoint of version 2, trained again up to version 3" in said
    stored = json.loads(out.read_text())
    assert stored["steps"] == [3, STEPS]
    assert [step["step"] for step in stored["recipes"]["gspo"]["steps"]] == [3, 4, 5]
    assert stored["recipes"][OWN]["means"]["cosine"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("recipes", "steps", "said"),
    [
        (["grpoo"], ":", "did you mean 'grpo'"),
        (["grpo clip"], ":", "write a recipe's name, and axis=value words"),
        ([""], ":", "write a recipe's name"),
        (["grpo ratio.denominator=proximal"], ":", "makes every ratio 1"),
        (["ppo"], ":", "needs a critic, and the run trained none"),
        ([], "3", "write a:b for the steps"),
        ([], "4:2", "the run has trained steps 0 to 5"),
        ([], ":7", "the run has trained steps 0 to 5"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_words(run: RunFolder, recipes: list[str], steps: str, said: str) -> None:
    if recipes == ["ppo"] and run.settings().recipe["name"] == "st_ppo":
        return  # that run has one
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        rescore(run, recipes, steps=steps)


def test_cosine_by_hand() -> None:
    assert cosine(torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])) == pytest.approx(24 / 25)
    assert cosine(torch.tensor([0.0, 0.0]), torch.tensor([4.0, 3.0])) is None
    assert cosine(torch.tensor([float("nan"), 0.0]), torch.tensor([4.0, 3.0])) is None


def test_steps_are_read_as_a_slice() -> None:
    assert parse_steps(":", 9) == (0, 9)
    assert parse_steps("2:", 9) == (2, 9)
    assert parse_steps(":3", 9) == (0, 3)
    with pytest.raises(UserError, match="no step yet"):
        parse_steps(":", 0)
