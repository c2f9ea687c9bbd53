"""sisa inspect --html: the numbers of the page against a dense softmax, in a browser."""

import json

import pytest
import torch

import sisa_model as sm
from sisa_kernels import reference
from sisa_model.cli import main
from sisa_model.data.tokenizer import Encoder
from sisa_model.evaluation.token_view import view_layers, write_page
from sisa_model.models.health import sequence_scores, visit_layers
from sisa_model.runs.config import TrainConfig
from sisa_model.training.trainer import train
from tests.support.browser import opened

TEXT = 'He said: <b>"no"</b> & left.\n</script><script>throw 1</script> naïve'


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = sm.build("sisa-tiny-ds16", n_kv_heads=2).eval()
    for layer in model.layers:  # heads that differ, and weigh in
        torch.nn.init.normal_(layer.attn.lambda_raw, 1.0, 1.0)
    return model


def test_views_are_the_oracles_attention(model):
    ids = torch.randint(257, (1, 24), generator=torch.Generator().manual_seed(0))
    views = view_layers(model, ids)
    assert [view.layer for view in views] == list(range(len(model.layers)))
    found = []

    def visit(layer, attn, x, context):
        (terms,) = sequence_scores(attn, x, context)
        inputs = attn.operands(x, context)
        y = reference.sisa_attention(**{**inputs._asdict(), "rotary": context.rotary})
        v = inputs.v.repeat_interleave(attn.n_heads // attn.n_kv_heads, 2)
        found.append((terms, y, v, inputs.log_decay))

    visit_layers(model, ids, visit)
    for view, (terms, y, v, log_decay) in zip(views, found):
        weight = (view.content + view.importance).softmax(-1)
        seen = torch.einsum("hij,jhd->ihd", weight, v[0].double())
        torch.testing.assert_close(seen.float(), y[0].float(), rtol=1e-5, atol=1e-6)
        assert torch.equal(view.importance, terms[1][0])
        group = len(view.g) // log_decay.shape[2]
        assert torch.equal(view.g[group], log_decay[0, :, 1].double().cumsum(0))


@pytest.mark.parametrize("width", [1300, 400])
def test_the_page_in_a_browser(model, tmp_path, width):
    encoder = Encoder(None)
    ids = encoder.encode_text(TEXT)
    views = view_layers(model, torch.tensor([ids]))
    path = tmp_path / "inspect.html"
    write_page(path, "about <it>", ids, encoder, views)
    with opened(path, width) as page:
        assert page.locator("#attention span").count() == len(ids)
        shown = page.locator("#attention").inner_text()
        assert 'He said: <b>"no"</b> & left.↵' in shown
        assert page.locator("p.note").first.inner_text() == "about <it>"
        for layer, head, token in ((0, 0, 30), (1, 1, 12), (1, 0, 0)):
            page.select_option("#layer", str(layer))
            page.select_option("#head", str(head))
            page.locator("#change span").nth(token).click()
            check_table(page, views[layer], head, token, encoder, ids)
        page.keyboard.press("ArrowRight")
        assert page.locator("#where").inner_text().startswith("token 1 of")


def check_table(page, view, head, token, encoder, ids):
    """The table of what changes most, against attention with and without the importance term."""
    content = view.content[head, token, : token + 1]
    importance = view.importance[head, token, : token + 1]
    weight = (content + importance).softmax(-1)
    without = content.softmax(-1)
    change = weight - without
    order = change.abs().argsort(descending=True)[:16].tolist()
    rows = page.locator("#rows tr")
    assert rows.count() == len(order)
    for n in range(rows.count()):
        text, back, *numbers = rows.nth(n).locator("td").all_inner_texts()
        j = token - int(back)
        assert json.loads(text) == encoder.decode([ids[j]])
        assert abs(float(change[j])) == pytest.approx(abs(float(change[order[n]])), abs=2e-4)
        decay = (view.g[head, token] - view.g[head, j]).exp()
        wanted = (weight[j], without[j], change[j], importance[j], decay)
        for number, value in zip(numbers, wanted):
            assert float(number) == pytest.approx(float(value), abs=1.1e-3, rel=5e-3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspected")
    (folder / "text.txt").write_text("".join(f"{n} green bottles; " for n in range(400)))
    settings = {"steps": 2, "seq_len": 32, "batch_size": 2, "val_blocks": 2, "sample_tokens": 0}
    data = (folder / "text.txt",)
    train(TrainConfig(out=folder / "run", data=data, device="cpu", **settings))
    return folder / "run"


def test_the_command_writes_the_page_only_when_asked(run, tmp_path):
    (tmp_path / "short.txt").write_text("ten green bottles")
    flags = ["inspect", str(run), "--text", str(tmp_path / "short.txt"), "--device", "cpu"]
    assert main([*flags, "--out", str(tmp_path / "plain")]) == 0
    assert not (tmp_path / "plain" / "inspect.html").exists()
    assert main([*flags, "--out", str(tmp_path / "page"), "--html"]) == 0
    text = (tmp_path / "page" / "inspect.html").read_text()
    assert "short.txt" in text
    assert main(["inspect", str(run), "--html", "--device", "cpu"]) == 0
    assert (run / "inspect" / "inspect.html").is_file()
