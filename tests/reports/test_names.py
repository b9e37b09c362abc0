"""Names that users give stay names, whatever they spell, in tables, plots and cards."""

from __future__ import annotations

import json
import re
import shlex
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from dist_train.export.card import Facts, model_card
from dist_train.reports.plots import acceptance_by_position, accepted_length_histogram, block_efficiency_bars
from dist_train.reports.tables import markdown

NAMES = (
    "$x_{$",
    "a|b",
    "<script>alert(1)</script>",
    "`id`",
    "*b*",
    "[link](http://x)",
    "back\\slash",
    "$(id)",
    "it's;",
)


class Text(HTMLParser):
    """What a page shows of its cells, and the elements that it is made of."""

    def __init__(self):
        super().__init__()
        self.cells, self.elements = [], set()

    def handle_starttag(self, tag, attributes):
        self.elements.add(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data


def test_a_table_shows_each_cell_as_it_is():
    shown = Text()
    shown.feed(
        MarkdownIt("gfm-like", {"linkify": False}).render(markdown(["name", "value"], [[name, "1"] for name in NAMES]))
    )
    assert [cell.strip() for cell in shown.cells] == [
        "name",
        "value",
        *[text for name in NAMES for text in (name, "1")],
    ]
    assert shown.elements == {"table", "thead", "tbody", "tr", "th", "td"}


def test_a_cell_is_one_line():
    assert markdown(["a"], [["two\nlines"]]).count("\n") == 3


@pytest.mark.parametrize("name", NAMES)
def test_plots_show_names(name):
    share = {"value": 1.5, "low": 1.4, "high": 1.6}
    row = {
        "task": name,
        "drafter": name,
        "gamma": 2,
        "temperature": 0.6,
        "drafting": "sampled",
        "block_efficiency": share,
    }
    results = {
        "drafters": {name: {}},
        "rows": [{**row, "accepted_histogram": [3, 2, 1], "accepted_shares": [0.5, 0.2]}],
    }
    plots = [block_efficiency_bars(results, name), acceptance_by_position(results, name, 0.6)]
    for plot in [*plots, accepted_length_histogram(results, name, 0.6)]:
        texts = [element.text for element in ElementTree.fromstring(plot).iter() if element.tag.endswith("}text")]
        assert any(name in (text or "") for text in texts), texts


@pytest.mark.parametrize("name", NAMES)
def test_commands_of_a_card_are_whole_words(name):
    sizes = {"parameters": 10, "dtype": "bf16", "positions": 64, "longest": 64}
    told = {"chats": True, "gamma": None, "provenance": [], "results": None, "assisted": None, "gguf": None}
    card = model_card(Facts(name, f"/models/{name}", **sizes, **told))
    blocks = re.findall(r"```bash\n(.*?)```", card, re.DOTALL)
    target = name.rpartition("/")[2]
    llama_cpp, vllm, sglang = (shlex.split(block) for block in blocks)
    assert llama_cpp[:3] == ["python", "llama.cpp/convert_hf_to_gguf.py", name]
    assert vllm[:3] == ["vllm", "serve", target]
    speculation = {"method": "draft_model", "num_speculative_tokens": 3, "draft_sample_method": "probabilistic"}
    assert json.loads(vllm[-1]) == {"model": name, **speculation}
    assert sglang[sglang.index("--model-path") + 1] == target
    assert sglang[sglang.index("--speculative-draft-model-path") + 1] == name
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert eval(re.search(r"drafter = .*from_pretrained\((.*), dtype", snippet)[1]) == name
    shown = Text()
    shown.feed(MarkdownIt("gfm-like", {"linkify": False}).render(card))
    assert "script" not in shown.elements
