"""Supervised fine-tuning by TRL: padded, packed and free of padding."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import sisa_model as sm

pytest.importorskip("transformers", minversion="5.24")
pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
from transformers import PreTrainedTokenizerFast  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

from sisa_model.interop.transformers import SisaConfig, SisaForCausalLM  # noqa: E402

FAMILIES = ["sisa-tiny-ds16", "fox-tiny", "mamba2-tiny", "mamba3-tiny", "hybrid-head-tiny"]
ROWS = [[(7 * start + place) % 50 for place in range(5 + 3 * start % 11)] for start in range(8)]
WAYS = {
    "padded": {},
    "packed": {"packing": True, "max_length": 32},
    "wrapped": {"packing": True, "max_length": 16, "packing_strategy": "wrapped"},
    "padding-free": {"padding_free": True, "max_length": None},
    "checkpointed": {"activation_checkpointing": True},
}


def wrapped(preset):
    torch.manual_seed(0)
    model = sm.build(preset, n_layers=2, max_seq_len=64)
    return SisaForCausalLM(SisaConfig(**dataclasses.asdict(model.config)), model)


def tokenizer():
    words = {f"w{i}": i for i in range(254)} | {"<pad>": 254, "<eos>": 255}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>")


def losses(model, folder, steps, **settings):
    """The loss of each step of the trainer, all rows in one batch."""
    arguments = SFTConfig(
        folder,
        max_steps=steps,
        per_device_train_batch_size=len(ROWS),
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        report_to=[],
        **{"activation_checkpointing": False, **settings},
    )
    data = datasets.Dataset.from_list([{"input_ids": row} for row in ROWS])
    trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer())
    trainer.train()
    return [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]


@torch.no_grad()
def loss_alone(model):
    """The mean over all predicted tokens, of each row by itself."""
    sums = []
    for row in ROWS:
        ids = torch.tensor([row])
        logits = model(ids).logits[0, :-1]
        sums.append(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    return float(sum(sums)) / sum(len(row) - 1 for row in ROWS)


@pytest.mark.parametrize("way", ["padded", "packed", "padding-free"])
@pytest.mark.parametrize("preset", ["sisa-tiny-ds16", "mamba2-tiny"])
def test_the_first_loss_is_that_of_the_rows_alone(preset, way, tmp_path):
    expected = loss_alone(wrapped(preset))
    (first,) = losses(wrapped(preset), tmp_path, 1, **WAYS[way])
    assert first == pytest.approx(expected, abs=2e-3)  # the log rounds to three places


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "way"),
    [*((FAMILIES[0], way) for way in WAYS), *((preset, "packed") for preset in FAMILIES[1:])],
)
def test_twenty_steps_of_supervised_fine_tuning_learn(preset, way, tmp_path):
    first, *_, last = losses(wrapped(preset), tmp_path, 20, **WAYS[way])
    assert last < first / 3
