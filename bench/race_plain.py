"""Group-relative policy gradient as a straight loop of torch and transformers: generate, score, one AdamW step.

The floor that a trainer has to beat (bench/race.py starts it). Synchronous and on policy, so every ratio is 1 and no
log-prob is computed twice; prompts are left-padded, answers sampled by `generate` with its cache, and the head is
applied to the answers only. Nothing in it is slow on purpose.

    python bench/race_plain.py MODEL ROWS.jsonl OUT.jsonl '{"groups": 8, ...}'
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from race_reward import reward_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


def encoded(tokenizer: Any, prompts: list[Any]) -> Any:
    """Prompts (text or chats) as one left-padded batch."""
    if not isinstance(prompts[0], str):
        prompts = [tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in prompts]
    return tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)


def answered(tokens: Tensor, prompt_length: int, end: int) -> Tensor:
    """True at the answers' tokens, the first end of text included: [rows, answer]."""
    answer = tokens[:, prompt_length:]
    ended = (answer == end).int().cumsum(1) - (answer == end).int()
    return ended == 0


def log_probs(model: Any, tokens: Tensor, mask: Tensor, prompt_length: int, temperature: float) -> Tensor:
    """Log-probs of the answers' tokens, [rows, answer]."""
    length = tokens.shape[1] - prompt_length
    logits = model(input_ids=tokens, attention_mask=mask, logits_to_keep=length + 1, use_cache=False).logits[:, :-1]
    logits = logits / temperature
    chosen = logits.gather(-1, tokens[:, prompt_length:, None]).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def train(model_path: str, rows: list[dict[str, Any]], out: Path, work: dict[str, Any]) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=work["learning_rate"], betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    groups, size, end = work["groups"], work["group_size"], tokenizer.eos_token_id
    for step in range(work["steps"]):
        began = time.perf_counter()
        chosen = [rows[(step * groups + i) % len(rows)] for i in range(groups) for _ in range(size)]
        prompts = encoded(tokenizer, [row["prompt"] for row in chosen])
        model.eval()
        with torch.no_grad():
            tokens = model.generate(
                **prompts, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=work["max_tokens"]
            )
        model.train()
        length = prompts["input_ids"].shape[1]
        mask = answered(tokens, length, end)
        texts = tokenizer.batch_decode(
            [row[keep] for row, keep in zip(tokens[:, length:], mask, strict=True)], skip_special_tokens=True
        )
        rewards = torch.tensor([reward_of(text, row["answer"]) for text, row in zip(texts, chosen, strict=True)])
        grouped = rewards.view(groups, size)
        advantage = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).view(-1, 1)
        seen = torch.cat([prompts["attention_mask"], mask.long()], 1)
        found = log_probs(model, tokens, seen, length, 1.0)
        loss = -(advantage * found * mask).sum() / mask.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds, reward = time.perf_counter() - began, float(rewards.mean())
        row = {"time": time.time(), "seconds": seconds, "tokens": int(mask.sum()), "reward": reward}
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    lines = Path(sys.argv[2]).read_text().splitlines()
    train(sys.argv[1], [json.loads(line) for line in lines], Path(sys.argv[3]), json.loads(sys.argv[4]))
