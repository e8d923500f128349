"""What a user may write in a config, and the sentence for each mistake."""

import dataclasses

import pytest

from jaxgpt import config
from jaxgpt.data.config import DataConfig, SourceConfig
from jaxgpt.models.config import ModelConfig
from jaxgpt.train.config import PretrainConfig


@dataclasses.dataclass(frozen=True)
class Outer:
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    steps: int = 3
    sources: dict[str, SourceConfig] = dataclasses.field(default_factory=dict)


def built(*overrides: str) -> Outer:
    values: dict = {}
    for item in overrides:
        field, text = item.split("=", 1)
        config.override(values, Outer, field, text)
    return config.build(Outer, values)


def test_overrides_are_read_as_the_type_of_the_field():
    made = built(
        "steps=7", "model.rope.theta=500000", "model.num_kv_heads=2", "model.sliding_window=none",
        "model.scan_layers=true", "model.window_pattern=local,global", "data.train=a/*.txt",
        "data.fields={'text': 'content'}",
    )  # fmt: skip
    assert made.steps == 7
    assert made.model.rope.theta == 500000.0
    assert isinstance(made.model.rope.theta, float)
    assert made.model.num_kv_heads == 2
    assert made.model.sliding_window is None
    assert made.model.scan_layers is True
    assert made.model.window_pattern == ("local", "global")
    assert made.data.train == "a/*.txt"
    assert made.data.fields == {"text": "content"}


def test_a_source_is_a_path_a_list_or_a_mixture():
    assert built("data.train=['a', 'b']").data.train == ("a", "b")
    mixture = built("data.train={'web': {'path': 'w', 'weight': 3}, 'code': {'path': ['c', 'd']}}").data.train
    assert built("sources.web.weight=2").sources == {"web": SourceConfig((), 2.0)}
    assert mixture == {"web": SourceConfig("w", 3.0), "code": SourceConfig(("c", "d"), 1.0)}
    assert built("data.train={'web': {'path': 'x'}}", "data.train.web.weight=2").data.train["web"].path == "x"
    assert built("data.train.web.path=x", "data.train.web.weight=2").data.train == {"web": SourceConfig("x", 2.0)}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.num_head=2", ["model.num_head", "model.num_heads"]),
        ("modle.num_heads=2", ["modle", "model"]),
        ("model.rope.thet=2", ["model.rope.thet", "model.rope.theta"]),
        ("steps.more=2", ["steps", "more"]),
        ("steps=2.5", ["steps", "an integer", "2.5"]),
        ("steps=many", ["steps", "an integer", "many"]),
        ("model.dropout=x", ["model.dropout", "a number"]),
        ("model.tie_embeddings=1", ["model.tie_embeddings", "True or False"]),
        ("model.norm=rmsnrm", ["model.norm", "'rmsnorm'"]),
        ("model.window_pattern=local,globl", ["model.window_pattern[1]", "'global'"]),
        ("data.train=3", None),
        ("data.train={'web': {'path': 'w', 'weigth': 3}}", ["data.train.web.weigth", "data.train.web.weight"]),
        ("data.train={'web': 3}", ["data.train.web", "section"]),
        ("model.num_heads=3", ["model.embed_dim=128", "model.num_heads=3", "is 2"]),
        ("model.num_kv_heads=3", ["model.num_kv_heads=3", "model.num_heads=4"]),
        ("model.dropout=1.5", ["model.dropout", "1.5"]),
        ("data.sequence_length=1", ["data.sequence_length"]),
    ],
)
def test_a_mistake_names_the_field_and_the_nearest_choice(override, words):
    if words is None:
        assert built(override).data.train == "3"
        return
    with pytest.raises(ValueError, match=".") as error:
        built(override)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_to_dict_is_plain_data_that_builds_the_same_config():
    made = built("data.train={'web': {'path': 'w'}}", "model.window_pattern=local,global", "model.sliding_window=8")
    assert config.build(Outer, config.to_dict(made)) == made


@pytest.mark.parametrize(("field", "text"), [("model.num_layers", "-" * 300_000 + "1"), ("train", "(" + "-" * 300_000)])
def test_a_text_that_python_cannot_read_for_its_depth_names_the_field(field, text):
    cls = DataConfig if field == "train" else PretrainConfig
    with pytest.raises(ValueError, match=rf"^{field}='.*\.\.\. is nested too deeply to be read\.$"):
        config.override({}, cls, field, text)
