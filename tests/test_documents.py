"""What the documents show runs, and what they name exists."""

import gc
import re
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2Model

import fullrank
from fullrank import Architecture
from fullrank.architecture.shorthands import SHORTHANDS, field_names
from fullrank.metrics import VOCABULARY
from fullrank.remedies import CATALOGUE

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def names():
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=64)).eval()
    batch = {"input_ids": torch.randint(50, (3, 24), generator=torch.Generator().manual_seed(1))}
    other = fullrank.examine(model, {"input_ids": batch["input_ids"].flip(1)}, spectrum=False)
    return {"model": model, "batch": batch, "other": other}


LONG = ("repairing.md", "real-batches.md", "networks-over-samples.md")


@pytest.mark.parametrize(
    "page",
    [pytest.param(one, id=one.name, marks=[pytest.mark.slow] if one.name in LONG else []) for one in PAGES],
)
def test_every_python_example_runs(page, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks, "a page without an example"
    space = dict(names)
    for block in blocks:
        exec(compile(block, page.name, "exec"), space)
    space.clear()
    gc.collect()  # models that examples leave repaired give tables of the process back now, and not in another test


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name
)
def test_every_relative_link_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


NO_METRICS = {
    *("fullrank", "exact", "n", "layer", "part", "scope", "site"),  # the package, and columns of the table
    *("out", "mid", "read", "self"),  # parts
    *("q", "k", "v", "o", "up", "gate", "down", "embed", "unembed"),  # roles
    *("all", "late", "samples"),  # scopes
    *("attention_mask", "position_ids", "variant", "labels", "loss"),  # arguments of models, and a column
    *("note", "warn", "fail", "sinks", "numerics", "heads", "float8_e4m3"),  # severities, verdicts, a column, a dtype
    *("predict", "examine", *field_names(Architecture), *SHORTHANDS),  # verbs, and what an architecture is described by
    *("repair", "screen", "none", *CATALOGUE),  # verbs, what a parameter may be, and names of remedies
    *("cu_seq_lens_q", "cu_seq_lens_k", "save_pretrained", "peft"),  # what other libraries call theirs
    *("permuted_null", "svdvals", "fully_shard"),  # functions, of fullrank.metrics, torch.linalg and torch.distributed
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_metric_that_a_page_names_is_in_the_vocabulary(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    named = set(re.findall(r"`([a-z][a-z0-9_]*)`", text))
    assert named - NO_METRICS <= set(VOCABULARY)
    assert named & set(VOCABULARY), "a page that names no metric"


def test_no_word_that_is_let_through_is_a_metric():
    assert not NO_METRICS & set(VOCABULARY)


def test_the_architecture_page_names_every_room():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rooms = {
        path.name for path in (ROOT / "src" / "fullrank").iterdir() if path.is_dir() and path.name != "__pycache__"
    }
    for room in rooms:
        assert f"`{room}/`" in text, room
