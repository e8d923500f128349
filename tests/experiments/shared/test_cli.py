"""What a command line makes of config files, overrides and errors."""

import os
import subprocess
import sys

import pytest

from experiments.sft import Config
from experiments.shared import cli, errors
from jaxgpt.train.config import PretrainConfig, RunConfig

REFERENCES = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict({"num_train_steps": 100, "seed": 3, "optimizer": {}, "data": {}})
    config.optimizer.warmup_steps = config.get_ref("num_train_steps") // 10
    config.eval_interval_steps = config.get_oneway_ref("num_train_steps")
    config.data.num_workers = config.get_ref("seed")
    return config
"""


@pytest.fixture
def config_file(tmp_path):
    """A function that writes a config file and returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "my_config.py"
        path.write_text(text)
        return str(path)

    return write


def test_references_of_a_config_file_follow_overrides(config_file):
    path = config_file(REFERENCES)
    plain = cli.load_config(path, [], RunConfig)
    assert (plain.num_train_steps, plain.optimizer.warmup_steps, plain.eval_interval_steps) == (100, 10, 100)
    longer = cli.load_config(path, [("num_train_steps", "1000"), ("seed", "2")], RunConfig)
    assert (longer.num_train_steps, longer.optimizer.warmup_steps, longer.eval_interval_steps) == (1000, 100, 1000)
    assert longer.data.num_workers == 2
    # What is computed from another field may be set by itself; the other then stays.
    own = cli.load_config(path, [("optimizer.warmup_steps", "7"), ("eval_interval_steps", "9")], RunConfig)
    assert (own.num_train_steps, own.optimizer.warmup_steps, own.eval_interval_steps) == (100, 7, 9)
    # A two-way reference changes both ends.
    both = cli.load_config(path, [("data.num_workers", "5")], RunConfig)
    assert (both.seed, both.data.num_workers) == (5, 5)


def test_sections_that_share_an_object_follow_overrides(config_file):
    path = config_file(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    config = ConfigDict({'mesh': {'data': 1}})\n"
        "    config.dcn_mesh = config.mesh\n"
        "    return config\n"
    )
    config = cli.load_config(path, [("mesh.data", "2")], RunConfig)
    assert (config.mesh.data, config.dcn_mesh.data) == (2, 2)


@pytest.mark.parametrize(
    ("overrides", "steps", "epochs"),
    [
        ([], 0, 3.0),
        ([("num_train_steps", "6")], 6, 0.0),
        ([("num_train_steps", "6"), ("num_epochs", "0")], 6, 0.0),
        ([("num_epochs", "0"), ("num_train_steps", "6")], 6, 0.0),
        ([("num_epochs", "0")], 1000, 0.0),
        ([("num_epochs", "2")], 0, 2.0),
    ],
)
def test_steps_on_the_command_line_replace_a_presets_epochs(overrides, steps, epochs):
    config = cli.load_config("configs/sft.py", overrides, Config)
    assert (config.num_train_steps, config.num_epochs) == (steps, epochs)


def test_epochs_on_the_command_line_replace_a_presets_steps():
    config = cli.load_config("configs/pretrain.py:tiny", [("num_epochs", "0.5")], PretrainConfig)
    assert (config.num_train_steps, config.num_epochs) == (0, 0.5)
    # 50 rows, batches of 16: half an epoch is 25 rows, the nearest number of whole batches is 2.
    assert config.num_steps(50) == 2


def test_steps_and_epochs_in_one_place_are_a_mistake(config_file):
    both = [("num_train_steps", "6"), ("num_epochs", "2")]
    for overrides in (both, both[::-1]):
        with pytest.raises(ValueError, match=r"num_train_steps.*num_epochs.*one of the two") as error:
            cli.load_config("configs/sft.py", overrides, Config)
        assert "command line" in str(error.value)
    path = config_file("def get_config():\n    return {'num_train_steps': 6, 'num_epochs': 2.0}\n")
    with pytest.raises(ValueError, match=r"my_config\.py.*num_train_steps.*num_epochs"):
        cli.load_config(path, [], Config)


@pytest.mark.parametrize(
    ("text", "preset", "words"),
    [
        ("def get_config():\n    return None\n", "", ["my_config.py", "returns None", "ConfigDict"]),
        ("def get_config():\n    return {}\n", "large", ["my_config.py", "no presets", "large"]),
        ("def get_config():\n    return undefined\n", "", ["my_config.py, line 2", "undefined"]),
        ("import no_such_module\n", "", ["my_config.py, line 1", "no_such_module"]),
        ("import sys\nsys.exit(3)\n", "", ["my_config.py, line 2", "SystemExit"]),
        ("get_config = 3\n", "", ["my_config.py", "get_config"]),
        ("def get_config(:\n", "", ["my_config.py, line 1"]),
        ("from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'a.b': 1})\n", "",
         ["my_config.py, line 3", "dots", "plain dict"]),
        ("from ml_collections import ConfigDict, config_dict\ndef get_config():\n"
         "    return ConfigDict({'seed': config_dict.placeholder(int, required=True)})\n", "", ["seed", "required"]),
        ("from ml_collections import ConfigDict\ndef get_config():\n    config = ConfigDict({'seed': 0})\n"
         "    config.batch_size = 8 // config.get_ref('seed')\n    return config\n", "", ["my_config.py, line 4", "zero"]),
        ("from ml_collections import ConfigDict\ndef get_config():\n    config = ConfigDict({'seed': 1})\n"
         "    config.batch_size = 8 // config.get_ref('seed')\n    config.seed = 0\n    return config\n", "",
         ["batch_size", "zero"]),
        ("def get_config():\n    return {'seed': {1: 2}}\n", "", ["seed", "integer"]),
        ("def get_config():\n    return {1: 2}\n", "", ["1"]),
        ("x = '\x00'\n", "", ["my_config.py", "null"]),
    ],
)  # fmt: skip
def test_a_mistake_in_a_config_file_is_a_sentence_with_its_line(config_file, text, preset, words):
    path = config_file(text)
    with pytest.raises(ValueError, match=".") as error:
        cli.load_config(f"{path}:{preset}" if preset else path, [], RunConfig)
    for word in words:
        assert word in str(error.value), error.value
    assert "\n" not in str(error.value)


def test_the_projects_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.load_config("configs/sft.py:lora", [], Config).lora.rank == 8


@pytest.mark.parametrize(
    ("text", "words"),
    [("def get_config():\n    raise ValueError('there is no corpus here')\n", "there is no corpus here"),
     ("def get_config():\n    return int('x')\n", "line 2: ValueError: invalid literal"),
     ("def get_config():\n    return b'\\xff'.decode()\n", "line 2: UnicodeDecodeError"),
     ("def get_config():\n    d = {}\n    d['data'] = d\n    return d\n", "data.data.data... is nested too deeply"),
     ("def get_config():\n    return " + "-" * 300_000 + "1\n", "my_config.py: MemoryError")],
)  # fmt: skip
def test_what_is_wrong_with_a_config_file_is_the_users_own_mistake(config_file, text, words):
    with pytest.raises(ValueError, match=".") as caught:
        cli.load_config(config_file(text), [], Config)
    assert words in errors.sentence(caught.value)


def test_a_reader_that_has_gone_ends_a_command_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "experiments.make_data", "--print_config"]
    done = subprocess.run(command, cwd=errors.ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
