"""TRL's GRPOTrainer on the rows of bench/race.py, which starts this.

Settings as its documentation gives them for a CPU, without what costs time and brings nothing here: no gradient
checkpointing, no KL term (no reference model), no tracker, fused AdamW.

    python bench/race_trl.py MODEL ROWS.jsonl OUT.jsonl '{"groups": 8, ...}'
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from race_reward import reward_of

FOREIGN = Path(__file__).resolve().parents[1] / ".venv" / "foreign"
"""where `make foreign` puts it"""


def main(model: str, rows: Path, out: Path, work: dict[str, Any]) -> None:
    sys.path.insert(0, str(FOREIGN))
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seen: dict[str, Any] = {"tokens": 0, "reward": 0.0}

    def reward(completions: list[Any], answer: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
        found = [reward_of(text, right) for text, right in zip(texts, answer, strict=True)]
        seen["tokens"] = sum(map(len, completion_ids))
        seen["reward"] = sum(found) / len(found)
        return found

    class Clock(TrainerCallback):
        began = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            with out.open("a") as file:
                file.write(json.dumps({"time": time.time(), "seconds": now - self.began, **seen}) + "\n")
            self.began = now

    samples = work["groups"] * work["group_size"]
    config = GRPOConfig(
        output_dir=str(out.parent / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=samples,
        num_generations=work["group_size"],
        max_completion_length=work["max_tokens"],
        max_steps=work["steps"],
        learning_rate=work["learning_rate"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw_torch_fused",
        beta=0.0,
        temperature=1.0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        seed=0,
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([json.loads(line) for line in rows.read_text().splitlines()]),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        callbacks=[Clock()],
    )
    assert trainer.model.dtype == torch.float32
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]))
