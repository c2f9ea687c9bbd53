"""Fine-tune a tiny Llama, made here at random, on the standard library's text after giving it
SISA's importance term.

    python examples/finetune_llama.py --steps 60

With a Llama of your own, load it with ``from_pretrained`` where this makes one; the rest stays.
Needs the extra ``hf``."""

import argparse
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from sisa_model.adapt import LlamaSisaAttention, replace_attention

LENGTH, BATCH = 256, 4


def text() -> torch.Tensor:
    """The bytes of some of the standard library's modules, [tokens] int64."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"))[:40]
    return torch.tensor(list(b"\n".join(path.read_bytes() for path in files)))


def train(model: LlamaForCausalLM, data: torch.Tensor, steps: int) -> float:
    """``steps`` steps of AdamW on random pieces of ``data``; the mean loss of the last tenth, in
    nats a byte.
    """
    lambdas = [p for name, p in model.named_parameters() if name.endswith("lambda_raw")]
    others = [p for name, p in model.named_parameters() if not name.endswith("lambda_raw")]
    # lambda is nearly exp(lambda_raw) while small: at the others' rate it would need thousands of
    # steps to grow.
    groups = [{"params": others, "lr": 2e-3}, {"params": lambdas, "lr": 0.1, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(data) - LENGTH, (BATCH,)).tolist()
        ids = torch.stack([data[start : start + LENGTH] for start in starts])
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def main(steps: int) -> dict[str, float]:
    """Pretrain, replace, fine-tune; prints and returns the losses and lambda."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config)
    data = text()
    found = {"pretrained": train(model, data, steps)}

    probe = data[None, :LENGTH]
    with torch.no_grad():
        before = F.cross_entropy(model(probe).logits[0, :-1], probe[0, 1:]).item()
        replace_attention(model, d_state=16)
        after = F.cross_entropy(model(probe).logits[0, :-1], probe[0, 1:]).item()
    found |= {"probe before": before, "probe after": after, "fine-tuned": train(model, data, steps)}
    found["lambda"] = max(
        m.lam().max().item() for m in model.modules() if isinstance(m, LlamaSisaAttention)
    )

    plain, tuned = found["pretrained"], found["fine-tuned"]
    print(f"loss after {steps} steps of the plain Llama        {plain:.4f} nats a byte")
    print(f"one text before and after replace_attention  {before:.6f} {after:.6f}")
    print(f"loss after {steps} more steps with SISA            {tuned:.4f}")
    print(f"largest lambda                               {found['lambda']:.5f}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=60, help="optimizer steps before and after the replacement"
    )
    main(parser.parse_args().steps)
