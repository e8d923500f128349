"""Every preset has the published number of parameters; nothing is allocated."""

import functools

import jax
import pytest

from configs.models import PRESETS, model_config
from jaxgpt import config, partition, tree
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig

# From the model cards and the sizes of the released weights (tied matrices counted once).
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-1b": 1_235_814_400,
    "llama3-3b": 3_212_749_824,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "mistral-7b": 7_241_732_096,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters(name):
    cfg = config.build(ModelConfig, model_config(name), "model")
    params = jax.eval_shape(functools.partial(decoder.init_params, cfg), jax.random.key(0))
    assert tree.count(partition.unbox(params)) == PUBLISHED[name]


def test_only_the_tiny_presets_have_no_published_count():
    assert set(PRESETS) - set(PUBLISHED) == {"tiny", "tiny-gpt2", "cpu-14m"}


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match=r"'llama3-8'.*'llama3-8b'"):
        model_config("llama3-8")
