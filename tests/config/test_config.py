"""Reading configurations: YAML, overrides, types, suggestions."""

from __future__ import annotations

import pytest

from dist_train.config import LOSS_NAMES, DistillConfig, EvaluateConfig, PretrainConfig, load_config, save_config
from dist_train.errors import UserError
from dist_train.losses import NAMES

LEAST = ["run.dir=x", "tokenizer=t", "data.sources=[{path: a}, {path: b, weight: 3}]", "train.steps=1"]


def test_overrides_go_before_the_file_and_later_ones_before_earlier(tmp_path):
    path = tmp_path / "conf.yaml"
    path.write_text(
        "run: {dir: there}\ntokenizer: t\ndata: {sources: [{path: a}]}\ntrain: {steps: 5, micro_batch: 4}\n"
    )
    config = load_config(PretrainConfig, path, ["train.steps=6", "train.steps=7", "run.seed=3"])
    assert (config.train.steps, config.train.micro_batch, config.run.seed) == (7, 4, 3)
    assert str(config.run.dir) == "there"


def test_values_are_yaml_and_numbers_select_list_entries():
    config = load_config(
        PretrainConfig,
        None,
        [*LEAST, "data.sources.0.weight=9", "objective={ce: 0.5, kld: 0.5}", "train.learning_rate=1e-3"],
    )
    assert [source.weight for source in config.data.sources] == [9, 3]
    assert config.objective == {"ce": 0.5, "kld": 0.5}
    assert config.train.learning_rate == 1e-3


def test_a_saved_configuration_reads_back_equal(tmp_path):
    config = load_config(DistillConfig, None, [*LEAST, "target.path=hub/model", "train.epsilon=1e-9"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(DistillConfig, tmp_path / "saved.yaml") == config


def test_a_configuration_is_not_written_through_a_link(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (tmp_path / "config.yaml").symlink_to(precious)
    save_config(config := load_config(PretrainConfig, None, LEAST), tmp_path / "config.yaml")
    assert precious.read_text() == "kept"
    assert load_config(PretrainConfig, tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        (PretrainConfig, [*LEAST, "train.leraning_rate=1"], "train.leraning_rate; did you mean train.learning_rate?"),
        (PretrainConfig, [*LEAST, "trian.steps=1"], "unknown key trian; did you mean train?"),
        (PretrainConfig, [*LEAST, "data.sources.0.wieght=1"], "sources.0.wieght; did you mean data.sources.0.weight?"),
        (PretrainConfig, [*LEAST, "train.xyzzy=1"], "unknown key train.xyzzy; known are steps, global_batch"),
        (PretrainConfig, [*LEAST, "objective={kdl: 1}"], "no loss 'kdl'; did you mean"),
        (PretrainConfig, [*LEAST, "objective={kld: -1}"], "the weight of kld is -1"),
        (PretrainConfig, [*LEAST, "train.steps=0"], "train.steps: Input should be greater than 0"),
        (PretrainConfig, [*LEAST, "train.steps=many"], "train.steps: Input should be a valid integer"),
        (DistillConfig, LEAST, "target is required"),
        (EvaluateConfig, [], "target is required; drafters is required; tasks is required; and 1 more"),
        (PretrainConfig, ["steps"], "'steps': an override is written section.key=value"),
        (PretrainConfig, [*LEAST, "train.steps.x=1"], "lies below something that has no keys"),
        (PretrainConfig, [*LEAST, "train.steps={"], "the value is not YAML"),
    ],
)  # fmt: skip
def test_faults_are_named_in_one_line(kind, words, message):
    with pytest.raises(UserError) as caught:
        load_config(kind, None, words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"), [("a: [", "not YAML"), ("- a\n", "a configuration is a mapping"), ("\xff", "not YAML")]
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, content, message):
    path = tmp_path / "conf.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message) as caught:
        load_config(PretrainConfig, path)
    assert str(path) in str(caught.value)


def test_the_configuration_knows_the_losses_there_are():
    assert LOSS_NAMES == NAMES


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("run: {dir: a}\nrun: {dir: b}\n", "key run is given twice"),
        ("train: {steps: 3, steps: 4}\n", "key steps is given twice"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested more than 50 deep"),
        ("a: " + "{a: " * 100 + "1" + "}" * 100, "nested more than 50 deep"),
        ("a: &a [*a]\n", "nested more than 50 deep"),
        ("a: !!timestamp x\n", "not YAML: a value is not of its tag"),
        ("a: !!int x\n", "not YAML: a value is not of its tag"),
        ("a: !!bool x\n", "not YAML: a value is not of its tag"),
        ("".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 10) if i else 1}]\n" for i in range(9)), "values"),
        ("a: 1\n b: [", "not YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_line(refused, tmp_path, text, told):
    (tmp_path / "x.yaml").write_text(text)
    assert told in refused("pretrain", tmp_path / "x.yaml")


def test_keys_of_a_merged_mapping_may_be_given_anew(tmp_path):
    from dist_train.config.read import read_yaml

    (tmp_path / "x.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")
    assert read_yaml(tmp_path / "x.yaml")["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("12:00:00", "12:00:00"),
        ("1:30", "1:30"),
        ("0123", "0123"),
        ("1_2", "1_2"),
        ("2026-11-26", "2026-11-26"),
        ("2026-13-45", "2026-13-45"),
        ("7", 7),
        ("-7", -7),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
    ],
)
def test_values_are_what_a_shell_shows(written, meant):
    from dist_train.config.yaml_text import parse_yaml

    assert parse_yaml(f"a: {written}")["a"] == meant
