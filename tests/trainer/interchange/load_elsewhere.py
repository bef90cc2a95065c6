"""Run alone, in a process that cannot import this product: load exported directories as a user would. Writes found.json.

``python load_elsewhere.py DIR...``; the tokens of ``DIR.ids`` become the logits of ``DIR.logits``.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

for room in ("longstride", "models", "trainer", "parallel", "optim", "memory_mgmt"):
    sys.modules[room] = None  # importing it raises ImportError

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def look(folder: Path) -> dict:
    found = {}
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    found["tokens"] = AutoTokenizer.from_pretrained(folder)("é")["input_ids"]
    ids = torch.load(folder.parent / f"{folder.name}.ids", weights_only=True)
    with torch.no_grad():
        logits = model(ids).logits
        padded = torch.cat([torch.zeros(len(ids), 5, dtype=torch.long), ids], 1)
        mask = torch.cat([torch.zeros(len(ids), 5, dtype=torch.long), torch.ones_like(ids)], 1)
        found["left padding"] = float((model(padded, attention_mask=mask).logits[:, 5:] - logits).abs().max())
        found["right padding"] = float(
            (model(padded.flip(1), attention_mask=mask.flip(1)).logits[:, : ids.shape[1]] - model(ids.flip(1)).logits).abs().max()
        )
        found["batch"] = float((model(ids[:1]).logits - logits[:1]).abs().max())
        new = model.generate(ids[:, :7], attention_mask=torch.ones_like(ids[:, :7]), max_new_tokens=3, do_sample=False, pad_token_id=0)
        step = ids[:, :7]
        for _ in range(3):
            step = torch.cat([step, model(step).logits[:, -1:].argmax(-1)], 1)
        found["generated"] = bool(torch.equal(new[:, : step.shape[1]], step))
    found["loss"] = float(model(ids, labels=ids).loss.detach())
    model(ids, labels=ids).loss.backward()
    found["gradients"] = all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    found["bf16"] = [str(half.dtype), bool(torch.isfinite(half(ids).logits).all())]
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        again = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)
        found["saved again"] = all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    torch.save(logits, folder.parent / f"{folder.name}.logits")
    return found


if __name__ == "__main__":
    Path("found.json").write_text(json.dumps([look(Path(folder)) for folder in sys.argv[1:]]))
