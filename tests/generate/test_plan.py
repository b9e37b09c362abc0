"""What a folder of answers depends on: it goes on tomorrow, whatever date the chat template writes."""

from __future__ import annotations

import json

from generations import generation

from dist_train.config import GenerateConfig, load_config
from dist_train.generate.stage import Generation

DATED = "{{ strftime_now('%d %B %Y %H:%M:%S.%f') }}{% for m in messages %}{{ m.content }}{% endfor %}"


def test_a_date_in_the_template_does_not_end_a_run(tiny, tmp_path):
    for name, template in (("dated", DATED), ("other", f"{DATED}.")):
        (tmp_path / f"{name}.jinja").write_text(template)

    def begun(name):
        words = [word for word in generation(tiny, tmp_path / "out") if "=" in word]
        return Generation(load_config(GenerateConfig, None, [*words, f"chat_template={tmp_path / name}.jinja"]))

    monday, tuesday, other = begun("dated"), begun("dated"), begun("other")
    assert monday.prompts != tuesday.prompts
    assert monday.plan == tuesday.plan
    assert other.plan != monday.plan
    assert json.loads(json.dumps(monday.plan)) == monday.plan
